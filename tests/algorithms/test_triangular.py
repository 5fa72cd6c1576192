"""Triangular matrices by blocks, against numpy's own functions."""

from __future__ import annotations

import numpy as np
import pytest

from tetris_onnx.algorithms.triangular import inverse_of_lower, mirror_upper


@pytest.mark.parametrize("n", [1, 64, 65, 300])
def test_the_inverse_of_a_lower_triangle(n: int) -> None:
    lower = np.tril(np.random.default_rng(n).uniform(-1, 1, (n, n))) / n + np.eye(n)
    inverse = inverse_of_lower(lower)
    # Well conditioned: the sums of n products are off by some n roundings.
    np.testing.assert_allclose(inverse @ lower, np.eye(n), atol=n * 1e-15)
    assert not np.triu(inverse, 1).any()


def test_a_stack_of_triangles_is_inverted_one_by_one() -> None:
    stack = np.tril(np.random.default_rng(0).uniform(-1, 1, (2, 3, 90, 90))) / 90 + np.eye(90)
    inverse = inverse_of_lower(stack)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(inverse[index], inverse_of_lower(stack[index]))


@pytest.mark.parametrize("n", [1, 256, 257, 700])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_above_the_diagonal_is_mirrored(n: int, order: str) -> None:
    matrix = np.asarray(np.random.default_rng(n).standard_normal((n, n)), order=order)  # type: ignore[call-overload]
    upper = np.triu(matrix)
    mirror_upper(matrix)
    np.testing.assert_array_equal(matrix, upper + np.triu(upper, 1).T)
