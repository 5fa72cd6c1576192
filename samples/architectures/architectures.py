"""What becomes of the usual architectures: layers pruned, Gathers left, verified error and speed-up, as a CSV table.

    pip install '.[cpu,torch]' onnxscript
    python samples/architectures/architectures.py -o architectures.csv --models folder       # torch networks
    python samples/architectures/architectures.py some.onnx other.onnx -o architectures.csv --models folder
    python samples/architectures/architectures.py -o architectures.csv --models folder --time-only

The first two optimize, and leave the dense and the block-sparse models in a folder; without model files the networks of
`networks.py` are taken (and one of them quantized by onnxruntime, too), which need torch. The third one times what the
folder holds: on a quiet machine. Rows of the table that are there already are replaced.
"""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer

from tetris_onnx import Config, optimize
from tetris_onnx.data.calibration import model_inputs, random_samples
from tetris_onnx.timing.bench import bench

COLUMNS = ["model", "precision", "layers", "pruned", "gathers", "fused", "error"]
COLUMNS += ["dense_ms", "ms", "speedup", "dense_ms_2", "ms_2", "speedup_2", "not_pruned"]
QUANTIZED = "ResNet-like"
SEED = 0


def networks() -> Iterator[tuple[str, onnx.ModelProto]]:
    """The networks of `networks.py` as torch exports them, one of them also quantized."""
    from networks import NETWORKS, export

    for name, network in NETWORKS.items():
        model = export(network)
        yield name, model
        if name == QUANTIZED:
            yield f"{name}, QDQ int8", quantize(model)


def quantize(model: onnx.ModelProto, samples: int = 4) -> onnx.ModelProto:
    """The model with onnxruntime's static quantization (QDQ, weights per channel), calibrated on random inputs."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Random inputs."""

        def __init__(self) -> None:
            self._left = [random_samples(model_inputs(model), 1, seed) for seed in range(samples)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            """The next input, or None."""
            return self._left.pop() if self._left else None

    with tempfile.TemporaryDirectory() as folder:
        dense, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("dense", "prepared", "quantized"))
        onnx.save(model, dense)
        quant_pre_process(str(dense), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(quantized), Reader(), per_channel=True)
        return onnx.load(quantized)


def prune(name: str, model: onnx.ModelProto, sparsity: float, folder: Path) -> dict[str, str]:
    """Optimize a model; its row but for the times. Both models go to the folder."""
    precision = "int8" if any(node.op_type == "DequantizeLinear" for node in model.graph.node) else "float32"
    result = optimize(model, Config(sparsity=sparsity, precision=precision))
    report = result.report
    onnx.save(model, folder / f"{name}.onnx")
    onnx.save(result.model, folder / f"{name}_bs.onnx")
    reasons = Counter(reason_class(row.reason) for row in report.layers if row.status != "block-sparse")
    return {
        "model": name,
        "precision": precision,
        "layers": str(len(report.layers)),
        "pruned": str(sum(row.status == "block-sparse" for row in report.layers)),
        "gathers": str(report.gathers),
        "fused": str(sum(report.fused)),
        "error": f"{report.max_error:.1e}",
        "not_pruned": "; ".join(f"{count} {reason}" for reason, count in reasons.most_common()),
    }


def reason_class(reason: str) -> str:
    """A reason without the figures of its layer."""
    if reason.startswith(("predicted", "measured")):
        return "not faster"
    return reason.partition(" and has only")[0].partition(";")[0].removeprefix("it is ").removeprefix("the ")


def timed(name: str, folder: Path, seconds: float) -> dict[str, str]:
    """The times of a model and its block-sparse form with one and two threads."""
    row = {}
    for threads, suffix in ((1, ""), (2, "_2")):
        models = folder / f"{name}.onnx", folder / f"{name}_bs.onnx"
        result = bench(*models, threads=threads, seconds=seconds, seed=SEED)
        row[f"dense_ms{suffix}"], row[f"ms{suffix}"] = (f"{timing.median_ms:.3g}" for timing in result.timings)
        row[f"speedup{suffix}"] = f"{result.speedup:.2f}"
    return row


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a table by model; none where there is no file yet."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write all rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Model files; without, the networks of networks.py.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The table.")] = Path("architectures.csv"),
    models: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("architectures"),
    sparsity: Annotated[float, typer.Option(help="Share of the weights to prune.")] = 0.7,
    seconds: Annotated[float, typer.Option(help="Of timing each pair of models.")] = 3.0,
    time_only: Annotated[bool, typer.Option(help="Time the models of the table that have no times yet.")] = False,
) -> None:
    """Make or extend the table."""
    models.mkdir(parents=True, exist_ok=True)
    rows = read_table(output)
    if time_only:
        for name, row in rows.items():
            if not row["speedup"]:
                row |= timed(name, models, seconds)
                write_table(output, list(rows.values()))
        return
    for name, model in ((file.stem, onnx.load(file)) for file in files) if files else networks():
        rows[name] = prune(name, model, sparsity, models)
        typer.echo(f"{name}: {rows[name]['pruned']} of {rows[name]['layers']} layers pruned")
        write_table(output, list(rows.values()))


if __name__ == "__main__":
    typer.run(main)
