"""Many settings of one model: what each of them costs in accuracy, and what it wins in time.

The settings are searched in parallel, on this machine through joblib or on a cluster through the same calls with Dask.
Each is a file of the folder as soon as it is found, so an interrupted sweep goes on where it was. Then the models are
timed here, one at a time, each in turns with the dense one: times taken side by side are worth nothing. What is left is
the Pareto front: the settings that no other one beats in both.

What the settings share is done once: the model and the samples (images decoded and scaled) are read and checked here,
and reach the workers as memory maps, or scattered over the cluster, which needs no files of ours. The searches share
nothing: what a layer sees depends on how those before it were pruned, and an allocation measures around the sparsity
that it is asked for. So each setting is exactly what `optimize` makes of it alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from joblib import Parallel, cpu_count, delayed, parallel_config
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from tetris_onnx import __version__
from tetris_onnx.accuracy.compare import compare
from tetris_onnx.algorithms.allocation import BudgetError
from tetris_onnx.config import Config, parse_block_size
from tetris_onnx.data.calibration import Data, Shapes, check_shapes, fixed_batch, model_inputs
from tetris_onnx.errors import TetrisError
from tetris_onnx.graph import io
from tetris_onnx.optimize import optimize
from tetris_onnx.planner import Progress
from tetris_onnx.runtime import get_library_path, import_onnxruntime
from tetris_onnx.timing.bench import bench
from tetris_onnx.timing.cost import Machine
from tetris_onnx.timing.machine import load_machine
from tetris_onnx.timing.processor import cpu_name

_FORMAT = "tetris-onnx sweep 1"
_IDENTITY = "sweep.json"
_MOST_SETTINGS = 1000
_CONNECT_SECONDS = 10
# Options that change how much memory or how many processors a search takes, and not what it finds.
_RESOURCES = ("sparsity", "block_size", "workers", "memory")
# What a folder may turn out to be, where its content says nothing to a reader.
_ANOTHER = {"model": "of another model", "calibration": "with other calibration samples", "data": "with other data"}
MEASURES = ("accuracy", "agreement", "error")

Versions: TypeAlias = dict[str, str]


class SweepError(TetrisError, ValueError):
    """A grid that makes no sense, a folder that holds something else, or a cluster that cannot be used."""


@dataclass(frozen=True, order=True)
class Setting:
    """One point of the grid."""

    block_size: tuple[int, int]
    sparsity: float

    @property
    def name(self) -> str:
        """``sparsity0.5_blocks32x32``: the stem of its files."""
        return f"sparsity{self.sparsity:g}_blocks{self.block_size[0]}x{self.block_size[1]}"


@dataclass(frozen=True)
class Timing:
    """Times of the dense and of the block-sparse model, measured in turns."""

    dense_ms: float
    sparse_ms: float
    speedup: float
    interval: tuple[float, float]  # 95 %, of the speed-up
    machine: str  # processor, onnxruntime, threads and seconds: what the times belong to


@dataclass(frozen=True)
class Outcome:
    """What became of one setting. All but ``setting`` and ``failure`` mean nothing where it failed."""

    setting: Setting
    density: float = 1.0  # kept weights / all
    macs: float | None = None  # kept multiplications / all; None where sizes are unknown
    file_size: int = 0
    block_sparse: int = 0  # layers that became block-sparse
    layers: int = 0
    dense_accuracy: float | None = None  # with labels only
    accuracy: float | None = None
    agreement: float | None = None  # share of samples with the same top-1 as the dense model's
    error: float = 0.0  # mean |y - z| / max|y|
    seconds: float = 0.0  # of the search
    failure: str = ""  # why there is no model
    timing: Timing | None = None

    def quality(self, measure: str) -> float | None:
        """What counts as good, one of `MEASURES`: larger is better."""
        return -self.error if measure == "error" else getattr(self, measure)


@dataclass(frozen=True)
class Sweep:
    """All settings, and which of them are worth looking at."""

    model: str
    folder: str
    measure: str  # one of MEASURES
    data: str  # what it was measured on
    outcomes: tuple[Outcome, ...]  # by block size, then sparsity
    front: tuple[bool, ...]  # for each outcome, whether no other one, nor the dense model, is better in both
    searched: int  # settings that this run searched; the others were in the folder

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        rows = zip(self.outcomes, self.front, strict=True)
        return asdict(replace(self, outcomes=(), front=())) | {
            "outcomes": [to_json(outcome) | {"front": front} for outcome, front in rows],
            "front": [o.setting.name for o, front in zip(self.outcomes, self.front, strict=True) if front],
        }


@dataclass(frozen=True, eq=False)
class _Work:
    """What every setting needs."""

    model: NDArray[np.uint8]  # an onnx.ModelProto
    samples: Data | None  # to prune with
    judged: Data | None  # to compare on; None: random samples
    config: Config
    machine: Machine
    shapes: Shapes | None  # of inputs whose sizes the model leaves open

    def load(self) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.ParseFromString(self.model.tobytes())
        return proto

    def at(self, setting: Setting) -> Config:
        return replace(self.config, sparsity=setting.sparsity, block_size=setting.block_size)


def parse_sparsities(text: str) -> tuple[float, ...]:
    """``"0.3:0.9:0.1"`` (first, last, step) or ``"0.3,0.5"`` -> rising sparsities in [0, 1). Raises `SweepError`."""
    wrong = SweepError(f"--sparsity {text}: expected FIRST:LAST:STEP or a list from 0 to below 1, such as 0.3:0.9:0.1")
    parts = text.split(":")
    try:
        if len(parts) == 1:
            values = [float(part) for part in text.split(",")]
        else:
            first, last, step = (float(part) for part in parts)
            if not 0 < step < 1 or not 0 <= first <= last < 1:
                raise wrong
            steps = min(int((last - first) / step + 1e-6), _MOST_SETTINGS)
            values = [round(first + i * step, 10) for i in range(steps + 1)]
    except ValueError:
        raise wrong from None
    if not all(0 <= value < 1 for value in values):
        raise wrong
    return tuple(sorted(set(values)))


def parse_block_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """``"16,32x64"`` -> ((16, 16), (32, 64)). Raises `ConfigError`."""
    return tuple(sorted({parse_block_size(part) for part in text.split(",")}))


def grid(sparsities: Sequence[float], block_sizes: Sequence[tuple[int, int]]) -> tuple[Setting, ...]:
    """Every sparsity with every block size. Raises `SweepError` where that is more than anyone would wait for."""
    settings = tuple(sorted(Setting(block, sparsity) for block in block_sizes for sparsity in sparsities))
    if not 0 < len(settings) <= _MOST_SETTINGS:
        raise SweepError(f"{len(settings)} settings: from 1 to {_MOST_SETTINGS} can be swept")
    return settings


def sweep(
    model: Path,
    settings: Sequence[Setting],
    folder: Path,
    config: Config | None = None,
    calibration: Data | None = None,
    data: Data | None = None,
    jobs: int | None = None,
    scheduler: str | None = None,
    seconds: float = 3.0,
    progress: Progress | None = None,
    shapes: Shapes | None = None,
) -> Sweep:
    """Optimize ``model`` with each of the ``settings`` on top of ``config``, compare and time the results.

    Everything is kept in ``folder``: a model and a JSON file for each setting. What the folder holds of the same model,
    options and versions is not computed again. ``calibration`` and ``data`` as in `optimize` and `compare`; without
    data the models are compared on the calibration samples (their labels are not used), else, by the error of their
    outputs, on random ones.

    ``jobs``: searches at a time (one per core by default); ``scheduler``: address of a Dask scheduler, whose workers
    search in their place. ``seconds`` and ``config.threads`` are those of `bench`, which runs here; ``shapes`` those of
    `optimize`. Raises `SweepError`, and what `optimize`, `compare` and `bench` raise, but a `BudgetError` is the
    outcome of its setting.
    """
    config = config or Config()
    if config.target != "cpu" or config.speedup is not None:
        raise SweepError("a sweep varies the sparsity and times on the processor: leave out target cuda and speedup")
    proto = io.raise_opset(io.load(model))
    inputs = model_inputs(proto)
    check_shapes(shapes or {}, inputs)  # before there is a folder of this shape
    judged = data if data is not None else calibration and replace(calibration, labels=None)
    content = np.frombuffer(proto.SerializeToString(deterministic=True), np.uint8)
    work = _Work(content, calibration, judged, config, load_machine(), shapes)
    store = _Store(folder, _identity(work), _versions(), asdict(work.machine))
    store.open(str(model))
    found = {setting: outcome for setting in settings if (outcome := store.load(setting)) is not None}
    todo = [setting for setting in settings if setting not in found]
    for done, outcome in enumerate(_search_all(work, todo, store, jobs, scheduler, progress), 1):
        found[outcome.setting] = outcome
        if progress is not None:
            progress("settings", done, len(todo))
    found = _time_all(model, found, store, work, seconds, fixed_batch(inputs) or 1, progress)
    outcomes = tuple(found[setting] for setting in sorted(settings))
    # (random samples are often all of one class: that they stay so says nothing)
    measures = MEASURES if judged is not None else ("error",)
    measure = next(m for m in measures if all(o.failure or o.quality(m) is not None for o in outcomes))
    source = "random samples" if judged is None else judged.source
    return Sweep(str(model), str(folder), measure, source, outcomes, pareto_front(outcomes, measure), len(todo))


def pareto_front(outcomes: Sequence[Outcome], measure: str) -> tuple[bool, ...]:
    """Which of the ``outcomes`` no other one, nor the dense model, is at least as good as in quality and in speed-up.

    Of two that are equal in both, both are on the front.
    """
    dense = next((o.dense_accuracy for o in outcomes if o.dense_accuracy is not None), None)
    best = {"accuracy": dense if dense is not None else 0.0, "agreement": 1.0, "error": 0.0}[measure]
    # (a setting that failed has no timing, and one with a timing was compared)
    points = [(o.quality(measure) or 0.0, o.timing.speedup) if o.timing else None for o in outcomes]
    rivals = [(best, 1.0), *(point for point in points if point is not None)]
    return tuple(
        point is not None and not any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in rivals)
        for point in points
    )


def to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON types, its setting among them; an error that is not finite is null."""
    values = asdict(outcome)
    setting = values.pop("setting")
    return {"name": outcome.setting.name, **setting, **values, "error": _finite(outcome.error)}


def from_json(values: Mapping[str, Any]) -> Outcome:
    """What `to_json` made. Raises KeyError, TypeError or ValueError for anything else."""
    rest = {k: v for k, v in values.items() if k not in ("name", "block_size", "sparsity", "timing")}
    rows, columns = values["block_size"]
    timing = values["timing"]
    if timing is not None:
        low, high = timing["interval"]
        timing = Timing(**timing | {"interval": (float(low), float(high))})
    error = float("inf") if rest["error"] is None else float(rest["error"])
    setting = Setting((int(rows), int(columns)), float(values["sparsity"]))
    return Outcome(setting, **rest | {"timing": timing, "error": error})


class _Store:
    """The folder of a sweep: what it belongs to, and the settings that are found."""

    def __init__(self, folder: Path, identity: dict[str, Any], versions: Versions, machine: dict[str, Any]) -> None:
        self.folder = folder
        self._identity = identity
        self._base = [identity, versions, machine]

    def open(self, model: str) -> None:
        """Make the folder, or check that it belongs to the same model and options. Raises `SweepError`."""
        path = self.folder / _IDENTITY
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if known is None and any(self.folder.iterdir()):
                raise SweepError(f"{self.folder} holds other files and no sweep; give a new folder")
        except OSError as error:
            raise SweepError(f"{self.folder}: {(error.strerror or str(error)).lower()}; give a folder") from None
        except ValueError as error:
            raise (
                error if isinstance(error, SweepError) else SweepError(f"{path} is damaged; give a new folder")
            ) from None
        if known is None:
            self._write(path, self._identity | {"model_file": model})
            return
        for key, value in self._identity.items():
            found = known.get(key) if isinstance(known, dict) else None
            if found != value:
                what = _ANOTHER.get(key, f"with another value of {key}")
                change = "" if key in _ANOTHER else f" ({found} there, {value} here)"
                raise SweepError(f"{self.folder} holds a sweep {what}{change}; give another folder")

    def model_path(self, setting: Setting) -> Path:
        return self.folder / f"{setting.name}.onnx"

    def load(self, setting: Setting) -> Outcome | None:
        """The outcome of a setting that was found with the same versions, else None."""
        try:
            values = json.loads((self.folder / f"{setting.name}.json").read_text(encoding="utf-8"))
            if values.pop("key") != self._key(setting.name):
                return None
            outcome = from_json(values)
        except (OSError, KeyError, TypeError, ValueError):  # one that is not there or damaged is computed again
            return None
        whole = outcome.failure or self.model_path(setting).is_file()
        return outcome if whole and outcome.setting == setting else None

    def save(self, outcome: Outcome, model: bytes | None = None) -> None:
        """Write an outcome, after its ``model``: the JSON file says that the setting is done."""
        if model:
            with io.write_atomically(self.model_path(outcome.setting)) as file:
                file.write(model)
        name = outcome.setting.name
        self._write(self.folder / f"{name}.json", {"key": self._key(name)} | to_json(outcome))

    def _key(self, name: str) -> str:
        return hashlib.sha256(json.dumps([*self._base, name], sort_keys=True).encode()).hexdigest()

    @staticmethod
    def _write(path: Path, values: Mapping[str, Any]) -> None:
        with io.write_atomically(path) as file:
            file.write((json.dumps(values, indent=1, allow_nan=False) + "\n").encode("utf-8"))


def _search_all(
    work: _Work,
    todo: Sequence[Setting],
    store: _Store,
    jobs: int | None,
    scheduler: str | None,
    progress: Progress | None,
) -> Iterator[Outcome]:
    """The outcomes in the order in which they are found, each of them stored."""
    if not todo:
        return
    jobs = max(1, min(jobs or cpu_count(), len(todo)))
    alone = scheduler is None and jobs == 1  # then a search may take all cores for itself
    if not alone:
        memory = work.config.memory // (jobs if scheduler is None else 1)
        work = replace(work, config=replace(work.config, workers=1, memory=memory))
    if progress is not None:
        progress("settings", 0, len(todo))
    with _backend(work, scheduler):
        processes = jobs if scheduler is None else -1
        runner = Parallel(n_jobs=processes, batch_size=1, pre_dispatch="n_jobs", return_as="generator_unordered")
        # The sparser a model, the quicker its refits: the long searches come first.
        order = sorted(todo, key=lambda setting: setting.sparsity)
        for outcome, model in runner(delayed(_search)(work, s) for s in order):
            store.save(outcome, model)
            yield outcome


def _search(work: _Work, setting: Setting) -> tuple[Outcome, bytes]:
    """One setting: what was found, and its model."""
    start = time.perf_counter()
    dense = work.load()
    with _one_thread(work.config):
        try:
            result = optimize(
                dense, work.at(setting), calibration=work.samples, machine=work.machine, shapes=work.shapes
            )
        except BudgetError as error:
            return Outcome(setting, failure=str(error), seconds=time.perf_counter() - start), b""
        found = compare(dense, result.model, work.judged, shapes=work.shapes)
    report = result.report
    total, kept = report.parameters
    model = result.model.SerializeToString()
    outcome = Outcome(
        setting,
        density=kept / max(total, 1),
        macs=report.macs and report.macs[1] / max(report.macs[0], 1),
        file_size=len(model),
        block_sparse=sum(row.status == "block-sparse" for row in report.layers),
        layers=len(report.layers),
        dense_accuracy=found.accuracy_a,
        accuracy=found.accuracy_b,
        agreement=found.agreement,
        error=found.mean_relative,
        seconds=time.perf_counter() - start,
    )
    return outcome, model


@contextlib.contextmanager
def _one_thread(config: Config) -> Iterator[None]:
    """One thread for numpy, and no workers' workers, where searches run side by side."""
    if config.workers != 1:
        yield
        return
    with threadpool_limits(1), parallel_config(backend="sequential"):
        yield


@contextlib.contextmanager
def _backend(work: _Work, scheduler: str | None) -> Iterator[None]:
    """What joblib's calls run on: processes of this machine, or the workers of a Dask cluster."""
    if scheduler is None:
        yield  # joblib's default; named here, it would take the place of the threads that a search itself uses
        return
    try:
        from dask.distributed import Client
    except ImportError:
        raise SweepError("--scheduler needs Dask: pip install 'tetris-onnx[dask]'") from None
    try:
        client = Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise SweepError(f"--scheduler {scheduler}: no Dask scheduler answers ({text})") from None
    with client:
        expected = _versions()
        for worker, versions in client.run(_versions).items():
            if versions != expected:
                raise SweepError(
                    f"the worker {worker} has {versions}, here are {expected}: install the same everywhere"
                )
        with parallel_config(backend="dask", client=client, scatter=[work]):
            yield


def _time_all(
    model: Path,
    found: dict[Setting, Outcome],
    store: _Store,
    work: _Work,
    seconds: float,
    batch: int,
    progress: Progress | None,
) -> dict[Setting, Outcome]:
    """The outcomes with their times; those that were measured here before in the same way keep them."""
    threads, samples = work.config.threads, None if work.judged is None else work.judged.samples
    machine = f"{cpu_name()}, {os.cpu_count()} cores, onnxruntime {_versions()['onnxruntime']}, {threads} threads"
    timed = dict(found)
    waiting = [s for s, o in found.items() if not o.failure and (o.timing is None or o.timing.machine != machine)]
    for done, setting in enumerate(sorted(waiting)):
        if progress is not None:
            progress("timing", done, len(waiting))
        sparse = store.model_path(setting)
        result = bench(model, sparse, threads=threads, batch=batch, seconds=seconds, data=samples, shapes=work.shapes)
        assert result.speedup is not None
        assert result.interval is not None
        first, second = (timing.median_ms for timing in result.timings)
        timing = Timing(first, second, result.speedup, result.interval, machine)
        timed[setting] = replace(found[setting], timing=timing)
        store.save(timed[setting])
    if progress is not None and waiting:
        progress("timing", len(waiting), len(waiting))
    return timed


def _identity(work: _Work) -> dict[str, Any]:
    """What all settings of a folder have in common; the names of the keys are for messages."""
    options = asdict(work.config)
    return {
        "format": _FORMAT,
        "model": hashlib.sha256(work.model.data).hexdigest(),
        "calibration": _digest(work.samples),
        "data": _digest(work.judged),
        "shapes": {name: list(shape) for name, shape in work.shapes.items()} if work.shapes else None,
    } | {name: json.loads(json.dumps(value)) for name, value in options.items() if name not in _RESOURCES}


def _digest(data: Data | None) -> str | None:
    if data is None:
        return None
    found = hashlib.sha256()
    labels = {} if data.labels is None else {"labels of the samples": data.labels}
    for name, array in (data.samples | labels).items():
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()


def _versions() -> Versions:
    """What a result may depend on; raises where something is missing."""
    get_library_path()
    return {"tetris-onnx": __version__, "onnxruntime": import_onnxruntime().__version__, "numpy": np.__version__}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
