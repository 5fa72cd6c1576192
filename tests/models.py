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

from tetris_onnx.graph.layers import DOMAIN

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
        self, x: str, channels: tuple[int, int], kernel: int = 3, bias: bool = True, group: int = 1, axes: int = 2, **attributes: Any
    ) -> str:
        """A convolution from ``channels[0]`` to ``channels[1]`` channels that keeps the size (unless ``attributes`` say more)."""
        in_, out = channels
        weight = self.random(out, in_ // group, *[kernel] * axes)
        attributes.setdefault("pads", [kernel // 2] * 2 * axes)
        if attributes.get("auto_pad"):
            del attributes["pads"]
        inputs = [x, weight] + ([self.random(out)] if bias else [])
        return self.op("Conv", *inputs, group=group, **attributes)

    def gemm(self, x: str, channels: tuple[int, int], bias: bool = True) -> str:
        in_, out = channels
        return self.op("Gemm", x, self.random(out, in_), *([self.random(out)] if bias else []), transB=1)

    def matmul(self, x: str, channels: tuple[int, int]) -> str:
        return self.op("MatMul", x, self.random(*channels))

    def batchnorm(self, x: str, channels: int, **attributes: Any) -> str:
        vectors = [self.random(channels, low=0.5, high=1.5), self.random(channels), self.random(channels)]
        return self.op("BatchNormalization", x, *vectors, self.random(channels, low=0.5, high=1.5), **attributes)

    def build(self, ir_version: int = 8) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "test", self.inputs, self.outputs, self.initializers, value_info=self.value_infos
        )
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, v) for d, v in self.domains.items())]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
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
