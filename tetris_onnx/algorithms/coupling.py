"""Fit all outputs of a layer together, where what their errors do to the network depends on how they go together.

With ``F`` [out, out] the mean of ``g g^T`` over the gradients ``g`` of the network's outputs by the layer's, and ``H``
the mean of ``u u^T`` over its features, errors ``E`` of its weights change the network's outputs by ``tr(F E H E^T)``
(Martens & Grosse, *Optimizing neural networks with Kronecker-factored approximate curvature*, 2015). Were all weights
kept, the best would be those of each output by itself. Pruned, outputs have errors that no weights of their own can
mend; coupled, those of others make up for them in the directions that the network looks at.

The weights of the rows with one support are solved for exactly, with the others as they are: that is what
preconditions a conjugate gradient over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.algorithms.threads import run_threads

# This share of the metric is the same for all directions: gradients are those of the dense network at a point.
_EVEN = 0.1
_MOST_STEPS = 12
_CLOSE = 1e-3  # of the squared residual at the start, in the preconditioner's norm
_MOST_BYTES = 2**30  # of inverses, one for each support
_PARTS = 16  # of a large product


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a weight that keep the same features."""

    rows: NDArray[np.int64]
    features: NDArray[np.int64]


def can_couple(sets: Sequence[Rows]) -> bool:
    """Whether the inverses for ``sets`` fit into memory: not for single weights of a large layer."""
    return sum(s.features.size**2 for s in sets) * np.dtype(np.float32).itemsize <= _MOST_BYTES


def couple(
    weight: NDArray,
    sets: Sequence[Rows],
    problem: tuple[NDArray[np.float32], NDArray, NDArray, NDArray],
    metric: NDArray,
    workers: int | None = None,
) -> NDArray[np.float64]:
    """The weights [out, features] that lower ``tr(F E H E^T)``, from a ``weight`` that is zero outside ``sets``.

    ``problem``: H [features, features]; the products ``mean(y u^T)`` [out, features]; the weights that the ridge pulls
    to; the ridge of each row [out]. ``metric``: F, of any scale. Other weights than those in ``sets`` stay zero.
    """
    gram, products, towards, damping = problem
    metric = np.asarray(metric, np.float64)
    scale = float(np.trace(metric)) / len(metric)
    if not scale > 0 or not np.isfinite(scale):
        return np.asarray(weight, np.float64)
    metric = (1 - _EVEN) / scale * metric + _EVEN * np.eye(len(metric))
    whole = metric.astype(np.float32)
    root = np.sqrt(damping).astype(np.float32)[:, None]
    keep = np.zeros(weight.shape, bool)
    for part in sets:
        keep[np.ix_(part.rows, part.features)] = True

    def inverses(part: Rows) -> tuple[NDArray, NDArray]:
        hessian = gram[np.ix_(part.features, part.features)].copy()
        hessian[np.diag_indices_from(hessian)] += damping[part.rows].mean()
        return np.linalg.inv(metric[np.ix_(part.rows, part.rows)]).astype(np.float32), np.linalg.inv(hessian)

    solved = run_threads(inverses, [(part,) for part in sets], workers)

    def gradient(error: NDArray, moved: NDArray) -> NDArray:
        """Of half the cost, given ``error`` H and how far each weight is from where the ridge pulls it."""
        return np.where(keep, whole @ error + root * (whole @ (root * moved)), np.float32(0))

    def precondition(residual: NDArray) -> NDArray:
        def solve(part: Rows, by_rows: NDArray, by_features: NDArray) -> NDArray:
            return by_rows @ residual[np.ix_(part.rows, part.features)] @ by_features

        result = np.zeros_like(residual)
        tasks = [(part, *pair) for part, pair in zip(sets, solved, strict=True)]
        for part, values in zip(sets, run_threads(solve, tasks, workers), strict=True):
            result[np.ix_(part.rows, part.features)] = values
        return result

    start = weight.astype(np.float32)
    change = np.zeros_like(start)
    error = (products - _times(start, gram, workers)).astype(np.float32)
    residual = gradient(error, (towards - weight).astype(np.float32))
    step = direction = precondition(residual)
    size = first = _inner(residual, step)
    for _ in range(_MOST_STEPS):
        if not size > _CLOSE * first or not np.isfinite(size):
            break
        image = gradient(_times(direction, gram, workers), direction)
        length = np.float32(size / _inner(direction, image))
        change += length * direction
        residual -= length * image
        step = precondition(residual)
        size, before = _inner(residual, step), size
        direction = step + np.float32(size / before) * direction
    return weight + change


def _times(weight: NDArray, gram: NDArray, workers: int | None) -> NDArray:
    """``weight @ gram`` in threads, of a symmetric matrix. The parts are the same whatever their number."""
    parts = np.array_split(np.arange(len(gram)), _PARTS)
    tasks = [(gram[part[0] : part[-1] + 1],) for part in parts if part.size]
    return np.concatenate(run_threads(lambda rows: weight @ rows.T, tasks, workers), axis=1)


def _inner(a: NDArray, b: NDArray) -> float:
    return float(np.einsum("of,of->", a, b, dtype=np.float64))
