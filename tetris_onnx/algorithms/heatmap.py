"""Weights as pictures: a matrix of channels by channels, as large as it is worth looking at (Figure 3 of the paper).

A picture is uint8 [height, width]: 0 where everything is dropped, from 1 (no importance) to 255 elsewhere. The three
pictures of a layer share one scale, so that they can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.algorithms.blocks import block_sums, expand_keep, group_capacities

# The shares of the cells below and above the scale: a few extreme weights would leave all else alike.
_CLIPPED = 0.01, 0.995


@dataclass(frozen=True, eq=False)
class Heatmap:
    """A layer's importance [out, in] as uint8 pictures; the last two are None for a layer that is not pruned."""

    original: NDArray[np.uint8]
    reordered: NDArray[np.uint8] | None = None
    pruned: NDArray[np.uint8] | None = None


def heatmap(
    scores: NDArray,
    limit: int,
    perms: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    keep: NDArray[np.bool_] | None = None,
    block_size: tuple[int, int] = (1, 1),
    refitted: NDArray | None = None,
) -> Heatmap:
    """Pictures of an importance ``scores`` [M, C], each of at most ``limit`` pixels (or one per block) along an axis.

    ``perms``: the order [M], [C] of a reordered layer, with the ``keep`` mask of its blocks; both or neither.
    ``refitted``: the importance of the pruned weight [M, C] in the original order, where a refit changed it. Pixels
    never mix kept and dropped blocks unless there are more blocks than pixels.
    """
    size = _cell(scores.shape[0], block_size[0], limit), _cell(scores.shape[1], block_size[1], limit)
    original = _means(scores, size)
    low, high = (float(value) for value in np.quantile(original, _CLIPPED))
    scale = low, max(high, low + 1e-6 * abs(low), float(np.finfo(np.float32).tiny))
    if perms is None or keep is None:
        return Heatmap(_levels(original, scale))
    order = np.ix_(*perms)
    kept = expand_keep(keep, block_size, scores.shape)
    left = np.where(kept, (scores if refitted is None else refitted)[order], 0)
    pruned = _levels(_means(left, size), scale)
    pruned[block_sums(kept, size) == 0] = 0
    return Heatmap(_levels(original, scale), _levels(_means(scores[order], size), scale), pruned)


def _cell(n: int, block: int, limit: int) -> int:
    """Positions of one pixel along an axis of ``n``: a divisor or a multiple of the block's length."""
    least = -(-n // limit)
    if least > block:
        return block * -(-least // block)
    return next(size for size in range(least, block + 1) if block % size == 0)


def _means(values: NDArray, size: tuple[int, int]) -> NDArray[np.float64]:
    lengths = (group_capacities(n, s) for n, s in zip(values.shape, size, strict=True))
    return block_sums(values, size) / np.multiply.outer(*lengths)


def _levels(means: NDArray[np.float64], scale: tuple[float, float]) -> NDArray[np.uint8]:
    # The square root spreads the many small values that the choice of blocks is about.
    return (1 + np.rint(254 * np.sqrt(np.clip((means - scale[0]) / (scale[1] - scale[0]), 0, 1)))).astype(np.uint8)
