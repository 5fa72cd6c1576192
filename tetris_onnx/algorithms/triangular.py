"""Inverses of triangular matrices out of matrix products, which numpy computes fast and beside other threads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SMALL = 64  # matrices of so many rows are inverted at once


def inverse_of_lower(factor: NDArray) -> NDArray:
    """The inverse of a lower triangular matrix [n, n], by halves."""
    n = len(factor)
    if n <= _SMALL:
        return np.tril(np.linalg.inv(factor))
    half = n // 2
    inverse = np.zeros_like(factor)
    first, second = inverse_of_lower(factor[:half, :half]), inverse_of_lower(factor[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = -(second @ factor[half:, :half]) @ first
    return inverse
