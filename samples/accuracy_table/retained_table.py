"""What reordering retains in every layer of a network, against the greedy search and no reordering, as a CSV table.

A row per layer and importance: the share of the importance (l1: of |w|, l2: of w squared) that the kept blocks hold,
with the channels as they are (``none``), after greedy swaps from that order alone (``greedy``: Algorithm 1 of the
TETRIS paper), and after the search that `tetris_onnx.optimize` makes (``exact``). No data is needed.

    python samples/accuracy_table/retained_table.py model.onnx --config rates.toml -o retained.csv
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated

import typer
from tables import provenance

from tetris_onnx import Config
from tetris_onnx.algorithms.importance import importance
from tetris_onnx.algorithms.reorder import BlockPruner, reorder
from tetris_onnx.config import load_config
from tetris_onnx.graph import io
from tetris_onnx.planner import prepare, survey

COLUMNS = ["layer", "out", "in", "block", "sparsity", "importance", "none", "greedy", "exact", "greedy_s", "exact_s"]


def main(
    model: Annotated[Path, typer.Argument(help="Dense ONNX model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV file to write.")] = Path("retained.csv"),
    config: Annotated[Path | None, typer.Option(help="TOML file with the sparsity of each layer.")] = None,
    importances: Annotated[str, typer.Option("--importance", help="l1, l2 or both.")] = "l1,l2",
    seed: Annotated[int, typer.Option(help="Of the random starts of the search.")] = 0,
) -> None:
    """Write what each of three orders retains in every layer that the config prunes."""
    options = load_config(config) if config is not None else Config()
    layers = [c for c in survey(prepare(io.to_graph(io.raise_opset(io.load(model)))), options) if not c.why_dense]
    with output.open("w", newline="") as file:
        file.write(provenance(seed))
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for candidate in layers:
            for kind in importances.split(","):
                scores = importance(candidate.layer.weight, kind)
                pruner = BlockPruner(candidate.block_size, candidate.options.sparsity)
                start = time.perf_counter()
                greedy = reorder(scores, pruner, method="greedy", starts=("identity",), seed=seed)
                middle = time.perf_counter()
                exact = reorder(scores, pruner, seed=seed)
                end = time.perf_counter()
                writer.writerow(
                    {
                        "layer": candidate.layer.node.name or candidate.layer.name,
                        "out": scores.shape[0],
                        "in": scores.shape[1],
                        "block": "x".join(map(str, candidate.block_size)),
                        "sparsity": round(candidate.options.sparsity, 4),
                        "importance": kind,
                        "none": round(greedy.baseline, 4),
                        "greedy": round(greedy.retained, 4),
                        "exact": round(exact.retained, 4),
                        "greedy_s": round(middle - start, 2),
                        "exact_s": round(end - middle, 2),
                    }
                )
                file.flush()


if __name__ == "__main__":
    typer.run(main)
