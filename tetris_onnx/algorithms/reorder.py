"""Reordering: Algorithm 1 of TETRIS (Ji et al., NeurIPS 2018), for arrays of any order and any pruning method.

Find permutations of the axes and a mask such that the mask keeps as much importance as it can::

    maximize  sum(importance[perms[0]][:, perms[1]]... [keep])        keep = P(...), P the pruning method

by alternating two steps until nothing is gained:

- **E-step**: with the order fixed, let P choose the mask (for blocks: those with the largest sums);
- **M-step**: with the mask fixed, reorder one axis after the other.

All that the M-step needs to know about P is its grid of cells. Positions in the same group (row of cells) of an axis
are interchangeable, so a slice i of the axis gains ``gain[i, J]``, its importance on the kept cells of group J,
wherever in J it goes: the order of the axis is an assignment of n slices to groups with capacities. Two solvers:

- `exact_step`: the optimum, a transportation problem (network simplex, `ot.emd`). Groups with the same kept cells are
  the same destination and are merged first; at high sparsity few distinct ones are left. See `transport` for what
  makes the 25088 slices of VGG16's first fully connected layer affordable.
- `greedy_step`: the paper's pair swaps, best first, with the updates of section 4.2. The best swap of two groups
  needs only the best slice of each for the other, so the matrices are n x groups and groups x groups, never n x n.

Both steps only ever raise the objective, and end in a local optimum that depends on the start: `reorder` tries
several.

Why the mask must be chosen again after reordering, although both steps minimize the same L1 error: each step is the
best one only for what the other has left fixed. Blocks of two rows and one column, two of the four to be kept:

>>> import numpy as np
>>> from tetris_onnx.algorithms.blocks import block_sums, keep_mask
>>> importance = np.array([[5.0, 4.0],
...                        [5.0, 0.0],
...                        [4.0, 9.0],
...                        [3.0, 0.0]])
>>> block_sums(importance, (2, 1)).tolist()
[[10.0, 4.0], [7.0, 9.0]]
>>> keep_mask(importance, (2, 1), sparsity=0.5).tolist()  # E-step: keeps 10 + 9 = 19
[[True, False], [False, True]]

With this mask a row keeps its first number in the first group and its second number in the second. The best order
(M-step) has rows 1 and 3 in the first group, 5 + 3, and rows 0 and 2 in the second, 4 + 9; that keeps 21:

>>> reordered = importance[[1, 3, 0, 2]]
>>> block_sums(reordered, (2, 1)).tolist()
[[8.0, 0.0], [9.0, 13.0]]

In this order, though, the mask is no longer the best one. The M-step moves importance into the kept blocks with no
regard for what it leaves in the others, and a dropped block (9) now outweighs a kept one (8). Choosing again keeps
22, and gives the next M-step another mask to work for:

>>> keep_mask(reordered, (2, 1), sparsity=0.5).tolist()
[[False, False], [True, True]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.algorithms.blocks import block_sums, group_capacities, keep_count, keep_largest
from tetris_onnx.algorithms.permutation import Permutation, identity

Method = Literal["exact", "greedy", "none"]
Start = Literal["greedy", "identity", "sorted", "random", "shaken"]

# (gain [n, patterns], pattern of each group [G], capacity of each group [G], group of each slice [n]) -> new groups [n]
MStep = Callable[[NDArray, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]


class Pruner(Protocol):
    """A pruning method P: it keeps or drops the cells of a grid, each as a whole."""

    @property
    def block_size(self) -> tuple[int, ...]:
        """Length of a cell along each axis; the last cell of an axis is cut off where it does not divide."""
        ...

    def prune(self, sums: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The cells to keep, same shape as ``sums``: of all masks that P allows, one with the largest total."""
        ...


@dataclass(frozen=True)
class BlockPruner:
    """Keep the most important blocks, as many as ``sparsity`` leaves (see `blocks.keep_count`).

    A block size with ones makes other methods of it: ``(b, 1)`` prunes vectors, ``(1, 1)`` single elements.
    """

    block_size: tuple[int, ...]
    sparsity: float

    def prune(self, sums: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The mask of the largest sums, equal ones by their index."""
        return keep_largest(sums, keep_count(sums.size, self.sparsity))


@dataclass(frozen=True, eq=False)
class Reordering:
    """What `reorder` found. The reordered array is ``importance[perms[0]][:, perms[1]]...``."""

    perms: tuple[Permutation, ...]  # one per axis of the array; the identity where the axis keeps its order
    keep: NDArray[np.bool_]  # the pruner's mask of the cells of the reordered array
    retained: float  # share of all importance that lies in kept cells; 1 where there is none at all
    baseline: float  # the same without any reordering
    iterations: int  # E- and M-steps of the winning start
    start: str  # the winning start; "none" where no reordering was better


def default_starts(shape: Sequence[int], method: Method) -> tuple[Start, ...]:
    """The starts that `reorder` tries unasked, fewer the larger the array.

    On the grids of convolutions, starts win more than anything else and take milliseconds each. Shaking the best
    order wins more than starting anew: 16 starts, 4 of them random, retain more of a trained VGG16 than 64 random
    ones.
    """
    size = int(np.prod(shape, dtype=np.int64))
    more = min(64, 2**23 // size)
    random: list[Start] = ["random"] * min(4, more)
    shaken: list[Start] = ["shaken"] * max(0, more - 4)
    if method != "exact":
        return ("identity", "sorted", *random, *shaken)
    if size > 2**23:  # only fully connected layers are that large
        return ("greedy", "sorted")
    return ("greedy", "identity", "sorted", *random, *shaken)


def reorder(
    importance: NDArray,
    pruner: Pruner,
    axes: Sequence[int] = (0, 1),
    method: Method = "exact",
    starts: Sequence[Start] | None = None,
    seed: int = 0,
    max_iterations: int = 100,
) -> Reordering:
    """Find the order of ``axes`` in which ``pruner`` keeps the most of ``importance``.

    ``importance``: non-negative floats, any number of axes. ``method``: the M-step, or ``"none"`` to only choose the
    mask. ``starts``: the orders to start from, one after the other (default: `default_starts`); the best result wins.

    - ``"identity"``: the given order;
    - ``"sorted"``: by the norm of the slices;
    - ``"random"``: another one each time;
    - ``"shaken"``: the best order so far with three of ten slices of each axis shuffled;
    - ``"greedy"``: the end of the greedy search from the identity, itself a candidate.

    The result depends on the arguments only and never retains less than the given order; with ``"greedy"`` among the
    starts (as by default) never less than the greedy search from the identity.

    Raises ValueError for negative or non-finite importance and for axes or block sizes that do not fit.
    """
    shape, block_size = importance.shape, pruner.block_size
    if importance.dtype not in (np.float32, np.float64):
        importance = importance.astype(np.float64)
    if sorted({a % max(1, len(shape)) for a in axes}) != sorted(axes):
        raise ValueError(f"cannot reorder axes {tuple(axes)} of shape {shape}: name each from 0 up, once")
    if method not in ("exact", "greedy", "none"):
        raise ValueError(f"unknown method {method!r}: use 'exact', 'greedy' or 'none'")
    sums = block_sums(importance, block_size)
    if not np.isfinite(sums).all() or importance.min() < 0:
        raise ValueError("importance must be finite and not negative")
    total = float(sums.sum())
    keep = pruner.prune(sums)
    baseline = float(sums[keep].sum()) / total if total > 0 else 1.0
    origin = [identity(n) for n in shape]
    best = Reordering(tuple(origin), keep, baseline, baseline, 0, "none")
    # An axis with a single group has nothing to choose, and neither has a mask of everything or nothing.
    movable = [axis for axis in axes if shape[axis] > block_size[axis]]
    if method == "none" or not movable or total == 0 or keep.all() or not keep.any():
        return best

    def better(perms: Sequence[Permutation], iterations: int, start: Start) -> Reordering:
        ordered = importance
        for axis in movable:
            ordered = np.take(ordered, perms[axis], axis=axis)
        sums = block_sums(ordered, block_size)
        keep = pruner.prune(sums)
        retained = float(sums[keep].sum()) / total
        if retained <= best.retained:
            return best
        return Reordering(tuple(perms), keep, retained, baseline, iterations, start)

    rng = np.random.default_rng(seed)
    m_step = exact_step if method == "exact" else greedy_step
    # Exact iterations on a large array take seconds, and the last ones gain next to nothing; greedy ones cost little.
    tolerance = max(1e-6, 1e-11 * importance.size) if method == "exact" else 1e-6
    for start in default_starts(shape, method) if starts is None else starts:
        perms, iterations = list(origin), 0
        if start == "sorted":
            for axis in movable:
                norm = importance.sum(axis=tuple(a for a in range(len(shape)) if a != axis))
                perms[axis] = np.argsort(-norm, kind="stable")
        elif start == "random":
            for axis in movable:
                perms[axis] = rng.permutation(shape[axis])
        elif start == "shaken":
            for axis in movable:
                perms[axis] = best.perms[axis].copy()
                moved = rng.choice(shape[axis], max(2, round(0.3 * shape[axis])), replace=False)
                perms[axis][moved] = perms[axis][rng.permutation(moved)]
        elif start == "greedy" and method == "exact":
            perms, iterations = _alternate(importance, pruner, movable, perms, greedy_step, max_iterations, 1e-6)
            best = better(perms, iterations, start)
        elif start not in ("greedy", "identity"):
            raise ValueError(f"unknown start {start!r}: use 'greedy', 'identity', 'sorted', 'random' or 'shaken'")
        perms, more = _alternate(importance, pruner, movable, perms, m_step, max_iterations, tolerance)
        best = better(perms, iterations + more, start)
    return best


def _alternate(
    importance: NDArray,
    pruner: Pruner,
    axes: Sequence[int],
    perms: Sequence[Permutation],
    m_step: MStep,
    max_iterations: int,
    tolerance: float,
) -> tuple[list[Permutation], int]:
    """E- and M-steps until one of each gains less than the share ``tolerance``. Returns the order and their number."""
    perms, size = list(perms), pruner.block_size
    held = -1.0
    slices = _sum_other_groups(importance, perms, size, axes[0])
    for iteration in range(max_iterations):
        sums = _sum_groups(slices, axes[0], perms[axes[0]], size[axes[0]]).astype(np.float64)
        keep = pruner.prune(sums)
        previous, held = held, float(sums[keep].sum())
        if held <= previous * (1 + tolerance):
            return perms, iteration
        for axis, following in zip(axes, [*axes[1:], axes[0]], strict=True):
            n = importance.shape[axis]
            flat = np.moveaxis(slices, axis, 0).reshape(n, -1)
            kept = np.moveaxis(keep, axis, 0).reshape(keep.shape[axis], -1)
            _, first, pattern = np.unique(np.packbits(kept, axis=1), axis=0, return_index=True, return_inverse=True)
            gain = flat @ kept[first].T.astype(flat.dtype)
            groups = np.empty(n, np.int64)
            groups[perms[axis]] = np.arange(n) // size[axis]
            groups = m_step(gain, pattern.ravel(), group_capacities(n, size[axis]), groups)
            perms[axis] = np.argsort(groups, kind="stable")
            slices = _sum_other_groups(importance, perms, size, following)
    return perms, max_iterations


def exact_step(
    gain: NDArray, pattern: NDArray[np.int64], capacities: NDArray[np.int64], groups: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The best assignment of slices to groups, as a transportation problem.

    ``gain`` [n, P]: what slice i keeps in a group with the kept cells of pattern p; ``pattern`` [G]: the pattern of
    each group; ``capacities`` [G]: how many slices it takes; ``groups`` [n]: the present assignment. Returns the new
    one, [n].

    Which of the groups of one pattern a slice goes to does not matter to this step. It does to the next E-step, which
    can choose better among unequal blocks than among equal ones: they are filled in the order of gain.
    """
    target = pattern[groups]
    if gain.shape[1] > 1:
        target = transport(gain, np.bincount(pattern, weights=capacities, minlength=gain.shape[1]))
    seats = np.repeat(np.arange(capacities.size), capacities)
    seats = seats[np.argsort(pattern[seats], kind="stable")]
    assigned = np.empty_like(groups)
    assigned[np.lexsort((-gain[np.arange(groups.size), target], target))] = seats
    return assigned


def transport(gain: NDArray, room: NDArray) -> NDArray[np.int64]:
    """Assign n slices to destinations of limited room at the largest total gain. Returns the destinations, [n].

    ``gain`` [n, P]; ``room`` [P] whole numbers, at least one each, n in all.

    Network simplex takes its time by the number of slices, of which most are not contested at the right prices: they
    go where ``gain - price`` is largest, whoever else comes. So: estimate the prices on a sample, settle the slices
    whose best destination wins by the widest margins, solve for the rest, and ask the settled ones again at the new
    prices. When none would rather move, prices and assignment prove each other optimal (complementary slackness);
    otherwise those that would, and those that nearly would, are contested too. Exact in any case, and 2 to 7 times
    faster at n = 25088.
    """
    n, count = gain.shape
    gain = gain.astype(np.float64)
    if n <= _SAMPLE:
        return _network_simplex(gain, room)[0]
    sample = gain[:: -(-n // _SAMPLE)]
    _, price = _network_simplex(sample, room * (len(sample) / n))
    worth = gain - price
    target = worth.argmax(axis=1)
    # Of each destination, the widest margins up to four fifths of its room: the price of a full one would be unknown.
    order = np.lexsort((-_margin(worth, target), target))
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n) - np.searchsorted(target[order], np.arange(count))[target[order]]
    contested = rank >= 0.8 * room[target] - 1
    tolerance = 1e-9 * float(gain.max() - gain.min())
    while True:
        left = room - np.bincount(target[~contested], minlength=count)
        target[contested], price = _network_simplex(gain[contested], left)
        margin = np.where(contested, np.inf, _margin(gain - price, target))
        moves = margin < -tolerance
        if not moves.any():
            return target
        contested |= margin < -np.quantile(margin[moves], 0.5)


_SAMPLE = 4096  # slices that network simplex solves in some 0.1 s


def _margin(worth: NDArray[np.float64], target: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much each slice prefers its target to the best other destination. Overwrites ``worth`` there."""
    rows = np.arange(target.size)
    own = worth[rows, target]
    worth[rows, target] = -np.inf
    return own - worth.max(axis=1)


def _network_simplex(gain: NDArray[np.float64], room: NDArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The optimal destination of each slice and the prices of the destinations."""
    from ot.lp import emd  # imported here: the package takes seconds to load where PyTorch is installed

    flow, log = emd(np.ones(len(gain)), room.astype(np.float64), gain.max() - gain, numItermax=10**8, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"transport of {gain.shape[0]} slices to {gain.shape[1]} destinations: {log['warning']}")
    return flow.argmax(axis=1), -log["v"]


def greedy_step(
    gain: NDArray, pattern: NDArray[np.int64], capacities: NDArray[np.int64], groups: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Swap the pair of slices that gains the most until no swap gains anything. Arguments and result as `exact_step`.

    ``best[J, p]`` is the most that one slice of group J gains by going to a group of pattern p. Of the groups with one
    pattern only the best giver counts, ``most[p, q] = max of best[J, q] over the groups J of pattern p``, so the best
    swap between patterns p and q gains ``most[p, q] + most[q, p]``: the search is among patterns, of which there may be
    far fewer than groups. A swap changes two rows of ``best``: O(n) work for groups of fixed size (section 4.2).
    """
    count = capacities.size
    groups = groups.copy()
    own = gain[np.arange(groups.size), pattern[groups]]
    # Rounding must not make a swap and its reverse both look like gains.
    tolerance = 8 * float(np.finfo(gain.dtype).eps) * float(gain.max(initial=0.0))
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(capacities)[:-1])
    best = np.empty((count, gain.shape[1]), gain.dtype)
    which = np.empty(best.shape, np.int64)  # the position in members[J] of the slice meant by best[J, p]
    patterns = np.arange(gain.shape[1])

    def update(j: int) -> None:
        moves = gain[members[j]] - own[members[j], None]
        which[j] = moves.argmax(axis=0)
        best[j] = moves[which[j], patterns]

    for j in range(count):
        update(j)
    groups_of = [np.flatnonzero(pattern == p) for p in patterns]
    giver = np.array([of[best[of].argmax(axis=0)] for of in groups_of])  # the group J meant by most[p, q]
    most = best[giver, patterns]

    def give_anew(p: int, j: int) -> None:
        """Bring ``most[p]`` up to date with a new ``best[j]`` of one of its groups."""
        others = groups_of[p]
        if others.size == 1:
            most[p] = best[j]
            return
        more = best[j] > most[p]
        giver[p, more] = j
        lost = np.flatnonzero((giver[p] == j) & ~more)
        if lost.size:
            giver[p, lost] = others[best[np.ix_(others, lost)].argmax(axis=0)]
        most[p] = best[giver[p], patterns]

    swap = most + most.T
    np.fill_diagonal(swap, -np.inf)
    # A best partner of each pattern, so that the best swap is found without a look at all of them.
    partner = swap.argmax(axis=1)
    value = swap.max(axis=1)
    while True:
        p = int(value.argmax())
        if not value[p] > tolerance:
            return groups
        q = int(partner[p])
        j, k = int(giver[p, q]), int(giver[q, p])
        from_j, from_k = which[j, q], which[k, p]
        a, b = members[j][from_j], members[k][from_k]
        members[j][from_j], members[k][from_k] = b, a
        groups[a], groups[b] = k, j
        own[a], own[b] = gain[a, q], gain[b, p]
        # Rows whose best partner was one of the two may have lost it. Those that found a better one in them need no
        # update: the same swap stands in row p or q.
        stale = (partner == p) | (partner == q)
        stale[p] = stale[q] = True
        for g, changed in ((p, j), (q, k)):
            update(changed)
            give_anew(g, changed)
        for g in (p, q):
            swap[g] = swap[:, g] = most[g] + most[:, g]
            swap[g, g] = -np.inf
        rows = np.flatnonzero(stale)
        found = swap[rows]
        partner[rows] = found.argmax(axis=1)
        value[rows] = found.max(axis=1)


def _sum_other_groups(array: NDArray, perms: Sequence[Permutation], size: Sequence[int], axis: int) -> NDArray:
    """Sums over the groups of every axis but ``axis``, which keeps its length and its original order."""
    for other in reversed(range(array.ndim)):
        if other != axis:
            array = _sum_groups(array, other, perms[other], size[other])
    return array


def _sum_groups(array: NDArray, axis: int, perm: Permutation, size: int) -> NDArray:
    """``array`` with ``axis`` gathered by ``perm`` and summed in groups of ``size``, without a reordered copy of it."""
    n = array.shape[axis]
    if size == 1:
        return np.take(array, perm, axis=axis)
    count = -(-n // size)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    out = np.empty((*before, count, *after), array.dtype)
    source = array.reshape(int(np.prod(before, dtype=np.int64)), n, -1)
    target = out.reshape(source.shape[0], count, -1)
    if source.shape[2] > 1:
        for g in range(count):
            source[:, perm[g * size : (g + 1) * size]].sum(axis=1, out=target[:, g])
        return out
    # The last axis: gather some rows at a time, and let BLAS add up the short runs (numpy's sum is slow on those).
    full, ones = n // size, np.ones(size, array.dtype)
    chunk = max(1, 2**20 // n)
    for row in range(0, source.shape[0], chunk):
        part = np.take(source[row : row + chunk, :, 0], perm, axis=1)
        target[row : row + chunk, :full, 0] = part[:, : full * size].reshape(len(part), full, size) @ ones
        if full < count:
            target[row : row + chunk, full, 0] = part[:, full * size :].sum(axis=1)
    return out
