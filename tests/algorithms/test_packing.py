from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetris_onnx.algorithms.blocks import block_grid, expand_keep
from tetris_onnx.algorithms.packing import PackedWeight, pack, unpack


def test_pack_by_hand() -> None:
    weight = np.arange(1.0, 10.0).reshape(3, 3)
    packed = pack(weight, np.array([[False, True], [True, True]]), (2, 2))
    assert packed.block_index.tolist() == [[0, 1], [1, 0], [1, 1]]
    assert packed.block_index.dtype == np.int64
    # the parts beyond the edge are zero
    assert packed.blocks.tolist() == [[[3, 0], [6, 0]], [[7, 8], [0, 0]], [[9, 0], [0, 0]]]
    assert (packed.weight_shape, packed.block_size, packed.density) == ((3, 3), (2, 2), 0.75)
    assert unpack(packed).tolist() == [[0, 0, 3], [0, 0, 6], [7, 8, 9]]


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_unpack_gives_the_masked_weight(
    m: int, c: int, taps: list[int], bo: int, bi: int, density: float, dtype: type
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((m, c, *taps)).astype(dtype)
    keep = rng.random(block_grid((m, c), (bo, bi))) < density
    packed = pack(weight, keep, (bo, bi))
    mask = expand_keep(keep, (bo, bi), (m, c)).reshape(m, c, *(1 for _ in taps))
    assert packed.blocks.shape == (keep.sum(), bo, bi, *taps)
    assert packed.blocks.dtype == dtype
    assert np.array_equal(packed.block_index, np.argwhere(keep))
    assert unpack(packed).dtype == dtype
    assert np.array_equal(unpack(packed), np.where(mask, weight, 0))


def test_pack_copies() -> None:
    weight = np.ones((4, 4), np.float32)
    packed = pack(weight, np.ones((2, 2), bool), (2, 2))
    weight[:] = 5
    assert (packed.blocks == 1).all()


def test_is_frozen() -> None:
    packed = pack(np.ones((2, 2)), np.ones((1, 1), bool), (2, 2))
    with pytest.raises(FrozenInstanceError):
        packed.block_size = (1, 1)  # type: ignore[misc]


def test_refuses_a_mask_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"does not fit a weight \(4, 4\)"):
        pack(np.ones((4, 4)), np.ones((2, 3), bool), (2, 2))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([[0, 1], [0, 0]], "sorted"),
        ([[0, 1], [0, 1]], "sorted"),
        ([[0, 0], [2, 0]], "outside"),
        ([[0, -1], [0, 0]], "outside"),
        ([[0, 0]], "do not fit"),
        ([0, 1], r"int64 \[blocks, 2\]"),
    ],
)
def test_refuses_a_malformed_index(index: list, message: str) -> None:
    packed = pack(np.ones((4, 4)), np.array([[True, True], [False, False]]), (2, 2))
    with pytest.raises(ValueError, match=message):
        replace(packed, block_index=np.array(index, np.int64))


def test_refuses_another_integer_type() -> None:
    with pytest.raises(ValueError, match="int64"):
        PackedWeight(np.ones((1, 2, 2)), np.zeros((1, 2), np.int32), (4, 4), (2, 2))  # type: ignore[arg-type]
