"""Prune with calibration samples: each layer is reordered, pruned and refitted to what it sees, in node order.

The layers pruned before it have changed a layer's inputs. Its importance, its blocks and its new weights all come from
samples of those inputs (algorithms.refit, algorithms.error_search), and its outputs are fitted to those of the dense
network. No labels and no training are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.accuracy.activations import Activations, Seen, leave_to_system
from tetris_onnx.accuracy.influence import Influence, measure_influence
from tetris_onnx.algorithms.blocks import keep_count
from tetris_onnx.algorithms.error_search import search, support
from tetris_onnx.algorithms.refit import LayerSamples
from tetris_onnx.config import Config
from tetris_onnx.data.augment import with_copies
from tetris_onnx.data.calibration import CalibrationError, Samples, count, model_inputs
from tetris_onnx.graph import io
from tetris_onnx.graph.channels import ChannelAxis, find_region
from tetris_onnx.graph.layers import Layer, conv_window
from tetris_onnx.passes.fuse_epilogue import clip_bounds
from tetris_onnx.passes.pipeline import Pass, run_passes
from tetris_onnx.passes.set_weights import NewWeights, set_weights
from tetris_onnx.plan import LayerPlan, Plan
from tetris_onnx.planner import Candidate, Progress, describe, free_axes, magnitude, search_order
from tetris_onnx.reports.report import LayerReport

# Rows of the least squares (output positions times samples): this many where there are, fewer of very many features
# (the matrix of the samples takes half a gigabyte then), but never fewer than this many per feature.
_ROWS = 2**16
_CELLS = 2**27
_ROWS_PER_FEATURE = 4
# Block rows times cubed features: up to here the search by error takes minutes at most (32x32 blocks of 512 channels
# with 3x3 taps: 1.6e12); layers in smaller blocks are pruned by the sum of their weights' saliencies.
_MOST_WORK = 10**13
# The network is pruned a second time where the searches of all layers take no longer than seconds.
_SWEEP_WORK = 10**12
# An output that no kept weight reads counts this much of one that is read most: what reads it may change a little.
_LEAST_WORTH = 1e-3
# This share of what a sample counts is the same for all: gradients are those of the dense network at a point.
_EVEN = 0.2
# One backward pass of each tells the influence; of fewer samples two.
_ENOUGH_SAMPLES = 128
# Of up to so many images a varied copy of each is learned from. An allocation spares the layers that these help most,
# and takes its own time.
_FEW_IMAGES = {"uniform": 128, "global": 64, "latency": 64}


@dataclass(frozen=True, eq=False)
class Recovery:
    """A plan, the weights that go with it by layer name, and a row per layer."""

    plan: Plan
    weights: dict[str, NewWeights]
    rows: list[LayerReport]


def recover(
    graph: gs.Graph,
    candidates: Sequence[Candidate],
    model: onnx.ModelProto,
    config: Config,
    samples: Samples,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Prune ``candidates``, the layers of a prepared ``graph`` (and its ``model``), with calibration ``samples``.

    Errors count by what they do to the network's outputs (`influence`), where that is known. Where ``config.sweeps``
    says so (by default, where that takes little), the network is pruned again from the start by what its pruned form
    makes of them, and the better result is taken. Of few images varied copies are learned from, too
    (``config.augment``).

    With a ``plan``, its permutations and blocks are kept and only the weights are fitted. Deterministic for a seed.
    """
    inputs = model_inputs(model)
    given = count(samples, inputs)
    copies = config.augment if config.augment is not None else int(given <= _FEW_IMAGES[config.allocation])
    matter = _matter(candidates, model, config, samples)
    originals, samples = samples, with_copies(samples, inputs, copies, config.seed)
    alike = count(samples, inputs) // given
    best = _prune(candidates, model, config, samples, alike, plan, progress, matter)
    for _ in range(_sweeps(candidates, config) - 1 if plan is None and by_error(config) else 0):
        pruned = run_passes(graph, [Pass("set_weights", partial(set_weights, weights=best.weights))])
        matter = _matter(candidates, io.to_proto(pruned, model), config, originals)
        if not matter:
            worth = output_worth(graph, [c.layer for c in candidates], best.weights)
            matter = {name: Influence(channels, None) for name, channels in worth.items()}
        found = _prune(candidates, model, config, samples, alike, plan, progress, matter)
        if _last_error(candidates, found) >= _last_error(candidates, best):
            break
        best = found
    return best


def _matter(
    candidates: Sequence[Candidate], model: onnx.ModelProto, config: Config, samples: Samples
) -> dict[str, Influence]:
    """What errors of the layers do to the outputs of ``model``, a dense or pruned form of the network, where known."""
    if not by_error(config):
        return {}
    layers = [c.layer for c in candidates if not c.layer.why_dense and not c.options.skip]
    known = [(x.name, x.out_axis) for x in layers if x.out_axis is not None and x.output.shape is not None]
    draws = 1 if count(samples, model_inputs(model)) >= _ENOUGH_SAMPLES else 2
    whole = [c.layer.name for c in candidates if c.faster_whole]
    return measure_influence(model, known, samples, draws, config.seed, whole)


def _sweeps(candidates: Sequence[Candidate], config: Config) -> int:
    """How often to prune the network."""
    if config.sweeps is not None:
        return config.sweeps
    return 2 if sum(_search_work(c) for c in candidates if not c.why_dense) <= _SWEEP_WORK else 1


def _search_work(candidate: Candidate) -> int:
    """Block rows times cubed features: what the search by error takes its time by."""
    shape = candidate.layer.weight_shape
    return -(-shape[0] // candidate.block_size[0]) * math.prod(shape[1:]) ** 3


def _last_error(candidates: Sequence[Candidate], found: Recovery) -> float:
    """The mean error of the layers next to the outputs, or of the last one that was fitted where none of them was."""
    errors = [row.output_error for row in found.rows if row.output_error is not None]
    pairs = zip(candidates, found.rows, strict=True)
    last = [row.output_error for c, row in pairs if c.last and row.output_error is not None]
    return float(np.mean(last or errors[-1:] or [0.0]))


def by_error(config: Config) -> bool:
    """Whether blocks are chosen by the error of the outputs."""
    return config.importance in ("auto", "hessian")


def output_worth(
    graph: gs.Graph, layers: Sequence[Layer], weights: Mapping[str, NewWeights]
) -> dict[str, NDArray[np.float64]]:
    """What an error of one size in each output channel of a layer does to the layers that read it, [out], mean 1.

    The sum of the squared weights that read the channel, those in ``weights`` in the place of the layers' own; every
    reader counts the same in all. Layers that no other layer reads are left out.
    """
    squares: dict[int, NDArray[np.float64]] = {}
    for layer in layers:
        if not layer.why_dense:
            weight = weights[layer.name].weight if layer.name in weights else layer.weight
            square = np.einsum("oit->i", weight.reshape(*weight.shape[:2], -1).astype(np.float64) ** 2)
            squares[id(layer.node)] = square / max(float(square.sum()), 1e-300)
    found: dict[str, NDArray[np.float64]] = {}
    for layer in layers:
        out = layer.weight_shape[0] if not layer.why_dense else 0
        if not out or layer.out_axis is None or layer.output.shape is None:
            continue
        total = np.zeros(out)
        for sink in find_region(graph, layer.output, ChannelAxis(layer.out_axis, out)).sinks:
            square = squares.get(id(sink.node), np.zeros(0))
            if square.size == sink.where.length:
                total += square.reshape(sink.where.outer, out, sink.where.inner).sum(axis=(0, 2))
        if total.any():
            total = np.maximum(total, _LEAST_WORTH * total.max())
            found[layer.name] = total / total.mean()
    return found


def _prune(
    candidates: Sequence[Candidate],
    model: onnx.ModelProto,
    config: Config,
    samples: Samples,
    alike: int,
    plan: Plan | None,
    progress: Progress | None,
    matter: Mapping[str, Influence],
) -> Recovery:
    """One pass over the network. ``matter``: by layer; errors of all outputs of other layers count the same.

    ``alike``: so many samples in a row are one and its copies.
    """
    chosen = [c for c in candidates if (not c.why_dense if plan is None else plan.get(c.layer.name) is not None)]
    dense = [c for c in candidates if c not in chosen and not (c.layer.why_dense or c.layer.opened or c.options.skip)]
    names = [c.layer.name for c in chosen]
    plans: list[LayerPlan] = []
    weights: dict[str, NewWeights] = {}
    rows: dict[str, LayerReport] = {}
    whole = [c.layer.name for c in candidates if c.faster_whole]
    with Activations(model, names, samples, config.memory, [c.layer.name for c in dense], whole) as activations:
        todo = [c for c in candidates if c in chosen or (c in dense and activations.changes(c.layer.name))]
        for done, candidate in enumerate(todo):
            layer = candidate.layer
            if progress is not None:
                progress("recover", done, len(todo))
            influence = matter.get(layer.name)
            where = None if influence is None else influence.positions
            values = activations.advance(layer.name)
            sampled = partial(layer_samples, layer, values, config.seed, influence=where, alike=alike)
            decision, shares = None if plan is None else plan.get(layer.name), None
            searched = candidate in chosen and decision is None
            # Blocks are chosen by the samples themselves, if they are enough: copies are to fit weights to.
            copies = not searched or alike == 1
            seen, bounds = sampled(copies=copies)
            if seen.few and not copies:
                copies = True
                seen, bounds = sampled()
            if searched:
                decision, shares = _choose(candidate, seen, config, None if influence is None else _worth(influence))
            if not copies:
                del seen  # two would take twice the memory
                seen, bounds = sampled()
            keep = np.ones((layer.weight_shape[0], seen.features), bool)
            if decision is not None:
                plans.append(decision)
                keep = support((decision.out_perm, decision.in_perm), decision.block_size, decision.keep, _taps(layer))
            if keep.all() and seen.few:
                weight, bias = seen.rescale()
            else:
                # (Of a layer that keeps all weights, each output has its best weights by itself.)
                metric = None if influence is None or keep.all() else influence.metric
                weight, bias = seen.refit(keep, bounds, choose_damping=True, workers=config.workers, metric=metric)
            kind = layer.weight.dtype
            new = NewWeights(weight.reshape(layer.weight_shape).astype(kind), bias.astype(kind))
            activations.replace(layer.name, layer.stored(new.weight), new.bias)
            weights[layer.name] = new
            rows[layer.name] = replace(describe(candidate, decision, shares), output_error=seen.error(weight))
    if progress is not None:
        progress("recover", len(todo), len(todo))
    listing = [rows.get(c.layer.name) or describe(c, None, None) for c in candidates]
    return Recovery(Plan(tuple(plans)), weights, listing)


def _worth(influence: Influence) -> NDArray[np.float64]:
    """What errors in each output channel count, [out], mean 1."""
    worth = np.maximum(influence.channels, _LEAST_WORTH * influence.channels.max())
    return worth / max(float(worth.mean()), 1e-300)


def layer_samples(
    layer: Layer,
    seen: Seen,
    seed: int,
    rows: int = _ROWS,
    per_feature: int = _ROWS_PER_FEATURE,
    influence: NDArray[np.float32] | None = None,
    alike: int = 1,
    copies: bool = True,
) -> tuple[LayerSamples, tuple[NDArray, NDArray]]:
    """The least-squares problem of a layer, and the bounds where its outputs are clipped (see `LayerSamples.refit`).

    Output positions are drawn at random, as many of each sample, ``rows`` in all (fewer of very many features) but at
    least ``per_feature``, where there are: neighbors say little new. What a later Add adds to the output in the pruned
    network is taken off the target: the layer makes up for the errors of the other branch too. ``alike``: so many
    samples in a row are one and its copies, so that they are held out together; without ``copies`` only the first of
    them are taken. ``influence`` is that of the first of them; all positions of the others count the same.
    """
    data, output = seen.data, seen.output
    taken = range(0, len(data), 1 if copies else alike)
    out, features = layer.weight_shape[0], math.prod(layer.weight_shape[1:])
    positions = math.prod(output.shape[2:] if layer.is_conv else output.shape[1:-1])
    wanted = max(min(rows, _CELLS // features), per_feature * features)
    each = min(positions, -(-wanted // len(taken)))
    rng = np.random.default_rng(seed)

    def outputs(value: NDArray, chosen: NDArray[np.int64]) -> NDArray:
        return value.reshape(out, -1)[:, chosen].T if layer.is_conv else value.reshape(-1, out)[chosen]

    u = np.empty((len(taken) * each, features), np.float32)
    y = np.empty((len(taken) * each, out), np.float32)
    share = None
    if influence is not None and influence.size * alike == len(data) * positions:
        influence = influence.reshape(-1, positions) / max(float(influence.mean()), 1e-30)
        share = np.ones(len(u), np.float32)
    low, high = (np.asarray(bound, np.float32) for bound in _bounds(layer, seen.addend is not None))
    if seen.addend is not None:
        low, high = np.broadcast_to(low, y.shape).copy(), np.broadcast_to(high, y.shape).copy()
    for number, i in enumerate(taken):
        chosen = np.sort(rng.choice(positions, each, replace=False)) if each < positions else np.arange(positions)
        part = slice(number * each, (number + 1) * each)
        u[part] = (
            patches(layer, data[i], output.shape[2:], chosen)
            if layer.is_conv
            else data[i].reshape(-1, features)[chosen]
        )
        y[part] = outputs(output[i], chosen)
        if share is not None and influence is not None and i % alike == 0:
            share[part] = influence[i // alike, chosen]
        if seen.addend is not None:
            addend = outputs(seen.addend[i], chosen)
            y[part] -= addend
            low[part] -= addend
            high[part] -= addend
        leave_to_system(data, output)
    weight = layer.weight.reshape(out, -1).astype(np.float32, copy=False)
    if share is not None:
        share = _EVEN + (1 - _EVEN) * share / max(float(share.mean()), 1e-30)
    return LayerSamples(u, y, weight, inputs=len(data) // alike, share=share), (low, high)


def patches(layer: Layer, image: NDArray, out_shape: tuple[int, ...], chosen: NDArray[np.int64]) -> NDArray:
    """What a convolution multiplies at the output positions ``chosen`` (flat): [positions, in * taps].

    ``image`` [in, D1, ..., Dk] without padding.
    """
    window = conv_window(layer.node)
    assert window is not None  # such a layer is never planned
    kernel, axes = window["kernel_shape"], len(window["kernel_shape"])
    padded = np.pad(image, [(0, 0), *zip(window["pads"][:axes], window["pads"][axes:], strict=True)])
    where = np.unravel_index(chosen, out_shape)
    taps = []
    for tap in np.ndindex(*kernel):
        at = [w * s + t * d for w, s, t, d in zip(where, window["strides"], tap, window["dilations"], strict=True)]
        taps.append(padded[tuple([slice(None), *at])])  # [in, positions]
    return np.stack(taps, axis=-1).transpose(1, 0, 2).reshape(len(chosen), -1)


def _choose(
    candidate: Candidate, seen: LayerSamples, config: Config, worth: NDArray[np.float64] | None
) -> tuple[LayerPlan, tuple[float, float]]:
    """Permutations and blocks of one layer, and the shares of importance retained with and without reordering.

    ``worth`` [out]: of errors in each output; None where all are worth the same.
    """
    layer, block, sparsity = candidate.layer, candidate.block_size, candidate.options.sparsity
    if worth is not None and by_error(config):
        seen = seen.weighted(worth)
    if config.importance in ("l1", "l2"):
        scores = magnitude(layer, config)
    else:
        single = seen.saliency() if by_error(config) else seen.activation()
        scores = single.reshape(*layer.weight_shape[:2], -1).sum(axis=2)
        if not np.isfinite(scores.sum(dtype=np.float64)):
            raise CalibrationError(f"layer {layer.name!r}: its inputs on the samples are too large to compute with")
    axes = free_axes(candidate, config)
    found = search_order(scores, block, sparsity, axes, config.reorder, config.seed)
    out_perm, in_perm = found.perms
    plan = LayerPlan(layer.name, out_perm, in_perm, block, found.keep)
    if by_error(config) and not seen.few and _search_work(candidate) <= _MOST_WORK:
        drop = found.keep.size - keep_count(found.keep.size, sparsity)
        movable = axes if config.reorder != "none" else ()
        exact = search(seen, (out_perm, in_perm), block, drop, movable, config.workers)
        weight, _ = seen.refit(support((out_perm, in_perm), block, found.keep, _taps(layer)), workers=config.workers)
        if exact.error < seen.error(weight):
            plan = LayerPlan(layer.name, exact.out_perm, exact.in_perm, block, exact.keep)
    return plan, (found.retained, found.baseline)


def _taps(layer: Layer) -> int:
    return math.prod(layer.weight_shape[2:])


def _bounds(layer: Layer, behind_add: bool) -> tuple[float, float]:
    """Where the only reader of the layer's output (or of the Add behind it) clips; no bounds where none does."""
    readers = layer.output.outputs
    if behind_add:
        readers = readers[0].outputs[0].outputs
    bounds = clip_bounds(readers[0]) if len(readers) == 1 else None
    return bounds or (-math.inf, math.inf)
