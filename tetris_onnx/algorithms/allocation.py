"""How much to prune where: spread one budget over layers so that the predicted loss is least.

Each layer is given as a list of options, one per number of kept blocks, with a cost (multiplications, weights or time)
and a loss (what the option does to the network's output). Losses of layers are taken to add up, as squared errors of
independent causes do. Choosing one option per layer is then a multiple-choice knapsack problem::

    minimize  sum(loss[l][choice[l]])    subject to  sum(cost[l][choice[l]]) <= budget

which `scipy.optimize.milp` solves to optimality in milliseconds: its linear relaxation splits one layer at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from tetris_onnx.algorithms.blocks import group_capacities
from tetris_onnx.errors import TetrisError

# Options per layer; between neighbors of so many, loss and cost differ by less than either is known.
MOST_OPTIONS = 65
_GAP = 1e-4  # the solution's loss is at most this share above the least one


class BudgetError(TetrisError, ValueError):
    """A budget below the cheapest choice of all layers."""


@dataclass(frozen=True, eq=False)
class Options:
    """What can become of one layer: option i keeps ``kept[i]`` blocks, costs ``cost[i]`` and loses ``loss[i]``."""

    kept: NDArray[np.int64]
    cost: NDArray[np.float64]
    loss: NDArray[np.float64]

    def __post_init__(self) -> None:
        if not (self.kept.shape == self.cost.shape == self.loss.shape and self.kept.ndim == 1 and self.kept.size):
            raise ValueError(f"options of {self.kept.shape}, {self.cost.shape} and {self.loss.shape} do not match")
        if not (np.isfinite(self.cost).all() and np.isfinite(self.loss).all()):
            raise ValueError("the cost and the loss of an option must be finite")


def allocate(layers: Sequence[Options], budget: float) -> list[int]:
    """The index of the option of each layer, with the least total loss among those that cost ``budget`` at most.

    Raises `BudgetError` where even the cheapest options cost more.
    """
    useful = [_undominated(options) for options in layers]
    cheapest = sum(float(options.cost.min()) for options in layers)
    if cheapest > budget:
        raise BudgetError(f"the cheapest choice costs {cheapest:.6g}, more than the budget of {budget:.6g}")
    if not layers:
        return []
    best = [int(indices[-1]) for indices in useful]
    if _total(layers, best) <= budget:
        return best
    greedy = _greedy(layers, useful, budget)
    # HiGHS has absolute tolerances: costs and losses are scaled to the order of 1.
    scale = max(sum(float(o.loss[i]) for o, i in zip(layers, greedy, strict=True)), 1e-300)
    cost = np.concatenate([o.cost[indices] for o, indices in zip(layers, useful, strict=True)])
    loss = np.concatenate([o.loss[indices] for o, indices in zip(layers, useful, strict=True)])
    ends = np.cumsum([len(indices) for indices in useful])
    one_each = sparse.block_diag([np.ones((1, len(indices))) for indices in useful], format="csr")
    limit = budget
    while True:
        found = optimize.milp(
            # Losses far above those of a good choice only spoil the numbers.
            np.minimum(loss / scale, 1e4),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(cost[None] / budget, -np.inf, limit / budget),
            ],
            integrality=1,
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": _GAP},
        )
        if found.x is None:
            return greedy
        parts = np.split(found.x, ends[:-1])
        chosen = [int(indices[part.argmax()]) for indices, part in zip(useful, parts, strict=True)]
        over = _total(layers, chosen) - budget
        if over <= 0:
            return min(chosen, greedy, key=lambda c: sum(float(o.loss[i]) for o, i in zip(layers, c, strict=True)))
        limit -= 2 * over  # by less than the solver's tolerance


def kept_shares(shape: tuple[int, int], block_size: tuple[int, int]) -> NDArray[np.float64]:
    """The largest share of the weights [out, in] that ``k`` kept blocks can hold, for k = 0 .. all: [all + 1].

    Blocks that the edge cuts off hold fewer weights; which blocks will be kept is not known yet.
    """
    rows, columns = (group_capacities(n, b) for n, b in zip(shape, block_size, strict=True))
    sizes = np.sort(np.outer(rows, columns), axis=None)[::-1]
    return np.concatenate([[0.0], np.cumsum(sizes) / (shape[0] * shape[1])])


def kept_counts(blocks: int) -> NDArray[np.int64]:
    """The numbers of kept blocks to choose from, 1 .. ``blocks``, at most `MOST_OPTIONS` of them."""
    return np.unique(np.round(np.linspace(1, blocks, min(blocks, MOST_OPTIONS))).astype(np.int64))


def _total(layers: Sequence[Options], chosen: Sequence[int]) -> float:
    return sum(float(options.cost[i]) for options, i in zip(layers, chosen, strict=True))


def _undominated(options: Options) -> NDArray[np.int64]:
    """The options to which no other one is preferable, by rising cost and falling loss."""
    order = np.lexsort((options.loss, options.cost))
    least = np.minimum.accumulate(options.loss[order])
    first = np.ones(order.size, bool)
    first[1:] = options.loss[order][1:] < least[:-1]
    return order[first]


def _greedy(layers: Sequence[Options], useful: Sequence[NDArray[np.int64]], budget: float) -> list[int]:
    """From the cheapest options, the upgrade that saves the most loss per cost, as long as one fits."""
    place = [0] * len(layers)
    spent = _total(layers, [int(indices[0]) for indices in useful])
    while True:
        best, rate = None, 0.0
        for layer, (options, indices) in enumerate(zip(layers, useful, strict=True)):
            now = indices[place[layer]]
            for step in range(place[layer] + 1, len(indices)):
                more = options.cost[indices[step]] - options.cost[now]
                gain = (options.loss[now] - options.loss[indices[step]]) / max(more, 1e-300)
                if spent + more <= budget and gain > rate:
                    best, rate = (layer, step, more), gain
        if best is None:
            return [int(indices[p]) for indices, p in zip(useful, place, strict=True)]
        layer, place[best[0]], more = best
        spent += more
