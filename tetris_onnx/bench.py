"""Time two models against each other: interleaved in one process, so that whatever slows the machine slows both.

A round times one model for a moment, then the other, the order alternating; each starts with runs that are not counted,
which bring its weights back into the caches. onnxruntime's threads spin for some 30 ms after a run, which would take a
core from the other model, so a turn starts only when this process is idle. The figures are medians over rounds; the
interval of the ratio is a bootstrap over rounds (Efron 1979): it covers the noise of this session, not that of another
machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tetris_onnx.calibration import (
    Samples,
    Shapes,
    load_samples,
    runnable_samples,
    session_inputs,
)
from tetris_onnx.runtime import import_onnxruntime
from tetris_onnx.session import ModelSource, model_name, open_session, run

SECONDS = 5.0
_MIN_ROUNDS = 5
_TURN_SECONDS = 0.03  # timed runs of one model in one round: at least one run
_PROFILED_RUNS = 20
_RESAMPLES = 2000
_WIDE_INTERVAL = 0.15  # of the speed-up: a quiet machine gives a few percent
_SETTLE_SECONDS = 0.5  # onnxruntime's threads stop spinning long before
# Ops that onnxruntime may merge into the weight op before them: their time is shown with it, so that models in which
# they are merged and models in which they are not have the same rows.
_WEIGHT_OPS = ("Conv", "Gemm", "MatMul", "ConvTranspose", "BlockSparseConv", "BlockSparseGemm")
_FOLLOWERS = (
    "Relu",
    "Clip",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "HardSigmoid",
    "HardSwish",
    "BatchNormalization",
    "Add",
    "Mul",
)


class BenchError(ValueError):
    """A measurement that makes no sense."""


@dataclass(frozen=True)
class Timing:
    """Times of one model."""

    model: str
    median_ms: float
    min_ms: float
    runs: int


@dataclass(frozen=True)
class LayerTiming:
    """Time of one layer (a weight op with what follows it, or another op) in each model."""

    name: str
    op_types: tuple[str, ...]  # per model; "" where it has no such layer
    median_ms: tuple[float | None, ...]  # per model


@dataclass(frozen=True)
class Machine:
    """What the times belong to."""

    cpu: str
    cores: int
    load: float | None  # running processes over the last minute, before the measurement
    onnxruntime: str


@dataclass(frozen=True)
class BenchResult:
    """Times of one or two models at one number of threads."""

    machine: Machine
    provider: str
    threads: int
    batch: int
    rounds: int
    timings: tuple[Timing, ...]
    speedup: float | None  # median of a / median of b; None for one model
    interval: tuple[float, float] | None  # 95 %, of the speed-up
    layers: tuple[LayerTiming, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self)


def bench(
    a: ModelSource,
    b: ModelSource | None = None,
    threads: int = 1,
    provider: str = "cpu",
    batch: int = 1,
    rounds: int | None = None,
    seconds: float = SECONDS,
    per_layer: bool = False,
    seed: int = 0,
    data: str | Path | None = None,
    shapes: Shapes | None = None,
    progress: Callable[[float], None] | None = None,
) -> BenchResult:
    """Time model ``a``, or ``a`` against ``b``, on the same ``batch`` samples of ``data`` (random without).

    ``rounds``: how many, else as many as fit in ``seconds``, at least 5. ``progress`` is called with the share that is
    done. Raises `BenchError`, `CalibrationError` or `SessionError`.
    """
    if threads < 1 or batch < 1 or (rounds is not None and rounds < 1) or seconds <= 0:
        raise BenchError("threads, batch, rounds and seconds have to be positive")
    models = [a] if b is None else [a, b]
    names = [model_name(model) for model in models]
    machine = _machine()
    sessions = [open_session(model, provider, threads) for model in models]
    feeds = _feeds(sessions, names, batch, seed, data, shapes)
    turns: list[Callable[[], object]] = [
        (lambda s=session, f=feed, n=name: run(s, f, n))  # type: ignore[misc]
        for session, feed, name in zip(sessions, feeds, names, strict=True)
    ]
    times, runs = _rounds(turns, rounds, seconds, settle=threads > 1, progress=progress)
    timings = tuple(
        Timing(name, 1e3 * float(np.median(times[:, i, 0])), 1e3 * float(times[:, i, 1].min()), runs[i])
        for i, name in enumerate(names)
    )
    speedup = interval = None
    if b is not None:
        speedup = timings[0].median_ms / timings[1].median_ms
        interval = _ratio_interval(times[:, 0, 0], times[:, 1, 0], seed)
    layers: tuple[LayerTiming, ...] = ()
    if per_layer:
        del sessions, turns
        profiles = [
            _profile(model, feed, provider, threads, name)
            for model, feed, name in zip(models, feeds, names, strict=True)
        ]
        layers = _align(profiles)
    return BenchResult(machine, provider, threads, batch, len(times), timings, speedup, interval, layers)


def print_bench(result: BenchResult, console: Console) -> None:
    """Print a measurement as a table, the layers below it."""
    machine = result.machine
    title = f"{result.provider}, threads {result.threads}, batch {result.batch}, {result.rounds} rounds"
    table = Table(title=title, title_justify="left")
    for header in ("model", "median ms", "min ms", "runs"):
        table.add_column(header, justify="left" if header == "model" else "right", overflow="fold")
    for row in result.timings:
        table.add_row(escape(row.model), f"{row.median_ms:.3f}", f"{row.min_ms:.3f}", str(row.runs))
    console.print(table)
    if result.speedup is not None and result.interval is not None:
        low, high = result.interval
        console.print(f"speed-up {result.speedup:.2f}x (95 % interval {low:.2f} to {high:.2f})", highlight=False)
        if high - low > _WIDE_INTERVAL * result.speedup:
            console.print(
                "note: the interval is wide: something else ran on the machine; measure again when it is quiet",
                style="yellow",
                highlight=False,
            )
    if result.layers:
        layers = Table(title="per layer, ms (profiled: slower than above)", title_justify="left")
        layers.add_column("layer", overflow="fold")
        for timing in result.timings:
            layers.add_column("op")
            layers.add_column(escape(Path(timing.model).name), justify="right", overflow="fold")
        if len(result.timings) == 2:
            layers.add_column("speed-up", justify="right")
        for layer in result.layers:
            cells = [escape(layer.name)]
            for op_type, ms in zip(layer.op_types, layer.median_ms, strict=True):
                cells += [escape(op_type), "" if ms is None else f"{ms:.3f}"]
            if len(result.timings) == 2:
                first, second = layer.median_ms
                cells.append(f"{first / second:.2f}x" if first and second else "")
            layers.add_row(*cells)
        console.print(layers)
    console.print(f"onnxruntime {machine.onnxruntime} on {machine.cpu}, {machine.cores} cores", highlight=False)
    if machine.load is not None and machine.load + result.threads > machine.cores + 0.5:
        console.print(
            f"note: the machine is busy (load {machine.load:.1f} on {machine.cores} cores): times are longer than they "
            "have to be, the speed-up less certain",
            style="yellow",
            highlight=False,
        )


def parse_threads(text: str) -> tuple[int, ...]:
    """``"1,2"`` -> (1, 2). Raises `BenchError`."""
    try:
        threads = tuple(int(part) for part in text.split(","))
    except ValueError:
        threads = ()
    if not threads or min(threads) < 1:
        raise BenchError(f"--threads {text}: expected numbers such as 1,2")
    return threads


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(named, "") or platform.processor() or platform.machine()


def _machine() -> Machine:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Machine(cpu_name(), os.cpu_count() or 1, load, import_onnxruntime().__version__)


def _feeds(
    sessions: Sequence[Any],
    names: Sequence[str],
    batch: int,
    seed: int,
    data: str | Path | None,
    shapes: Shapes | None,
) -> list[Samples]:
    """What each session runs on: the same samples for all."""
    inputs = [session_inputs(session) for session in sessions]
    if {spec.name for spec in inputs[0]} != {spec.name for spec in inputs[-1]}:
        raise BenchError(f"{names[0]} and {names[-1]} have different inputs")
    if data is not None:
        samples = load_samples(data, inputs[0])
    else:
        samples = runnable_samples(lambda one: run(sessions[0], one, names[0]), inputs[0], batch, seed, shapes)
    feed = {spec.name: samples[spec.name][:batch] if spec.shape else samples[spec.name] for spec in inputs[0]}
    for spec in (spec for specs in inputs for spec in specs if spec.shape):
        if isinstance(spec.shape[0], int) and spec.shape[0] != batch:
            raise BenchError(f"batch {batch}: the model takes batches of {spec.shape[0]} only (input {spec})")
        if len(feed[spec.name]) != batch:
            raise BenchError(f"batch {batch}: there are only {len(feed[spec.name])} samples")
    return [feed] * len(sessions)


def _rounds(
    turns: Sequence[Callable[[], object]],
    rounds: int | None,
    seconds: float,
    settle: bool,
    progress: Callable[[float], None] | None,
) -> tuple[NDArray[np.float64], list[int]]:
    """Times [round, model, (median, minimum)] in seconds, and the number of timed runs per model."""
    repeats = []
    for turn in turns:
        if settle:
            _settle()
        turn()  # allocations, lazy initialization
        best, end = math.inf, time.perf_counter() + _TURN_SECONDS
        while best == math.inf or time.perf_counter() < end:
            start = time.perf_counter()
            turn()
            best = min(best, time.perf_counter() - start)
        repeats.append(max(1, round(_TURN_SECONDS / max(best, 1e-6))))
    times: list[list[tuple[float, float]]] = []
    begin = time.perf_counter()

    def share() -> float:
        if rounds is not None:
            return len(times) / rounds
        return min(len(times) / _MIN_ROUNDS, (time.perf_counter() - begin) / seconds)

    while share() < 1:
        row = [(0.0, 0.0)] * len(turns)
        order = list(range(len(turns)))
        for i in order if len(times) % 2 == 0 else reversed(order):
            if settle:
                _settle()
            for _ in range(1 + repeats[i] // 4):
                turns[i]()
            measured = []
            for _ in range(repeats[i]):
                start = time.perf_counter()
                turns[i]()
                measured.append(time.perf_counter() - start)
            row[i] = float(np.median(measured)), min(measured)
        times.append(row)
        if progress is not None:
            progress(share())
    return np.array(times), [n * len(times) for n in repeats]


def _settle() -> None:
    """Wait until no thread of this process spins."""
    end = time.perf_counter() + _SETTLE_SECONDS
    while time.perf_counter() < end:
        wall, busy = time.perf_counter(), time.process_time()
        time.sleep(0.002)
        if time.process_time() - busy < 0.3 * (time.perf_counter() - wall):
            return


def _ratio_interval(a: NDArray[np.float64], b: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % interval of median(a) / median(b), rounds resampled in pairs."""
    picks = np.random.default_rng(seed).integers(0, len(a), (_RESAMPLES, len(a)))
    ratios = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def _profile(model: ModelSource, feed: Samples, provider: str, threads: int, name: str) -> dict[str, tuple[str, float]]:
    """Per layer: (op type, median milliseconds), in the order of execution."""
    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    if not all(node.name for node in proto.graph.node):  # a profile cannot tell nodes without a name apart
        model = onnx.ModelProto()
        model.CopyFrom(proto)
        for node in model.graph.node:
            node.name = node.name or node.output[0]
        proto = model
    layer_of = _layers_by_name(proto)
    with tempfile.TemporaryDirectory(prefix="tetris-onnx-") as folder:
        session = open_session(model, provider, threads, profile=Path(folder) / "profile")
        for _ in range(1 + _PROFILED_RUNS):
            run(session, feed, name)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["name"].removesuffix("_kernel_time")
            op_type = event["args"].get("op_name", "")
            durations[node, event["args"].get("node_index", ""), op_type].append(event["dur"] / 1e3)
    layers: dict[str, tuple[str, float]] = {}
    for (node, _, op_type), values in durations.items():
        layer, is_weight_op = _find_layer(node, op_type, layer_of)
        known, total = layers.get(layer, (op_type, 0.0))
        layers[layer] = (op_type if is_weight_op else known, total + float(np.median(values)))
    return layers


def _find_layer(node: str, op_type: str, layer_of: Mapping[str, str]) -> tuple[str, bool]:
    """The row that a node of onnxruntime's optimized graph belongs to, and whether it names the row.

    onnxruntime names a node after the original node or the value it makes, with additions: "y_nchwc", "fused fc",
    "fc/MatMulAddFusion".
    """
    is_weight_op = op_type in (*_WEIGHT_OPS, "FusedConv", "FusedGemm", "FusedMatMul")
    stem = node.removeprefix("fused ").removesuffix("_nchwc").removesuffix("_nhwc")
    for name in (node, stem, stem.rsplit("/", 1)[0], stem.rsplit("_token_", 1)[0]):
        if name in layer_of:
            return layer_of[name], is_weight_op
    return (node if is_weight_op and node else op_type), is_weight_op


def _layers_by_name(model: onnx.ModelProto) -> dict[str, str]:
    """The row of every node, by the node's name and by the names of the values it makes.

    A weight op names a row; what follows it elementwise is in the same row; any other op has its own.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {output for node in model.graph.node if node.op_type == "Constant" for output in node.output}
    rows: dict[str, str] = {}  # by value
    names: dict[str, str] = {}  # by node
    of_weights: set[str] = set()
    for node in model.graph.node:
        row = node.name or node.output[0]
        if node.op_type in _WEIGHT_OPS:
            of_weights.add(row)
        elif node.op_type in _FOLLOWERS:
            sources = [rows.get(value, "") for value in node.input if value and value not in constants]
            if len(sources) == 1 and sources[0] in of_weights:
                row = sources[0]
        names[node.name] = row
        rows |= dict.fromkeys(node.output, row)
    return rows | names


def _align(profiles: Sequence[Mapping[str, tuple[str, float]]]) -> tuple[LayerTiming, ...]:
    """One row per layer of any model, in the order of the first one that has it."""
    names = list(dict.fromkeys(name for profile in profiles for name in profile))
    return tuple(
        LayerTiming(
            name,
            tuple(profile[name][0] if name in profile else "" for profile in profiles),
            tuple(profile[name][1] if name in profile else None for profile in profiles),
        )
        for name in names
    )
