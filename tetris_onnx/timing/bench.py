"""Time two models against each other: interleaved in one process, so that whatever slows the machine slows both.

A round times one model for a moment, then the other, the order alternating; each starts with runs that are not counted,
which bring its weights back into the caches. onnxruntime's threads spin for some 30 ms after a run, which would take a
core from the other model, so a turn starts only when this process is idle. The figures are medians over rounds; the
interval of the ratio is a bootstrap over rounds (Efron 1979): it covers the noise of this session, not that of another
machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tetris_onnx.data.calibration import (
    Samples,
    Shapes,
    load_samples,
    runnable_samples,
    select,
    session_inputs,
)
from tetris_onnx.errors import TetrisError
from tetris_onnx.runtime import import_onnxruntime
from tetris_onnx.session import CUDA_GRAPH, ModelSource, model_name, open_session, resident, run
from tetris_onnx.timing.processor import cpu_name, is_busy, load_average
from tetris_onnx.timing.profiling import LayerTiming, Placement, placements, profile, totals, wait_until_idle

SECONDS = 5.0
_MIN_ROUNDS = 5
_MOST_THREADS = 1024
_TURN_SECONDS = 0.03  # timed runs of one model in one round: at least one run
_RESAMPLES = 2000
_WIDE_INTERVAL = 0.15  # of the speed-up: a quiet machine gives a few percent


class BenchError(TetrisError, ValueError):
    """A measurement that makes no sense."""


@dataclass(frozen=True)
class Timing:
    """Times of one model."""

    model: str
    median_ms: float
    min_ms: float
    runs: int


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
    placements: tuple[Placement, ...] = ()  # of each model, where the provider is not the processor
    cuda_graph: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        values = asdict(self)
        values["layers"] = [layer.to_dict() for layer in self.layers]
        values["totals"] = [layer.to_dict() for layer in totals(self.layers)]
        return values


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
    data: str | Path | Samples | None = None,
    shapes: Shapes | None = None,
    cuda_graph: bool = False,
    progress: Callable[[float], None] | None = None,
) -> BenchResult:
    """Time model ``a``, or ``a`` against ``b``, on the same ``batch`` samples of ``data`` (random without).

    ``rounds``: how many, else as many as fit in ``seconds``, at least 5. ``progress`` is called with the share that is
    done. On a GPU inputs and outputs stay in its memory: copies to it are not timed. ``cuda_graph``: each run there is
    one launch of a captured graph. Raises `BenchError`, `CalibrationError` or `SessionError`.
    """
    if threads < 1 or batch < 1 or (rounds is not None and rounds < 1) or seconds <= 0:
        raise BenchError("threads, batch, rounds and seconds have to be positive")
    if cuda_graph and provider != "cuda":
        raise BenchError("a CUDA graph needs the provider cuda")
    models = [a] if b is None else [a, b]
    names = [model_name(model) for model in models]
    machine = _machine()
    options = CUDA_GRAPH if cuda_graph else None
    sessions = [open_session(model, provider, threads, provider_options=options) for model in models]
    # A captured graph has one size and one place of its inputs: their sizes are found out without.
    trials = [open_session(model, provider, threads) for model in models] if cuda_graph else sessions
    feeds = _feeds(trials, names, batch, seed, data, shapes)
    turns: list[Callable[[], object]]
    if provider == "cpu":
        turns = [
            (lambda s=session, f=feed, n=name: run(s, f, n))  # type: ignore[misc]
            for session, feed, name in zip(sessions, feeds, names, strict=True)
        ]
    else:
        turns = [resident(s, f, n, provider) for s, f, n in zip(sessions, feeds, names, strict=True)]
    times, runs = interleave(turns, rounds, seconds, settle=threads > 1, progress=progress)
    timings = tuple(
        Timing(name, 1e3 * float(np.median(times[:, i, 0])), 1e3 * float(times[:, i, 1].min()), runs[i])
        for i, name in enumerate(names)
    )
    speedup = interval = None
    if b is not None:
        speedup = timings[0].median_ms / timings[1].median_ms
        interval = _ratio_interval(times[:, 0, 0], times[:, 1, 0], seed)
    layers: tuple[LayerTiming, ...] = ()
    del sessions, trials, turns
    if per_layer:
        layers = profile(models, feeds, names, provider, threads, exact=provider == "cpu")
    placed = placements(models, feeds, names, provider) if provider != "cpu" else ()
    return BenchResult(
        machine, provider, threads, batch, len(times), timings, speedup, interval, layers, placed, cuda_graph
    )


def print_bench(result: BenchResult, console: Console) -> None:
    """Print a measurement as a table, the layers below it."""
    machine = result.machine
    provider = f"{result.provider}, CUDA graph" if result.cuda_graph else result.provider
    title = f"{provider}, threads {result.threads}, batch {result.batch}, {result.rounds} rounds"
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
    for place in result.placements:
        if place.elsewhere or place.copies:
            console.print(
                f"note: of {place.nodes} nodes of {place.model}, onnxruntime ran {len(place.elsewhere)} on another "
                f"provider ({_listing(place.elsewhere)}) and copied {len(place.copies)} values between CPU and GPU",
                style="yellow",
                highlight=False,
                markup=False,
            )
    if result.layers:
        console.print(_layer_table(result))
    console.print(f"onnxruntime {machine.onnxruntime} on {machine.cpu}, {machine.cores} cores", highlight=False)
    if is_busy(machine.load, machine.cores, result.threads):
        console.print(
            f"note: the machine is busy (load {machine.load:.1f} on {machine.cores} cores): times are longer than they "
            "have to be, the speed-up less certain",
            style="yellow",
            highlight=False,
        )


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _layer_table(result: BenchResult) -> Table:
    pair = len(result.timings) == 2
    table = Table(title="per layer, ms", title_justify="left")
    table.add_column("layer", overflow="fold")
    for timing in result.timings:
        table.add_column("op")
        table.add_column(escape(Path(timing.model).name), justify="right", overflow="fold")
    for header in ("speed-up", "density", "ideal ms", "of ideal") if pair else ():
        table.add_column(header, justify="right", no_wrap=True)
    sums = totals(result.layers)
    for layer in (*result.layers, *sums):
        if layer is sums[0]:
            table.add_section()
        cells = [escape(layer.name)]
        for op_type, ms in zip(layer.op_types, layer.median_ms, strict=True):
            cells += [escape(op_type), _number(ms, ".3f")]
        if pair:
            first, second = layer.median_ms
            cells.append(f"{first / second:.2f}x" if first and second else "")
            cells += [_number(layer.density, ".3f"), _number(layer.ideal_ms, ".3f"), _number(layer.fraction, ".2f")]
        table.add_row(*cells)
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def parse_threads(text: str) -> tuple[int, ...]:
    """``"1,2"`` -> (1, 2). Raises `BenchError`."""
    try:
        threads = tuple(int(part) for part in text.split(","))
    except ValueError:
        threads = ()
    if not threads or min(threads) < 1 or max(threads) > _MOST_THREADS:
        raise BenchError(f"--threads {text}: expected numbers such as 1,2")
    return threads


def _machine() -> Machine:
    return Machine(cpu_name(), os.cpu_count() or 1, load_average(), import_onnxruntime().__version__)


def _feeds(
    sessions: Sequence[Any],
    names: Sequence[str],
    batch: int,
    seed: int,
    data: str | Path | Samples | None,
    shapes: Shapes | None,
) -> list[Samples]:
    """What each session runs on: the same samples for all."""
    inputs = [session_inputs(session) for session in sessions]
    if {spec.name for spec in inputs[0]} != {spec.name for spec in inputs[-1]}:
        raise BenchError(f"{names[0]} and {names[-1]} have different inputs")
    if isinstance(data, dict):
        samples = data
    elif data is not None:
        samples = load_samples(data, inputs[0])
    else:
        samples = runnable_samples(lambda one: run(sessions[0], one, names[0]), inputs[0], batch, seed, shapes)
    feed = select({spec.name: samples[spec.name] for spec in inputs[0]}, inputs[0], slice(batch))
    for spec in (spec for specs in inputs for spec in specs if not spec.whole):
        if isinstance(spec.shape[0], int) and spec.shape[0] != batch:
            raise BenchError(f"batch {batch}: the model takes batches of {spec.shape[0]} only (input {spec})")
        if len(feed[spec.name]) != batch:
            raise BenchError(f"batch {batch}: there are only {len(feed[spec.name])} samples")
    return [feed] * len(sessions)


def interleave(
    turns: Sequence[Callable[[], object]],
    rounds: int | None,
    seconds: float,
    settle: bool,
    progress: Callable[[float], None] | None,
) -> tuple[NDArray[np.float64], list[int]]:
    """Run functions in turns: times [round, function, (median, minimum)] in seconds, and how often each was timed.

    `rounds` and `seconds` as in `bench`. `settle`: wait before each turn until this process is idle.
    """
    repeats = []
    for turn in turns:
        if settle:
            wait_until_idle()
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
                wait_until_idle()
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


def _ratio_interval(a: NDArray[np.float64], b: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % interval of median(a) / median(b), rounds resampled in pairs."""
    picks = np.random.default_rng(seed).integers(0, len(a), (_RESAMPLES, len(a)))
    ratios = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
