"""The stored form of a block-sparse weight: its kept blocks and where they belong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.algorithms.blocks import block_grid


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [M, C, *K] of which only some blocks are stored, all else being zero.

    Raises ValueError when the parts disagree.
    """

    blocks: NDArray  # [B, bo, bi, *K], the parts beyond the weight's edge zero
    block_index: NDArray[np.int64]  # [B, 2] (block row, block column), sorted row-major, no duplicates
    weight_shape: tuple[int, ...]  # (M, C, *K)
    block_size: tuple[int, int]  # (bo, bi)

    def __post_init__(self) -> None:
        rows, columns = block_grid(self.weight_shape[:2], self.block_size)
        index = self.block_index
        if index.ndim != 2 or index.shape[1] != 2 or index.dtype != np.int64:
            raise ValueError(f"block_index must be int64 [blocks, 2], not {index.dtype} {list(index.shape)}")
        if self.blocks.shape != (len(index), *self.block_size, *self.weight_shape[2:]):
            raise ValueError(
                f"blocks of shape {self.blocks.shape} do not fit {len(index)} blocks of {self.block_size} "
                f"of a weight {self.weight_shape}"
            )
        if len(index) and (index.min() < 0 or index[:, 0].max() >= rows or index[:, 1].max() >= columns):
            raise ValueError(f"block_index points outside the grid of {rows} x {columns} blocks")
        if (np.diff(index[:, 0] * columns + index[:, 1]) <= 0).any():
            raise ValueError("block_index must be sorted row-major and without duplicates")

    @property
    def density(self) -> float:
        """Stored blocks / all blocks."""
        rows, columns = block_grid(self.weight_shape[:2], self.block_size)
        return len(self.block_index) / (rows * columns)


def pack(weight: NDArray, keep: NDArray[np.bool_], block_size: tuple[int, int]) -> PackedWeight:
    """Take the kept blocks out of ``weight`` [M, C, *K]; ``keep`` is [ceil(M / bo), ceil(C / bi)]; the dtype is kept.

    Raises ValueError when ``keep`` does not fit the weight and the block size.
    """
    bo, bi = block_size
    grid = block_grid(weight.shape[:2], block_size)
    if keep.shape != grid:
        raise ValueError(f"a keep mask of {keep.shape} does not fit a weight {weight.shape}: its blocks make {grid}")
    index = np.argwhere(keep).astype(np.int64)
    blocks = np.zeros((len(index), bo, bi, *weight.shape[2:]), weight.dtype)
    for block, (i, j) in zip(blocks, index, strict=True):
        part = weight[i * bo : (i + 1) * bo, j * bi : (j + 1) * bi]
        block[: part.shape[0], : part.shape[1]] = part
    return PackedWeight(blocks, index, tuple(weight.shape), (bo, bi))


def unpack(packed: PackedWeight) -> NDArray:
    """The dense weight [M, C, *K] with zeros where no block is stored."""
    bo, bi = packed.block_size
    weight = np.zeros(packed.weight_shape, packed.blocks.dtype)
    for block, (i, j) in zip(packed.blocks, packed.block_index, strict=True):
        part = weight[i * bo : (i + 1) * bo, j * bi : (j + 1) * bi]
        part[...] = block[: part.shape[0], : part.shape[1]]
    return weight
