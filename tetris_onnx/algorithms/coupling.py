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
from tetris_onnx.algorithms.triangular import inverse_of_lower

# This share of the metric is the same for all directions: gradients are those of the dense network at a point.
_EVEN = 0.1
_MOST_STEPS = 5
_CLOSE = 1e-2  # of the squared residual at the start, in the preconditioner's norm: the metric itself is a rough one
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


class Coupling:
    """The problem of one layer: lower ``tr(F E H E^T)`` plus the ridge, with all weights outside ``sets`` zero.

    ``gram``: H [features, features]; ``towards`` [out, features]: the weights that the ridge pulls to; ``damping``
    [out]: the ridge of each row, the same for rows of one set; ``metric`` [out, out]: F, of any scale.
    """

    def __init__(
        self,
        sets: Sequence[Rows],
        gram: NDArray[np.float32],
        towards: NDArray,
        damping: NDArray,
        metric: NDArray,
        workers: int | None = None,
    ) -> None:
        self._sets, self._gram, self._towards, self._workers = sets, gram, towards, workers
        metric = np.asarray(metric, np.float64)
        scale = float(np.trace(metric)) / len(metric)
        if not scale > 0 or not np.isfinite(scale):  # it says nothing
            metric, scale = np.eye(len(metric)), 1.0
        metric = (1 - _EVEN) / scale * metric + _EVEN * np.eye(len(metric))
        self._metric = metric.astype(np.float32)
        self._root = np.sqrt(damping).astype(np.float32)[:, None]
        self._keep = np.zeros(towards.shape, bool)
        for part in sets:
            self._keep[np.ix_(part.rows, part.features)] = True

        def inverse(part: Rows, kind: type[np.floating]) -> NDArray[np.float32]:
            hessian = gram[np.ix_(part.features, part.features)].astype(kind)
            hessian[np.diag_indices_from(hessian)] += kind(damping[part.rows].mean())
            factor = inverse_of_lower(np.linalg.cholesky(hessian)).astype(np.float32)
            return factor.T @ factor

        def inverses(part: Rows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            by_rows = np.linalg.inv(metric[np.ix_(part.rows, part.rows)]).astype(np.float32)
            try:
                return by_rows, inverse(part, np.float32)
            except np.linalg.LinAlgError:  # the damping is below the rounding
                return by_rows, inverse(part, np.float64)

        self._inverses = run_threads(inverses, [(part,) for part in sets], workers)

    def fit(self, weight: NDArray, products: NDArray) -> NDArray[np.float64]:
        """Better weights than ``weight``, both [out, features], for targets with these products ``mean(y u^T)``."""
        start = weight.astype(np.float32)
        change = np.zeros_like(start)
        error = (products - self._times_gram(start)).astype(np.float32)
        residual = self._gradient(error, (self._towards - weight).astype(np.float32))
        step = direction = self._precondition(residual)
        size = first = _inner(residual, step)
        for _ in range(_MOST_STEPS):
            if not size > _CLOSE * first or not np.isfinite(size):
                break
            image = self._gradient(self._times_gram(direction), direction)
            curvature = _inner(direction, image)
            if not curvature > 0:  # rounding is all that is left
                break
            length = np.float32(size / curvature)
            change += length * direction
            residual -= length * image
            step = self._precondition(residual)
            size, before = _inner(residual, step), size
            direction = step + np.float32(size / before) * direction
        return weight + change

    def _gradient(self, error: NDArray, moved: NDArray) -> NDArray[np.float32]:
        """Of half the cost, given an ``error`` times H and how far each weight is from where the ridge pulls it."""
        ridge = self._root * (self._metric @ (self._root * moved))
        return np.where(self._keep, self._metric @ error + ridge, np.float32(0))

    def _precondition(self, residual: NDArray) -> NDArray[np.float32]:
        """What solves for the rows of each set by themselves."""

        def solve(part: Rows, by_rows: NDArray, by_features: NDArray) -> NDArray[np.float32]:
            return by_rows @ residual[np.ix_(part.rows, part.features)] @ by_features

        result = np.zeros_like(residual)
        tasks = [(part, *pair) for part, pair in zip(self._sets, self._inverses, strict=True)]
        for part, values in zip(self._sets, run_threads(solve, tasks, self._workers), strict=True):
            result[np.ix_(part.rows, part.features)] = values
        return result

    def _times_gram(self, weight: NDArray) -> NDArray:
        """``weight @ H`` in threads. The parts are the same whatever their number."""
        parts = np.array_split(np.arange(len(self._gram)), _PARTS)
        tasks = [(self._gram[part[0] : part[-1] + 1],) for part in parts if part.size]
        return np.concatenate(run_threads(lambda rows: weight @ rows.T, tasks, self._workers), axis=1)


def _inner(a: NDArray, b: NDArray) -> float:
    return float(np.einsum("of,of->", a, b, dtype=np.float64))
