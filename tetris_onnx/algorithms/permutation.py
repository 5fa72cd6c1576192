"""Permutations, written one way everywhere: ``y = x[perm]``, the meaning of ONNX Gather."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Permutation = NDArray[np.int64]


def identity(n: int) -> Permutation:
    """The permutation of ``n`` elements that changes nothing."""
    return np.arange(n, dtype=np.int64)


def inverse(perm: Permutation) -> Permutation:
    """The permutation that undoes ``perm``: ``x[perm][inverse(perm)] == x``."""
    inv = np.empty(perm.size, np.int64)
    inv[perm] = np.arange(perm.size)
    return inv


def compose(first: Permutation, second: Permutation) -> Permutation:
    """One permutation for two in a row: ``x[first][second] == x[compose(first, second)]``.

    Raises ValueError when the lengths differ.
    """
    if first.size != second.size:
        raise ValueError(f"cannot compose permutations of {first.size} and {second.size} elements")
    return first[second]


def is_permutation(a: ArrayLike) -> bool:
    """Whether ``a`` is a 1-D array of integers that holds each of 0 .. n-1 once."""
    array = np.asarray(a)
    if array.ndim != 1:
        return False
    if array.size == 0:
        return True
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= array.size:
        return False
    return bool(np.bincount(array, minlength=array.size).max() == 1)


def is_identity(a: ArrayLike) -> bool:
    """Whether ``a`` is the permutation that changes nothing."""
    array = np.asarray(a)
    return array.ndim == 1 and np.array_equal(array, np.arange(array.size))


def expand(perm: Permutation, outer: int, inner: int) -> Permutation:
    """The permutation of a flattened axis whose middle part is permuted.

    An axis of ``outer * n * inner`` positions, flattened from ``[outer, n, inner]``, takes it when the middle axis is
    gathered by ``perm`` [n]: ``x.reshape(outer, n, inner)[:, perm].ravel() == x[expand(perm, outer, inner)]``.
    """
    positions = np.arange(outer * perm.size * inner, dtype=np.int64).reshape(outer, perm.size, inner)
    return positions[:, perm].ravel()
