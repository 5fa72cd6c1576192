"""One budget for the whole network: which layer keeps how many blocks (see `algorithms.allocation`).

- ``global``: as many multiplications as the same sparsity in every layer would leave, spread to lose the least;
- ``latency``: the predicted time (`cost`) of all layers, those that are not pruned included, as a share of the dense
  one's. A layer that our operator runs faster whole counts with that time: it need not be pruned for it.

Layers that a rule of the config skips or gives a sparsity of their own keep it, whatever the others get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.accuracy.sensitivity import Sensitivity, is_free
from tetris_onnx.algorithms.allocation import BudgetError, Options, allocate, kept_counts, kept_shares
from tetris_onnx.algorithms.blocks import block_grid, keep_count
from tetris_onnx.config import Config
from tetris_onnx.planner import Candidate

_DENSE = "the allocation leaves it dense"


@dataclass(frozen=True, eq=False)
class Budget:
    """What layers cost, and what they may cost together."""

    costs: dict[str, NDArray[np.float64]]  # of each free layer by the number of kept blocks, 0 .. all
    limit: float  # for the free layers
    fixed: float  # cost of all other layers
    unit: str

    @property
    def least(self) -> float:
        """The cost of the free layers with one block each, or dense where that is cheaper."""
        return sum(float(cost[1:].min()) for cost in self.costs.values())


def spread(candidates: Sequence[Candidate], sensitivities: Sequence[Sensitivity], config: Config) -> list[Candidate]:
    """The ``candidates``, the free ones with the sparsity that the allocation gives them.

    ``sensitivities`` are those of the free ones. Raises `BudgetError` where the budget is out of reach.
    """
    budget = network_budget(candidates, config)
    names = list(budget.costs)
    loss = {s.layer: s.loss for s in sensitivities}
    options = []
    for name in names:
        kept = kept_counts(loss[name].size - 1)
        options.append(Options(kept, budget.costs[name][kept], loss[name][kept]))
    if budget.least > budget.limit:
        raise BudgetError(_out_of_reach(budget, config))
    chosen = allocate(options, budget.limit)
    kept_blocks = {name: int(o.kept[i]) for name, o, i in zip(names, options, chosen, strict=True)}
    return [with_kept(c, kept_blocks[c.layer.name]) if c.layer.name in kept_blocks else c for c in candidates]


def predicted_loss(candidates: Sequence[Candidate], sensitivities: Sequence[Sensitivity]) -> dict[str, float]:
    """By layer, what its sensitivity says for the number of blocks that it keeps."""
    kept = {c.layer.name: kept_blocks(c) for c in candidates}
    return {s.layer: float(s.loss[kept[s.layer]]) for s in sensitivities}


def network_budget(candidates: Sequence[Candidate], config: Config) -> Budget:
    """The costs and the limit that ``config`` sets."""
    if config.speedup is not None:
        return _time_budget(candidates, config.speedup)
    free = [c for c in candidates if is_free(c)]
    known = all(c.layer.multiplications is not None for c in free)
    works = [float((c.layer.multiplications if known else None) or c.layer.weight.size) for c in free]
    costs = {c.layer.name: work * _shares(c) for c, work in zip(free, works, strict=True)}
    limit = sum(work * (1 - c.options.sparsity) for c, work in zip(free, works, strict=True))
    return Budget(costs, limit, 0.0, "multiplications" if known else "weights")


def kept_blocks(candidate: Candidate) -> int:
    """How many blocks of a layer stay."""
    return _blocks(candidate) if candidate.why_dense else keep_count(_blocks(candidate), candidate.options.sparsity)


def with_kept(candidate: Candidate, kept: int) -> Candidate:
    """The candidate with the sparsity that keeps ``kept`` blocks; dense where these are all."""
    if kept == _blocks(candidate):
        return replace(candidate, why_dense=_DENSE)
    return replace(candidate, options=replace(candidate.options, sparsity=1 - kept / _blocks(candidate)))


def _time_budget(candidates: Sequence[Candidate], speedup: float) -> Budget:
    costs: dict[str, NDArray[np.float64]] = {}
    total = fixed = 0.0
    for candidate in candidates:
        unpruned = candidate.unpruned_seconds
        times = None if unpruned is None else candidate.seconds(_shares(candidate))
        if times is None or unpruned is None:
            if is_free(candidate):
                raise BudgetError(
                    f"the time of layer {candidate.layer.name!r} is not known, since the model leaves its size open: "
                    "fix the input's shape, or use allocation global"
                )
            continue
        dense, sparse = times
        total += dense
        sparse[-1] = unpruned
        if candidate.why_dense:
            fixed += unpruned
        elif is_free(candidate):
            costs[candidate.layer.name] = sparse
        else:
            fixed += float(sparse[kept_blocks(candidate)])
    return Budget(costs, total / speedup - fixed, fixed, "predicted time")


def _out_of_reach(budget: Budget, config: Config) -> str:
    if config.speedup is not None:
        total = (budget.limit + budget.fixed) * config.speedup
        most = total / (budget.least + budget.fixed)
        return (
            f"a speed-up of {config.speedup:g} is out of reach: with one block left in each layer it is {most:.2f} "
            "(predicted); smaller blocks leave less, and layers that stay dense limit it"
        )
    everything = sum(float(cost[-1]) for cost in budget.costs.values())
    return (
        f"sparsity {config.sparsity:g} is out of reach: with one block left in each layer, "
        f"{100 * budget.least / everything:.1f} % of the {budget.unit} are left; use smaller blocks or less sparsity"
    )


def _blocks(candidate: Candidate) -> int:
    rows, columns = block_grid(candidate.layer.weight_shape[:2], candidate.block_size)
    return rows * columns


def _shares(candidate: Candidate) -> NDArray[np.float64]:
    rows, columns = candidate.layer.weight_shape[:2]
    return kept_shares((rows, columns), candidate.block_size)
