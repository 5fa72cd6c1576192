"""Blocks of a weight matrix: their sizes, their importance and which of them to keep.

A matrix of ``shape`` = (M, C) is cut into ``ceil(M / bo) x ceil(C / bi)`` blocks of ``block_size`` = (bo, bi); those
at the bottom and right edge are cut off where the size does not divide the shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.algorithms.permutation import inverse


def fit_block_size(shape: Sequence[int], block_size: Sequence[int]) -> tuple[int, ...]:
    """The block size that a layer of ``shape`` really gets: halved (rounding up) per axis until there are two blocks.

    The paper's rule (TETRIS, section 5): with a single block along an axis there is nothing to choose. An axis of
    length 1 gets blocks of length 1. Raises ValueError for sizes below 1.
    """
    _check(shape, block_size)
    fitted = []
    for n, size in zip(shape, block_size, strict=True):
        size = min(size, n)
        while size > 1 and size >= n:
            size = (size + 1) // 2
        fitted.append(size)
    return tuple(fitted)


def block_grid(shape: Sequence[int], block_size: Sequence[int]) -> tuple[int, ...]:
    """Number of blocks along each axis, counting those cut off at the edge."""
    _check(shape, block_size)
    return tuple(-(-n // b) for n, b in zip(shape, block_size, strict=True))


def group_capacities(n: int, size: int) -> NDArray[np.int64]:
    """Length of each block along an axis of ``n`` positions: ``size``, and what is left over at the edge."""
    return np.minimum(size, n - np.arange(0, n, size, dtype=np.int64))


def block_sums(importance: NDArray, block_size: Sequence[int]) -> NDArray[np.float64]:
    """Importance of every block of an array of any order: [M, C] -> [R, Cb], summed in float64."""
    _check(importance.shape, block_size)
    # The last axis first: it reads the array once, in order, and leaves little for the other axes.
    sums = importance
    for axis in reversed(range(importance.ndim)):
        size = block_size[axis]
        if size > 1:
            sums = np.add.reduceat(sums, np.arange(0, sums.shape[axis], size), axis=axis, dtype=np.float64)
    return sums.astype(np.float64, copy=False)


def keep_count(blocks: int, sparsity: float) -> int:
    """How many of ``blocks`` survive: ``(1 - sparsity) * blocks`` rounded half up, at least one below sparsity 1.

    A layer that keeps nothing puts out a constant: that must be asked for, not come about by rounding. Raises
    ValueError for a sparsity outside [0, 1].
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must be between 0 and 1, not {sparsity}")
    if sparsity == 1.0 or blocks == 0:
        return 0
    # 1e-9: (1 - 0.7) * 5 and the like come out just below or above the half that they are.
    return max(1, int(np.floor((1.0 - sparsity) * blocks + 0.5 + 1e-9)))


def keep_largest(sums: NDArray, count: int) -> NDArray[np.bool_]:
    """Mask, shaped like ``sums``, of its ``count`` largest values; of equal ones the first in row-major order."""
    keep = np.zeros(sums.size, np.bool_)
    keep[np.argsort(-sums, axis=None, kind="stable")[:count]] = True
    return keep.reshape(sums.shape)


def keep_mask(importance: NDArray, block_size: Sequence[int], sparsity: float) -> NDArray[np.bool_]:
    """The blocks to keep: the most important ones, [R, Cb], `keep_count` of them, equal ones by their index."""
    sums = block_sums(importance, block_size)
    return keep_largest(sums, keep_count(sums.size, sparsity))


def expand_keep(keep: NDArray[np.bool_], block_size: Sequence[int], shape: Sequence[int]) -> NDArray[np.bool_]:
    """The mask of single positions, of ``shape``, for a mask of blocks. Raises ValueError when they do not fit."""
    if keep.shape != block_grid(shape, block_size):
        raise ValueError(
            f"a keep mask of {keep.shape} does not fit shape {tuple(shape)} in blocks of {tuple(block_size)}: "
            f"that takes {block_grid(shape, block_size)}"
        )
    mask = keep
    for axis, (n, size) in enumerate(zip(shape, block_size, strict=True)):
        mask = np.repeat(mask, group_capacities(n, size), axis=axis)
    return mask


def original_mask(
    keep: NDArray[np.bool_], block_size: Sequence[int], out_perm: NDArray[np.int64], in_perm: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which elements [out, in] survive in the order from before the reordering by ``out_perm`` and ``in_perm``."""
    reordered = expand_keep(keep, block_size, (out_perm.size, in_perm.size))
    return reordered[inverse(out_perm)][:, inverse(in_perm)]


def _check(shape: Sequence[int], block_size: Sequence[int]) -> None:
    if len(shape) != len(block_size) or min(block_size, default=1) < 1:
        raise ValueError(f"block size {tuple(block_size)} does not fit shape {tuple(shape)}: one number >= 1 per axis")
    if min(shape, default=1) < 1:
        raise ValueError(f"an array of shape {tuple(shape)} has no elements and so no blocks")
