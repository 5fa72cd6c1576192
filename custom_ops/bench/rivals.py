"""Time a network in other runtimes and precisions against its block-sparse form, all in one process.

    pip install openvino torch
    python custom_ops/bench/rivals.py vgg16.onnx vgg16_bs.onnx --batch 1,8 --threads 1,2 -o rivals.csv

The first model is the dense float32 one, every other a form of it for onnxruntime with our operators. The rivals are
made from the dense model; one that does not run here is left out, and a line says why:

- onnxruntime float32, and int8: quantized statically (QDQ, weights per channel), calibrated on --data (.npz), else on
  random inputs;
- OpenVINO float32, bfloat16, and int8 (the same quantized model);
- torch float32 and bfloat16, channels last, as it is and compiled (torch.compile with frozen weights).

Each takes and gives float32 NCHW arrays; conversions count. All take turns (timing.bench), so that whatever slows
the machine slows all of them. `error` is the rounding that a rival adds: the root mean square of its difference to
onnxruntime's float32 outputs over that of the outputs; a block-sparse model is another network, and has none.

Rows are added to the table (-o): one that is there already is replaced.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from tetris_onnx.data.calibration import session_inputs
from tetris_onnx.runtime import InferenceSession
from tetris_onnx.timing.bench import interleave
from tetris_onnx.timing.processor import cpu_name

Array = NDArray[np.float32]
Run = Callable[[], Array]
CALIBRATION_SAMPLES = 8


class Unavailable(Exception):
    """Why a rival cannot take part."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    network: str
    runtime: str
    precision: str
    batch: int
    threads: int
    median_ms: float
    min_ms: float
    speedup: float  # over onnxruntime float32
    error: str

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What the row is of."""
        return (self.network, self.runtime, self.precision, self.batch, self.threads)


@dataclass(frozen=True)
class Task:
    """What all rivals run."""

    dense: Path
    int8: Path  # the quantized model; made by the first rival that needs it
    name: str  # of the input
    x: Array
    threads: int
    calibration: Array


# --- onnxruntime


def onnxruntime_session(model: Path, task: Task, ours: bool = False) -> Run:
    """A run of a model in onnxruntime, with our operators or without."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    create = InferenceSession if ours else onnxruntime.InferenceSession
    session = create(str(model), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {task.name: task.x})[0]


def quantized(task: Task) -> Path:
    """The dense model in int8: activations unsigned, weights signed and per channel, as x86 processors like it best."""
    if not task.int8.exists():
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            samples = iter(task.calibration)

            def get_next(self) -> dict[str, Array] | None:
                sample = next(self.samples, None)
                return None if sample is None else {task.name: sample[None]}

        unfinished = task.int8.with_name(f"{task.int8.name}.part")
        quantization.quantize_static(
            task.dense,
            unfinished,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        unfinished.replace(task.int8)
    return task.int8


# --- OpenVINO


def openvino(model: Path, task: Task, precision: str) -> Run:
    """A run in OpenVINO, compiled for the batch."""
    try:
        import openvino as ov
    except ModuleNotFoundError:
        raise Unavailable("openvino is not installed") from None
    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("OpenVINO finds no bfloat16 on this processor")
    network = core.read_model(model)
    network.reshape(list(task.x.shape))
    compiled = core.compile_model(
        network,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": str(task.threads),
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    return lambda: request.infer([task.x], share_inputs=True)[0]


# --- torch


def torch_network(task: Task, precision: str, compiled: bool) -> Run:
    """A run in torch, channels last, as it is or compiled."""
    try:
        import torch
    except ModuleNotFoundError:
        raise Unavailable("torch is not installed") from None
    torch.set_num_threads(task.threads)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    network = as_torch(onnx.load(task.dense)).eval().to(dtype=dtype, memory_format=torch.channels_last)
    x = torch.from_numpy(task.x)
    if compiled:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        network = torch.compile(network)

    def once() -> Array:
        with torch.inference_mode() if not compiled else torch.no_grad():
            y = network(x.to(dtype=dtype, memory_format=torch.channels_last))
            return y.float().numpy()

    return once


def as_torch(model: onnx.ModelProto) -> Any:
    """The network as a torch module. Raises `Unavailable` where it has an operator that is not known here."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    steps: list[tuple[str, Callable[..., Any], list[str]]] = []
    modules: dict[str, nn.Module] = {}
    for number, node in enumerate(model.graph.node):
        a = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        inputs = [name for name in node.input if name not in weights]
        parameters = [torch.tensor(weights[name]) for name in node.input if name in weights]
        pads = a.get("pads", [0, 0, 0, 0])
        plain = a.get("auto_pad", b"NOTSET") == b"NOTSET" and pads[:2] == pads[2:] and not a.get("ceil_mode")
        step: Callable[..., Any]
        if node.op_type == "Conv" and plain and len(a["kernel_shape"]) == 2 and len(inputs) == 1:
            (outputs, inputs_per_group, *kernel), group = parameters[0].shape, a.get("group", 1)
            window = {"stride": a.get("strides", 1), "padding": pads[:2], "dilation": a.get("dilations", 1)}
            bias = len(parameters) > 1
            step = nn.Conv2d(inputs_per_group * group, outputs, kernel, groups=group, bias=bias, **window)
            step.load_state_dict(dict(zip(("weight", "bias"), parameters, strict=False)))
        elif node.op_type == "Gemm" and a.get("transB") == 1 and len(parameters) == 2 and len(inputs) == 1:
            step = nn.Linear(parameters[0].shape[1], parameters[0].shape[0])
            step.load_state_dict({"weight": parameters[0], "bias": parameters[1]})
        elif node.op_type == "MaxPool" and plain:
            step = nn.MaxPool2d(a["kernel_shape"], a.get("strides", 1), pads[:2])
        elif node.op_type == "GlobalAveragePool":
            step = nn.AdaptiveAvgPool2d(1)
        elif node.op_type == "Flatten" and a.get("axis", 1) == 1:
            step = nn.Flatten()
        elif node.op_type == "Relu":
            step = F.relu
        elif node.op_type == "Add" and len(inputs) == 2:
            step = torch.add
        else:
            raise Unavailable(f"no translation of {node.op_type} {node.name} to torch")
        if isinstance(step, nn.Module):
            modules[str(number)] = step
        steps.append((node.output[0], step, inputs))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict(modules)

        def forward(self, x: Any) -> Any:
            values = {model.graph.input[0].name: x}
            for output, step, names in steps:
                values[output] = step(*(values[name] for name in names))
            return values[model.graph.output[0].name]

    return Network()


# --- all of them


def rivals(task: Task, sparse: Sequence[Path]) -> dict[tuple[str, str], Callable[[], Run]]:
    """What makes each one's run, by runtime and precision; the baseline first."""
    found: dict[tuple[str, str], Callable[[], Run]] = {
        ("onnxruntime", "float32"): lambda: onnxruntime_session(task.dense, task),
        ("onnxruntime", "int8"): lambda: onnxruntime_session(quantized(task), task),
        ("OpenVINO", "float32"): lambda: openvino(task.dense, task, "f32"),
        ("OpenVINO", "bfloat16"): lambda: openvino(task.dense, task, "bf16"),
        ("OpenVINO", "int8"): lambda: openvino(quantized(task), task, "f32"),
    }
    for precision in ("float32", "bfloat16"):
        for title, compiled in (("torch", False), ("torch, compiled", True)):
            found[title, precision] = lambda p=precision, c=compiled: torch_network(task, p, c)  # type: ignore[misc]
    for model in sparse:
        found["tetris-onnx", model.stem] = lambda m=model: onnxruntime_session(m, task, ours=True)  # type: ignore[misc]
    return found


def measure(task: Task, sparse: Sequence[Path], seconds: float, only: str) -> list[Row]:
    """A row for each rival that runs; says why for each that does not."""
    runs: dict[tuple[str, str], Run] = {}
    outputs: dict[tuple[str, str], Array] = {}
    for (runtime, precision), make in rivals(task, sparse).items():
        if runs and only and only not in f"{runtime} {precision}":
            continue
        try:
            run = make()
            outputs[runtime, precision] = np.array(run())
            runs[runtime, precision] = run
        except Unavailable as reason:
            print(f"left out: {runtime} {precision}: {reason}", file=sys.stderr)
        except Exception as error:  # each package raises its own types
            message = " ".join(str(error).split())[:300]
            print(f"left out: {runtime} {precision}: {type(error).__name__}: {message}", file=sys.stderr)
    times, _ = interleave(list(runs.values()), None, seconds, settle=True, progress=None)
    reference = outputs["onnxruntime", "float32"]
    medians = 1e3 * np.median(times[:, :, 0], axis=0)
    rows = []
    for i, (runtime, precision) in enumerate(runs):
        difference = np.linalg.norm(outputs[runtime, precision] - reference) / np.linalg.norm(reference)
        error = "" if runtime == "tetris-onnx" else f"{difference:.1e}"
        best = 1e3 * times[:, i, 1].min()
        rows.append(
            Row(
                *(task.dense.stem, runtime, precision, len(task.x), task.threads),
                *(float(medians[i]), float(best), float(medians[0] / medians[i]), error),
            )
        )
    return rows


def read_table(path: Path) -> list[Row]:
    """The rows of a table."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    kinds: Mapping[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
    return [Row(**{f.name: kinds[str(f.type)](row[f.name]) for f in fields(Row)}) for row in csv.DictReader(lines)]


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows under comments that say what they belong to."""
    packages = []
    for package in ("onnxruntime", "openvino", "torch"):
        try:
            packages.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {cpu_name()}, {os.cpu_count()} cores; {', '.join(packages)}\n")
        file.write(f"# {shlex.join(['python', 'custom_ops/bench/rivals.py', *sys.argv[1:]])}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def print_markdown(rows: Sequence[Row]) -> None:
    """A table with a column for each batch and number of threads."""
    columns = list(dict.fromkeys((row.network, row.batch, row.threads) for row in rows))
    print("| runtime | precision | error | " + " | ".join(f"{n}, batch {b}, {t} thr." for n, b, t in columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    for runtime, precision in dict.fromkeys((row.runtime, row.precision) for row in rows):
        found = {(r.network, r.batch, r.threads): r for r in rows if (r.runtime, r.precision) == (runtime, precision)}
        cells = (f"{r.median_ms:.1f} ms, {r.speedup:.2f}x" if (r := found.get(c)) else "" for c in columns)
        error = next(iter(found.values())).error
        print(f"| {runtime} | {precision} | {error} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measure, write the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", type=Path, help="the dense float32 model (.onnx), of one input and one output")
    parser.add_argument("sparse", type=Path, nargs="*", help="block-sparse models made from it")
    parser.add_argument("--batch", type=_numbers, default=(1,), help="1,8")
    parser.add_argument("--threads", type=_numbers, default=(1,), help="1,2")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each batch and number of threads")
    parser.add_argument("--only", default="", help="only the rivals whose name holds this (and the baseline)")
    parser.add_argument("--data", type=Path, help=".npz with inputs to calibrate int8 on (default: random)")
    parser.add_argument("--int8", type=Path, help="keep the quantized model in this file, and use it if it is there")
    parser.add_argument("-o", "--output", type=Path, help="add the rows to this table (.csv)")
    arguments = parser.parse_args()
    for model in (arguments.dense, *arguments.sparse):
        if not model.is_file():
            parser.error(f"{model}: no such file")
    session = onnxruntime.InferenceSession(str(arguments.dense), providers=["CPUExecutionProvider"])
    inputs = session_inputs(session)
    if len(inputs) != 1 or len(session.get_outputs()) != 1 or not all(isinstance(d, int) for d in inputs[0].shape[1:]):
        parser.error(f"{arguments.dense}: expected one input, of a fixed size but for the batch, and one output")
    name, shape = inputs[0].name, inputs[0].shape[1:]
    del session
    rng = np.random.default_rng(0)
    if arguments.data is not None:
        calibration = np.load(arguments.data)[name][:CALIBRATION_SAMPLES].astype(np.float32)
    else:
        calibration = rng.standard_normal((CALIBRATION_SAMPLES, *shape), dtype=np.float32)
    rows = read_table(arguments.output) if arguments.output is not None and arguments.output.exists() else []
    with tempfile.TemporaryDirectory(prefix="tetris-onnx-") as folder:
        int8 = arguments.int8 or Path(folder) / "int8.onnx"
        for batch in arguments.batch:
            x = rng.standard_normal((batch, *shape), dtype=np.float32)
            for threads in arguments.threads:
                task = Task(arguments.dense, int8, name, x, threads, calibration)
                found = measure(task, arguments.sparse, arguments.seconds, arguments.only)
                new = {row.key for row in found}
                rows = [row for row in rows if row.key not in new] + found
                if arguments.output is not None:
                    write_table(arguments.output, rows)
    print_markdown(rows)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
