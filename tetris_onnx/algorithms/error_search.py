"""The blocks and permutations with the smallest output error: TETRIS's EM on the true error, not a sum of importance.

A sum of importance treats weights as independent. The samples of a layer (see refit) give what dropping a set of
weights really costs, refit included, so the two steps of Algorithm 1 can work on that:

    E: in each block row, drop the cheapest block, refit the rest, repeat (`eliminate_blocks`, exact costs); then take
       the cheapest drops of all block rows (`choose_blocks`).
    M: with the supports fixed, give each output channel to the block row whose support explains it best (transport,
       exact); give each input channel to the blocks whose rows would miss it most (transport, estimated gains).

Both start from the order that `reorder` finds for the importance `LayerSamples.saliency`. A step that does not lower
the error is not taken.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.algorithms.blocks import group_capacities, original_mask
from tetris_onnx.algorithms.permutation import Permutation
from tetris_onnx.algorithms.refit import LayerSamples
from tetris_onnx.algorithms.reorder import transport
from tetris_onnx.algorithms.threads import run_threads
from tetris_onnx.algorithms.triangular import inverse_of_lower

_MAX_ITERATIONS = 3
_MANY = 32  # of so many blocks, one at a time is dropped; of more, as large a share
# Other starts, from the best order with a third of the channels shuffled, where they cost little: small layers have
# poor local optima (ResNet-20: up to 6 % of a layer's error). Block rows times cubed features, see _prune.
_MOST_SHAKES = 8
_SHAKING_WORK = 10**10
_LEAST_GAIN = 0.03  # share of the error that an iteration has to save for another one to follow
_threads = threading.local()  # what `_scratch` holds


@dataclass(frozen=True, eq=False)
class Pruned:
    """Permutations [out] and [in], the keep mask of the blocks, and the layer's relative output error with them."""

    out_perm: Permutation
    in_perm: Permutation
    keep: NDArray[np.bool_]
    error: float


def search(
    samples: LayerSamples,
    start: tuple[Permutation, Permutation],
    block_size: tuple[int, int],
    drop: int,
    axes: Sequence[int] = (0, 1),
    workers: int | None = None,
) -> Pruned:
    """Choose ``drop`` blocks to drop and improve the permutations ``start`` of the axes in ``axes``.

    Needs more samples than features. ``workers``: threads; the result does not depend on them.
    """
    best = _alternate(samples, start, block_size, drop, axes, workers)
    rng = np.random.default_rng(0)
    work = -(-start[0].size // block_size[0]) * samples.features**3
    for _ in range(min(_MOST_SHAKES, _SHAKING_WORK // work) if axes else 0):
        perms = [best.out_perm.copy(), best.in_perm.copy()]
        for axis in axes:
            moved = rng.choice(perms[axis].size, -(-perms[axis].size // 3), replace=False)
            perms[axis][moved] = perms[axis][rng.permutation(moved)]
        found = _alternate(samples, (perms[0], perms[1]), block_size, drop, axes, workers)
        best = min(best, found, key=lambda p: p.error)
    keep = support((best.out_perm, best.in_perm), block_size, best.keep, samples.features // best.in_perm.size)
    return replace(best, error=samples.error(samples.refit(keep, workers=workers)[0]))


def _alternate(
    samples: LayerSamples,
    start: tuple[Permutation, Permutation],
    block_size: tuple[int, int],
    drop: int,
    axes: Sequence[int],
    workers: int | None,
) -> Pruned:
    """E- and M-steps from one start. The errors are those of the damped problem."""
    best = _prune(samples, *start, block_size, drop, workers)
    for _ in range(_MAX_ITERATIONS):
        previous = best.error
        for axis in axes:
            perms = [best.out_perm, best.in_perm]
            assign = _assign_outputs if axis == 0 else _assign_inputs
            perms[axis] = assign(samples, best, block_size, workers)
            found = _prune(samples, perms[0], perms[1], block_size, drop, workers)
            best = min(best, found, key=lambda p: p.error)
        if best.error > previous * (1 - _LEAST_GAIN):
            break
    return best


def support(
    plan: tuple[Permutation, Permutation], block_size: tuple[int, int], keep: NDArray[np.bool_], taps: int
) -> NDArray:
    """Which features [out, in * taps] survive, in the layer's own order."""
    return np.repeat(original_mask(keep, block_size, *plan), taps, axis=1)


def eliminate_blocks(
    inverse: NDArray[np.float32], fitted: NDArray[np.float32], most: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Drop the blocks of features of one block row, cheapest first, refitting after each.

    ``inverse`` [blocks, size, blocks, size]: that of the Hessian; ``fitted`` [rows, blocks, size]: the best weights on
    all features (`by_blocks` makes both); ``most``: how many to drop (all by default). Returns (blocks in the order of
    dropping, what each drop adds to the squared error).

    With the features J dropped and ``L L^T = A_JJ`` (A the inverse), the inverse for the rest is ``A - V^T V`` with
    ``V = inv(L) A_J`` and the weights are ``w - Z^T V`` with ``Z = inv(L) w_J^T``. So only V grows, by one product per
    drop. The diagonal blocks of the rest only shrink with it: a block's cost by its diagonal of an earlier step is a
    lower bound, and only blocks whose bound is among the least have their diagonal brought up to date. Of very many
    blocks several are dropped at a time.
    """
    count, size = inverse.shape[:2]
    rows, most = len(fitted), count if most is None else min(most, count)
    live = np.arange(count)  # the block in each slot; slots of dropped blocks are filled with the last ones
    diagonal = inverse[live, :, live, :]
    whiten = inverse_of_lower(np.linalg.cholesky(diagonal))
    known = np.zeros(count, np.int64)  # so many rows of V are in the diagonal of each slot
    w = fitted.reshape(rows, count * size).copy()
    v = _scratch(most * size, count * size)
    order: list[NDArray[np.int64]] = []
    costs: list[NDArray[np.float64]] = []
    done = 0
    while done < most:
        n, held = live.size, done * size
        by_slot = w[:, : n * size].reshape(rows, n, size).transpose(1, 2, 0)
        cost = _squares(whiten[:n] @ by_slot)
        batch = min(max(1, n // _MANY), most - done)
        while True:
            slots = np.argsort(cost, kind="stable")[:batch]
            late = slots[known[slots] < held]
            if not late.size:
                break
            for slot in late:
                part = v[known[slot] : held, slot * size : (slot + 1) * size]
                diagonal[slot] -= part.T @ part
                whiten[slot] = inverse_of_lower(np.linalg.cholesky(diagonal[slot]))
            known[late] = held
            cost[late] = _squares(whiten[late] @ by_slot[late])
        gone = _positions(slots, size)
        columns = inverse[live[slots]][:, :, live].reshape(gone.size, n * size)
        columns -= v[:held, gone].T @ v[:held, : n * size]
        white = whiten[slots[0]] if batch == 1 else inverse_of_lower(np.linalg.cholesky(columns[:, gone]))
        added = np.matmul(white, columns, out=v[held : held + gone.size, : n * size])
        z = white @ w[:, gone].T
        order.append(live[slots])
        costs.append(np.sum(z.reshape(batch, -1).astype(np.float64) ** 2, axis=1))
        done += batch
        w[:, : n * size] -= z.T @ added
        left = n - batch
        for hole, mover in zip(np.sort(slots[slots < left]), np.setdiff1d(np.arange(left, n), slots), strict=True):
            for array in (live, known, diagonal, whiten):
                array[hole] = array[mover]
            for array in (w, v[: done * size]):
                array[:, hole * size : (hole + 1) * size] = array[:, mover * size : (mover + 1) * size]
        live = live[:left]
    return np.concatenate([np.zeros(0, np.int64), *order]), np.concatenate([np.zeros(0), *costs])


def _squares(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sum of squares of each of a stack of matrices."""
    return np.einsum("nsr,nsr->n", vectors, vectors)


def _scratch(rows: int, columns: int) -> NDArray[np.float32]:
    """An array of any values, in the same memory for each call of a thread: new memory is slow."""
    if getattr(_threads, "memory", np.empty(0)).size < rows * columns:
        _threads.memory = np.empty(rows * columns, np.float32)
    return _threads.memory[: rows * columns].reshape(rows, columns)


def by_blocks(
    inverse: NDArray, fitted: NDArray, blocks: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``inverse`` [d, d] and ``fitted`` [rows, d] for `eliminate_blocks`, given the features of each block.

    A block shorter than the others is filled with features that stand alone and have no weight: they cost nothing.
    """
    count, size = len(blocks), max(len(block) for block in blocks)
    real = np.concatenate([i * size + np.arange(len(block)) for i, block in enumerate(blocks)])
    layout = np.concatenate(list(blocks))
    if real.size == count * size:
        padded, weights = inverse[np.ix_(layout, layout)], fitted[:, layout]
    else:
        padded, weights = np.eye(count * size, dtype=np.float32), np.zeros((len(fitted), count * size), np.float32)
        padded[np.ix_(real, real)] = inverse[np.ix_(layout, layout)]
        weights[:, real] = fitted[:, layout]
    return (
        padded.astype(np.float32, copy=False).reshape(count, size, count, size),
        weights.astype(np.float32, copy=False).reshape(len(fitted), count, size),
    )


def _positions(slots: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    return (slots[:, None] * size + np.arange(size)).ravel()


def choose_blocks(
    orders: Sequence[NDArray[np.int64]], costs: Sequence[NDArray[np.float64]], columns: int, drop: int
) -> NDArray[np.bool_]:
    """Keep mask [block rows, columns] after ``drop`` drops in all, each block row in its own order.

    A cheap drop behind a dear one is only to be had with it: runs of drops are taken at their mean cost.
    """
    keep = np.ones((len(orders), columns), bool)
    runs = [(mean, row, start, length) for row, cost in enumerate(costs) for mean, start, length in _rising_runs(cost)]
    for _, row, start, length in sorted(runs):  # means rise within a block row, so its runs come in order
        taken = min(length, drop)
        keep[row, orders[row][start : start + taken]] = False
        drop -= taken
    return keep


def error_curve(
    samples: LayerSamples,
    perms: tuple[Permutation, Permutation],
    block_size: tuple[int, int],
    workers: int | None = None,
) -> ErrorCurve:
    """The layer's error for every number of kept blocks, in one order of the channels: one elimination per block row.

    Needs more samples than features.
    """
    orders, costs, columns = _eliminate(samples, perms, block_size, None, workers)
    runs = sorted((mean, row, start, n) for row, cost in enumerate(costs) for mean, start, n in _rising_runs(cost))
    rising = np.concatenate([np.full(n, mean) for mean, _, _, n in runs])
    errors = np.concatenate([[0.0], np.cumsum(rising)]) + _least_error(samples)
    return ErrorCurve(perms, block_size, orders, costs, columns, errors[::-1] / max(samples.power, 1e-300))


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """What `error_curve` found. ``errors[k]``: squared error over the output's variance with k blocks kept."""

    perms: tuple[Permutation, Permutation]
    block_size: tuple[int, int]
    orders: list[NDArray[np.int64]]
    costs: list[NDArray[np.float64]]
    columns: int
    errors: NDArray[np.float64]

    def keep(self, kept: int) -> NDArray[np.bool_]:
        """The best mask that keeps ``kept`` blocks."""
        return choose_blocks(self.orders, self.costs, self.columns, self.errors.size - 1 - kept)


def _rising_runs(costs: NDArray[np.float64]) -> list[tuple[float, int, int]]:
    """(mean cost, start, length) of runs of drops, merged until the means rise."""
    runs: list[tuple[float, int, int]] = []
    for i, cost in enumerate(costs.tolist()):
        runs.append((cost, i, 1))
        while len(runs) > 1 and runs[-2][0] >= runs[-1][0]:
            (a, start, n), (b, _, m) = runs[-2:]
            runs[-2:] = [((a * n + b * m) / (n + m), start, n + m)]
    return runs


def _prune(
    samples: LayerSamples,
    out_perm: Permutation,
    in_perm: Permutation,
    block: tuple[int, int],
    drop: int,
    workers: int | None,
) -> Pruned:
    orders, costs, columns = _eliminate(samples, (out_perm, in_perm), block, drop, workers)
    keep = choose_blocks(orders, costs, columns, drop)
    dropped = sum(float(cost[: int((~kept).sum())].sum()) for cost, kept in zip(costs, keep, strict=True))
    return Pruned(out_perm, in_perm, keep, (_least_error(samples) + dropped) / max(samples.power, 1e-300))


def _least_error(samples: LayerSamples) -> float:
    """The damped squared error with all weights; zero, but for rounding, for the dense layer's own inputs."""
    towards = samples.power + samples.damping * float(np.sum(samples.weight**2, dtype=np.float64))
    return max(towards - float(np.einsum("of,of->", samples.fitted, samples.cross)), 0.0)


def _eliminate(
    samples: LayerSamples,
    perms: tuple[Permutation, Permutation],
    block: tuple[int, int],
    drop: int | None,
    workers: int | None,
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float64]], int]:
    """`eliminate_blocks` for every block row, far enough to ``drop`` so many in all: orders, costs, block columns."""
    out_perm, in_perm = perms
    blocks = _features(samples, in_perm, block[1])
    groups = [out_perm[i : i + block[0]] for i in range(0, out_perm.size, block[0])]
    # A block row that loses far more than its share is not worth looking at.
    most = None if drop is None else min(len(blocks), -(-drop * 3 // (2 * len(groups))) + 1)
    inverse, fitted = by_blocks(samples.inverse, samples.fitted, blocks)
    found = run_threads(eliminate_blocks, [(inverse, fitted[rows], most) for rows in groups], workers)
    return [order for order, _ in found], [cost for _, cost in found], len(blocks)


def _assign_outputs(samples: LayerSamples, pruned: Pruned, block: tuple[int, int], workers: int | None) -> Permutation:
    """Output channels by the block row whose support explains most of them: exact for the supports as they are."""
    blocks = _features(samples, pruned.in_perm, block[1])
    supports = [_union(blocks, row) for row in pruned.keep]
    gain = np.stack(run_threads(_explained, [(samples, s) for s in supports], workers), axis=1)
    room = group_capacities(pruned.out_perm.size, block[0]).astype(np.float64)
    return np.argsort(_assign(gain, room), kind="stable")


def _explained(samples: LayerSamples, s: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much the features ``s`` lower each output's squared error, [out]."""
    if not s.size:
        return np.zeros(len(samples.cross))
    return np.sum((_whiten(samples, s) @ samples.cross[:, s].T.astype(np.float32)) ** 2, axis=0, dtype=np.float64)


def _whiten(samples: LayerSamples, s: NDArray[np.int64]) -> NDArray:
    """The inverse of L, for ``H_ss = L L^T``. In single precision: what it serves is a choice between blocks."""
    return inverse_of_lower(np.linalg.cholesky(samples.hessian[np.ix_(s, s)].astype(np.float32)))


def _assign_inputs(samples: LayerSamples, pruned: Pruned, block: tuple[int, int], workers: int | None) -> Permutation:
    """Input channels by what each block's rows lose without them (kept ones) or would gain with them (others)."""
    groups = [pruned.out_perm[i : i + block[0]] for i in range(0, pruned.out_perm.size, block[0])]
    blocks = _features(samples, pruned.in_perm, block[1])
    tasks = [(samples, rows, blocks, kept, pruned.in_perm.size) for rows, kept in zip(groups, pruned.keep, strict=True)]
    worth = np.stack(run_threads(_channel_worth, tasks, workers))  # [block rows, in]
    gain = worth.T @ pruned.keep.astype(np.float64)
    room = group_capacities(pruned.in_perm.size, block[1]).astype(np.float64)
    return np.argsort(_assign(gain, room), kind="stable")


def _channel_worth(
    samples: LayerSamples,
    rows: NDArray[np.int64],
    blocks: Sequence[NDArray[np.int64]],
    kept: NDArray[np.bool_],
    channels: int,
) -> NDArray[np.float64]:
    """What each input channel is worth [in] to the rows of one block row, given its other channels.

    For a channel of the support, what dropping it costs; for another one, what adding it would save.
    """
    taps = samples.features // channels
    s = _union(blocks, kept)
    rest = np.setdiff1d(np.arange(samples.features), s)
    cross = samples.cross[rows].astype(np.float32)
    worth = np.zeros(channels)
    white = _whiten(samples, s) if s.size else np.zeros((0, 0), np.float32)
    z = white @ cross[:, s].T
    fitted = z.T @ white
    lifted = white @ samples.hessian[np.ix_(s, rest)].astype(np.float32)
    residual = cross[:, rest] - z.T @ lifted
    for start in range(0, s.size, taps):
        part = slice(start, start + taps)
        worth[s[start] // taps] = _quadratic(fitted[:, part], white[:, part].T @ white[:, part])
    for start in range(0, rest.size, taps):
        part = slice(start, start + taps)
        left = samples.hessian[np.ix_(rest[part], rest[part])] - lifted[:, part].T @ lifted[:, part]
        worth[rest[start] // taps] = _quadratic(residual[:, part], left)
    return worth


def _quadratic(vectors: NDArray, matrix: NDArray) -> float:
    """Sum over rows v of ``v inv(matrix) v^T``."""
    return float(np.sum(vectors * np.linalg.solve(matrix, vectors.T).T))


def _union(blocks: Sequence[NDArray[np.int64]], kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The features of the kept blocks, channel by channel."""
    return np.concatenate([np.zeros(0, np.int64), *(block for block, keep in zip(blocks, kept, strict=True) if keep)])


def _assign(gain: NDArray[np.float64], room: NDArray[np.float64]) -> NDArray[np.int64]:
    return transport(gain, room) if len(room) > 1 else np.zeros(len(gain), np.int64)


def _features(samples: LayerSamples, in_perm: Permutation, columns: int) -> list[NDArray[np.int64]]:
    """The features of each block column."""
    taps = samples.features // in_perm.size
    groups = [in_perm[j : j + columns] for j in range(0, in_perm.size, columns)]
    return [(group[:, None] * taps + np.arange(taps)).ravel() for group in groups]
