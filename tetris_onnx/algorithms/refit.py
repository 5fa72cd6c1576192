"""Recover a pruned layer's output without training: least squares on what the layer sees.

A layer computes ``y = W u + b`` from features ``u`` (its input channels, times the kernel's taps). After pruning, the
kept weights can be fitted to the outputs of the dense layer on a few hundred samples, even though the layers before it
have been pruned and its own inputs have changed. With means removed, per sample

    H = mean(u u^T) + lam I,    G = mean(y u^T) + lam W,    lam = damping * mean(diag(mean(u u^T)))

the best weights on a support ``s`` are ``W_s = G_s inv(H_ss)`` (ridge regression towards the dense weights), with the
error ``mean(y^2) - G_s inv(H_ss) G_s^T``. All rows of one block row share a support, so one factorization serves them.

Which blocks to drop follows from the same matrices (optimal brain surgeon, Hassibi & Stork 1993): dropping the
features ``J`` from a support and refitting the rest costs exactly

    w_J inv(inv(H)_JJ) w_J^T        per row w of the weights fitted so far.

`eliminate_blocks` drops the cheapest block, refits, and repeats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Damping = float
DAMPING = 1e-2


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What the least squares of one layer needs. Features are ordered (channel, tap): ``d = channels * taps``."""

    hessian: NDArray  # [d, d], damped
    cross: NDArray  # [out, d], damped
    mean_in: NDArray  # [d]
    mean_out: NDArray  # [out]
    power_out: NDArray  # [out], mean of (y - mean_out)^2


def moments(features: NDArray, outputs: NDArray, weight: NDArray, damping: Damping = DAMPING) -> LayerMoments:
    """Moments of samples ``features`` [n, d] and dense ``outputs`` [n, out], for a dense weight [out, d]."""
    total = MomentSums(features.shape[1], outputs.shape[1])
    total.add(features, outputs)
    return total.finish(weight, damping)


class MomentSums:
    """Running sums of products, so that any number of samples fits in memory."""

    def __init__(self, features: int, outputs: int) -> None:
        self._count = 0
        self._uu = np.zeros((features, features), np.float64)
        self._yu = np.zeros((outputs, features), np.float64)
        self._u = np.zeros(features)
        self._y = np.zeros(outputs)
        self._yy = np.zeros(outputs)

    def add(self, features: NDArray, outputs: NDArray) -> None:
        """Add samples [n, d] and [n, out]."""
        self._count += len(features)
        # Products in the samples' own float32, sums over the chunks in float64.
        self._uu += features.T @ features
        self._yu += outputs.T @ features
        self._u += features.sum(0, dtype=np.float64)
        self._y += outputs.sum(0, dtype=np.float64)
        self._yy += np.einsum("no,no->o", outputs, outputs, dtype=np.float64)

    def finish(self, weight: NDArray, damping: Damping = DAMPING) -> LayerMoments:
        """The moments of all samples, for the dense weight [out, d]."""
        n = max(self._count, 1)
        mean_in, mean_out = self._u / n, self._y / n
        hessian = self._uu / n - np.outer(mean_in, mean_in)
        cross = self._yu / n - np.outer(mean_out, mean_in)
        # A feature that never changes (a dead channel) has a zero row: the damping keeps the matrix invertible.
        lam = damping * max(float(np.trace(hessian)) / len(hessian), np.finfo(np.float32).tiny)
        hessian[np.diag_indices_from(hessian)] += lam
        cross += lam * weight
        return LayerMoments(hessian, cross, mean_in, mean_out, np.maximum(self._yy / n - mean_out**2, 0))


def saliency(m: LayerMoments) -> NDArray:
    """What dropping each single weight [out, d] costs after the rest is refitted."""
    inverse = _inverse(m.hessian)
    return (m.cross @ inverse) ** 2 / np.diag(inverse)


def eliminate_blocks(
    m: LayerMoments, rows: NDArray[np.int64], blocks: list[NDArray[np.int64]], inverse: NDArray
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Drop the blocks of features of one block row, cheapest first, refitting after each.

    ``rows``: the outputs of the block row; ``blocks``: the features of each block; ``inverse``: that of the Hessian, in
    the type to compute in. Returns (indices of ``blocks`` in the order of dropping, what each drop adds to the squared
    error). O(d^3) for d features.
    """
    layout = np.concatenate(blocks)
    ends = np.cumsum([len(block) for block in blocks])
    where = {i: np.arange(end - len(blocks[i]), end) for i, end in enumerate(ends)}
    inv = inverse[np.ix_(layout, layout)]
    w = m.cross[np.ix_(rows, layout)].astype(inv.dtype) @ inv
    active = list(range(len(blocks)))
    order: list[int] = []
    costs: list[float] = []
    while active:
        factors = {i: linalg.cho_factor(inv[np.ix_(where[i], where[i])], lower=True, check_finite=False) for i in active}
        solved = {i: linalg.cho_solve(factors[i], w[:, where[i]].T, check_finite=False) for i in active}
        cost = {i: float(np.einsum("rj,jr->", w[:, where[i]], solved[i], dtype=np.float64)) for i in active}
        dropped = min(active, key=lambda i: cost[i])
        active.remove(dropped)
        order.append(dropped)
        costs.append(cost[dropped])
        if not active:
            break
        gone = where[dropped]
        columns = inv[gone]
        w -= solved[dropped].T @ columns
        inv -= columns.T @ linalg.cho_solve(factors[dropped], columns, check_finite=False)
        # The last features move to where the dropped ones were, so that what is left stays one square.
        size = len(inv) - len(gone)
        holes = gone[gone < size]
        movers = np.setdiff1d(np.arange(size, len(inv)), gone)
        w[:, holes] = w[:, movers]
        inv[holes] = inv[movers]
        inv[:, holes] = inv[:, movers]
        moved = np.arange(len(inv))
        moved[movers] = holes
        where = {i: moved[where[i]] for i in active}
        inv, w = inv[:size, :size], w[:, :size]
    return np.array(order, np.int64), np.array(costs)


def choose_blocks(orders: list[NDArray[np.int64]], costs: list[NDArray], drop: int) -> NDArray[np.bool_]:
    """Keep mask [rows, blocks] after dropping ``drop`` blocks in all, each block row in its own order.

    A cheap drop behind an expensive one is only to be had with it: runs of drops are taken at their mean cost.
    """
    keep = np.ones((len(orders), len(orders[0]) if orders else 0), bool)
    taken = [0] * len(orders)
    runs = [_merge_runs(c) for c in costs]
    heads = [0] * len(orders)
    while drop > 0:
        row = min(
            (r for r in range(len(orders)) if heads[r] < len(runs[r])), key=lambda r: runs[r][heads[r]][0], default=None
        )
        if row is None:
            break
        count = min(runs[row][heads[row]][1], drop)
        keep[row, orders[row][taken[row] : taken[row] + count]] = False
        taken[row] += count
        drop -= count
        heads[row] += 1
    return keep


def _merge_runs(costs: NDArray) -> list[tuple[float, int]]:
    """(mean cost, length) of runs of drops, merged until the means rise."""
    runs: list[tuple[float, int]] = []
    for cost in costs.tolist():
        runs.append((cost, 1))
        while len(runs) > 1 and runs[-2][0] >= runs[-1][0]:
            (c1, n1), (c2, n2) = runs[-2:]
            runs[-2:] = [((c1 * n1 + c2 * n2) / (n1 + n2), n1 + n2)]
    return runs


def refit(m: LayerMoments, keep: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """The best weights [out, d] that are zero outside ``keep`` [out, d], and their bias [out].

    Rows with the same support are solved together.
    """
    weight = np.zeros(keep.shape)
    supports: dict[bytes, list[int]] = {}
    for row, mask in enumerate(keep):
        supports.setdefault(np.packbits(mask).tobytes(), []).append(row)
    for rows in supports.values():
        s = np.flatnonzero(keep[rows[0]])
        if s.size:
            factor = linalg.cho_factor(m.hessian[np.ix_(s, s)], lower=True, check_finite=False)
            weight[np.ix_(rows, s)] = linalg.cho_solve(factor, m.cross[np.ix_(rows, s)].T, check_finite=False).T
    return weight, m.mean_out - weight @ m.mean_in


def relative_error(m: LayerMoments, weight: NDArray) -> float:
    """Squared error of a fitted ``weight`` [out, d] over the variance of the dense outputs (with the damping's share)."""
    quadratic = np.einsum("od,od->", weight @ m.hessian, weight)
    error = float(m.power_out.sum() - 2 * np.einsum("od,od->", weight, m.cross) + quadratic)
    return max(error, 0.0) / max(float(m.power_out.sum()), np.finfo(np.float64).tiny)


def _inverse(matrix: NDArray) -> NDArray:
    factor = linalg.cho_factor(matrix, lower=True, check_finite=False)
    return linalg.cho_solve(factor, np.eye(len(matrix)), check_finite=False)
