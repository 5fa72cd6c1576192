from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetris_onnx.algorithms.blocks import (
    block_grid,
    block_sums,
    expand_keep,
    fit_block_size,
    group_capacities,
    keep_count,
    keep_mask,
)


@pytest.mark.parametrize(
    ("shape", "asked", "fitted"),
    [
        ((64, 64), (32, 32), (32, 32)),
        ((33, 64), (32, 32), (32, 32)),  # two blocks, the second one row high
        ((32, 64), (32, 32), (16, 32)),
        ((64, 3), (32, 32), (32, 2)),
        ((10, 10), (64, 64), (5, 5)),
        ((11, 5), (11, 5), (6, 3)),
        ((1, 2), (32, 32), (1, 1)),
        ((64, 64), (32, 1), (32, 1)),
        ((8, 8, 8), (4, 8, 16), (4, 4, 4)),
    ],
)
def test_every_axis_gets_two_blocks(shape: tuple[int, ...], asked: tuple[int, ...], fitted: tuple[int, ...]) -> None:
    assert fit_block_size(shape, asked) == fitted


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_fitted_block_size_is_never_larger_than_asked(n: int, size: int) -> None:
    (fitted,) = fit_block_size((n,), (size,))
    assert 1 <= fitted <= size
    assert block_grid((n,), (fitted,))[0] >= min(n, 2)
    if block_grid((n,), (size,))[0] >= 2:
        assert fitted == size


def test_grid_and_capacities_count_the_cut_off_block() -> None:
    assert block_grid((7, 8), (3, 4)) == (3, 2)
    assert group_capacities(7, 3).tolist() == [3, 3, 1]
    assert group_capacities(8, 4).tolist() == [4, 4]
    assert group_capacities(2, 5).tolist() == [2]


def test_block_sums_by_hand() -> None:
    x = np.arange(12.0).reshape(3, 4)
    assert block_sums(x, (2, 3)).tolist() == [[0 + 1 + 2 + 4 + 5 + 6, 3 + 7], [8 + 9 + 10, 11]]
    assert block_sums(x, (1, 1)).tolist() == x.tolist()
    assert block_sums(x, (5, 5)).tolist() == [[66]]


def test_block_sums_add_up_in_float64() -> None:
    # 2**24 + 1 has no float32
    x = np.array([[2.0**24, 1.0, 1.0, 1.0]], np.float32)
    sums = block_sums(x, (1, 4))
    assert sums.dtype == np.float64
    assert sums.item() == 2**24 + 3
    assert block_sums(x.T, (4, 1)).item() == 2**24 + 3


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.integers(0, 99))
def test_block_sums_and_expand_keep_agree(axes: list[tuple[int, int]], seed: int) -> None:
    shape, size = zip(*axes, strict=True)
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 100, shape).astype(float)
    keep = rng.random(block_grid(shape, size)) < 0.5
    sums = block_sums(x, size)
    assert sums.shape == keep.shape
    assert sums[keep].sum() == x[expand_keep(keep, size, shape)].sum()  # whole numbers: exact
    assert sums.sum() == x.sum()


@pytest.mark.parametrize(
    ("blocks", "sparsity", "kept"),
    [
        (4, 0.0, 4),
        (4, 0.5, 2),
        (4, 1.0, 0),
        (4, 0.99, 1),  # at least one below sparsity 1
        (10, 0.9, 1),
        (5, 0.9, 1),  # half up
        (5, 0.7, 2),  # 1.5 -> 2
        (15, 0.9, 2),  # 1.5 again, but in floats (1 - 0.9) * 15 < 1.5
        (256, 0.78, 56),
        (100352, 0.96, 4014),
    ],
)
def test_keep_count(blocks: int, sparsity: float, kept: int) -> None:
    assert keep_count(blocks, sparsity) == kept


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_sparsity_outside_0_to_1(sparsity: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        keep_count(4, sparsity)


def test_keep_mask_by_hand() -> None:
    x = np.array([[1.0, 1.0, 9.0], [1.0, 1.0, 0.0], [5.0, 0.0, 2.0]])
    # blocks of 2 x 2: sums 4, 9 / 5, 2
    assert keep_mask(x, (2, 2), 0.5).tolist() == [[False, True], [True, False]]
    assert keep_mask(x, (2, 2), 0.75).tolist() == [[False, True], [False, False]]


def test_equal_blocks_are_kept_by_their_index() -> None:
    assert keep_mask(np.ones((4, 6)), (2, 2), 0.5).tolist() == [[True, True, True], [False, False, False]]
    x = np.random.default_rng(0).integers(0, 4, (1, 1000)).astype(float)
    expected = sorted(range(1000), key=lambda i: (-x[0, i], i))[:400]
    assert np.flatnonzero(keep_mask(x, (1, 1), 0.6)).tolist() == sorted(expected)
    assert keep_mask(np.zeros((2, 4)), (1, 2), 0.25).tolist() == [[True, True], [True, False]]


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.integers(0, 9))
def test_keep_mask_holds_the_largest_blocks(m: int, c: int, bo: int, bi: int, sparsity: float, seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 5, (m, c)).astype(float)
    keep, sums = keep_mask(x, (bo, bi), sparsity), block_sums(x, (bo, bi))
    assert keep.sum() == keep_count(keep.size, sparsity)
    if keep.any() and not keep.all():
        assert sums[keep].min() >= sums[~keep].max()


def test_expand_keep_by_hand() -> None:
    mask = expand_keep(np.array([[True, False], [False, True]]), (2, 2), (3, 3))
    assert mask.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit shape"):
        expand_keep(np.ones((2, 2), bool), (2, 2), (5, 4))
    with pytest.raises(ValueError, match="does not fit shape"):
        block_sums(np.ones((2, 2)), (2,))
    with pytest.raises(ValueError, match="does not fit shape"):
        fit_block_size((4, 4), (0, 2))
    with pytest.raises(ValueError, match="no elements"):
        block_sums(np.ones((0, 2)), (1, 1))
