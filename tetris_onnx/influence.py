"""How strongly the outputs of a network depend on each layer's output: which channels and positions matter.

A pruned layer makes errors, and the network's answers suffer from some of them far more than from others (a trained
VGG16: a fifth of the channels and of the positions carry half). To first order, errors ``e`` of a layer's output ``y``
that are independent of each other change the outputs ``z`` by

    E |z' - z|^2 = sum_i (sum_k (dz_k / dy_i)^2) e_i^2

the diagonal of the Gauss-Newton matrix (Fisher's, for a network that gives log-probabilities). Its expectation over
random signs r is ``(d(r z) / dy_i)^2``: one backward pass per draw instead of one per output. The backward pass is
a part of the ONNX graph that runs it (`_Backward`): no training framework is needed. It knows the operators
of convolutional networks; what it does not know keeps the layers before it from having an influence that is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from tetris_onnx.calibration import Samples, batches, count, model_inputs
from tetris_onnx.graph.outputs import before_squashing
from tetris_onnx.graph.tensors import in_files
from tetris_onnx.session import SessionError, open_session, run

_BATCH = 8
_MOST_BYTES = 10**9  # of a model: it is held several times


@dataclass(frozen=True, eq=False)
class Influence:
    """Mean squares of a layer's gradients: per output channel [out], and per sample and position [samples, ...]."""

    channels: NDArray[np.float64]
    positions: NDArray[np.float32] | None  # None where they are not known


def measure_influence(
    model: onnx.ModelProto, layers: Sequence[tuple[str, int]], samples: Samples, draws: int = 1, seed: int = 0
) -> dict[str, Influence]:
    """The influence of ``layers``, (name of the output, axis of its channels), of a prepared ``model`` by their names.

    ``draws``: random signs per sample. Layers whose way to the outputs has an operator without a known derivative
    are left out, and all of a model above 1 GB or with its weights in files, which cannot be held several times.
    Deterministic for a seed.
    """
    if in_files(model) or model.ByteSize() > _MOST_BYTES:
        return {}
    inputs = model_inputs(model)
    try:
        backward = _Backward(model)
    except _UnknownError:
        return {}
    found = backward.gradients([name for name, _ in layers])
    known = [(name, axis) for name, axis in layers if name in found]
    if not known:
        return {}
    outputs = [backward.square_sums(name, axis) for name, axis in known]
    rng = np.random.default_rng(seed)
    total = count(samples, inputs)
    channels: dict[str, NDArray[np.float64]] = {}
    positions: dict[str, NDArray[np.float32]] = {}
    try:
        session = open_session(backward.model([o for pair in outputs for o in pair]))
        for part, feed in batches(samples, inputs, _BATCH):
            n = part.stop - part.start
            for _ in range(draws):
                signs = {
                    name: rng.choice(np.array([-1, 1], np.float32), (n, *shape))
                    for name, shape in backward.directions.items()
                }
                values = iter(run(session, feed | signs, "the model"))
                for (name, _), by_channel, by_position in zip(known, values, values, strict=False):
                    channels[name] = channels.get(name, np.float64(0)) + by_channel.astype(np.float64) / (total * draws)
                    whole = positions.setdefault(name, np.zeros((total, *by_position.shape[1:]), np.float32))
                    whole[part] += by_position / draws
    except SessionError:
        return {}
    return {name: Influence(channels[name], positions[name]) for name, _ in known}


class _UnknownError(ValueError):
    """An operator without a known derivative."""


class _Backward:
    """The forward and backward graph of a model in one."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = shape_inference.infer_shapes(model)
        graph = self._model.graph
        self._constants = {t.name: t for t in graph.initializer}
        self._producer = {name: node for node in graph.node for name in node.output if name}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
        self._shapes = {
            v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
            for v in (*graph.value_info, *graph.input, *graph.output)
        }
        self._nodes: list[onnx.NodeProto] = []
        self._extra: list[onnx.TensorProto] = []
        self._count = 0
        self._gradients: dict[str, list[str]] = {}
        self.directions: dict[str, tuple[int, ...]] = {}
        squashed = before_squashing(self._model)
        for output in graph.output:
            target = squashed[output.name][-1] if squashed[output.name] else output.name
            shape = self._shapes.get(target, [])[1:]
            if output.type.tensor_type.elem_type != onnx.TensorProto.FLOAT or None in shape or not shape:
                raise _UnknownError(f"output {output.name!r} has no fixed size")
            name = self._name("direction")
            self.directions[name] = tuple(int(d) for d in shape if d is not None)
            self._gradients.setdefault(target, []).append(name)

    def gradients(self, wanted: Sequence[str]) -> set[str]:
        """Add the backward pass. Returns those of the ``wanted`` values whose gradient is known."""
        on_the_way = self._before(wanted)
        unknown: set[str] = set()
        for node in reversed(list(self._model.graph.node)):
            if not any(name in self._gradients or name in unknown for name in node.output):
                continue
            inputs = [name for name in node.input if name and name not in self._constants]
            inputs = [name for name in inputs if name in on_the_way]
            if not inputs:
                continue
            if any(name in unknown for name in node.output):
                unknown.update(inputs)
                continue
            try:
                rule = getattr(self, f"_{node.op_type.lower()}", None)
                if rule is None or node.domain not in ("", "ai.onnx"):
                    raise _UnknownError(node.op_type)
                found = rule(node, self._sum(node.output[0]))
            except _UnknownError:
                unknown.update(inputs)
                continue
            for name, gradient in found.items():
                if name in on_the_way:
                    self._gradients.setdefault(name, []).append(gradient)
        return {name for name in wanted if name in self._gradients and name not in unknown}

    def square_sums(self, value: str, axis: int) -> tuple[str, str]:
        """Names of the sums of a value's squared gradients: [channels], and [samples, ...] without its channels."""
        rank = len(self._shapes[value])
        square = self._node("Mul", [self._sum(value)] * 2)
        others = [a for a in range(rank) if a != axis]
        by_channel = self._node("ReduceSum", [square, self._constant(np.array(others, np.int64))], keepdims=0)
        return by_channel, self._node("ReduceSum", [square, self._constant(np.array([axis], np.int64))], keepdims=0)

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        """The model that gives ``outputs`` (see `square_sums`) for the inputs and the `directions`."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        for name, shape in self.directions.items():
            model.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, *shape]))
        model.graph.initializer.extend(self._extra)
        model.graph.node.extend(self._nodes)
        return model

    def _before(self, wanted: Sequence[str]) -> set[str]:
        """The values that depend on one of the ``wanted``, and these."""
        found = set(wanted)
        for node in self._model.graph.node:
            if any(name in found for name in node.input):
                found.update(node.output)
        return found

    def _name(self, what: str) -> str:
        self._count += 1
        return f"influence/{self._count}/{what}"

    def _constant(self, value: NDArray) -> str:
        name = self._name("constant")
        self._extra.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _node(self, op_type: str, inputs: Sequence[str], **attributes: object) -> str:
        name = self._name(op_type)
        self._nodes.append(helper.make_node(op_type, list(inputs), [name], name, **attributes))
        return name

    def _sum(self, value: str) -> str:
        """The gradient of a value: the sum over its readers."""
        parts = self._gradients[value]
        if len(parts) > 1:
            self._gradients[value] = [self._node("Sum", parts)]
        return self._gradients[value][0]

    def _shape(self, value: str) -> list[int | None]:
        if value not in self._shapes:
            raise _UnknownError(f"{value} has no known shape")
        return self._shapes[value]

    def _array(self, name: str) -> NDArray:
        if name not in self._constants:
            raise _UnknownError(f"{name} is no constant")
        return numpy_helper.to_array(self._constants[name])

    def _conv(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kernel = self._array(node.input[1]).shape[2:]
        axes = len(kernel)
        data, output = self._shape(node.input[0])[2:], self._shape(node.output[0])[2:]
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise _UnknownError("auto_pad")
        strides = list(attributes.get("strides", [1] * axes))
        dilations = list(attributes.get("dilations", [1] * axes))
        pads = list(attributes.get("pads", [0] * 2 * axes))
        missing = []
        for i in range(axes):
            size, made = data[i], output[i]
            if size is None or made is None:
                missing.append(0)  # right for strides of 1
                if strides[i] != 1:
                    raise _UnknownError("a stride and an open size")
                continue
            reach = (made - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
            missing.append(size + pads[i] + pads[axes + i] - reach)
        result = self._node(
            "ConvTranspose",
            [gradient, node.input[1]],
            strides=strides,
            dilations=dilations,
            pads=pads,
            group=int(attributes.get("group", 1)),
            output_padding=missing,
        )
        return {node.input[0]: result}

    def _relu(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        return {node.input[0]: self._node("Mul", [gradient, self._node("Sign", [node.output[0]])])}

    def _clip(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        same = self._node("Cast", [self._node("Equal", [node.input[0], node.output[0]])], to=onnx.TensorProto.FLOAT)
        return {node.input[0]: self._node("Mul", [gradient, same])}

    def _add(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        shape = self._shape(node.output[0])
        found: dict[str, str] = {}
        for name in node.input:
            if name in self._constants:
                continue
            if self._shape(name) != shape or name in found:
                raise _UnknownError("broadcasting")
            found[name] = gradient
        return found

    def _mul(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        constant = [name for name in node.input if name in self._constants]
        other = [name for name in node.input if name not in self._constants]
        if len(constant) != 1 or self._shape(other[0]) != self._shape(node.output[0]):
            raise _UnknownError("a product of two values")
        return {other[0]: self._node("Mul", [gradient, constant[0]])}

    def _identity(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        return {node.input[0]: gradient}

    _dropout = _identity

    def _matmul(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        weight = self._array(node.input[1])
        if weight.ndim != 2:
            raise _UnknownError("a stack of matrices")
        return {node.input[0]: self._node("MatMul", [gradient, self._constant(weight.T)])}

    def _gemm(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if attributes.get("transA", 0):
            raise _UnknownError("transA")
        weight = self._array(node.input[1]) * np.float32(attributes.get("alpha", 1.0))
        return {
            node.input[0]: self._node(
                "MatMul", [gradient, self._constant(weight if attributes.get("transB", 0) else weight.T)]
            )
        }

    def _reshape(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        return {node.input[0]: self._node("Reshape", [gradient, self._node("Shape", [node.input[0]])])}

    _flatten = _squeeze = _unsqueeze = _reshape

    def _transpose(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        back = list(range(len(self._shape(node.input[0]))))[::-1] if perm is None else np.argsort(perm).tolist()
        return {node.input[0]: self._node("Transpose", [gradient], perm=back)}

    def _globalaveragepool(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        sizes = self._shape(node.input[0])[2:]
        if None in sizes:
            raise _UnknownError("an open size")
        share = self._constant(np.array(1 / math.prod(d for d in sizes if d is not None), np.float32))
        mean = self._node("Mul", [gradient, share])
        return {node.input[0]: self._node("Expand", [mean, self._node("Shape", [node.input[0]])])}

    def _maxpool(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        """Windows side by side: the gradient goes to the values that equal their window's maximum."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kernel = list(attributes["kernel_shape"])
        data, output = self._shape(node.input[0])[2:], self._shape(node.output[0])[2:]
        if (
            len(kernel) != 2
            or list(attributes.get("strides", [])) != kernel
            or any(attributes.get("pads", []))
            or None in data
            or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
        ):
            raise _UnknownError("windows that overlap")
        most, spread = (self._repeat(name, data, output, kernel) for name in (node.output[0], gradient))
        same = self._node("Cast", [self._node("Equal", [node.input[0], most])], to=onnx.TensorProto.FLOAT)
        return {node.input[0]: self._node("Mul", [spread, same])}

    def _repeat(
        self, value: str, data: Sequence[int | None], output: Sequence[int | None], kernel: Sequence[int]
    ) -> str:
        """Every value of each window's result at all places of its window; zero behind the last window."""
        for axis, (size, made, length) in enumerate(zip(data, output, kernel, strict=True), 2):
            assert size is not None and made is not None
            value = self._spread(value, axis, np.minimum(np.arange(size) // length, made))
        return value

    def _spread(self, value: str, axis: int, index: NDArray) -> str:
        """The entries ``index`` of a value of 4 axes along one, where the index behind the last one is a zero."""
        pads = np.zeros(8, np.int64)
        pads[4 + axis] = 1
        padded = self._node("Pad", [value, self._constant(pads)])
        return self._node("Gather", [padded, self._constant(index.astype(np.int64))], axis=axis)

    def _slice(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        starts, ends = self._array(node.input[1]), self._array(node.input[2])
        axes = self._array(node.input[3]) if len(node.input) > 3 else np.arange(starts.size)
        steps = self._array(node.input[4]) if len(node.input) > 4 else np.ones(starts.size, np.int64)
        shape = self._shape(node.input[0])
        for start, end, axis, step in zip(*(a.tolist() for a in (starts, ends, axes, steps)), strict=True):
            size = shape[axis]
            if size is None or len(shape) != 4:
                raise _UnknownError("an open size")
            taken = np.arange(size)[slice(start, end, step)]
            index = np.full(size, taken.size)
            index[taken] = np.arange(taken.size)
            gradient = self._spread(gradient, axis % len(shape), index)
        return {node.input[0]: gradient}

    def _pad(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        if mode != b"constant" or len(node.input) > 3:
            raise _UnknownError("such a Pad")
        pads = self._array(node.input[1])
        rank = pads.size // 2
        ends = [-int(p) if p else np.iinfo(np.int64).max for p in pads[rank:]]
        return {
            node.input[0]: self._node(
                "Slice", [gradient, self._constant(pads[:rank]), self._constant(np.array(ends, np.int64))]
            )
        }
