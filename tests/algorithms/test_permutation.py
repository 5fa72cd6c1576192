from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetris_onnx.algorithms.permutation import compose, expand, identity, inverse, is_identity, is_permutation

permutations = st.integers(0, 20).flatmap(lambda n: st.permutations(range(n))).map(lambda p: np.array(p, np.int64))


def test_identity_changes_nothing() -> None:
    assert identity(3).tolist() == [0, 1, 2]
    assert identity(3).dtype == np.int64


def test_inverse_by_hand() -> None:
    assert inverse(np.array([2, 0, 1])).tolist() == [1, 2, 0]


def test_compose_by_hand() -> None:
    x = np.array(["a", "b", "c"])
    first, second = np.array([1, 2, 0]), np.array([0, 2, 1])
    assert x[first].tolist() == ["b", "c", "a"]
    assert x[first][second].tolist() == ["b", "a", "c"]
    assert compose(first, second).tolist() == [1, 0, 2]


def test_compose_refuses_different_lengths() -> None:
    with pytest.raises(ValueError, match="3 and 2 elements"):
        compose(identity(3), identity(2))


@settings(deadline=None)
@given(permutations, st.randoms(use_true_random=False))
def test_inverse_and_compose_agree(first: np.ndarray, random: object) -> None:
    second = np.random.default_rng(random.getrandbits(32)).permutation(first.size)  # type: ignore[attr-defined]
    x = np.arange(first.size) * 10
    assert np.array_equal(x[first][inverse(first)], x)
    assert np.array_equal(x[first][second], x[compose(first, second)])
    assert is_permutation(inverse(first))
    assert is_identity(compose(first, inverse(first)))


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ([0], True),
        ([], True),
        ([1, 0, 2], True),
        ([0, 0, 2], False),
        ([1, 2, 3], False),
        ([-1, 0], False),
        ([0, 10**12], False),
        ([0.0, 1.0], False),
        ([[0, 1]], False),
        (3, False),
    ],
)
def test_is_permutation(a: object, expected: bool) -> None:
    assert is_permutation(a) is expected  # type: ignore[arg-type]


def test_is_identity() -> None:
    assert is_identity([0, 1, 2])
    assert is_identity(identity(0))
    assert not is_identity([0, 2, 1])
    assert not is_identity([[0, 1]])


def test_expand_by_hand() -> None:
    # [outer 2, n 2, inner 3] with the middle axis reversed
    assert expand(np.array([1, 0]), 2, 3).tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]


@settings(deadline=None)
@given(permutations, st.integers(1, 4), st.integers(1, 4))
def test_expand_is_the_gather_of_the_middle_axis(perm: np.ndarray, outer: int, inner: int) -> None:
    x = np.arange(outer * perm.size * inner) * 7
    expected = x.reshape(outer, perm.size, inner)[:, perm].ravel()
    assert np.array_equal(x[expand(perm, outer, inner)], expected)
