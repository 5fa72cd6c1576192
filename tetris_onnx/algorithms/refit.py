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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from tetris_onnx.algorithms.coupling import Coupling, Rows, can_couple
from tetris_onnx.algorithms.threads import once, run_threads
from tetris_onnx.algorithms.triangular import mirror_upper

# To choose blocks with. The weights are fitted with the best of several (see `LayerSamples.refit`).
DAMPING = 0.1
_DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
_PARTS = 16  # of a large product
_HELD_OUT = 4  # one in so many inputs of the network
CLIP_ROUNDS = 4  # in which targets beyond what clips are renewed
_COUPLINGS = 2  # so many of them with all outputs together
# Sets of rows with one support: small ones are fitted together, up to so many rows and bytes of factors, and of more
# than so many sets some say for all which damping is best.
_ROWS_TOGETHER = 32
_FACTOR_BYTES = 2**28
_CHOOSING = 16
_MOST_ROWS = 128  # of one task: a layer that keeps all weights has one set of rows
_MOST_COPIED = 0.75  # of all features: more of them are not worth a copy of their samples
_FACTORS = (0.5, 2.0)  # by which an output may be scaled


class LayerSamples:
    """One layer's least-squares problem, from samples ``u`` [n, features] and dense outputs ``y`` [n, out].

    Features are ordered (channel, tap). ``weight`` [out, features] is the dense weight. ``inputs``: of how many inputs
    of the network the samples are, one after the other, equally many of each (default: each of its own). ``share`` [n],
    positive with mean 1: how often each sample's squared error counts (default: once). With fewer samples than
    features everything is computed from the n x n matrix of inner products instead (the same results, up to rounding).
    """

    def __init__(
        self,
        u: NDArray,
        y: NDArray,
        weight: NDArray,
        damping: float = DAMPING,
        inputs: int | None = None,
        share: NDArray[np.float32] | None = None,
    ) -> None:
        self._share = None if share is None else share[:, None]
        self.mean_in = self._mean(u)
        self.mean_out = self._mean(y)
        # Products are in the samples' float32: their rounding is far below the damping.
        root = None if self._share is None else np.sqrt(self._share)
        self.u, self.y = _centered(u, self.mean_in, root), _centered(y, self.mean_out, root)
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

    def _mean(self, values: NDArray) -> NDArray[np.float64]:
        """The mean over the samples."""
        if self._share is not None:
            values = values * self._share
        return values.mean(axis=0, dtype=np.float64)

    def _lam(self, damping: float) -> float:
        # A feature that never changes has a zero row in H: the damping keeps the matrix invertible.
        return max(damping * self._variance, float(np.finfo(np.float32).tiny))

    @cached_property
    def _gram(self) -> NDArray[np.float32]:
        return sum(m.gram * np.float32(m.count / len(self.u)) for m in self._moments)

    @cached_property
    def _products(self) -> NDArray[np.float64]:
        return sum(m.products * (m.count / len(self.u)) for m in self._moments)  # type: ignore[return-value]

    @cached_property
    def _held_out(self) -> NDArray[np.bool_] | None:
        """Which samples are held out to choose the damping: all of one in four inputs. None where there are too few."""
        source = np.arange(len(self.u)) * self.inputs // len(self.u)
        held = source % _HELD_OUT == _HELD_OUT - 1
        return held if held.any() else None

    @cached_property
    def _moments(self) -> list[_Moments]:
        """Of the samples that are not held out, and of those that are (where there are)."""
        held = self._held_out
        if held is None:
            return [_Moments.of(self.u, self.y)]
        return [_Moments.of(self.u[part], self.y[part]) for part in (~held, held)]

    @cached_property
    def _held_out_means(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Means of the features and the outputs over the samples of each held-out input, less those of all of them."""
        held = self._held_out
        assert held is not None
        source = (np.arange(len(self.u)) * self.inputs // len(self.u))[held]
        starts = np.flatnonzero(np.diff(source, prepend=-1))
        found = []
        for array in (self.u[held], self.y[held]):
            sums = np.add.reduceat(array, starts, axis=0, dtype=np.float64)
            means = sums / np.diff(starts, append=len(source))[:, None]
            found.append(means - means.mean(axis=0))
        return found[0], found[1]

    @cached_property
    def hessian(self) -> NDArray[np.float64]:
        """H [features, features]."""
        hessian = self._gram.astype(np.float64)
        hessian[np.diag_indices_from(hessian)] += self.damping
        return hessian

    @cached_property
    def inverse(self) -> NDArray[np.float64]:
        """The inverse of H."""
        upper, failed = linalg.lapack.dpotri(cholesky(self.hessian)[0], lower=0, overwrite_c=1)
        assert not failed
        mirror_upper(upper)
        return upper.T  # laid out as numpy's other matrices are

    @cached_property
    def fitted(self) -> NDArray[np.float64]:
        """The best weights on all features, [out, features]."""
        return self.cross @ self.inverse

    @cached_property
    def cross(self) -> NDArray[np.float64]:
        """G [out, features]."""
        return self._products + self.damping * self.weight

    def saliency(self) -> NDArray[np.float64]:
        """What dropping each single weight [out, features] adds to the squared error after the rest is refitted."""
        if not self.few:
            return self.fitted**2 / np.diag(self.inverse)
        # With A = U U^T + n lam I and the residual R of the dense weight W:
        # inv(H) = (I - U^T inv(A) U) / lam, and the fit on all features is W + R^T inv(A) U.
        solved = linalg.cho_solve(self._inner_factor(self.u, self.damping), self.u, check_finite=False)
        diagonal = (1 - np.einsum("nf,nf->f", self.u, solved)) / self.damping
        fitted = self.weight + (self.y - self.u @ self.weight.T).T @ solved
        return fitted**2 / np.maximum(diagonal, np.finfo(np.float64).tiny)

    def weighted(self, factor: NDArray) -> LayerSamples:
        """The same problem where the squared error of each output counts ``factor`` [out] times."""
        if not self.few:
            _ = self.inverse, self._products  # before the copy, so that they are computed once
        root = np.sqrt(factor)
        other = copy.copy(self)
        for name in ("_moments", "_held_out_means", "cross", "fitted"):
            other.__dict__.pop(name, None)
        other.y = self.y * root.astype(self.y.dtype)
        other.mean_out = self.mean_out * root
        other.weight = self.weight * root.astype(self.weight.dtype)[:, None]
        other.power = float(np.einsum("no,no->", other.y, other.y, dtype=np.float64)) / len(other.y)
        if not self.few:
            other.__dict__["_products"] = self._products * root[:, None]
        return other

    def activation(self) -> NDArray[np.float64]:
        """``|w|`` of each weight [out, features] times the norm of its feature (Sun et al., Wanda, 2023)."""
        power = np.einsum("nf,nf->f", self.u, self.u, dtype=np.float64) / len(self.u) + self.mean_in**2
        return np.abs(self.weight) * np.sqrt(power)

    def refit(
        self,
        keep: NDArray[np.bool_],
        bounds: tuple[float | NDArray, float | NDArray] = (-np.inf, np.inf),
        choose_damping: bool = False,
        workers: int | None = None,
        metric: NDArray | None = None,
        clip_rounds: int = CLIP_ROUNDS,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The best weights that are zero outside ``keep`` (both [out, features]), and the bias [out] with them.

        ``bounds``: where the next operator clips (0 and inf for a ReLU), numbers or arrays [n, out]. Outputs that the
        dense layer has beyond them may be anything beyond them: targets there follow the fit, which lowers a bound of
        the error after the clip in each of ``clip_rounds`` (majorize and minimize).

        ``choose_damping``: take, for each set of rows with one support, the damping whose weights fit held-out samples
        and their means over an input best; where there are many sets, the mean of some of them for all. One in four
        inputs of the network is held out: samples of one are alike.

        ``metric`` [out, out]: what errors of outputs do together (see `coupling`). Without it, or with fewer samples
        than features, each output is fitted by itself.
        """
        supports: dict[bytes, list[int]] = {}
        for row, mask in enumerate(keep):
            supports.setdefault(np.packbits(mask).tobytes(), []).append(row)
        sets = [Rows(np.array(rows), np.flatnonzero(keep[rows[0]])) for rows in supports.values()]
        low, high = (np.broadcast_to(np.asarray(bound, self.y.dtype), self.y.shape) for bound in bounds)
        clipped = not (np.all(np.isneginf(bounds[0])) and np.all(np.isposinf(bounds[1])))
        root = np.sqrt(self._share) if self._share is not None else np.ones((1, 1), self.y.dtype)
        chosen = choose_damping and self._held_out is not None
        if not self.few:
            _ = self.hessian, self._products, self._held_out_means if chosen else None  # once, for all threads
        dampings = self._best_dampings(sets, workers) if chosen else [self.damping] * len(sets)
        pieces = [piece for part, damping in zip(sets, dampings, strict=True) for piece in self._pieces(part, damping)]
        bundles = self._bundles(pieces)
        coupled = metric is not None and not self.few and can_couple(sets)

        def targets(rows: NDArray[np.int64]) -> Callable[[NDArray, NDArray], tuple[NDArray, NDArray[np.float64]]]:
            """What makes targets [n, rows] and their mean from the outputs of weights, less their mean: ``bounds``."""
            raw = self.y[:, rows] / root + self.mean_out[rows].astype(self.y.dtype)
            least, most = low[:, rows], high[:, rows]
            below, above = raw <= least, raw >= most

            def renew(outputs: NDArray, mean: NDArray) -> tuple[NDArray, NDArray[np.float64]]:
                fitted = outputs + mean.astype(outputs.dtype)
                target = np.where(below, np.minimum(fitted, least), raw)
                target = np.where(above, np.maximum(fitted, most), target)
                mean = self._mean(target)
                return (target - mean.astype(target.dtype)) * root, mean

            return renew

        def fit(rows: NDArray[np.int64], bundle: Sequence[_Piece]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            features = np.flatnonzero(keep[rows].any(axis=0))
            mean = self.mean_out[rows]
            if not self.few and features.size > _MOST_COPIED * self.features:
                features = np.arange(self.features)
            u = None
            if clipped or self.few:
                u = self.u[:, features] if features.size < self.features else self.u
            solve = self._solver(rows, bundle, features, u)
            weight = solve(None)
            if clipped and u is not None:
                renew = targets(rows)
                for _ in range(clip_rounds - (_COUPLINGS if coupled else 0)):
                    target, mean = renew(u @ weight.T.astype(u.dtype) / root, mean)
                    weight = solve(target)
            whole = np.zeros((rows.size, self.features))
            whole[:, features] = weight
            return whole, mean

        weight, mean = np.zeros(keep.shape), np.empty(len(keep))
        tasks = [(np.concatenate([piece.rows for piece in bundle]), bundle) for bundle in bundles]
        for (rows, _), fitted in zip(tasks, run_threads(fit, tasks, workers), strict=True):
            weight[rows], mean[rows] = fitted
        if metric is not None and coupled:
            ridge = np.empty(len(keep))
            for part, damping in zip(sets, dampings, strict=True):
                ridge[part.rows] = damping
            coupling = Coupling(sets, self._gram, self.weight, ridge, metric, workers)
            products = self._products
            some = [rows for rows in np.array_split(np.arange(len(keep)), _PARTS) if rows.size and clipped]
            renewed = run_threads(targets, [(rows,) for rows in some], workers)
            for _ in range(_COUPLINGS if clipped else 1):
                if clipped:
                    found = run_threads(
                        lambda renew, weight, mean: renew(self.u @ weight.T / root, mean),
                        [
                            (renew, weight[rows].astype(self.u.dtype), mean[rows])
                            for rows, renew in zip(some, renewed, strict=True)
                        ],
                        workers,
                    )
                    mean = np.concatenate([m for _, m in found])
                    products = _inner(np.concatenate([t for t, _ in found], axis=1), self.u) / len(self.u)
                weight = coupling.fit(weight, products)
        return weight, mean - weight @ self.mean_in

    def _pieces(self, part: Rows, damping: float) -> list[_Piece]:
        """A set of rows with one support in parts for several threads."""
        factor: Callable[[], tuple[NDArray, bool]] = partial(self._factor, part.features, damping)
        count = -(-part.rows.size // _MOST_ROWS)
        if count > 1:
            factor = once(factor)  # (of others nothing is held: there may be thousands of them)
        return [_Piece(rows, part.features, damping, factor) for rows in np.array_split(part.rows, count)]

    def _bundles(self, pieces: Sequence[_Piece]) -> list[list[_Piece]]:
        """Those that are fitted together: one pass over the samples serves all rows of a bundle."""
        bundles: list[list[_Piece]] = []
        rows, size = _ROWS_TOGETHER, 0
        for piece in pieces:
            factor = piece.features.size**2 * np.dtype(np.float64).itemsize
            if self.few or rows + piece.rows.size > _ROWS_TOGETHER or size + factor > _FACTOR_BYTES:
                bundles.append([])
                rows, size = 0, 0
            bundles[-1].append(piece)
            rows, size = rows + piece.rows.size, size + factor
        return bundles

    def _factor(self, features: NDArray[np.int64], damping: float) -> tuple[NDArray, bool]:
        """The factor of what the weights of these features are solved with; with few samples, of inner products."""
        if self.few:
            return self._inner_factor(self.u if features.size == self.features else self.u[:, features], damping)
        hessian = self.hessian[np.ix_(features, features)]
        hessian[np.diag_indices_from(hessian)] += damping - self.damping
        return cholesky(hessian)

    def rescale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The dense weights with a factor per output, and the bias [out] with them, that fit the targets best.

        Two numbers per output are all that fewer samples than features can tell of a layer that is not pruned: weights
        fitted to them follow the samples' errors, which are smaller than those of other inputs.
        """
        now = self.u @ self.weight.T.astype(self.u.dtype)
        power = np.einsum("no,no->o", now, now, dtype=np.float64)
        factor = np.einsum("no,no->o", now, self.y, dtype=np.float64) / np.maximum(power, 1e-300)
        factor = np.where(power > 0, np.clip(factor, *_FACTORS), 1.0)
        weight = self.weight * factor[:, None]
        return weight, self.mean_out - weight @ self.mean_in

    def _solver(
        self, rows: NDArray[np.int64], bundle: Sequence[_Piece], features: NDArray[np.int64], u: NDArray | None
    ) -> Callable[[NDArray | None], NDArray[np.float64]]:
        """What makes weights [rows, features] of targets [n, rows] without their mean; None: of the dense outputs.

        ``rows``, ``features``: those of the whole bundle; ``u`` [n, features]: the features' samples, which targets
        other than None and few samples need.
        """
        towards = self.weight[np.ix_(rows, features)]
        if self.few:
            assert u is not None
            (piece,) = bundle
            inner = piece.factor()

            def solve(target: NDArray | None) -> NDArray[np.float64]:
                residual = (self.y[:, rows] if target is None else target) - u @ towards.T
                return towards + linalg.cho_solve(inner, residual, check_finite=False).T @ u

            return solve
        factors = []
        starts = np.cumsum([0, *(piece.rows.size for piece in bundle)])
        for start, piece in zip(starts, bundle, strict=False):
            if piece.features.size:
                where = np.ix_(start + np.arange(piece.rows.size), np.searchsorted(features, piece.features))
                factors.append((where, piece.damping, piece.factor()))

        def solve_moments(target: NDArray | None) -> NDArray[np.float64]:
            if target is None:
                products = self._products[np.ix_(rows, features)]
            else:
                assert u is not None
                products = (target.T @ u).astype(np.float64) / len(u)
            weight = np.zeros(products.shape)
            for where, damping, factor in factors:
                given = products[where] + damping * towards[where]
                weight[where] = linalg.cho_solve(factor, given.T, check_finite=False).T
            return weight

        return solve_moments

    def _best_dampings(self, sets: Sequence[Rows], workers: int | None) -> list[float]:
        """For each set of rows the damping that fits the held-out samples best; of many sets the mean of some's."""
        some = np.unique(np.linspace(0, len(sets) - 1, _CHOOSING).round().astype(np.int64))
        if len(some) == 1:
            return [self._best_damping(sets[0].rows, sets[0].features, workers)]
        best = run_threads(self._best_damping, [(sets[i].rows, sets[i].features) for i in some], workers)
        return best if len(best) == len(sets) else [float(np.exp(np.log(best).mean()))] * len(sets)

    def _best_damping(self, rows: NDArray[np.int64], s: NDArray[np.int64], workers: int | None = 1) -> float:
        """The damping that fits the held-out samples best, for weights [rows, s]; of many rows some tell.

        Half of what counts are the means over each input's samples. Damping shrinks the outputs, which lowers the error
        of single positions but is the same everywhere: the layers behind, which add up many positions, would feel it.
        """
        rows = rows[:: -(-rows.size // _MOST_ROWS)]
        towards, held = self.weight[np.ix_(rows, s)], self._held_out
        assert held is not None
        if not s.size:
            return self.damping
        if self.few:
            u, y = (array - array[~held].mean(axis=0) for array in (self.u[:, s], self.y[:, rows]))
            missing = (y - u @ towards.T)[~held]

            def error(step: int) -> float:
                factor = self._inner_factor(u[~held], self._lam(_DAMPINGS[step]))
                weight = towards + linalg.cho_solve(factor, missing, check_finite=False).T @ u[~held]
                return float(np.sum((y[held] - u[held] @ weight.T) ** 2))

        else:
            (gram, products, _), (test_gram, test_products, power) = (m.centered(rows, s) for m in self._moments)
            mean_u, mean_y = self._held_out_means
            mean_u, mean_y = mean_u[:, s], mean_y[:, rows]
            mean_power = float(np.sum(mean_y**2))

            def error(step: int) -> float:
                damping = self._lam(_DAMPINGS[step])
                hessian = gram.copy()
                hessian[np.diag_indices_from(hessian)] += damping
                weight = linalg.cho_solve(cholesky(hessian), (products + damping * towards).T, check_finite=False).T
                single = power - 2 * np.sum(weight * test_products) + np.sum((weight @ test_gram) * weight)
                mean = np.sum((mean_y - mean_u @ weight.T) ** 2)
                return float(single / max(power, 1e-300) + mean / max(mean_power, 1e-300))

        best = _DAMPINGS.index(DAMPING)
        errors: dict[int, float] = {}
        if workers != 1:
            first = (best - 1, best, best + 1)
            errors = dict(zip(first, run_threads(error, [(step,) for step in first], workers), strict=True))

        def known(step: int) -> float:
            if step not in errors:
                errors[step] = error(step)
            return errors[step]

        # The error falls and then rises with the damping.
        for direction in (1, -1):
            while 0 <= best + direction < len(_DAMPINGS) and known(best + direction) < known(best):
                best += direction
        return self._lam(_DAMPINGS[best])

    def error(self, weight: NDArray) -> float:
        """Squared error of a ``weight`` with its best bias, over the variance of the dense outputs."""
        residual = self.y - self.u @ weight.T.astype(self.u.dtype)
        return (
            float(np.einsum("no,no->", residual, residual, dtype=np.float64)) / len(residual) / max(self.power, 1e-300)
        )

    def _inner_factor(self, u: NDArray, damping: float) -> tuple[NDArray, bool]:
        inner = (u @ u.T).astype(np.float64)
        inner[np.diag_indices_from(inner)] += len(u) * damping
        return cholesky(inner)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows that keep the same features, and how they are fitted."""

    rows: NDArray[np.int64]
    features: NDArray[np.int64]
    damping: float
    factor: Callable[[], tuple[NDArray, bool]]


@dataclass(frozen=True, eq=False)
class _Moments:
    """First and second moments of some samples."""

    count: int
    gram: NDArray  # [features, features], mean of u u^T
    products: NDArray  # [out, features], mean of y u^T
    power: NDArray  # [out], mean of y^2
    mean_in: NDArray  # [features]
    mean_out: NDArray  # [out]

    @staticmethod
    def of(u: NDArray, y: NDArray) -> _Moments:
        """Of samples ``u`` [n, features] and ``y`` [n, out]."""
        return _Moments(
            count=len(u),
            gram=_gram(u) / np.float32(len(u)),
            products=_inner(y, u).astype(np.float64) / len(u),
            power=np.einsum("no,no->o", y, y, dtype=np.float64) / len(u),
            mean_in=u.mean(axis=0, dtype=np.float64),
            mean_out=y.mean(axis=0, dtype=np.float64),
        )

    def centered(self, rows: NDArray[np.int64], s: NDArray[np.int64]) -> tuple[NDArray, NDArray, float]:
        """(gram, products, total power) of some outputs and features, without the means."""
        mean_in, mean_out = self.mean_in[s], self.mean_out[rows]
        gram = self.gram[np.ix_(s, s)] - np.outer(mean_in, mean_in)
        products = self.products[np.ix_(rows, s)] - np.outer(mean_out, mean_in)
        return gram, products, float(np.sum(self.power[rows] - mean_out**2))


def cholesky(matrix: NDArray) -> tuple[NDArray, bool]:
    """The factor of a positive definite matrix, for scipy's cho_solve.

    By numpy, which lets other threads run meanwhile; scipy's does not. Transposed, it is laid out as LAPACK wants it.
    """
    return np.linalg.cholesky(matrix).T, False


def _centered(values: NDArray, mean: NDArray[np.float64], root: NDArray | None) -> NDArray:
    """``values`` [n, ...] less their ``mean``, times ``root`` [n, 1] if there is one, in threads."""
    result = np.empty_like(values)

    def fill(start: int, end: int) -> None:
        part = result[start:end]
        np.subtract(values[start:end], mean.astype(values.dtype), out=part)
        if root is not None:
            part *= root[start:end]

    ends = [len(values) * i // _PARTS for i in range(_PARTS + 1)]
    run_threads(fill, pairwise(ends))
    return result


def _gram(u: NDArray) -> NDArray:
    """``u.T @ u`` in threads; only one half of it is computed."""
    parts = np.array_split(np.arange(u.shape[1]), min(_PARTS, u.shape[1]))
    gram = np.empty((u.shape[1], u.shape[1]), u.dtype)

    def fill(columns: NDArray[np.int64]) -> None:
        start, end = columns[0], columns[-1] + 1
        gram[start:end, start:] = u[:, start:end].T @ u[:, start:]
        gram[end:, start:end] = gram[start:end, end:].T

    run_threads(fill, [(part,) for part in parts])
    return gram


def _inner(a: NDArray, b: NDArray) -> NDArray:
    """``a.T @ b`` in threads. The parts are the same whatever their number, and so is the rounding."""
    parts = np.array_split(np.arange(a.shape[1]), _PARTS)
    return np.concatenate(run_threads(lambda columns: a[:, columns].T @ b, [(part,) for part in parts if part.size]))
