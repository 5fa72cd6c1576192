from __future__ import annotations

import numpy as np
import pytest

from tetris_onnx.algorithms.importance import importance

WEIGHT = np.array([[[1.0, -2.0], [0.0, 3.0]], [[-1.0, -1.0], [4.0, 0.5]], [[0.0, 0.0], [2.0, -2.0]]])  # [3, 2, taps 2]


def test_l1_and_l2_by_hand() -> None:
    assert importance(WEIGHT).tolist() == [[3.0, 3.0], [2.0, 4.5], [0.0, 4.0]]
    assert importance(WEIGHT, "l2").tolist() == [[5.0, 9.0], [2.0, 16.25], [0.0, 8.0]]


@pytest.mark.parametrize("taps", [(), (2,), (3, 3), (2, 1, 3)])
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_any_number_of_kernel_dimensions(taps: tuple[int, ...], kind: str) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 4, *taps))
    expected = (np.abs(weight) if kind == "l1" else weight**2).reshape(5, 4, -1).sum(2)
    # a few float64 additions in another order
    np.testing.assert_allclose(importance(weight, kind), expected, rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "expected"), [("f8", "f8"), ("f4", "f4"), ("f2", "f4")])
def test_dtype(given: str, expected: str) -> None:
    assert importance(WEIGHT.astype(given)).dtype == np.dtype(expected)


def test_float16_is_widened_before_it_is_squared() -> None:
    assert importance(np.full((1, 1, 2), 300.0, np.float16), "l2").tolist() == [[180000.0]]


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_cannot_be_ranked(kind: str, value: float) -> None:
    weight = WEIGHT.copy()
    weight[1, 1, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        importance(weight, kind)  # type: ignore[arg-type]


def test_refuses_other_input() -> None:
    with pytest.raises(ValueError, match="at least two axes"):
        importance(np.ones(3))
    with pytest.raises(ValueError, match="use 'l1' or 'l2'"):
        importance(WEIGHT, "l3")  # type: ignore[arg-type]
