"""Decide what to do with each layer: which ones to prune, in which blocks, in which channel order.

model + config -> Plan, and a row per layer that says what was decided and why
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from joblib import Parallel, cpu_count, delayed
from numpy.typing import ArrayLike, NDArray

from tetris_onnx.algorithms.blocks import block_grid, block_sums, fit_block_size, keep_count
from tetris_onnx.algorithms.importance import importance
from tetris_onnx.algorithms.reorder import BlockPruner, Reordering, reorder
from tetris_onnx.config import Config, LayerConfig
from tetris_onnx.data.calibration import Shapes, check_shapes, model_inputs
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import MULTIPLIERS, Layer, conv_window, find_layers, nested_layers, other_layers
from tetris_onnx.graph.shapes import EXAMPLE_SIZES, example_shapes, infer_shapes
from tetris_onnx.operators import WORTH_IT, choose, gain_of_whole, slower_reason
from tetris_onnx.passes import Pass, fuse_batchnorm, normalize_layers, open_layers, run_passes
from tetris_onnx.passes.lower_block_sparse import whole_block
from tetris_onnx.plan import LayerPlan, Plan, PlanError
from tetris_onnx.reports.report import LayerReport
from tetris_onnx.timing import cuda_cost
from tetris_onnx.timing.cost import CACHED_WEIGHTS, LayerShape, Machine, predict, predict_dense
from tetris_onnx.timing.cuda_cost import OPEN_BATCH
from tetris_onnx.timing.machine import load_machine

# Called with (stage, steps done, all steps) while something takes its time.
Progress: TypeAlias = Callable[[str, int, int], None]

OPEN_SIZES = f"times are predicted for a size of {EXAMPLE_SIZES[0]} where the model leaves it open: give its --shape"
# Below this many weights in all, starting worker processes costs more than they save.
_WORTH_PROCESSES = 2**21


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer, the options that hold for it, and why it stays dense ("" where it does not)."""

    layer: Layer
    options: LayerConfig
    block_size: tuple[int, int]
    first: bool  # reads an input of the model with no other layer between
    last: bool  # its result reaches an output of the model with no other layer between
    why_dense: str
    shape: LayerShape | None  # what the layer's time depends on; None where that is not known
    machine: Machine  # that the times are predicted for
    threads: int = 1  # of a session
    precision: str = "float32"  # of a layer that is pruned
    required: bool = False  # pruned whatever its time: the config or a plan names it
    whole: bool = False  # not pruned, but run by our operator

    @property
    def density(self) -> float:
        """Share of the blocks that its options keep."""
        grid = block_grid(self.layer.weight_shape[:2], self.block_size)
        return keep_count(grid[0] * grid[1], self.options.sparsity) / (grid[0] * grid[1])

    @property
    def can_be_whole(self) -> bool:
        """Whether our operator may run it unpruned: a convolution over images that the config does not skip.

        Grouped and quantized ones keep their own form, which is faster.
        """
        layer = self.layer
        if self.shape is None or len(self.shape.kernel) != 2 or layer.opened or self.options.skip:
            return False
        return bool(layer.weight.dtype == np.float32) and self.finite

    @cached_property
    def finite(self) -> bool:
        """Whether its weight holds numbers only."""
        return bool(np.isfinite(self.layer.weight).all())

    def predict(self, density: float, block_size: tuple[int, int] | None = None) -> tuple[float, float] | None:
        """Milliseconds of one run (dense, by our operator), or None where they cannot be predicted."""
        found = self.seconds(density, block_size)
        return None if found is None else (1e3 * found[0], 1e3 * float(found[1]))

    def seconds(
        self, density: ArrayLike, block_size: tuple[int, int] | None = None
    ) -> tuple[float, NDArray[np.float64]] | None:
        """Seconds of one run: dense, and block-sparse for each density."""
        if self.shape is None:
            return None
        block, precision = block_size or self.block_size, self.precision
        if self.why_dense:  # kept whole: in float32, as it was
            block, precision = whole_block(self.layer), "float32"
        sparse = predict(self.shape, density, block, self.machine, self.threads, precision)
        return predict_dense(self.shape, self.machine, self.threads), sparse

    @property
    def faster_whole(self) -> bool:
        """Whether our operator is predicted to run it faster with all its weights. Not what the result will do."""
        if self.shape is None or not self.can_be_whole:
            return False
        return float(self.unpruned_seconds or 0.0) < predict_dense(self.shape, self.machine, self.threads)

    @property
    def unpruned_seconds(self) -> float | None:
        """Seconds of one run with all blocks, by the operator that is faster; None where they cannot be predicted."""
        if self.shape is None:
            return None
        dense = predict_dense(self.shape, self.machine, self.threads)
        if not self.can_be_whole:
            return dense
        return min(dense, float(predict(self.shape, 1.0, whole_block(self.layer), self.machine, self.threads)))


def inspect(
    model: str | Path | onnx.ModelProto,
    config: Config | None = None,
    machine: Machine | None = None,
    shapes: Shapes | None = None,
) -> list[LayerReport]:
    """One row per layer of a model: its shape, whether it would be pruned or why not, and its time on ``machine``.

    ``shapes``: of inputs whose sizes the model leaves open, by name; the first axis, the batch, is not used. Raises
    `ModelError` for a file that is no model, `CalibrationError` for a shape that its inputs cannot have.
    """
    proto = io.raise_opset(io.given(model))
    config = config or Config()
    graph = prepare(io.to_graph(proto), config.precision == "int8")
    if shapes:
        check_shapes(shapes, model_inputs(proto))
        set_sizes(graph, shapes)
    return [describe(c, None, None) for c in survey(graph, config, machine)]


def prepare(graph: gs.Graph, quantized: bool = False) -> gs.Graph:
    """The graph in the form that is planned on: layers normalized and opened, BatchNormalization fused.

    ``quantized``: with the float weights of quantized layers, so that these can be pruned.
    """
    steps = [
        Pass("normalize_layers", normalize_layers),
        Pass("open_layers", partial(open_layers, quantized=quantized)),
        Pass("fuse_batchnorm", fuse_batchnorm),
    ]
    return run_passes(graph, steps)


def set_sizes(graph: gs.Graph, shapes: Shapes) -> None:
    """Annotate the values of a prepared ``graph`` with the sizes that they have for inputs of ``shapes``, by name.

    All but the first axis of the inputs, the batch. For plans only: the rewritten model takes other sizes, too, so what
    a layer is dense for (a rank or a padding that depends on them) has to stay open.
    """
    dense = {id(layer.node): layer.data.shape for layer in find_layers(graph) if layer.why_dense}
    found = infer_shapes(gs.export_onnx(graph), shapes)
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Variable) and name in found:
            tensor.dtype, tensor.shape = found[name][0], list(found[name][1])
    for layer in find_layers(graph):
        if id(layer.node) in dense and not layer.why_dense:
            layer.data.shape = dense[id(layer.node)]


def survey(
    graph: gs.Graph, config: Config, machine: Machine | None = None, plan: Plan | None = None
) -> list[Candidate]:
    """Every layer of a prepared graph, with what the options make of it, or a ``plan``; those in subgraphs come last.

    Times are predicted for ``machine``: this one, if none is given. Where an allocation has yet to give layers their
    sparsities, those that cannot win with any are dense; which operator runs the others is for `operators.choose`.
    Raises `PlanError` for a plan of another model.
    """
    number = {id(node): i for i, node in enumerate(graph.nodes)}
    layers = sorted(find_layers(graph) + other_layers(graph), key=lambda layer: number[id(layer.node)])
    layers += nested_layers(graph)
    weighted = {
        id(layer.node)
        for layer in layers
        if len(layer.node.inputs) > 1 and isinstance(layer.node.inputs[1], gs.Constant)
    }
    from_input = _reachable(graph, graph.inputs, weighted, downwards=True)
    to_output = _reachable(graph, graph.outputs, weighted, downwards=False)
    machine = machine or load_machine()
    shapes = layer_shapes(graph, layers)
    candidates = [
        _judge(layer, config, id(layer.node) in from_input, id(layer.node) in to_output, shape, machine)
        for layer, shape in zip(layers, shapes, strict=True)
    ]
    if plan is not None:
        _check_plan(layers, plan)
        candidates = [_as_planned(candidate, plan.get(candidate.layer.name)) for candidate in candidates]
    if config.target == "cuda":
        return [_on_cuda(candidate) for candidate in candidates]
    if config.allocation == "uniform" or plan is not None:
        return choose(graph, candidates)
    return [
        c if c.why_dense else _dense_where_slower(c, 0.0 if not c.options.own_sparsity else c.density)
        for c in candidates
    ]


def make_plan(
    candidates: Sequence[Candidate], config: Config, progress: Progress | None = None
) -> tuple[Plan, list[LayerReport]]:
    """Search the permutations and keep masks of all ``candidates`` that are to be pruned, in parallel processes.

    Layers that share a weight and have the same options share one search. Deterministic for ``config.seed``, whatever
    the number of processes.
    """
    jobs: dict[tuple, int] = {}
    tasks: list[tuple] = []
    job_of: list[int | None] = []
    for candidate in candidates:
        if candidate.why_dense:
            job_of.append(None)
            continue
        axes = free_axes(candidate, config)
        layer, sparsity = candidate.layer, candidate.options.sparsity
        key = id(layer.node.inputs[1]), layer.stored_transposed, candidate.block_size, sparsity, axes
        if key not in jobs:
            jobs[key] = len(tasks)
            tasks.append((layer, candidate.block_size, candidate.options.sparsity, axes))
        job_of.append(jobs[key])
    found = _run(tasks, config, progress)

    plans, rows = [], []
    for candidate, job in zip(candidates, job_of, strict=True):
        if job is None:
            rows.append(describe(candidate, None, None))
            continue
        result = found[job]
        out_perm, in_perm = result.perms
        plan = LayerPlan(candidate.layer.name, out_perm, in_perm, candidate.block_size, result.keep)
        plans.append(plan)
        rows.append(describe(candidate, plan, (result.retained, result.baseline)))
    return Plan(tuple(plans)), rows


def match_plan(candidates: Sequence[Candidate], plan: Plan, config: Config) -> list[LayerReport]:
    """Check that a plan made elsewhere fits the ``candidates``, all layers of a prepared graph, and describe them.

    Raises `PlanError` where it names a layer that is not there, cannot be pruned or has another shape.
    """
    _check_plan([c.layer for c in candidates], plan)
    rows = []
    for candidate in candidates:
        decision = plan.get(candidate.layer.name)
        if decision is None:
            rows.append(describe(_as_planned(candidate, None), None, None))
            continue
        scores = magnitude(candidate.layer, config)
        sums = block_sums(scores[decision.out_perm][:, decision.in_perm], decision.block_size)
        plain = np.sort(block_sums(scores, decision.block_size), axis=None)[::-1]
        total = float(sums.sum()) or 1.0
        shares = float(sums[decision.keep].sum()) / total, float(plain[: decision.keep.sum()].sum()) / total
        rows.append(describe(candidate, decision, shares))
    return rows


def _check_plan(layers: Sequence[Layer], plan: Plan) -> None:
    """Raise `PlanError` where a plan does not fit the layers of a model."""
    by_name = {layer.name: layer for layer in layers}
    for wanted in plan:
        layer = by_name.get(wanted.layer)
        if layer is None:
            raise PlanError(f"the plan is for another model: this one has no layer {wanted.layer!r}")
        if layer.why_dense:
            raise PlanError(f"the plan prunes layer {wanted.layer!r}, but {layer.why_dense}")
        if layer.weight_shape[:2] != wanted.shape:
            raise PlanError(
                f"the plan's layer {wanted.layer!r} has {wanted.shape[0]} x {wanted.shape[1]} channels, "
                f"the model's {layer.weight_shape[0]} x {layer.weight_shape[1]}"
            )


def _as_planned(candidate: Candidate, decision: LayerPlan | None) -> Candidate:
    """The candidate pruned as a plan says, or not where it says nothing."""
    if decision is None:
        return replace(candidate, why_dense=candidate.layer.why_dense or "it is not in the plan")
    options = replace(candidate.options, sparsity=1 - decision.density)
    return replace(candidate, options=options, block_size=decision.block_size, why_dense="", required=True)


def _judge(
    layer: Layer, config: Config, first: bool, last: bool, work: LayerShape | None, machine: Machine
) -> Candidate:
    options = config.for_layer(str(layer.node.name or layer.name))
    reason = layer.why_dense
    if not reason and config.target == "cuda" and options.default_block:
        columns = options.block_size[1]
        height = cuda_cost.block_height(work, 1 - options.sparsity, columns, *_on_gpu(layer))
        options = replace(options, block_size=(height, columns))
    block = options.block_size
    if not reason:
        shape = layer.weight_shape[:2]
        groups = layer.groups
        if groups > 1 and options.sparsity > 0:  # it is that of what is inside the groups
            kept = (1 - options.sparsity) / groups
            options = replace(options, sparsity=1 - kept, own_sparsity=True)
        size = [min(b, n // groups) for b, n in zip(options.block_size, shape, strict=True)]
        rows, columns = fit_block_size(shape, options.block_size if groups == 1 else size)
        block = rows, columns
        grid = block_grid(shape, block)
        uniform = config.allocation == "uniform" or options.own_sparsity
        if options.skip:
            reason = "the config skips it"
        elif uniform and keep_count(grid[0] * grid[1], options.sparsity) == grid[0] * grid[1]:
            reason = "its sparsity is 0" if options.sparsity == 0 else "it has too few blocks for this sparsity"
        elif grid == (1, 1):
            reason = "it has a single block"
        elif not options.explicit:
            small = [n for n, b in zip(shape, options.block_size, strict=True) if n < b]
            if small and first:
                reason = f"it is the first layer and has only {shape[1]} x {shape[0]} channels"
            elif small and last:
                reason = f"it is the last layer and has only {shape[1]} x {shape[0]} channels"
        if not reason and not np.isfinite(layer.weight).all():
            reason = "its weight holds NaN or infinite values"
    load = config.threads, config.precision
    return Candidate(layer, options, block, first, last, reason, work, machine, *load, required=options.explicit)


def _dense_where_slower(candidate: Candidate, density: float) -> Candidate:
    """The candidate, to stay dense where its block-sparse form of this ``density`` is not predicted to be faster."""
    predicted = None if candidate.required else candidate.predict(density)
    if predicted is None or predicted[1] <= WORTH_IT * predicted[0]:
        return candidate
    return replace(candidate, why_dense=slower_reason(predicted))


def _on_cuda(candidate: Candidate) -> Candidate:
    """The candidate for CUDA: dense where it cannot gain there, and without times, which are a processor's."""
    reason = candidate.why_dense
    if not reason and not candidate.required:
        item_size, batch = _on_gpu(candidate.layer)
        reason = cuda_cost.why_dense(candidate.shape, candidate.density, candidate.block_size, item_size, batch)
    return replace(candidate, why_dense=reason, shape=None)


def _on_gpu(layer: Layer) -> tuple[int, int]:
    """Bytes of a value, and how many times the samples of its shape a layer is reckoned with."""
    first = layer.data.shape
    return layer.weight.dtype.itemsize, OPEN_BATCH if first is not None and isinstance(first[0], str) else 1


def layer_shapes(graph: gs.Graph, layers: Sequence[Layer]) -> list[LayerShape | None]:
    """What the time of each layer depends on; None where its sizes are not known.

    A size that the model leaves open is taken as one of `shapes.EXAMPLE_SIZES`, an open batch as 1.
    """
    weights = [layer.weight_shape for layer in layers if _has_weight(layer)]
    cold = sum(math.prod(shape) for shape in weights) > CACHED_WEIGHTS
    found = [_layer_shape(layer, layer.data.shape, layer.output.shape, cold) for layer in layers]
    if any(shape is None and not layer.why_dense for layer, shape in zip(layers, found, strict=True)):
        sizes = example_shapes(gs.export_onnx(graph))
        for i, layer in enumerate(layers):
            found[i] = found[i] or _layer_shape(layer, sizes.get(layer.data.name), sizes.get(layer.output.name), cold)
    return found


def _layer_shape(
    layer: Layer, data: Sequence[object] | None, output: Sequence[object] | None, cold: bool
) -> LayerShape | None:
    """`layer_shapes` of one layer with an input of shape ``data`` and an output of shape ``output``."""
    if layer.why_dense or data is None or output is None:
        return None
    sizes = [[d for d in shape[1:] if isinstance(d, int)] for shape in (data, output)]
    if [len(s) for s in sizes] != [len(data) - 1, len(output) - 1] or min(*sizes[0], *sizes[1]) < 1:
        return None
    samples = output[0] if isinstance(output[0], int) and output[0] > 0 else 1
    out, in_ = layer.weight_shape[:2]
    if not layer.is_conv:
        return LayerShape(out, in_, samples=samples * math.prod(sizes[1][:-1]), cold=cold)
    window = conv_window(layer.node)
    assert window is not None  # such a layer stays dense
    kernel, strides, dilations = (tuple(window[name]) for name in ("kernel_shape", "strides", "dilations"))
    maps = tuple(sizes[0][1:]), tuple(sizes[1][1:])
    return LayerShape(out, in_, kernel, strides, dilations, *maps, samples, cold, layer.groups)


def _has_weight(layer: Layer) -> bool:
    if layer.block_sparse:
        return True
    inputs = layer.node.inputs
    weight = inputs[1] if layer.node.op in MULTIPLIERS and len(inputs) > 1 else None  # others have others
    return isinstance(weight, gs.Constant) and len(weight.shape) > 1


def free_axes(candidate: Candidate, config: Config) -> tuple[int, ...]:
    """The axes whose order is free: a Gather at a border of the model would have no partner to merge with."""
    if config.gathers == "absorb":
        return 0, 1
    return tuple(axis for axis, border in ((0, candidate.last), (1, candidate.first)) if not border)


def magnitude(layer: Layer, config: Config) -> NDArray:
    """Importance [out, in] of a layer's weight by its size: l2 where the options say so, else l1."""
    return importance(layer.weight, "l2" if config.importance == "l2" else "l1")


def search_order(
    scores: NDArray, block_size: tuple[int, int], sparsity: float, axes: tuple[int, ...], method: str, seed: int
) -> Reordering:
    """Permutations and keep mask of one layer for an importance ``scores`` [out, in]."""
    return reorder(scores, BlockPruner(block_size, sparsity), axes, method, seed=seed)  # type: ignore[arg-type]


def _run(tasks: Sequence[tuple], config: Config, progress: Progress | None) -> list[Reordering]:
    """The searches' results in the order of ``tasks``; the longest start first."""
    sizes = [math.prod(task[0].weight_shape[:2]) for task in tasks]
    order = sorted(range(len(tasks)), key=lambda i: -sizes[i])
    found: dict[int, Reordering] = {}
    # joblib hands large arrays over as memory maps and keeps each process to its share of the BLAS threads. It takes
    # the calls as it gets to them: the scores of two layers for each process are in memory at a time.
    runner = Parallel(n_jobs=process_count(sizes, config.workers), return_as="generator_unordered", batch_size=1)
    for index, result in runner(_search(i, tasks[i], config) for i in order):
        found[index] = result
        if progress is not None:
            progress("search", len(found), len(tasks))
    return [found[i] for i in range(len(tasks))]


def _search(index: int, task: tuple, config: Config) -> tuple:
    """The call that searches the order of a layer."""
    layer, block_size, sparsity, axes = task
    scores = magnitude(layer, config)
    return delayed(_numbered)(index, (scores, block_size, sparsity, axes, config.reorder, config.seed))


def process_count(sizes: Sequence[int], workers: int | None) -> int:
    """How many processes search layers with so many weights: ``workers`` at most, one where more cost too much."""
    return max(min(workers or cpu_count(), len(sizes)), 1) if sum(sizes) >= _WORTH_PROCESSES else 1


def _numbered(index: int, task: tuple) -> tuple[int, Reordering]:
    return index, search_order(*task)


def describe(candidate: Candidate, plan: LayerPlan | None, shares: tuple[float, float] | None) -> LayerReport:
    """The row of one layer. ``shares``: of the importance retained with and without reordering."""
    layer = candidate.layer
    known = _has_weight(layer) and not layer.block_sparse
    shape = layer.weight_shape if known else ()
    groups = layer.groups if known else 1
    if groups > 1:
        shape = (shape[0], shape[1] // groups, *shape[2:])
    parameters = int(np.prod(shape, dtype=np.int64)) if known else 0
    density = 1.0 if plan is None else plan.density
    prunable = plan is None and not candidate.why_dense
    predicted = candidate.predict(candidate.density if prunable else density, None if plan is None else plan.block_size)
    reason, status = candidate.why_dense, "prunable" if prunable else "block-sparse"
    if plan is None and not prunable:
        status = "whole" if candidate.whole else "dense"
        if candidate.whole and predicted is not None:
            reason = f"{reason}; {gain_of_whole(candidate.shape, predicted)}"
        elif predicted is not None:
            predicted = predicted[0], predicted[0]
    return LayerReport(
        layer=layer.name,
        node=str(layer.node.name or layer.name),
        op_type=str(layer.node.op),
        weight_shape=shape,
        block_size=candidate.block_size if prunable else None if plan is None else plan.block_size,
        density=min(density * groups, 1.0),
        retained=None if shares is None else shares[0],
        baseline=None if shares is None else shares[1],
        parameters=parameters,
        kept_parameters=round(parameters * min(density * groups, 1.0)),
        macs=layer.multiplications // groups if known and layer.multiplications is not None else None,
        status=status,
        reason=reason,
        predicted_ms=predicted,
    )


def _reachable(graph: gs.Graph, start: Sequence[gs.Tensor], stops: set[int], downwards: bool) -> set[int]:
    """Ids of the nodes reached from values without passing a node of ``stops`` (which are reached themselves)."""
    seen: set[int] = set()
    todo = list(start)
    while todo:
        tensor = todo.pop()
        for node in tensor.outputs if downwards else tensor.inputs:
            if id(node) not in seen:
                seen.add(id(node))
                if id(node) not in stops and node.op not in ("Shape", "Size"):
                    todo += node.outputs if downwards else node.inputs
    return seen
