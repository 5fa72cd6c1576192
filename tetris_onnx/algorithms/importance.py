"""How much a weight matters: the quantity that reordering and pruning try to keep.

A block spans all taps of a kernel, so the importance of input channel ``c`` to output channel ``m`` is one number,
the sum over the taps: ``l1`` is the paper's objective, ``l2`` the squared error that pruning makes in the weight.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

ImportanceKind = Literal["l1", "l2"]


def importance(weight: NDArray, kind: ImportanceKind = "l1") -> NDArray:
    """Importance [M, C] of a weight [M, C, *K]: the sum over the taps of ``|w|`` (l1) or ``w**2`` (l2).

    float64 for a float64 weight, else float32 (float16 is widened before it is squared). Raises ValueError for a
    weight of fewer than two axes, one that is not finite, and an unknown kind.
    """
    if weight.ndim < 2:
        raise ValueError(f"a weight has at least two axes, [out, in, ...]; this one has shape {weight.shape}")
    dtype = np.float64 if weight.dtype == np.float64 else np.float32
    w = weight.astype(dtype, copy=False).reshape(*weight.shape[:2], -1)
    if kind == "l1":
        total = np.abs(w).sum(axis=2, dtype=dtype)
    elif kind == "l2":
        total = np.einsum("mck,mck->mc", w, w)
    else:
        raise ValueError(f"unknown importance {kind!r}: use 'l1' or 'l2'")
    if not np.isfinite(total).all():
        raise ValueError("the weight holds NaN or infinite values (or squares that overflow): it cannot be ranked")
    return total
