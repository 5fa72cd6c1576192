"""What pruning a layer does to the network's outputs: the loss that the allocation of a budget minimizes.

With calibration samples, each layer is pruned alone in the dense network, at two numbers of kept blocks, and fitted.
Then the layers behind it are fitted to what they now see, as they will be in the pruned network: that makes up for
most of what some layers lose (97 % were measured) and for little of what others do. The rest of the network runs on
samples that the fits have not seen. The loss is the squared error of the network's outputs (before a final Softmax or
the like) over their variance. Between the measured points it follows the layer's own error, known for every number of
blocks from one elimination (`error_search.error_curve`): their ratio changes little where both fall off cliffs.

Without samples, the loss is ``-log`` of the share of the weights' squares that is kept. Minimizing its sum over layers
is what LAMP does (Lee et al., ICLR 2021): a signal passes the layers one after the other, so shares multiply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from joblib import Parallel, delayed
from numpy.typing import NDArray

from tetris_onnx.accuracy.activations import Activations, Changes, Seen
from tetris_onnx.accuracy.recovery import layer_samples
from tetris_onnx.algorithms.blocks import block_grid, block_sums, keep_largest
from tetris_onnx.algorithms.error_search import error_curve, support
from tetris_onnx.algorithms.importance import importance
from tetris_onnx.algorithms.refit import LayerSamples
from tetris_onnx.algorithms.reorder import BlockPruner, Reordering, Start, reorder
from tetris_onnx.config import Config
from tetris_onnx.data.calibration import Samples
from tetris_onnx.graph.layers import Layer
from tetris_onnx.graph.outputs import before_squashing
from tetris_onnx.planner import Candidate, Progress, free_axes, process_count

# Rows of the least squares: fewer than the recovery takes.
_ROWS = 8192
_ROWS_PER_FEATURE = 2
# Layers behind a pruned one that are fitted, on so many samples and rows: a little says enough.
_BEHIND = 3
_MOST_BEHIND = 32
_ROWS_BEHIND = 2048
# The order matters less here than for the result; a few starts do.
_STARTS: tuple[Start, ...] = ("sorted", "random", "shaken", "shaken")
_HELD_OUT = 4  # one in so many samples is measured on
_MOST_HELD_OUT = 32
_CLIP_ROUNDS = 2  # of the fits: fewer than for the result say enough
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The predicted loss of a network in which only ``layer`` is pruned: ``loss[k]`` with k blocks kept, k = 0 .. all.

    ``error[k]``: the squared error of the layer's own output over its variance, None where it was not measured.
    """

    layer: str
    loss: NDArray[np.float64]
    error: NDArray[np.float64] | None = None

    @property
    def half(self) -> float:
        """The loss with half of the blocks: a figure to compare layers by."""
        return float(self.loss[self.loss.size // 2])


def measure(
    candidates: Sequence[Candidate],
    model: onnx.ModelProto,
    config: Config,
    samples: Samples,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """The sensitivity of each free one of the ``candidates``, all layers of a prepared ``model``, on ``samples``.

    Deterministic for a seed.
    """
    free = [c for c in candidates if is_free(c)]
    fitted = {c.layer.name: c.layer for c in candidates if not c.layer.why_dense and not c.options.skip}
    targets = _targets(model)
    found = []
    whole = [c.layer.name for c in candidates if c.faster_whole]
    with Activations(model, [], samples, config.memory, whole=whole) as activations:
        batches = activations.count // activations.batch
        held_out = min(batches // _HELD_OUT, max(_MOST_HELD_OUT // activations.batch, 1)) * activations.batch
        first = activations.count - held_out if held_out else 0
        fit = first or activations.count
        some = min(fit, max(_MOST_BEHIND // activations.batch, 1) * activations.batch)
        dense: list[NDArray] = []
        for done, candidate in enumerate(free):
            if progress is not None:
                progress("sensitivity", done, len(free))
            name = candidate.layer.name
            seen = activations.advance(name)
            if not dense:
                dense = activations.consequence(name, {}, targets, first)
            error, weights = _prune(candidate, Seen(seen.data[:fit], seen.output[:fit], None), config)
            chain = _Chain(
                activations, name, [fitted[n] for n in activations.behind(name, list(fitted))[:_BEHIND]], some
            )
            losses = {}
            for kept, weight in weights.items():
                changes = chain.fit({name: weight}, config)
                losses[kept] = output_loss(dense, activations.consequence(name, changes, targets, first))
            found.append(Sensitivity(name, interpolate(error, losses), error))
    if progress is not None:
        progress("sensitivity", len(free), len(free))
    return found


class _Chain:
    """The layers behind a pruned one, which make up for part of what it loses."""

    def __init__(self, activations: Activations, start: str, layers: Sequence[Layer], stop: int) -> None:
        """``start``: the pruned layer; ``layers``: those behind it, fitted on the samples to ``stop``."""
        self._activations, self._start, self._layers, self._stop = activations, start, layers, stop
        partners = {layer.name: activations.partner(layer.name) for layer in layers}
        changed = set(activations.behind(start, [p for p in partners.values() if p is not None]))
        self._partners = {name: p for name, p in partners.items() if p in changed}
        wanted = sorted({*partners, *self._partners.values()})
        self._dense = dict(zip(wanted, activations.consequence(start, {}, wanted, 0, stop), strict=True))

    def fit(self, changes: Changes, config: Config) -> Changes:
        """The ``changes`` of the first layer and those of the layers behind it."""
        changes = dict(changes)
        for layer in self._layers:
            partner, output = self._partners.get(layer.name), self._dense[layer.name]
            wanted = [str(layer.data.name), *([] if partner is None else [partner])]
            data, *beside = self._activations.consequence(self._start, changes, wanted, 0, self._stop)
            seen = Seen(data, output, None)
            if partner is not None and self._dense[partner].shape == beside[0].shape == output.shape:
                seen = Seen(data, output + self._dense[partner], beside[0])
            changes[layer.name] = _fit(layer, *layer_samples(layer, seen, config.seed, _ROWS_BEHIND, 0), None, config)
        return changes


def estimate(candidates: Sequence[Candidate], config: Config, progress: Progress | None = None) -> list[Sensitivity]:
    """The sensitivity of each free one of the ``candidates`` from its weights alone."""
    free = [c for c in candidates if is_free(c)]
    density = average_density(config)
    tasks = [
        (importance(c.layer.weight, "l2"), c.block_size, 1 - density, free_axes(c, config), config.reorder, config.seed)
        for c in free
    ]
    processes = process_count([task[0].size for task in tasks], config.workers)
    curves = Parallel(n_jobs=processes, batch_size=1)(delayed(_kept_energy)(*task) for task in tasks)
    if progress is not None:
        progress("sensitivity", len(tasks), len(tasks))
    return [Sensitivity(c.layer.name, -np.log(np.maximum(curve, _TINY))) for c, curve in zip(free, curves, strict=True)]


def is_free(candidate: Candidate) -> bool:
    """Whether an allocation decides how much of a layer is pruned."""
    return not candidate.why_dense and not candidate.options.own_sparsity


def average_density(config: Config) -> float:
    """The density that the layers will have on average, more or less."""
    return 1 - config.sparsity if config.speedup is None else 1 / config.speedup


def output_loss(dense: Sequence[NDArray], pruned: Sequence[NDArray]) -> float:
    """Squared error of outputs over their variance from sample to sample, the mean over the outputs."""
    losses = []
    for y, z in zip(dense, pruned, strict=True):
        if y.shape != z.shape:
            losses.append(1.0)
            continue
        wide = y.astype(np.float64)
        error, spread = float(np.square(wide - z).sum()), float(np.square(wide - wide.mean(axis=0)).sum())
        scale = spread if spread > 0 else float(np.square(wide).sum()) or 1.0
        losses.append(error / scale if math.isfinite(error) else 1e6)
    return float(np.mean(losses))


def interpolate(error: NDArray[np.float64], losses: dict[int, float]) -> NDArray[np.float64]:
    """The loss for every number of kept blocks, from the layer's own ``error`` and the ``losses`` measured at some.

    Never falls as blocks are dropped; zero with all of them.
    """
    kept = np.arange(error.size)
    floor = np.maximum(error, _TINY)
    if losses:
        at = np.array(sorted(losses))
        ratio = np.log([max(losses[k], _TINY) / floor[k] for k in at.tolist()])
        loss = floor * np.exp(np.interp(kept, at, ratio))
    else:
        loss = floor.copy()
    loss[-1] = 0.0
    return np.maximum.accumulate(loss[::-1])[::-1]


def _targets(model: onnx.ModelProto) -> list[str]:
    """The values whose change is the loss: floating point outputs, before what they are squashed by."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    names = before_squashing(model)
    return [
        names[output.name][-1] if names[output.name] else output.name
        for output in model.graph.output
        if output.type.tensor_type.elem_type in floats
    ]


def _prune(
    candidate: Candidate, seen: Seen, config: Config
) -> tuple[NDArray[np.float64], dict[int, tuple[NDArray, NDArray]]]:
    """The error of a layer for every number of kept blocks, and its fitted weight and bias for two of them.

    The channels are ordered for the average density; one of the two is above it and one below.
    """
    layer, block, density = candidate.layer, candidate.block_size, average_density(config)
    problem, bounds = layer_samples(layer, seen, config.seed, _ROWS, _ROWS_PER_FEATURE)
    taps, blocks = math.prod(layer.weight_shape[2:]), math.prod(block_grid(layer.weight_shape[:2], block))
    scores = problem.saliency().reshape(*layer.weight_shape[:2], -1).sum(axis=2)
    order = _order(scores, block, 1 - density, free_axes(candidate, config), config.reorder, config.seed)
    perms = order.perms[0], order.perms[1]
    counts = sorted({min(max(round(d * blocks), 1), blocks - 1) for d in (density**0.5, 0.6 * density)})
    if problem.few:
        sums = block_sums(scores[perms[0]][:, perms[1]], block)
        error = np.concatenate([np.cumsum(np.sort(sums, axis=None))[::-1], [0.0]]) / max(problem.power, 1e-300)
        keeps = {k: keep_largest(sums, k) for k in counts}
    else:
        curve = error_curve(problem, perms, block, config.workers)
        error = curve.errors
        keeps = {k: curve.keep(k) for k in counts}
    supports = {k: support(perms, block, keep, taps) for k, keep in keeps.items()}
    return error, {k: _fit(layer, problem, bounds, keep, config) for k, keep in supports.items()}


def _fit(
    layer: Layer,
    problem: LayerSamples,
    bounds: tuple[NDArray, NDArray],
    keep: NDArray[np.bool_] | None,
    config: Config,
) -> tuple[NDArray, NDArray]:
    """The best weight, as the layer's node stores it, and bias; zeros where ``keep`` says."""
    keep = np.ones((layer.weight_shape[0], problem.features), bool) if keep is None else keep
    weight, bias = problem.refit(keep, bounds, workers=config.workers, clip_rounds=_CLIP_ROUNDS)
    kind = layer.weight.dtype
    return layer.stored(weight.reshape(layer.weight_shape).astype(kind)), bias.astype(kind)


def _order(
    scores: NDArray, block: tuple[int, int], sparsity: float, axes: tuple[int, ...], method: str, seed: int
) -> Reordering:
    starts = ("sorted",) if method == "none" else _STARTS
    return reorder(scores, BlockPruner(block, sparsity), axes, method, starts, seed)  # type: ignore[arg-type]


def _kept_energy(
    scores: NDArray, block: tuple[int, int], sparsity: float, axes: tuple[int, ...], method: str, seed: int
) -> NDArray[np.float64]:
    """The share of the squares of a layer's weights in the k best blocks, k = 0 .. all."""
    found = _order(scores, block, sparsity, axes, method, seed)
    sums = np.sort(block_sums(scores[found.perms[0]][:, found.perms[1]], block), axis=None)[::-1]
    return np.concatenate([[0.0], np.cumsum(sums)]) / max(float(sums.sum()), 1e-300)
