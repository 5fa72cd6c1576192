"""Prune with calibration samples: each layer is reordered, pruned and refitted to what it sees, in node order.

The layers pruned before it have changed a layer's inputs. Its importance, its blocks and its new weights all come from
samples of those inputs (algorithms.refit, algorithms.error_search), and its outputs are fitted to those of the dense
network. No labels and no training are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from tetris_onnx.activations import Activations, Seen
from tetris_onnx.algorithms.blocks import keep_count
from tetris_onnx.algorithms.error_search import search, support
from tetris_onnx.algorithms.refit import LayerSamples
from tetris_onnx.calibration import Samples
from tetris_onnx.config import Config
from tetris_onnx.graph.layers import Layer, conv_window
from tetris_onnx.passes.fuse_epilogue import clip_bounds
from tetris_onnx.passes.set_weights import NewWeights
from tetris_onnx.plan import LayerPlan, Plan
from tetris_onnx.planner import Candidate, Progress, describe, free_axes, magnitude, search_order
from tetris_onnx.report import LayerReport

# Rows of the least squares (output positions times samples): this many where there are, fewer of very many features
# (the matrix of the samples takes half a gigabyte then), but never fewer than this many per feature.
_ROWS = 2**16
_CELLS = 2**27
_ROWS_PER_FEATURE = 4
# Block rows times cubed features: up to here the search by error takes minutes at most (32x32 blocks of 512 channels
# with 3x3 taps: 1.6e12); layers in smaller blocks are pruned by the sum of their weights' saliencies.
_MOST_WORK = 10**13


@dataclass(frozen=True, eq=False)
class Recovery:
    """A plan, the weights that go with it by layer name, and a row per layer."""

    plan: Plan
    weights: dict[str, NewWeights]
    rows: list[LayerReport]


def recover(
    candidates: Sequence[Candidate],
    model: onnx.ModelProto,
    config: Config,
    samples: Samples,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Prune ``candidates``, the layers of a prepared ``model``, with calibration ``samples``.

    With a ``plan``, its permutations and blocks are kept and only the weights are fitted. Deterministic for a seed.
    """
    chosen = [c for c in candidates if (not c.why_dense if plan is None else plan.get(c.layer.name) is not None)]
    dense = [c for c in candidates if c not in chosen and not c.layer.why_dense and not c.options.skip]
    names = [c.layer.name for c in chosen]
    plans: list[LayerPlan] = []
    weights: dict[str, NewWeights] = {}
    rows: dict[str, LayerReport] = {}
    with Activations(model, names, samples, config.memory, [c.layer.name for c in dense]) as activations:
        todo = [c for c in candidates if c in chosen or (c in dense and activations.changes(c.layer.name))]
        for done, candidate in enumerate(todo):
            layer = candidate.layer
            if progress is not None:
                progress("recover", done, len(todo))
            seen, bounds = layer_samples(layer, activations.advance(layer.name), config.seed)
            decision, shares = None if plan is None else plan.get(layer.name), None
            keep = np.ones((layer.weight_shape[0], seen.features), bool)
            if candidate in chosen:
                if decision is None:
                    decision, shares = _choose(candidate, seen, config)
                plans.append(decision)
                keep = support((decision.out_perm, decision.in_perm), decision.block_size, decision.keep, _taps(layer))
            weight, bias = seen.refit(keep, bounds, choose_damping=True, workers=config.workers)
            dtype = layer.weight.dtype
            new = NewWeights(weight.reshape(layer.weight_shape).astype(dtype), bias.astype(dtype))
            activations.replace(layer.name, layer.stored(new.weight), new.bias)
            weights[layer.name] = new
            rows[layer.name] = replace(describe(candidate, decision, shares), output_error=seen.error(weight))
    if progress is not None:
        progress("recover", len(todo), len(todo))
    listing = [rows.get(c.layer.name) or describe(c, None, None) for c in candidates]
    return Recovery(Plan(tuple(plans)), weights, listing)


def layer_samples(
    layer: Layer, seen: Seen, seed: int, rows: int = _ROWS, per_feature: int = _ROWS_PER_FEATURE
) -> tuple[LayerSamples, tuple[NDArray, NDArray]]:
    """The least-squares problem of a layer, and the bounds where its outputs are clipped (see `LayerSamples.refit`).

    Output positions are drawn at random, as many of each sample, ``rows`` in all (fewer of very many features) but at
    least ``per_feature``, where there are: neighbors say little new. What a later Add adds to the output in the pruned
    network is taken off the target: the layer makes up for the errors of the other branch too.
    """
    data, output = seen.data, seen.output
    out, features = layer.weight_shape[0], math.prod(layer.weight_shape[1:])
    positions = math.prod(output.shape[2:] if layer.is_conv else output.shape[1:-1])
    wanted = max(min(rows, _CELLS // features), per_feature * features)
    each = min(positions, -(-wanted // len(data)))
    rng = np.random.default_rng(seed)

    def outputs(value: NDArray, chosen: NDArray[np.int64]) -> NDArray:
        return value.reshape(out, -1)[:, chosen].T if layer.is_conv else value.reshape(-1, out)[chosen]

    u = np.empty((len(data) * each, features), np.float32)
    y = np.empty((len(data) * each, out), np.float32)
    low, high = (np.asarray(bound, np.float32) for bound in _bounds(layer, seen.addend is not None))
    if seen.addend is not None:
        low, high = np.broadcast_to(low, y.shape).copy(), np.broadcast_to(high, y.shape).copy()
    for i in range(len(data)):
        chosen = np.sort(rng.choice(positions, each, replace=False)) if each < positions else np.arange(positions)
        part = slice(i * each, (i + 1) * each)
        u[part] = (
            patches(layer, data[i], output.shape[2:], chosen)
            if layer.is_conv
            else data[i].reshape(-1, features)[chosen]
        )
        y[part] = outputs(output[i], chosen)
        if seen.addend is not None:
            addend = outputs(seen.addend[i], chosen)
            y[part] -= addend
            low[part] -= addend
            high[part] -= addend
    weight = layer.weight.reshape(out, -1).astype(np.float32, copy=False)
    return LayerSamples(u, y, weight, inputs=len(data)), (low, high)


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


def _choose(candidate: Candidate, seen: LayerSamples, config: Config) -> tuple[LayerPlan, tuple[float, float]]:
    """Permutations and blocks of one layer, and the shares of importance retained with and without reordering."""
    layer, block, sparsity = candidate.layer, candidate.block_size, candidate.options.sparsity
    by_error = config.importance in ("auto", "hessian")
    if config.importance in ("l1", "l2"):
        scores = magnitude(layer, config)
    else:
        single = seen.saliency() if by_error else seen.activation()
        scores = single.reshape(*layer.weight_shape[:2], -1).sum(axis=2)
    axes = free_axes(candidate, config)
    found = search_order(scores, block, sparsity, axes, config.reorder, config.seed)
    out_perm, in_perm = found.perms
    plan = LayerPlan(layer.name, out_perm, in_perm, block, found.keep)
    work = -(-layer.weight_shape[0] // block[0]) * seen.features**3
    if by_error and not seen.few and work <= _MOST_WORK:
        drop = found.keep.size - keep_count(found.keep.size, sparsity)
        movable = axes if config.reorder != "none" else ()
        exact = search(seen, (out_perm, in_perm), block, drop, movable, config.workers)
        weight, _ = seen.refit(support((out_perm, in_perm), block, found.keep, _taps(layer)))
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
