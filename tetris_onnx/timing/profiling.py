"""The time of each layer of one or two models, taken from onnxruntime's own profile while the whole network runs.

Two models are profiled in turns, so that whatever slows the machine slows both, and their layers are put side by side:
nodes with a name or a value in common belong together. An operator that takes over its neighbors in one model (bias,
activation, a residual Add, a MaxPool) is so in one row with all that it does in the other model.

onnxruntime writes down each node's inputs within the time that it gives for the node: some 4 us, more for a node of
many inputs. `profile` can measure that, by runs of the same networks without a profile in turns with the others, and
take it off.

A row of a kernel with ``density`` = kept / all weights could take ``ideal`` = dense time x density; ``fraction`` =
ideal / its time. 1 is a time exactly proportional to the weights that are left.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tetris_onnx.data.calibration import Samples
from tetris_onnx.graph.layers import DOMAIN, OUR_OPS
from tetris_onnx.session import PROVIDERS, ModelSource, open_session, run

LAYER, CONVERSION, OTHER = "layer", "conversion", "other"
_WEIGHT_OPS = ("Conv", "Gemm", "MatMul", "ConvTranspose", *OUR_OPS)
# Ops that onnxruntime may merge into the weight op before them: their time is shown with it, so that models in which
# they are merged and models in which they are not have the same rows.
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
# Where onnxruntime changes the layout of its convolutions.
_CONVERSIONS = ("ReorderInput", "ReorderOutput")
_TURNS = 5  # of each model
_MOST_RUNS = 40  # timed, in all turns of one model
_LEAST_RUNS = 10
_SECONDS = 2.0  # that the timed runs of one model should take
# A difference counts where it is beyond two standard errors, this share of the time (a machine drifts by more than the
# spread of neighboring runs tells) and what the profile can resolve.
_NOISE = 0.03
_RESOLUTION_MS = 0.001
_LEAST_SHARE = 0.1  # of a node's time in a profile that is its own, as far as that can be told
_SETTLE_SECONDS = 0.5  # onnxruntime's threads stop spinning long before


@dataclass(frozen=True)
class LayerTiming:
    """Time of one layer (a weight op with what follows it, or another op) in each model."""

    name: str
    kind: str  # LAYER (with a constant weight), CONVERSION (of layout) or OTHER
    op_types: tuple[str, ...]  # per model; "" where it has no such layer
    median_ms: tuple[float | None, ...]  # per model
    noise_ms: tuple[float, ...]  # per model: standard error of the median
    density: float | None = None  # kept / all weights in the last model (1 = dense); None where there are none

    @property
    def ideal_ms(self) -> float | None:
        """The first model's time times the density."""
        first = self.median_ms[0]
        return None if first is None or self.density is None or len(self.median_ms) < 2 else first * self.density

    @property
    def fraction(self) -> float | None:
        """Ideal time over the second model's."""
        ideal, second = self.ideal_ms, self.median_ms[-1]
        return ideal / second if ideal and second else None

    @property
    def slower_ms(self) -> float:
        """How much slower the second model's layer is; 0 where it is not, beyond noise (see `_NOISE`)."""
        if len(self.median_ms) < 2 or None in self.median_ms:
            return 0.0
        first, second = (ms or 0.0 for ms in self.median_ms)
        noise = max(2 * math.hypot(*self.noise_ms), _NOISE * first, _RESOLUTION_MS)
        return second - first if second - first > noise else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "name": self.name,
            "kind": self.kind,
            "op_types": self.op_types,
            "median_ms": self.median_ms,
            "noise_ms": self.noise_ms,
            "density": self.density,
            "ideal_ms": self.ideal_ms,
            "fraction_of_ideal": self.fraction,
        }


@dataclass(frozen=True)
class Row:
    """What a node of a model is shown with: the names of its row, and what is known of it."""

    name: str
    names: frozenset[tuple[str, str]]  # ("node" | "value", name) of all that is in the row
    kind: str
    density: float | None


@dataclass(frozen=True)
class Profile:
    """Per row of one model: what it is, the op that names it, and the milliseconds of each run."""

    rows: Mapping[str, tuple[Row, str, NDArray[np.float64]]]


def profile(
    models: Sequence[ModelSource],
    feeds: Sequence[Samples],
    names: Sequence[str],
    provider: str,
    threads: int,
    exact: bool = False,
) -> tuple[LayerTiming, ...]:
    """The time of each layer of one or two models, each on its own feed, in turns.

    ``exact``: without what the profiler takes itself, so that the layers add up to the network's time; needs a second
    session of each model. Raises `SessionError`.
    """
    protos = [named(model) for model in models]
    with tempfile.TemporaryDirectory(prefix="tetris-onnx-") as folder:
        profiled = [
            open_session(source, provider, threads, profile=Path(folder) / f"profile{i}")
            for i, source in enumerate(protos)
        ]
        sessions = profiled + [open_session(source, provider, threads) for source in protos if exact]
        walls: list[list[float]] = [[] for _ in sessions]

        def timed(i: int) -> None:
            start = time.perf_counter()
            run(sessions[i], feeds[i % len(models)], names[i % len(models)])
            walls[i].append(1e6 * (time.perf_counter() - start))

        turns: list[Callable[[], object]] = [(lambda i=i: timed(i)) for i in range(len(sessions))]  # type: ignore[misc]
        counted = take_turns(turns, settle=threads > 1 and len(turns) > 1)
        events = [json.loads(Path(s.end_profiling()).read_text(encoding="utf-8")) for s in profiled]
    found = []
    for i, (event, proto) in enumerate(zip(events, protos, strict=True)):
        excess = 0.0
        if exact:
            plain = i + len(models)
            excess = profilers_share(event, counted[i], np.array(walls[plain])[counted[plain]])
        found.append(collect(event, proto, counted[i], excess))
    return align(found)


def profilers_share(events: Iterable[Mapping[str, Any]], counted: Sequence[bool], plain: NDArray[np.float64]) -> float:
    """Microseconds of a node's time in a profile that are the profiler's own.

    By what the nodes' times of the ``counted`` runs together are more than ``plain``, the times of whole runs without a
    profile; 0 where they are not. The median over turns: a machine that changes its pace between two does not matter.
    """
    durations = [event["dur"] for event in events if _is_node(event)]
    nodes, rest = divmod(len(durations), len(counted))
    if nodes == 0 or rest > 0:  # a loop's or a branch's nodes: the runs cannot be told apart
        return 0.0
    sums = np.array(durations, float).reshape(len(counted), nodes).sum(axis=1)[np.array(counted, bool)]
    turns = min(_TURNS, len(sums), len(plain))
    with_profile, without = ([np.median(turn) for turn in np.array_split(runs, turns)] for runs in (sums, plain))
    return max(0.0, float(np.median(np.subtract(with_profile, without))) / nodes)


def _is_node(event: Mapping[str, Any]) -> bool:
    return bool(event.get("cat") == "Node" and event["name"].endswith("_kernel_time"))


@dataclass(frozen=True)
class Placement:
    """Where onnxruntime ran the nodes of a model."""

    model: str
    nodes: int
    elsewhere: tuple[str, ...]  # those that another provider ran than the one that was asked for
    copies: tuple[str, ...]  # those that copy between the memories of two providers


def placements(
    models: Sequence[ModelSource], feeds: Sequence[Samples], names: Sequence[str], provider: str
) -> tuple[Placement, ...]:
    """Where the nodes of each model run, by onnxruntime's own account of one run. Raises `SessionError`."""
    with tempfile.TemporaryDirectory(prefix="tetris-onnx-") as folder:
        found = []
        for i, (model, feed, name) in enumerate(zip(models, feeds, names, strict=True)):
            session = open_session(named(model), provider, profile=Path(folder) / f"profile{i}")
            run(session, feed, name)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            found.append(placement(events, name, PROVIDERS[provider]))
    return tuple(found)


def placement(events: Iterable[Mapping[str, Any]], model: str, provider: str) -> Placement:
    """What the events of a profile say of a model that was to run on ``provider`` (onnxruntime's name of it)."""
    ran = {
        event["name"].removesuffix("_kernel_time"): (event["args"]["op_name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and "provider" in event.get("args", {})
    }
    elsewhere = tuple(node for node, (_, where) in ran.items() if where != provider)
    copies = tuple(node for node, (op_type, _) in ran.items() if op_type.startswith("Memcpy"))
    return Placement(model, len(ran), elsewhere, copies)


def take_turns(turns: Sequence[Callable[[], object]], settle: bool) -> list[list[bool]]:
    """Run each of ``turns`` some times, then the next, several rounds. Which of their runs count, in order.

    A turn starts with a run that does not count: it brings the weights back into the caches.
    """
    counted: list[list[bool]] = []
    repeats = []
    for turn in turns:
        turn()  # allocations, lazy initialization
        start = time.perf_counter()
        turn()
        took = max(time.perf_counter() - start, 1e-6)
        runs = min(_MOST_RUNS, max(_LEAST_RUNS, round(_SECONDS / took)))
        repeats.append(-(-runs // _TURNS))
        counted.append([False, False])
    for n in range(_TURNS):
        order = range(len(turns)) if n % 2 == 0 else reversed(range(len(turns)))
        for i in order:
            if settle:
                wait_until_idle()
            for repeat in range(1 + repeats[i]):
                turns[i]()
                counted[i].append(repeat > 0)
    return counted


def wait_until_idle() -> None:
    """Wait until no thread of this process spins: onnxruntime's do after a run, and would take a core from the next."""
    end = time.perf_counter() + _SETTLE_SECONDS
    while time.perf_counter() < end:
        wall, busy = time.perf_counter(), time.process_time()
        time.sleep(0.002)
        if time.process_time() - busy < 0.3 * (time.perf_counter() - wall):
            return


def collect(
    events: Iterable[Mapping[str, Any]], model: onnx.ModelProto, counted: Sequence[bool], excess: float = 0.0
) -> Profile:
    """The rows of a model from the events of its profile, in the order of execution.

    ``excess``: microseconds that each time is too long (`profilers_share`).
    """
    rows = rows_of(model)
    durations: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if _is_node(event):
            node = event["name"].removesuffix("_kernel_time")
            op_type = event["args"].get("op_name", "")
            durations[node, event["args"].get("node_index", ""), op_type].append(
                max(event["dur"] - excess, _LEAST_SHARE * event["dur"]) / 1e3
            )
    chosen = np.array(counted, bool)
    found: dict[str, tuple[Row, str, NDArray[np.float64]]] = {}
    for (node, _, op_type), values in durations.items():
        row, names_it = find_row(node, op_type, rows)
        times = np.asarray(values)
        # A node of a loop or a branch runs more or less than once in a run: its share of each run.
        each = times[chosen] if len(times) == len(chosen) else np.full(chosen.sum(), times.sum() / len(chosen))
        _, known, total = found.get(row.name, (row, op_type, np.zeros(chosen.sum())))
        found[row.name] = row, (op_type if names_it else known), total + each
    return Profile(found)


def named(model: ModelSource) -> onnx.ModelProto:
    """The model, every node with a name: a profile cannot tell nodes without one apart."""
    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    if all(node.name for node in proto.graph.node):
        return proto
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    for node in named.graph.node:
        node.name = node.name or node.output[0]
    return named


def find_row(node: str, op_type: str, rows: Mapping[tuple[str, str], Row]) -> tuple[Row, bool]:
    """The row that a node of onnxruntime's optimized graph belongs to, and whether it names the row's operator.

    onnxruntime names a node after the original node or the value it makes, with additions: "y_nchwc", "fused fc",
    "fc/MatMulAddFusion".
    """
    names_it = op_type in (*_WEIGHT_OPS, "FusedConv", "FusedGemm", "FusedMatMul")
    if op_type in _CONVERSIONS:
        return Row(op_type, frozenset([("op", op_type)]), CONVERSION, None), False
    stem = node.removeprefix("fused ").removesuffix("_nchwc").removesuffix("_nhwc")
    for name in (node, stem, stem.rsplit("/", 1)[0], stem.rsplit("_token_", 1)[0]):
        for what in ("node", "value"):
            if name and (what, name) in rows:
                return rows[what, name], names_it
    name = node if names_it and node else op_type
    return Row(name, frozenset([("op", name)]), OTHER, None), names_it


def rows_of(model: onnx.ModelProto) -> dict[tuple[str, str], Row]:
    """The row of every node and value of a model's graph.

    A weight op names a row; what follows it elementwise is in the same row; any other op has its own, with the
    activation behind it.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = set(initializers)
    key_of: dict[str, str] = {}  # by value
    members: dict[str, set[tuple[str, str]]] = defaultdict(set)
    weights: dict[str, float] = {}  # density by row
    products: set[str] = set()  # of a weight, or of two activations
    for node in model.graph.node:
        if not node.output:
            continue
        sources = [value for value in node.input if value and value not in constants]
        if not sources:
            constants |= set(node.output)
        key = node.name or node.output[0]
        if node.op_type in _WEIGHT_OPS:
            products.add(key)
            if node.domain == DOMAIN:
                weights[key] = density_of(node, initializers)
            elif len(sources) == 1:
                weights[key] = 1.0
        elif node.op_type in _FOLLOWERS and len(sources) == 1:
            before = key_of.get(sources[0], "")
            if before in products or (before in members and node.op_type in ("Relu", "Clip")):
                key = before
        members[key] |= {("value", value) for value in node.output if value}
        if node.name:
            members[key].add(("node", node.name))
        key_of |= dict.fromkeys(node.output, key)
    rows: dict[tuple[str, str], Row] = {}
    for key, names in members.items():
        row = Row(key, frozenset(names), LAYER if key in weights else OTHER, weights.get(key))
        rows |= dict.fromkeys(names, row)
    return rows


def density_of(node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto]) -> float:
    """Share of the weights that one of our nodes keeps, from its own inputs (NaN where they are not constants)."""
    attributes = {a.name: list(a.ints) for a in node.attribute if a.type == onnx.AttributeProto.INTS}
    if node.input[2] not in initializers:
        return math.nan
    index = onnx.numpy_helper.to_array(initializers[node.input[2]])
    kept = np.ones(len(index))
    for axis, (size, block) in enumerate(zip(attributes["weight_shape"][:2], attributes["block_size"], strict=True)):
        kept *= np.minimum(block, size - index[:, axis] * block)  # blocks at the edges count with their true size
    return float(kept.sum()) / math.prod(attributes["weight_shape"][:2])


def align(profiles: Sequence[Profile]) -> tuple[LayerTiming, ...]:
    """One timing per row of any model, in the order of the first one that has it; rows with a name in common are one.

    A weight op gives the row its name, its kind and its operator.
    """
    groups: list[tuple[set[tuple[str, str]], list[tuple[int, str]]]] = []
    for i, one in enumerate(profiles):
        for key, (row, _, _) in one.rows.items():
            names, parts = {*row.names, ("row", f"{i}/{key}")}, [(i, key)]
            touching = [g for g in groups if not g[0].isdisjoint(names)]
            if touching:
                first = touching[0]
                first[0].update(names, *(g[0] for g in touching[1:]))
                first[1].extend([p for g in touching[1:] for p in g[1]] + parts)
                groups = [g for g in groups if not any(g is other for other in touching[1:])]
            else:
                groups.append((names, parts))
    return tuple(_timing(profiles, parts) for _, parts in groups)


def _timing(profiles: Sequence[Profile], parts: Sequence[tuple[int, str]]) -> LayerTiming:
    op_types, rows = [""] * len(profiles), []
    medians: list[float | None] = []
    noises: list[float] = []
    for i, one in enumerate(profiles):
        mine = [one.rows[key] for model, key in parts if model == i]
        mine.sort(key=lambda part: part[0].kind != LAYER)  # stable: a layer names the row, else what runs first
        rows += [row for row, _, _ in mine]
        if not mine:
            medians.append(None)
            noises.append(0.0)
            continue
        op_types[i] = mine[0][1]
        times = np.sum([t for _, _, t in mine], axis=0)
        medians.append(float(np.median(times)))
        noises.append(_standard_error(times))
    rows.sort(key=lambda row: row.kind != LAYER)
    last = [row.density for model, key in parts if model == len(profiles) - 1 for row in [profiles[model].rows[key][0]]]
    density = next((d for d in last if d is not None), 1.0 if rows[0].kind == LAYER else None)
    return LayerTiming(rows[0].name, rows[0].kind, tuple(op_types), tuple(medians), tuple(noises), density)


def _standard_error(times: NDArray[np.float64]) -> float:
    """Of the median of ``times``: that of a mean of normal values, times sqrt(pi / 2), its width from quartiles."""
    low, high = np.quantile(times, (0.25, 0.75))
    return float((high - low) / 1.349 * math.sqrt(math.pi / 2 / len(times)))


def totals(layers: Sequence[LayerTiming]) -> tuple[LayerTiming, ...]:
    """Sums over the weight layers, the layout conversions, everything else and the whole network."""
    sums = []
    for name, kinds in (
        ("weight layers", (LAYER,)),
        ("layout conversions", (CONVERSION,)),
        ("everything else", (OTHER,)),
        ("sum", (LAYER, CONVERSION, OTHER)),
    ):
        chosen = [layer for layer in layers if layer.kind in kinds]
        models = range(len(chosen[0].median_ms)) if chosen else range(0)
        if not chosen:
            continue
        medians = tuple(sum(layer.median_ms[i] or 0.0 for layer in chosen) for i in models)
        noises = tuple(math.hypot(*(layer.noise_ms[i] for layer in chosen)) for i in models)
        density = None
        if kinds == (LAYER,) and len(models) == 2 and medians[0]:
            density = sum(layer.ideal_ms or 0.0 for layer in chosen) / medians[0]  # weighted by the dense times
        sums.append(
            LayerTiming(name, kinds[0] if len(kinds) == 1 else OTHER, ("",) * len(models), medians, noises, density)
        )
    return tuple(sums)
