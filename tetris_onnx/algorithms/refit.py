"""Recover a pruned layer's output without training: least squares on what the layer sees.

A layer computes ``y = W u + b`` from features ``u`` (its input channels, times the kernel's taps). After pruning, the
kept weights can be fitted to the outputs of the dense layer on samples, even though the layers before it have been
pruned and its own inputs have changed. With means removed,

    H = mean(u u^T) + lam I,    G = mean(y u^T) + lam W,    lam = damping * mean(diag(mean(u u^T)))

the best weights on a support ``s`` are ``W_s = G_s inv(H_ss)`` (ridge regression towards the dense weights W), which
lowers the squared error by ``G_s inv(H_ss) G_s^T``. All rows of one block row share a support: one factorization
serves them.

Which features to drop follows from the same matrices (optimal brain surgeon, Hassibi & Stork 1993): dropping the
features ``J`` from a support and refitting the rest costs exactly

    w_J inv(inv(H_ss)_JJ) w_J^T        per row w of the weights fitted to s.

Before a ReLU, outputs below zero are all the same: `LayerSamples.refit` can fit to the best of the equivalent targets.
"""

from __future__ import annotations

import copy
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from tetris_onnx.algorithms.threads import run_threads

# To choose blocks with. The weights are fitted with the best of several (see `best_damping`).
DAMPING = 0.1
_DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
_PARTS = 16  # of a large product
_HELD_OUT = 4  # one in so many inputs of the network
_CLIP_ITERATIONS = 4


class LayerSamples:
    """One layer's least-squares problem, from samples ``u`` [n, features] and dense outputs ``y`` [n, out].

    Features are ordered (channel, tap). ``weight`` [out, features] is the dense weight. ``inputs``: of how many inputs
    of the network the samples are, one after the other, equally many of each (default: each of its own). With fewer
    samples than features everything is computed from the n x n matrix of inner products instead (the same results, up
    to rounding).
    """

    def __init__(
        self, u: NDArray, y: NDArray, weight: NDArray, damping: float = DAMPING, inputs: int | None = None
    ) -> None:
        self.mean_in = u.mean(axis=0, dtype=np.float64)
        self.mean_out = y.mean(axis=0, dtype=np.float64)
        # Products are in the samples' float32: their rounding is far below the damping.
        self.u = u - self.mean_in.astype(u.dtype)
        self.y = y - self.mean_out.astype(y.dtype)
        self.weight = weight
        self.inputs = inputs or len(u)
        # The sum of the outputs' variances.
        self.power = float(np.einsum("no,no->", self.y, self.y, dtype=np.float64)) / len(y)
        self._variance = float(np.einsum("nf,nf->", self.u, self.u, dtype=np.float64)) / u.size
        self.damping = self._lam(damping)

    @property
    def features(self) -> int:
        """Number of features."""
        return int(self.u.shape[1])

    @property
    def few(self) -> bool:
        """Whether there are fewer samples than features."""
        return len(self.u) < self.features

    def _lam(self, damping: float) -> float:
        # A feature that never changes has a zero row in H: the damping keeps the matrix invertible.
        return max(damping * self._variance, float(np.finfo(np.float32).tiny))

    @cached_property
    def _gram(self) -> NDArray[np.float32]:
        return _inner(self.u, self.u) / np.float32(len(self.u))

    @cached_property
    def hessian(self) -> NDArray[np.float64]:
        """H [features, features]."""
        hessian = self._gram.astype(np.float64)
        hessian[np.diag_indices_from(hessian)] += self.damping
        return hessian

    @cached_property
    def inverse(self) -> NDArray[np.float64]:
        """The inverse of H."""
        factor = cholesky(self.hessian)
        return linalg.cho_solve(factor, np.eye(self.features), check_finite=False)

    @cached_property
    def fitted(self) -> NDArray[np.float64]:
        """The best weights on all features, [out, features]."""
        return self.cross @ self.inverse

    @cached_property
    def cross(self) -> NDArray[np.float64]:
        """G [out, features]."""
        return self._products + self.damping * self.weight

    @cached_property
    def _products(self) -> NDArray[np.float64]:
        return self._mean_products(self.y)

    def _mean_products(self, y: NDArray) -> NDArray[np.float64]:
        return _inner(y, self.u).astype(np.float64) / len(self.u)

    def saliency(self) -> NDArray[np.float64]:
        """What dropping each single weight [out, features] adds to the squared error after the rest is refitted."""
        if not self.few:
            return self.fitted**2 / np.diag(self.inverse)
        # With A = U U^T + n lam I and the residual R of the dense weight W:
        # inv(H) = (I - U^T inv(A) U) / lam, and the fit on all features is W + R^T inv(A) U.
        solved = linalg.cho_solve(self._inner_factor(np.arange(self.features)), self.u, check_finite=False)
        diagonal = (1 - np.einsum("nf,nf->f", self.u, solved)) / self.damping
        fitted = self.weight + (self.y - self.u @ self.weight.T).T @ solved
        return fitted**2 / np.maximum(diagonal, np.finfo(np.float64).tiny)

    def refit(
        self, keep: NDArray[np.bool_], bounds: tuple[float | NDArray, float | NDArray] = (-np.inf, np.inf)
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The best weights that are zero outside ``keep`` (both [out, features]), and the bias [out] with them.

        ``bounds``: where the next operator clips (0 and inf for a ReLU), numbers or arrays [n, out]. Outputs that the
        dense layer has beyond them may be anything beyond them: targets there follow the fit, which lowers the error
        after the clip in every iteration (majorize and minimize).
        """
        weight = self._solve(keep, self.y, self.weight, None if self.few else self.cross)
        bias = self.mean_out - weight @ self.mean_in
        low, high = bounds
        if np.all(np.isneginf(low)) and np.all(np.isposinf(high)):
            return weight, bias
        raw = self.y + self.mean_out.astype(self.y.dtype)
        for _ in range(_CLIP_ITERATIONS):
            fitted = self.u @ weight.T.astype(self.u.dtype) + (bias + weight @ self.mean_in).astype(self.u.dtype)
            target = np.where(raw <= low, np.minimum(fitted, low), np.where(raw >= high, np.maximum(fitted, high), raw))
            mean = target.mean(axis=0, dtype=np.float64)
            # The damping now pulls to the last fit, so that the iteration ends at the optimum of the samples.
            target -= mean.astype(target.dtype)
            cross = None if self.few else self._mean_products(target) + self.damping * weight
            weight = self._solve(keep, target, weight, cross)
            bias = mean - weight @ self.mean_in
        return weight, bias

    def best_damping(self, keep: NDArray[np.bool_]) -> LayerSamples:
        """These samples with the damping that fits held-out samples best, for weights that are zero outside ``keep``.

        One in four inputs of the network is held out: samples of one input are alike.
        """
        source = np.arange(len(self.u)) * self.inputs // len(self.u)
        held = source % _HELD_OUT == _HELD_OUT - 1
        if held.all() or not held.any():
            return self
        train, held_out = (LayerSamples(self.u[part], self.y[part], self.weight) for part in (~held, held))

        def error(index: int) -> float:
            return held_out.error(train._damped(_DAMPINGS[index]).refit(keep)[0])

        # The error falls and then rises with the damping.
        best = _DAMPINGS.index(DAMPING)
        least = error(best)
        for step in (1, -1):
            while 0 <= best + step < len(_DAMPINGS) and (tried := error(best + step)) < least:
                best, least = best + step, tried
        return self._damped(_DAMPINGS[best])

    def _damped(self, damping: float) -> LayerSamples:
        """The same samples with another damping; what does not depend on it is shared."""
        if not self.few:
            _ = self._gram, self._products  # computed before the copy, for both
        other = copy.copy(self)
        for name in ("hessian", "inverse", "cross", "fitted"):
            other.__dict__.pop(name, None)
        other.damping = self._lam(damping)
        return other

    def error(self, weight: NDArray) -> float:
        """Squared error of a ``weight`` with its best bias, over the variance of the dense outputs."""
        residual = self.y - self.u @ weight.T.astype(self.u.dtype)
        return (
            float(np.einsum("no,no->", residual, residual, dtype=np.float64)) / len(residual) / max(self.power, 1e-300)
        )

    def _solve(
        self, keep: NDArray[np.bool_], y: NDArray, towards: NDArray, cross: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """Weights for the targets ``y``, damped towards ``towards``. ``cross``: their G; None to solve by samples."""
        supports: dict[bytes, list[int]] = {}
        for row, mask in enumerate(keep):
            supports.setdefault(np.packbits(mask).tobytes(), []).append(row)
        groups = [np.array(rows) for rows in supports.values()]
        hessian = None if cross is None else self.hessian

        def solve(rows: NDArray[np.int64]) -> NDArray[np.float64]:
            s = np.flatnonzero(keep[rows[0]])
            if not s.size:
                return np.zeros((rows.size, 0))
            if cross is None or hessian is None:
                residual = y[:, rows] - self.u[:, s] @ towards[np.ix_(rows, s)].T
                solved = linalg.cho_solve(self._inner_factor(s), residual, check_finite=False)
                return towards[np.ix_(rows, s)] + solved.T @ self.u[:, s]
            factor = cholesky(hessian[np.ix_(s, s)])
            return linalg.cho_solve(factor, cross[np.ix_(rows, s)].T, check_finite=False).T

        weight = np.zeros(keep.shape)
        for rows, fitted in zip(groups, run_threads(solve, [(rows,) for rows in groups]), strict=True):
            weight[np.ix_(rows, np.flatnonzero(keep[rows[0]]))] = fitted
        return weight

    def _inner_factor(self, s: NDArray[np.int64]) -> tuple[NDArray, bool]:
        part = self.u[:, s]
        inner = (part @ part.T).astype(np.float64)
        inner[np.diag_indices_from(inner)] += len(self.u) * self.damping
        return cholesky(inner)


def cholesky(matrix: NDArray) -> tuple[NDArray, bool]:
    """The factor of a positive definite matrix, for scipy's cho_solve."""
    return linalg.cho_factor(matrix, lower=True, check_finite=False)


def _inner(a: NDArray, b: NDArray) -> NDArray:
    """``a.T @ b`` in threads. The parts are the same whatever their number, and so is the rounding."""
    parts = np.array_split(np.arange(a.shape[1]), _PARTS)
    return np.concatenate(run_threads(lambda columns: a[:, columns].T @ b, [(part,) for part in parts if part.size]))
