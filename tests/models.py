"""Small models for the tests of graphs and passes, and what the tests ask about a model.

Weights are random and distinct, so that a value in the wrong channel shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tetris_onnx.graph import io
from tetris_onnx.graph.channels import gather_permutation
from tetris_onnx.graph.layers import DOMAIN, find_layers
from tetris_onnx.optimize import masked_dense, pipeline
from tetris_onnx.passes import run_passes
from tetris_onnx.plan import LayerPlan, Plan
from tetris_onnx.planner import prepare

Dim = int | str | None

# Sums of a few hundred float32 products in another order, relative to the largest output.
TOLERANCE = 1e-5


class Net:
    """Writes a model node by node. Values are their names."""

    def __init__(self, opset: int = 17, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.value_infos: list[onnx.ValueInfoProto] = []
        self.domains: dict[str, int] = {}
        self.functions: list[onnx.FunctionProto] = []
        self._count: Counter[str] = Counter()

    def name(self, stem: str) -> str:
        self._count[stem] += 1
        return f"{stem}{self._count[stem]}"

    def input(self, name: str, shape: Sequence[Dim] | None, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, dtype: int = TensorProto.FLOAT, shape: Sequence[Dim] | None = None) -> None:
        info = helper.make_tensor_value_info(value, dtype, shape)
        self.outputs.append(info)

    def constant(self, values: NDArray | Sequence[int], name: str | None = None) -> str:
        """An initializer."""
        name = name or self.name("const")
        array = np.asarray(values, np.int64) if isinstance(values, (list, tuple)) else values
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def random(self, *shape: int, low: float = -1.0, high: float = 1.0, name: str | None = None) -> str:
        """A random float32 initializer."""
        return self.constant(self.rng.uniform(low, high, shape).astype(np.float32), name)

    def weight_values(self, out: int, in_: int, *kernel: int) -> NDArray:
        """A weight that keeps the size of activations about the same, so that rounding errors do not grow."""
        limit = np.sqrt(6 / (in_ * int(np.prod(kernel))))
        return self.rng.uniform(-limit, limit, (out, in_, *kernel)).astype(np.float32)

    def weight(self, out: int, in_: int, *kernel: int) -> str:
        return self.constant(self.weight_values(out, in_, *kernel))

    def op(self, op: str, *inputs: str, out: str | None = None, domain: str = "", **attributes: Any) -> str:
        """A node of one output."""
        out = out or self.name(op.lower())
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"node_{out}", domain=domain, **attributes))
        if domain:
            self.domains[domain] = 1
        return out

    def ops(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """A node of several outputs."""
        outs = [self.name(op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), outs, name=f"node_{outs[0]}", **attributes))
        return outs

    def conv(
        self,
        x: str,
        channels: tuple[int, int],
        kernel: int = 3,
        bias: bool = True,
        group: int = 1,
        axes: int = 2,
        **attributes: Any,
    ) -> str:
        """A convolution from ``channels[0]`` to ``channels[1]`` channels; without ``attributes`` it keeps the size."""
        in_, out = channels
        weight = self.weight(out, in_ // group, *[kernel] * axes)
        attributes.setdefault("pads", [kernel // 2] * 2 * axes)
        if attributes.get("auto_pad"):
            del attributes["pads"]
        inputs = [x, weight] + ([self.random(out)] if bias else [])
        return self.op("Conv", *inputs, group=group, **attributes)

    def gemm(self, x: str, channels: tuple[int, int], bias: bool = True) -> str:
        in_, out = channels
        return self.op("Gemm", x, self.weight(out, in_), *([self.random(out)] if bias else []), transB=1)

    def matmul(self, x: str, channels: tuple[int, int]) -> str:
        return self.op("MatMul", x, self.constant(self.weight_values(*channels[::-1]).T))

    def batchnorm(self, x: str, channels: int, **attributes: Any) -> str:
        vectors = [self.random(channels, low=0.5, high=1.5), self.random(channels), self.random(channels)]
        return self.op("BatchNormalization", x, *vectors, self.random(channels, low=0.5, high=1.5), **attributes)

    def build(self, ir_version: int = 8) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "test", self.inputs, self.outputs, self.initializers, value_info=self.value_infos
        )
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, v) for d, v in self.domains.items())]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=self.functions)
        inferred = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.output}
        for value in model.graph.output:  # outputs need a shape
            if not value.type.tensor_type.HasField("shape"):
                value.CopyFrom(inferred[value.name])
        return model


def run(model: onnx.ModelProto, feed: Mapping[str, NDArray], optimized: bool = True) -> list[NDArray]:
    """The outputs in plain onnxruntime (without our library). Unoptimized, equal nodes give equal bits."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))


def random_feed(model: onnx.ModelProto, dynamic: int = 2, seed: int = 0) -> dict[str, NDArray]:
    """Random values for every input; ``dynamic`` for each dimension without a size."""
    rng = np.random.default_rng(seed)
    fixed = {i.name for i in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name not in fixed:
            shape = [d.dim_value or dynamic for d in value.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feed[value.name] = np.asarray(rng.uniform(-1, 1, shape)).astype(dtype)
    return feed


def relative_error(expected: Sequence[NDArray], actual: Sequence[NDArray]) -> float:
    """The largest difference of an output, relative to its largest value."""
    assert len(expected) == len(actual)
    errors = [0.0]
    for a, b in zip(expected, actual, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.size:
            scale = max(float(np.abs(a).max()), 1e-30)
            errors.append(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) / scale)
    return max(errors)


def op_counts(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator the main graph has."""
    return Counter(node.op_type for node in model.graph.node)


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray]:
    """The initializers."""
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def block_sparse_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of our operators, in order."""
    return [node for node in model.graph.node if node.domain == DOMAIN]


def random_plan(
    model: onnx.ModelProto,
    block_size: tuple[int, int] = (4, 4),
    density: float = 0.5,
    seed: int = 0,
    fixed: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Plan:
    """A plan that reorders every layer of ``model`` at random: harder than what a search finds.

    ``fixed``: axes of layers that keep their order, as ``NAME.in`` and ``NAME.out``. ``skip``: layers to leave out.
    """
    rng = np.random.default_rng(seed)
    plans = []
    for layer in find_layers(prepare(io.to_graph(model), quantized=True)):
        if layer.why_dense or layer.name in skip:
            continue
        out, in_ = layer.weight_shape[:2]
        rows, columns = (min(b, n) for b, n in zip(block_size, (out, in_), strict=True))
        keep = rng.random((-(-out // rows), -(-in_ // columns))) < density
        keep.flat[rng.integers(keep.size)] = True
        perms = {end: rng.permutation(n) for end, n in (("out", out), ("in", in_))}
        for end in perms:
            if f"{layer.name}.{end}" in fixed:
                perms[end] = np.arange(perms[end].size)
        plans.append(LayerPlan(layer.name, perms["out"], perms["in"], (rows, columns), keep))
    return Plan(tuple(plans))


def rewrite(
    model: onnx.ModelProto,
    plan: Plan,
    gathers: str = "absorb",
    until: str | None = None,
    target: str = "cpu",
    whole: Sequence[str] = (),
) -> onnx.ModelProto:
    """``model`` after the passes of `optimize`, or after those up to the one named ``until``."""
    steps = pipeline(plan, gathers, target=target, whole=whole)
    if until is not None:
        steps = steps[: [step.name for step in steps].index(until) + 1]
    return io.to_proto(run_passes(io.to_graph(model), steps), model)


def our_gathers(model: onnx.ModelProto, original: onnx.ModelProto) -> int:
    """How many reordering Gathers ``model`` has that ``original`` has not."""

    def count(proto: onnx.ModelProto) -> int:
        return sum(gather_permutation(node) is not None for node in io.to_graph(proto).nodes)

    return count(model) - count(original)


def check_rewrite(
    model: onnx.ModelProto,
    plan: Plan | None = None,
    gathers: str = "absorb",
    dynamic: int = 2,
    tolerance: float = TOLERANCE,
    left: int | None = 0,
) -> onnx.ModelProto:
    """Rewrite ``model`` and compare it with the dense model with the same blocks zeroed, in plain onnxruntime.

    So is what the passes for the CUDA target make of it, which differs in its layout only.

    ``left``: how many Gathers have to be there (None: any number). Returns the model rewritten for the CPU.
    """
    plan = random_plan(model) if plan is None else plan
    before = model.SerializeToString()
    result = rewrite(model, plan, gathers)
    reference = masked_dense(model, plan)
    assert model.SerializeToString() == before
    assert len(block_sparse_nodes(result)) == len(plan)
    onnx.checker.check_model(result, full_check=True)
    feed = random_feed(model, dynamic)
    error = relative_error(run(reference, feed), run(result, feed))
    assert error <= tolerance
    if gathers == "absorb":
        last = rewrite(model, plan, target="cuda")
        onnx.checker.check_model(last, full_check=True)
        assert relative_error(run(reference, feed), run(last, feed)) <= tolerance
    if left is not None:
        assert our_gathers(result, model) == left
    return result
