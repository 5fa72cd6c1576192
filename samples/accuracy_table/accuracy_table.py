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
"""

from __future__ import annotations

import csv
import glob
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import typer
from numpy.typing import NDArray
from rich.progress import track

from tetris_onnx import Config, LayerRule, Plan
from tetris_onnx.activations import Activations
from tetris_onnx.algorithms.blocks import keep_count, keep_largest
from tetris_onnx.calibration import Samples, load_samples, model_inputs
from tetris_onnx.compare import compare
from tetris_onnx.graph import io
from tetris_onnx.optimize import masked_dense
from tetris_onnx.passes import NewWeights
from tetris_onnx.planner import Candidate, make_plan, prepare, survey
from tetris_onnx.processor import cpu_name
from tetris_onnx.recovery import layer_samples, recover

SAMPLE = Path(__file__).resolve().parents[1] / "fashion_mnist"
COLUMNS = ["sparsity", "block_size", "reorder", "recovery", "density", "retained", "accuracy", "agreement", "max_error"]


@dataclass(frozen=True)
class Variant:
    """One row of the table: how to prune. ``block_size`` 0 prunes single weights."""

    sparsity: float
    block_size: int
    reorder: str
    recovery: str


def provenance(seed: int) -> str:
    """What a table was made with, as its first lines."""
    libraries = f"numpy {np.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"
    command = " ".join(Path(word).name if Path(word).exists() else word for word in sys.argv)
    return f"# seed {seed}; {cpu_name()}, {os.cpu_count()} cores; {libraries}\n# python {command}\n"


def variants(sparsities: list[float], block_sizes: list[int], recoveries: list[str]) -> Iterator[Variant]:
    """The rows in their order. Single weights and kernels need no reordering."""
    for sparsity in sparsities:
        for recovery in recoveries:
            yield Variant(sparsity, 0, "none", recovery)
            for size in block_sizes:
                for reorder in ("none", "exact") if size > 1 else ("none",):
                    yield Variant(sparsity, size, reorder, recovery)


def prunable(model: onnx.ModelProto, block_size: int, skip: list[str]) -> Config:
    """A config that prunes, whatever its block size, the layers that blocks of ``block_size`` can prune."""
    rules = tuple(LayerRule(pattern, sparsity=0.0) for pattern in skip)
    config = Config(sparsity=0.5, block_size=(block_size, block_size), layers=rules)
    layers = [c.layer for c in survey(prepare(io.to_graph(model)), config) if not c.why_dense]
    if not layers:
        raise typer.BadParameter("no layer of this model can be pruned")
    names = [str(layer.node.name or layer.name) for layer in layers]
    return Config(layers=(*(LayerRule(glob.escape(name)) for name in names), LayerRule("*", sparsity=0.0)))


def prune_blocks(model: onnx.ModelProto, config: Config, samples: Samples | None) -> tuple[onnx.ModelProto, float]:
    """(the model with pruned weights, share of the importance retained)."""
    graph = prepare(io.to_graph(model))
    candidates = survey(graph, config)
    if samples is None:
        plan, rows = make_plan(candidates, config)
        weights: dict[str, NewWeights] = {}
    else:
        found = recover(graph, candidates, io.to_proto(graph, model), config, samples)
        plan, rows, weights = found.plan, found.rows, found.weights
    share = [(row.retained, row.parameters) for row in rows if row.retained is not None]
    return masked_dense(model, plan, weights), sum(r * n for r, n in share) / sum(n for _, n in share)


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


def measure(model: onnx.ModelProto, base: Config, variant: Variant, samples: Samples, data: Path) -> dict[str, Any]:
    """One row of the table."""
    size = max(variant.block_size, 1)
    config = replace(base, sparsity=variant.sparsity, block_size=(size, size), reorder=variant.reorder)
    prune = prune_blocks if variant.block_size else prune_weights
    result, retained = prune(model, config, samples if variant.recovery == "refit" else None)
    found = compare(model, result, data)
    return {
        "sparsity": variant.sparsity,
        "block_size": variant.block_size or "weights",
        "reorder": variant.reorder,
        "recovery": variant.recovery,
        "density": round(density(model, result), 4),
        "retained": round(retained, 4),
        "accuracy": found.accuracy_b,
        "agreement": found.agreement,
        "max_error": round(found.relative, 4),
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
    samples = load_samples(calibration, model_inputs(proto))
    sizes = [int(size) for size in block_sizes.split(",")]
    base = prunable(proto, max(sizes), skip or [])
    rows = list(variants([float(s) for s in sparsity.split(",")], sizes, recovery.split(",")))
    with output.open("w", newline="") as file:
        file.write(provenance(base.seed))
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for variant in track(rows, "pruning", disable=not sys.stderr.isatty()):
            writer.writerow(measure(proto, base, variant, samples, data))
            file.flush()


if __name__ == "__main__":
    typer.run(main)
