"""Triangular matrices, by blocks. Inverses are matrix products, which numpy computes fast and beside other threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SMALL = 64  # matrices of so many rows are inverted at once
_MIRRORED = 256  # rows of a block that is transposed within the caches


def inverse_of_lower(factor: NDArray) -> NDArray:
    """The inverse of a lower triangular matrix [n, n], or of each of a stack of them [..., n, n], by halves."""
    n = factor.shape[-1]
    if n <= _SMALL:
        return np.tril(np.linalg.inv(factor))
    half = n // 2
    inverse = np.zeros_like(factor)
    first, second = inverse_of_lower(factor[..., :half, :half]), inverse_of_lower(factor[..., half:, half:])
    inverse[..., :half, :half], inverse[..., half:, half:] = first, second
    inverse[..., half:, :half] = -(second @ factor[..., half:, :half]) @ first
    return inverse


def mirror_upper(matrix: NDArray) -> None:
    """Make a matrix [n, n] symmetric, in place: what is below the diagonal becomes what is above it."""
    n = len(matrix)
    for start in range(0, n, _MIRRORED):
        end = min(start + _MIRRORED, n)
        block = matrix[start:end, start:end]
        block[...] = np.triu(block) + np.triu(block, 1).T
        for after in range(end, n, _MIRRORED):
            matrix[after : after + _MIRRORED, start:end] = matrix[start:end, after : after + _MIRRORED].T
