"""The pipeline: a dense ONNX model in, a verified block-sparse one out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from tetris_onnx.accuracy.compare import compare
from tetris_onnx.accuracy.quantization import InputRanges, input_ranges
from tetris_onnx.accuracy.verification import (
    REAL_SAMPLES,
    check_loads,
    comparable,
    first_samples,
    rounding_error,
    verify,
    verify_precision,
)
from tetris_onnx.algorithms.heatmap import Heatmap
from tetris_onnx.config import MEASURED_IMPORTANCES, Config, ConfigError
from tetris_onnx.data.calibration import (
    CalibrationError,
    Data,
    InputSpec,
    Samples,
    Shapes,
    Source,
    check_shapes,
    count,
    fixed_batch,
    is_open,
    model_inputs,
    select,
)
from tetris_onnx.data.image_options import ImageOptions
from tetris_onnx.data.images import load_data
from tetris_onnx.decision import Decision, Problem, split
from tetris_onnx.graph import io
from tetris_onnx.graph.channels import gather_permutation
from tetris_onnx.graph.io import ModelError
from tetris_onnx.graph.layers import CONV_ADD, CONV_MAX_POOL
from tetris_onnx.graph.quantized import is_quantized
from tetris_onnx.graph.tensors import TensorFile, inlined
from tetris_onnx.passes import (
    NewWeights,
    Pass,
    absorb_gathers,
    attach_fallback,
    channels_last,
    fold_gathers,
    fuse_add_and_pool,
    fuse_batchnorm,
    fuse_epilogue,
    group_channels,
    join_quantized,
    lower_block_sparse,
    normalize_layers,
    open_layers,
    prune_blocks,
    reorder_weights,
    run_passes,
    set_precision,
    set_weights,
)
from tetris_onnx.plan import Plan
from tetris_onnx.planner import OPEN_SIZES, Progress, prepare, set_sizes
from tetris_onnx.reports.heatmaps import weight_maps
from tetris_onnx.reports.report import LayerReport, Report
from tetris_onnx.session import model_name
from tetris_onnx.timing.cost import Machine
from tetris_onnx.timing.machine import MEASURED, load_machine, measured, save_machine
from tetris_onnx.timing.processor import is_busy, load_average
from tetris_onnx.timing.trial import Trial, try_out

# Samples that the ranges of int8 inputs are taken from.
_RANGE_SAMPLES = 64
# How often layers that measured slower than dense are made dense; each time the others are measured again.
_MOST_CHANGES = 3


@dataclass(frozen=True)
class Result:
    """What `optimize` gives back."""

    model: onnx.ModelProto
    plan: Plan
    report: Report
    maps: Mapping[str, Heatmap] = field(default_factory=dict)  # pictures of the weights by layer, where asked for


@dataclass(frozen=True)
class _Verified:
    """A block-sparse model, its error and that of its precision (see `Report`)."""

    model: onnx.ModelProto
    error: float
    rounding_error: tuple[float, float] | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Rounded:
    """A model in another precision, and the samples that say how far it is from float32."""

    model: onnx.ModelProto
    samples: Samples | None
    note: str | None = None


def optimize(
    model: str | Path | onnx.ModelProto,
    config: Config | None = None,
    plan: Plan | None = None,
    calibration: Source | Data | None = None,
    progress: Progress | None = None,
    dump_passes: str | Path | None = None,
    measure: bool = False,
    images: ImageOptions | None = None,
    max_drop: float | None = None,
    labeled: Source | Data | None = None,
    weight_pictures: bool = False,
    machine: Machine | None = None,
    shapes: Shapes | None = None,
) -> Result:
    """Reorder, prune and lower the layers of ``model``, and verify the result in onnxruntime.

    ``calibration``: samples without labels: arrays by the name of the model's input, an .npz of such, or a folder of
    images, which ``images`` says how to scale. With them, layers are pruned by the error of their outputs and refitted
    to what they see, which brings back most of the accuracy. ``plan`` replaces the search. ``dump_passes``: a folder
    for the model after each pass. ``model`` is not changed.

    ``max_drop``: prune as much as loses so many points of accuracy at most (``config.sparsity`` is not used), measured
    on the samples ``labeled`` (as ``calibration``, with an array ``label``); without them on a quarter of the
    calibration samples, if these have labels.

    ``measure``: time the result against the dense model on this machine, make layers that are slower than dense (beyond
    noise) dense again, and report what was measured; the first time, also fit the cost model to the machine.

    ``weight_pictures``: also make pictures of every layer's weight, for a report's page.

    ``machine``: what times are predicted for, in the place of this one.

    ``shapes``: of inputs whose sizes the model leaves open, by name (the first axis, the batch, is not used): what it
    is planned, verified and timed for, not a limit of the result. Calibration samples say it, too.

    The result is compared with the dense model that has the same weights and zero blocks, on random inputs and on some
    of the samples.

    Raises, all of them a `TetrisError`: `ConfigError` (an importance that needs samples, and none), `ModelError` (a
    file that is no model), `SessionError` (a model that onnxruntime does not run), `CalibrationError` (samples that do
    not fit), `PlanError` (a plan for another model), `BudgetError` and `DropError` (a sparsity, speed-up or accuracy
    that cannot be had), `PassError` and `VerificationError` (a mistake of ours: the model must not be used).
    """
    config = config or Config()
    if max_drop is not None and (plan is not None or config.speedup is not None):
        raise ConfigError("max_drop chooses the sparsity: give no plan and no speedup")
    if config.importance in MEASURED_IMPORTANCES and calibration is None and plan is None:
        raise ConfigError(f"importance {config.importance} is measured on samples: give calibration, or use l1 or l2")
    clock = _Clock(progress)
    with clock.stage("load"):
        original = io.given(model)
        source = io.raise_opset(original)
        graph = io.to_graph(source)
        weight_file = io.open_weights() if io.is_large(source) else None
        before = {node.name for node in graph.nodes if gather_permutation(node) is not None}
        check_loads(source, model_name(model))
    machine = machine or (_fitted_machine(clock) if measure else load_machine())
    with clock.stage("plan"):
        prepared = prepare(graph, config.precision == "int8")
        # Without samples, all that is asked of it is its inputs.
        proto = source if calibration is None else io.to_proto(prepared, source, weight_file)
        inputs = model_inputs(proto)
        if calibration is not None and not isinstance(calibration, Data):
            calibration = load_data(calibration, inputs, images)
        if labeled is not None and not isinstance(labeled, Data):
            labeled = load_data(labeled, inputs, images)
        if max_drop is not None and labeled is None:
            if calibration is None or calibration.labels is None:
                raise CalibrationError("the accuracy that max_drop limits needs labeled samples")
            calibration, labeled = split(calibration, inputs)
        samples = None if calibration is None else calibration.samples
        sizes = _open_shapes(shapes, samples, inputs)
        if sizes:
            set_sizes(prepared, sizes)
        problem = Problem(prepared, proto, machine, samples, progress)
        if max_drop is None:
            decision = problem.decide(config, plan)
        else:
            decision = problem.sparsest(
                config, max_drop, lambda found: _points_lost(source, found, labeled, weight_file)
            )
        plan, weights, rows = decision.plan, decision.weights, decision.rows
    some = None if samples is None else first_samples(samples, model_inputs(source))

    def build(plan: Plan, weights: Mapping[str, NewWeights], folder: Path | None) -> _Verified:
        with clock.stage("rewrite"):
            whole = frozenset(row.layer for row in rows if row.status == "whole")
            steps = pipeline(plan, config.gathers, weights, config.target, whole)
            sparse = run_passes(graph, steps, folder, source)
            result = io.to_proto(sparse, source, weight_file)
        with clock.stage("verify"):
            error = verify(result, masked_dense(source, plan, weights, weight_file), config.tolerance, some, shapes)
            if config.precision == "float32" or not len(plan):
                return _Verified(result, error)

            def rounded(ranges: InputRanges | None = None) -> onnx.ModelProto:
                step = partial(set_precision, precision=config.precision, input_ranges=ranges)
                return io.to_proto(run_passes(sparse, [Pass("set_precision", step)]), source, weight_file)

            if config.precision == "int8" and samples is not None:
                found = _with_ranges(rounded, result, samples)
            else:
                found = _Rounded(rounded(), some)
            rounding = verify_precision(found.model, result, config.precision, found.samples, shapes)
            return _Verified(found.model, error, rounding, found.note)

    built = build(plan, weights, None if dump_passes is None else Path(dump_passes))
    trial = None
    for changes in range(_MOST_CHANGES + 1) if measure else ():
        with clock.stage("measure"):
            trial = try_out(source, built.model, [row.layer for row in rows], some, config.threads, shapes)
        # (a layer that a rule of the config names is pruned as the user asks, whatever its time)
        slower = {
            row.layer
            for row in rows
            if row.layer in trial.slower and (row.status == "whole" or not config.for_layer(row.node).explicit)
        }
        slower = slower if changes < _MOST_CHANGES else set()
        rows = [_with_measured(row, trial, row.layer in slower) for row in rows]
        if not slower:
            break
        plan = Plan(tuple(p for p in plan if p.layer not in slower))
        weights = {name: new for name, new in weights.items() if name not in slower}
        built = build(plan, weights, None)
    final = io.to_graph(built.model)
    gathers = sum(gather_permutation(node) is not None and node.name not in before for node in final.nodes)
    ops = [node.op for node in final.nodes]
    report = Report(
        model=str(model) if isinstance(model, (str, Path)) else original.graph.name,
        output="",
        layers=tuple(rows),
        gathers=gathers,
        fused=(ops.count(CONV_ADD), ops.count(CONV_MAX_POOL)),
        bytes_before=io.size_of(original),
        bytes_after=io.size_of(built.model),
        max_error=built.error,
        precision=config.precision,
        rounding_error=built.rounding_error,
        seconds=clock.seconds,
        importance=config.importance if config.importance != "auto" else "l1" if calibration is None else "hessian",
        machine=machine.name,
        threads=config.threads,
        notes=(
            *decision.notes,
            *([built.note] if built.note else []),
            *_notes(config, plan, rows, built.rounding_error, is_quantized(source)),
        ),
    )
    if trial is not None:
        report = _with_times(report, trial)
    return Result(inlined(built.model), plan, report, weight_maps(prepared, plan, weights) if weight_pictures else {})


def _open_shapes(given: Shapes | None, samples: Samples | None, inputs: Sequence[InputSpec]) -> Shapes:
    """The shapes of inputs that the model leaves open, by name: those ``given``, or those of the samples.

    Raises `CalibrationError` where the model's inputs cannot have them, or a sample has another one.
    """
    given = given or {}
    check_shapes(given, inputs)
    found = given if samples is None else {spec.name: samples[spec.name].shape for spec in inputs}
    for name, shape in given.items():
        if tuple(shape[1:]) != tuple(found[name][1:]):
            raise CalibrationError(
                f"the shape given for {name!r} is {'x'.join(map(str, shape))}, but its samples are "
                f"{'x'.join(map(str, (1, *found[name][1:])))}: give one of the two"
            )
    return {spec.name: found[spec.name] for spec in inputs if spec.name in found and is_open(spec)}


def _fitted_machine(clock: _Clock) -> Machine:
    """The coefficients measured on this machine: now, if they have not been before.

    They are kept for later runs, but not what a busy machine gave: it would spoil those, too.
    """
    machine = load_machine()
    if measured(machine):
        return machine
    from tetris_onnx.timing.measure import measure_machine

    busy = is_busy(load_average(), os.cpu_count() or 1)
    with clock.stage("fit cost model"):
        machine = measure_machine().machine
        if not busy:
            with suppress(ModelError):  # it will be measured again the next time
                save_machine(machine)
    return replace(machine, name=f"{machine.name}{MEASURED}")


def _with_measured(row: LayerReport, trial: Trial, slower: bool) -> LayerReport:
    """The row of a layer with what was measured; that of a dense layer, where it is ``slower`` block-sparse."""
    times = trial.layers.get(row.layer)
    if not slower or times is None:
        return replace(row, measured_ms=times)
    dense, sparse = times
    return replace(
        row,
        block_size=None,
        density=1.0,
        retained=None,
        baseline=None,
        kept_parameters=row.parameters,
        status="dense",
        reason=f"measured {sparse:.2g} ms by our operator against {dense:.2g} ms dense",
        output_error=None,
        predicted_loss=None,
        predicted_ms=row.predicted_ms and (row.predicted_ms[0], row.predicted_ms[0]),
        measured_ms=times,
    )


def _with_times(report: Report, trial: Trial) -> Report:
    """The report with the times of the whole network, and what they say."""
    first, second = (timing.median_ms for timing in trial.network.timings)
    ratio, interval = trial.network.speedup, trial.network.interval
    assert ratio is not None
    assert interval is not None
    notes = list(report.notes)
    if interval[1] < 1:
        notes.append("the whole network measured slower than the dense one: leave it dense, or prune more")
    kept = [row.node for row in report.layers if row.layer in trial.slower and row.status == "block-sparse"]
    if kept:
        listing = ", ".join(repr(name) for name in kept[:3]) + (", ..." if len(kept) > 3 else "")
        notes.append(f"block-sparse although measured slower than dense: {listing}")
    return replace(report, milliseconds=(first, second), speedup=(ratio, *interval), notes=tuple(notes))


def _points_lost(
    source: onnx.ModelProto, decision: Decision, labeled: Data | None, weight_file: TensorFile | None
) -> float:
    """By how many points the accuracy falls."""
    found = compare(source, masked_dense(source, decision.plan, decision.weights, weight_file), labeled)
    if found.accuracy_a is None or found.accuracy_b is None:
        raise CalibrationError("the accuracy that max_drop limits needs labeled samples")
    return 100 * (found.accuracy_a - found.accuracy_b)


def pipeline(
    plan: Plan,
    gathers: str = "absorb",
    weights: Mapping[str, NewWeights] | None = None,
    target: str = "cpu",
    whole: Collection[str] = (),
) -> list[Pass]:
    """The passes that turn a dense graph into a block-sparse one, in order. ``weights``: those of refitted layers.

    ``whole``: layers that are not pruned but run by our operators, by the names of their outputs. ``target``: the
    provider that the result is for. Only the CPU's has the operator with a fused MaxPool; CUDA's keeps values
    channels-last.

    Pruning comes before reordering (the same blocks, in the layer's own order), so that every later pass has to leave
    the result as it is; Gathers are absorbed after lowering, when the operators are there to take them.
    """
    steps: list[tuple[str, Callable[[gs.Graph], None]]] = [
        ("normalize_layers", normalize_layers),
        ("open_layers", _open({p.layer for p in plan} | set(whole))),
        ("fuse_batchnorm", fuse_batchnorm),
    ]
    if weights:
        steps.append(("set_weights", partial(set_weights, weights=weights)))
    steps += [
        ("prune_blocks", partial(prune_blocks, plan=plan)),
        ("reorder_weights", partial(reorder_weights, plan=plan)),
        ("fold_gathers", fold_gathers),
        ("lower_block_sparse", partial(lower_block_sparse, plan=plan, whole=whole)),
    ]
    if gathers == "absorb":
        steps.append(("absorb_gathers", absorb_gathers))
        if target == "cuda":
            steps.append(("group_channels", group_channels))
    steps += [("join_quantized", join_quantized), ("fuse_epilogue", fuse_epilogue)]
    steps.append(("fuse_add_and_pool", partial(fuse_add_and_pool, pools=target == "cpu")))
    if target == "cuda":
        steps.append(("channels_last", channels_last))
    steps.append(("attach_fallback", attach_fallback))
    return [Pass(name, apply) for name, apply in steps]


def masked_dense(
    model: onnx.ModelProto,
    plan: Plan,
    weights: Mapping[str, NewWeights] | None = None,
    weight_file: TensorFile | None = None,
) -> onnx.ModelProto:
    """The dense model with the blocks that ``plan`` drops set to zero: what the block-sparse one has to compute.

    Refitted ``weights`` are those of a model whose BatchNormalization is fused; without them it stays as it is. Its
    large constants go to ``weight_file``, if there is one.
    """
    steps = [Pass("normalize_layers", normalize_layers), Pass("open_layers", _open({p.layer for p in plan}))]
    if weights:
        steps += [Pass("fuse_batchnorm", fuse_batchnorm), Pass("set_weights", partial(set_weights, weights=weights))]
    steps.append(Pass("prune_blocks", partial(prune_blocks, plan=plan)))
    return io.to_proto(run_passes(io.to_graph(model), steps), model, weight_file)


def _open(names: Collection[str]) -> Callable[[gs.Graph], None]:
    return partial(open_layers, names=names, quantized=True)


def _with_ranges(
    rounded: Callable[[InputRanges | None], onnx.ModelProto], exact: onnx.ModelProto, samples: Samples
) -> _Rounded:
    """The int8 model with fixed input ranges, of those that are tried the ones of the least error on held-out samples.

    ``rounded``: makes the model with ranges, or with ones that each run finds; ``exact``: the same in float32.
    """
    inputs = model_inputs(exact)
    batch = fixed_batch(inputs) or 1
    n = count(samples, inputs)
    held = min(REAL_SAMPLES, n // 4) // batch * batch
    seen = min(_RANGE_SAMPLES, n - held) // batch * batch
    some, others = (
        select(samples, inputs, part) for part in (slice(seen), slice(n - held, n) if held else slice(seen))
    )

    def error(model: onnx.ModelProto) -> float:
        return rounding_error(model, exact, others)[1]

    (wide, _), wide_samples = comparable(exact, exact, some)
    found = input_ranges(wide, wide_samples or some)
    models = {share: rounded(ranges) for share, ranges in found.items()}
    errors = {share: error(model) for share, model in models.items()}
    best = min(errors, key=lambda share: errors[share])
    cut = f"without {100 * best:g} % of the values at each end" if best else "from the least to the largest value"
    whose = f"{held} others" if held else f"{seen} of them"
    note = (
        f"int8: the range of each layer's input is fixed, {cut} that {seen} samples have; mean error "
        f"{errors[best]:.1e} of max|y| on {whose}, {error(rounded(None)):.1e} with ranges found in each run"
    )
    return _Rounded(models[best], others, note)


def _notes(
    config: Config, plan: Plan, rows: list, rounding_error: tuple[float, float] | None, quantized: bool
) -> tuple[str, ...]:
    notes = []
    unused = config.unused_patterns(row.node for row in rows)
    if unused:
        listing = ", ".join(repr(pattern) for pattern in unused[:3]) + (", ..." if len(unused) > 3 else "")
        notes.append(
            f"{len(unused)} of {len(config.layers)} patterns match no layer: {listing} "
            "(tetris-onnx inspect lists the names)"
        )
    if any(row.predicted_ms and row.macs is None for row in rows):
        notes.append(OPEN_SIZES)
    if quantized and any(row.predicted_ms and row.status == "block-sparse" for row in rows):
        notes.append("the model is quantized: its layers take less time than the dense float32 ones predicted here")
    if rounding_error is not None and rounding_error[0] == 0:
        notes.append(f"this processor has no kernels of {config.precision}: here the result computes in float32")
    if not len(plan):
        whole = sum(row.status == "whole" for row in rows)
        faster = f"; {whole} of its layers run whole in our operators" if whole else ""
        notes.append(f"no layer was pruned: the result computes what the original does{faster}")
    return tuple(notes)


class _Clock:
    """Seconds per stage, and the stages as progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if self._progress is not None:
            self._progress(name, 1, 1)
