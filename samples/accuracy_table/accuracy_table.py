"""What block pruning costs in accuracy: block sizes, reordering and recovery side by side, as a CSV table.

For every sparsity, the same layers of one network are pruned

- in blocks of each size, with and without reordering (a block of size 1 is one kernel: all taps of one input and one
  output channel), and weight by weight (``weights``);
- by magnitude, the other weights as they are (``none``), and by the error of each layer's outputs with the others
  refitted to unlabeled samples (``refit``).

So the rows of one sparsity and one recovery show what blocks cost against single weights, and what reordering wins back
(Figures 1b, 4 and 5 of the TETRIS paper). The layers are those that the largest blocks can prune. Nothing is timed.

    python samples/accuracy_table/accuracy_table.py -o table.csv
    python samples/accuracy_table/accuracy_table.py model.onnx --calibration images.npz --data labeled.npz -o table.csv

Rows that the file holds are not made again: stop the program whenever you like, and start it again to go on.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from rich.progress import track
from tables import Table, TableError, fingerprint

from tetris_onnx import Config, LayerRule, Plan
from tetris_onnx.accuracy.activations import Activations
from tetris_onnx.accuracy.compare import compare
from tetris_onnx.accuracy.recovery import layer_samples, recover
from tetris_onnx.algorithms.blocks import keep_count, keep_largest
from tetris_onnx.data.calibration import Data, Samples, count, load_samples, model_inputs
from tetris_onnx.data.images import load_data
from tetris_onnx.graph import io
from tetris_onnx.optimize import masked_dense
from tetris_onnx.passes import NewWeights
from tetris_onnx.planner import Candidate, make_plan, match_plan, prepare, survey

SAMPLE = Path(__file__).resolve().parents[1] / "fashion_mnist"
KEY = ["sparsity", "block_size", "reorder", "recovery"]
COLUMNS = [*KEY, "density", "retained", "dense_accuracy", "accuracy", "agreement", "max_error", "mean_error"]


@dataclass(frozen=True)
class Variant:
    """One row of the table: how to prune. Without a ``block_size`` single weights are."""

    sparsity: float
    block_size: int | None
    reorder: str
    recovery: str

    @property
    def cells(self) -> dict[str, Any]:
        """Its part of the row."""
        return asdict(self) | {"block_size": self.block_size or "weights"}

    def config(self, base: Config) -> Config:
        """``base`` with what it asks for."""
        size = self.block_size or 1
        return replace(base, sparsity=self.sparsity, block_size=(size, size), reorder=self.reorder)


def variants(sparsities: Sequence[float], block_sizes: Sequence[int], recoveries: Sequence[str]) -> Iterator[Variant]:
    """The rows in their order. Single weights and kernels need no reordering."""
    for sparsity in sparsities:
        for recovery in recoveries:
            yield Variant(sparsity, None, "none", recovery)
            for size in block_sizes:
                for reorder in ("none", "exact") if size > 1 else ("none",):
                    yield Variant(sparsity, size, reorder, recovery)


def prunable(model: onnx.ModelProto, block_size: int, skip: Sequence[str] = (), rates: Config | None = None) -> Config:
    """A config that prunes, whatever its block size, the layers that blocks of ``block_size`` can prune.

    Their time is not looked at. ``rates``: a config whose sparsities they get, instead of one for all.
    """
    rules = tuple(LayerRule(pattern, sparsity=0.0) for pattern in skip)
    config = replace(rates or Config(sparsity=0.5), block_size=(block_size, block_size))
    candidates = survey(prepare(io.to_graph(model)), replace(config, layers=(*rules, *config.layers)))
    found = [c for c in candidates if not c.why_dense or c.why_dense.startswith("predicted")]
    if not found:
        raise typer.BadParameter("no layer of this model can be pruned")
    named = [(str(c.layer.node.name or c.layer.name), c.options.sparsity if rates else None) for c in found]
    layers = (*(LayerRule(glob.escape(n), sparsity=s) for n, s in named), LayerRule("*", sparsity=0.0))
    return Config(layers=layers, augment=0)  # single weights are refitted to the samples as they are, too


def prune_blocks(
    model: onnx.ModelProto, config: Config, samples: Samples | None, plan: Plan | None = None
) -> tuple[onnx.ModelProto, float, Plan]:
    """(the model with pruned weights, share of the importance retained, the plan: that which is given, if one is)."""
    graph = prepare(io.to_graph(model))
    candidates = survey(graph, config, plan=plan)
    weights: dict[str, NewWeights] = {}
    if samples is not None:
        found = recover(graph, candidates, io.to_proto(graph, model), config, samples, plan)
        plan, rows, weights = found.plan, found.rows, found.weights
    elif plan is not None:
        rows = match_plan(candidates, plan, config)
    else:
        plan, rows = make_plan(candidates, config)
    share = [(row.retained, row.parameters) for row in rows if row.retained is not None]
    retained = sum(r * n for r, n in share) / sum(n for _, n in share)
    return masked_dense(model, plan, weights), retained, plan


def prune_weights(model: onnx.ModelProto, config: Config, samples: Samples | None) -> tuple[onnx.ModelProto, float]:
    """The same weight by weight."""
    graph = prepare(io.to_graph(model))
    candidates = [c for c in survey(graph, config) if not c.layer.why_dense]
    pruned = [c.layer.name for c in candidates if not c.why_dense]
    weights: dict[str, NewWeights] = {}
    retained, total = 0.0, 0.0

    def choose(candidate: Candidate, importance: NDArray) -> NDArray[np.bool_]:
        nonlocal retained, total
        if candidate.why_dense:
            return np.ones(importance.shape, bool)
        keep = keep_largest(importance, keep_count(importance.size, candidate.options.sparsity))
        size = importance.size
        retained, total = retained + size * float(importance[keep].sum() / importance.sum()), total + size
        return keep

    if samples is None:
        for candidate in candidates:
            layer = candidate.layer
            if candidate.why_dense:
                continue
            bias = np.zeros(layer.weight_shape[0], np.float32) if layer.bias is None else layer.bias
            weights[layer.name] = NewWeights(layer.weight * choose(candidate, np.abs(layer.weight)), bias)
    else:
        dense = [c.layer.name for c in candidates if c.why_dense]
        with Activations(io.to_proto(graph, model), pruned, samples, config.memory, dense) as activations:
            for candidate in candidates:
                layer = candidate.layer
                if candidate.why_dense and not activations.changes(layer.name):
                    continue
                seen, bounds = layer_samples(layer, activations.advance(layer.name), config.seed)
                weight, bias = seen.refit(choose(candidate, seen.saliency()), bounds, choose_damping=True)
                new = NewWeights(weight.reshape(layer.weight_shape).astype(np.float32), bias.astype(np.float32))
                activations.replace(layer.name, layer.stored(new.weight), new.bias)
                weights[layer.name] = new
    return masked_dense(model, Plan(()), weights), retained / total


def prune(
    model: onnx.ModelProto, base: Config, variant: Variant, samples: Samples | None
) -> tuple[onnx.ModelProto, float]:
    """(the model with pruned weights, share of the importance retained) of one row."""
    config, given = variant.config(base), samples if variant.recovery == "refit" else None
    if variant.block_size is None:
        return prune_weights(model, config, given)
    return prune_blocks(model, config, given)[:2]


def score(model: onnx.ModelProto, pruned: onnx.ModelProto, retained: float, data: Data) -> dict[str, Any]:
    """The part of a row that says what came out."""
    found = compare(model, pruned, data)
    return {
        "density": round(density(model, pruned), 4),
        "retained": round(retained, 4),
        "dense_accuracy": found.accuracy_a,
        "accuracy": found.accuracy_b,
        "agreement": found.agreement,
        "max_error": round(found.relative, 4),
        "mean_error": round(found.mean_relative, 5),
    }


def density(model: onnx.ModelProto, pruned: onnx.ModelProto) -> float:
    """Share of the weights of the model's layers that are left."""
    layers = [c.layer for c in survey(prepare(io.to_graph(model)), Config()) if not c.layer.why_dense]
    left = {c.layer.name: c.layer for c in survey(prepare(io.to_graph(pruned)), Config())}
    return sum(np.count_nonzero(left[layer.name].weight) for layer in layers) / sum(
        layer.weight.size for layer in layers
    )


def main(
    model: Annotated[Path, typer.Argument(help="Dense ONNX model.")] = SAMPLE / "fashion_mnist.onnx",
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV file to write.")] = Path("accuracy_table.csv"),
    calibration: Annotated[Path, typer.Option(help="Unlabeled samples.")] = SAMPLE / "calibration.npz",
    data: Annotated[Path, typer.Option(help="Samples to score with, with labels where there are.")] = SAMPLE
    / "test.npz",
    sparsity: Annotated[str, typer.Option(help="Of the pruned layers.")] = "0.5,0.7,0.9",
    block_sizes: Annotated[str, typer.Option(help="Rows and columns of a block.")] = "1,8,16,32,64",
    recovery: Annotated[str, typer.Option(help="none, refit or both.")] = "none,refit",
    skip: Annotated[list[str] | None, typer.Option(help="Glob of layers to leave dense; may be repeated.")] = None,
) -> None:
    """Prune a network in blocks of several sizes and write a table of what it costs in accuracy."""
    proto = io.raise_opset(io.load(model))
    samples, labeled = load_samples(calibration, model_inputs(proto)), load_data(data, model_inputs(proto))
    sizes = [int(size) for size in block_sizes.split(",")]
    base = prunable(proto, max(sizes), skip or [])
    rows = list(variants([float(s) for s in sparsity.split(",")], sizes, recovery.split(",")))
    try:
        table = Table(output, COLUMNS, KEY, describe(model.name, proto, samples, labeled), base.seed)
    except TableError as error:
        raise typer.BadParameter(str(error)) from None
    for variant in track(rows, "pruning", disable=not sys.stderr.isatty()):
        if variant.cells not in table:
            table.add(variant.cells | score(proto, *prune(proto, base, variant, samples), labeled))


def describe(name: str, model: onnx.ModelProto, samples: Samples | None, data: Data) -> str:
    """What a table is about, in one line."""
    calibration, test = (count(each, model_inputs(model)) if each else 0 for each in (samples, data.samples))
    return f"{name} ({fingerprint(model)}), {calibration} samples to calibrate, {test} to test"


if __name__ == "__main__":
    typer.run(main)
