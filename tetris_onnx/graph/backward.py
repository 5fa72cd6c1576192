"""The backward pass of a model as a part of the ONNX graph that runs it: gradients without a training framework.

`Backward` is given the gradient of something by one or more values (`seed`), goes through the nodes from the last to
the first and adds what computes the gradients by the values before them (`gradients`) and by the weights of layers
(`weight_gradient`, `bias_gradient`). It knows the operators of convolutional networks; what it does not know leaves the
values before it without a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from tetris_onnx.errors import TetrisError
from tetris_onnx.graph.outputs import before_squashing, with_outputs


class UnknownDerivativeError(TetrisError, ValueError):
    """An operator without a known derivative."""


class Backward:
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
        # By the result of a convolution that is the backward pass of another one: the result of that one, its weight.
        self.convolutions: dict[str, tuple[str, str]] = {}

    def shape(self, value: str) -> list[int | None]:
        """The sizes of a value, None where one is open. Raises `UnknownDerivativeError` where none is known."""
        if value not in self._shapes:
            raise UnknownDerivativeError(f"{value} has no known shape")
        return self._shapes[value]

    def targets(self) -> list[tuple[str, tuple[int, ...]]]:
        """For each output of the model, the value before what squashes it and its sizes without the samples' axis.

        Raises `UnknownDerivativeError` where one is not float32 or has no fixed size.
        """
        found = []
        squashed = before_squashing(self._model)
        for output in self._model.graph.output:
            target = squashed[output.name][-1] if squashed[output.name] else output.name
            sizes = [d for d in self._shapes.get(target, [])[1:] if d is not None]
            open_sizes = len(self._shapes.get(target, [])) - 1 - len(sizes)
            if output.type.tensor_type.elem_type != onnx.TensorProto.FLOAT or open_sizes or not sizes:
                raise UnknownDerivativeError(f"output {output.name!r} has no fixed size")
            found.append((target, tuple(sizes)))
        return found

    def seed(self, value: str, gradient: str) -> None:
        """Add to the gradient by ``value`` the value ``gradient``, an input or the result of a node (see `node`)."""
        self._gradients.setdefault(value, []).append(gradient)

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
                    raise UnknownDerivativeError(node.op_type)
                found = rule(node, self.gradient(node.output[0]))
            except UnknownDerivativeError:
                unknown.update(inputs)
                continue
            for name, gradient in found.items():
                if name in on_the_way:
                    self._gradients.setdefault(name, []).append(gradient)
        return {name for name in wanted if name in self._gradients and name not in unknown}

    def model(
        self, outputs: Sequence[str], inputs: Sequence[onnx.ValueInfoProto], free: Collection[str] = ()
    ) -> onnx.ModelProto:
        """The model that gives ``outputs`` for its own inputs and ``inputs``; the constants ``free`` are inputs too."""
        model = with_outputs(self._model, outputs)
        graph = model.graph
        graph.input.extend(inputs)
        for i in reversed(range(len(graph.initializer))):
            tensor = graph.initializer[i]
            if tensor.name in free:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
                del graph.initializer[i]
        graph.initializer.extend(self._extra)
        graph.node.extend(self._nodes)
        return model

    def weight_gradient(self, node: onnx.NodeProto) -> str:
        """The gradient by the weight of a Conv, Gemm or MatMul, in the form that the node stores.

        Raises `UnknownDerivativeError` where a size is open. `gradients` has to know that by the node's output.
        """
        gradient = self.gradient(node.output[0])
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            return self._conv_weight(node, attributes, gradient)
        if node.op_type == "Gemm" and not attributes.get("transA", 0):
            alpha = float(attributes.get("alpha", 1.0))
            pair = [gradient, node.input[0]] if attributes.get("transB", 0) else [node.input[0], gradient]
            return self.node("Gemm", pair, transA=1, alpha=alpha)
        if node.op_type == "MatMul" and self._array(node.input[1]).ndim == 2:
            rows = [
                self.node("Reshape", [value, self.constant(np.array([-1, size], np.int64))])
                for value, size in zip((node.input[0], gradient), self._array(node.input[1]).shape, strict=True)
            ]
            return self.node("Gemm", rows, transA=1)
        raise UnknownDerivativeError(f"the weight of such a {node.op_type}")

    def bias_gradient(self, value: str, axis: int) -> str:
        """The gradient by what is added to all places of ``value`` along ``axis``, [channels]."""
        others = [a for a in range(len(self.shape(value))) if a != axis]
        return self.node("ReduceSum", [self.gradient(value), self.constant(np.array(others, np.int64))], keepdims=0)

    def _conv_weight(self, node: onnx.NodeProto, attributes: dict[str, Any], gradient: str) -> str:
        """Each tap's weights are the product of the gradient and the inputs that the tap has seen, over all places."""
        weight = self._array(node.input[1]).shape
        kernel, axes = weight[2:], len(weight) - 2
        strides, dilations, pads, group = _window(attributes, axes)
        made = self.shape(node.output[0])[2:]
        padded = node.input[0]
        if any(pads):
            begin, end = pads[:axes], pads[axes:]
            padded = self.node("Pad", [padded, self.constant(np.array([0, 0, *begin, 0, 0, *end], np.int64))])
        flat = self.constant(np.array([0, group, weight[0] // group, -1], np.int64))
        left = self.node("Reshape", [gradient, flat])
        flat = self.constant(np.array([0, group, weight[1], -1], np.int64))
        taps = []
        for tap in np.ndindex(*kernel):
            starts, ends = [], []
            for t, s, d, size in zip(tap, strides, dilations, made, strict=True):
                if size is None:
                    raise UnknownDerivativeError("an open size")
                starts.append(t * d)
                ends.append(t * d + (size - 1) * s + 1)
            where = [np.array(v, np.int64) for v in (starts, ends, range(2, 2 + axes), strides)]
            seen = self.node("Slice", [padded, *(self.constant(v) for v in where)])
            right = self.node("Transpose", [self.node("Reshape", [seen, flat])], perm=[0, 1, 3, 2])
            product = self.node("MatMul", [left, right])  # [samples, groups, out of a group, in of a group]
            taps.append(self.node("ReduceSum", [product, self.constant(np.array([0], np.int64))], keepdims=0))
        last = self.constant(np.array([-1], np.int64))
        stack = self.node("Concat", [self.node("Unsqueeze", [tap, last]) for tap in taps], axis=-1)
        return self.node("Reshape", [stack, self.constant(np.array(weight, np.int64))])

    def _before(self, wanted: Sequence[str]) -> set[str]:
        """The values that depend on one of the ``wanted``, and these."""
        found = set(wanted)
        for node in self._model.graph.node:
            if any(name in found for name in node.input):
                found.update(node.output)
        return found

    def _name(self, what: str) -> str:
        self._count += 1
        return f"backward/{self._count}/{what}"

    def constant(self, value: NDArray) -> str:
        """The name of a new constant."""
        name = self._name("constant")
        self._extra.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op_type: str, inputs: Sequence[str], **attributes: object) -> str:
        """The name of the result of a new node."""
        name = self._name(op_type)
        self._nodes.append(helper.make_node(op_type, list(inputs), [name], name, **attributes))
        return name

    def gradient(self, value: str) -> str:
        """The gradient by a value whose gradient is known (see `gradients`): the sum over its readers."""
        parts = self._gradients[value]
        if len(parts) > 1:
            self._gradients[value] = [self.node("Sum", parts)]
        return self._gradients[value][0]

    def _array(self, name: str) -> NDArray:
        if name not in self._constants:
            raise UnknownDerivativeError(f"{name} is no constant")
        return numpy_helper.to_array(self._constants[name])

    def _conv(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kernel = self._array(node.input[1]).shape[2:]
        axes = len(kernel)
        data, output = self.shape(node.input[0])[2:], self.shape(node.output[0])[2:]
        strides, dilations, pads, group = _window(attributes, axes)
        around = [(k - 1) * d - p for k, d, p in zip(kernel * 2, dilations * 2, pads, strict=True)]
        if set(strides) == {1} and group == 1 and min(around) >= 0:
            # The same taps in the opposite order: a Conv is faster than a ConvTranspose.
            weight = self.node("Transpose", [node.input[1]], perm=[1, 0, *range(2, 2 + axes)])
            back = [[-1] * axes, [np.iinfo(np.int64).min] * axes, range(2, 2 + axes), [-1] * axes]
            weight = self.node("Slice", [weight, *(self.constant(np.array(v, np.int64)) for v in back)])
            result = self.node("Conv", [gradient, weight], dilations=dilations, pads=around)
            self.convolutions[result] = node.output[0], node.input[1]
            return {node.input[0]: result}
        missing = []
        for i in range(axes):
            size, made = data[i], output[i]
            if size is None or made is None:
                missing.append(0)  # right for strides of 1
                if strides[i] != 1:
                    raise UnknownDerivativeError("a stride and an open size")
                continue
            reach = (made - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
            missing.append(size + pads[i] + pads[axes + i] - reach)
        result = self.node(
            "ConvTranspose",
            [gradient, node.input[1]],
            strides=strides,
            dilations=dilations,
            pads=pads,
            group=group,
            output_padding=missing,
        )
        return {node.input[0]: result}

    def _relu(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        return {node.input[0]: self.node("Mul", [gradient, self.node("Sign", [node.output[0]])])}

    def _clip(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        same = self.node("Cast", [self.node("Equal", [node.input[0], node.output[0]])], to=onnx.TensorProto.FLOAT)
        return {node.input[0]: self.node("Mul", [gradient, same])}

    def _add(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        shape = self.shape(node.output[0])
        found: dict[str, str] = {}
        for name in node.input:
            if name in self._constants:
                continue
            if self.shape(name) != shape or name in found:
                raise UnknownDerivativeError("broadcasting")
            found[name] = gradient
        return found

    def _mul(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        constant = [name for name in node.input if name in self._constants]
        other = [name for name in node.input if name not in self._constants]
        if len(constant) != 1 or self.shape(other[0]) != self.shape(node.output[0]):
            raise UnknownDerivativeError("a product of two values")
        return {other[0]: self.node("Mul", [gradient, constant[0]])}

    def _identity(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        return {node.input[0]: gradient}

    _dropout = _identity

    def _matmul(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        if self._array(node.input[1]).ndim != 2:
            raise UnknownDerivativeError("a stack of matrices")
        return {node.input[0]: self.node("MatMul", [gradient, self.node("Transpose", [node.input[1]], perm=[1, 0])])}

    def _gemm(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if attributes.get("transA", 0):
            raise UnknownDerivativeError("transA")
        self._array(node.input[1])
        alpha, transposed = float(attributes.get("alpha", 1.0)), int(attributes.get("transB", 0))
        return {node.input[0]: self.node("Gemm", [gradient, node.input[1]], alpha=alpha, transB=1 - transposed)}

    def _reshape(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        return {node.input[0]: self.node("Reshape", [gradient, self.node("Shape", [node.input[0]])])}

    _flatten = _squeeze = _unsqueeze = _reshape

    def _transpose(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        back = list(range(len(self.shape(node.input[0]))))[::-1] if perm is None else np.argsort(perm).tolist()
        return {node.input[0]: self.node("Transpose", [gradient], perm=back)}

    def _globalaveragepool(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        sizes = self.shape(node.input[0])[2:]
        if None in sizes:
            raise UnknownDerivativeError("an open size")
        share = self.constant(np.array(1 / math.prod(d for d in sizes if d is not None), np.float32))
        mean = self.node("Mul", [gradient, share])
        return {node.input[0]: self.node("Expand", [mean, self.node("Shape", [node.input[0]])])}

    def _maxpool(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        """Windows side by side: the gradient goes to the values that equal their window's maximum."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        kernel = list(attributes["kernel_shape"])
        data, output = self.shape(node.input[0])[2:], self.shape(node.output[0])[2:]
        if (
            len(kernel) != 2
            or list(attributes.get("strides", [])) != kernel
            or any(attributes.get("pads", []))
            or None in data
            or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
        ):
            raise UnknownDerivativeError("windows that overlap")
        most, spread = (self._repeat(name, data, output, kernel) for name in (node.output[0], gradient))
        same = self.node("Cast", [self.node("Equal", [node.input[0], most])], to=onnx.TensorProto.FLOAT)
        return {node.input[0]: self.node("Mul", [spread, same])}

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
        padded = self.node("Pad", [value, self.constant(pads)])
        return self.node("Gather", [padded, self.constant(index.astype(np.int64))], axis=axis)

    def _slice(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        starts, ends = self._array(node.input[1]), self._array(node.input[2])
        axes = self._array(node.input[3]) if len(node.input) > 3 else np.arange(starts.size)
        steps = self._array(node.input[4]) if len(node.input) > 4 else np.ones(starts.size, np.int64)
        shape = self.shape(node.input[0])
        for start, end, axis, step in zip(*(a.tolist() for a in (starts, ends, axes, steps)), strict=True):
            size = shape[axis]
            if size is None or len(shape) != 4:
                raise UnknownDerivativeError("an open size")
            taken = np.arange(size)[slice(start, end, step)]
            index = np.full(size, taken.size)
            index[taken] = np.arange(taken.size)
            gradient = self._spread(gradient, axis % len(shape), index)
        return {node.input[0]: gradient}

    def _pad(self, node: onnx.NodeProto, gradient: str) -> dict[str, str]:
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        if mode != b"constant" or len(node.input) > 3:
            raise UnknownDerivativeError("such a Pad")
        pads = self._array(node.input[1])
        rank = pads.size // 2
        ends = [-int(p) if p else np.iinfo(np.int64).max for p in pads[rank:]]
        return {
            node.input[0]: self.node(
                "Slice", [gradient, self.constant(pads[:rank]), self.constant(np.array(ends, np.int64))]
            )
        }


def _window(attributes: dict[str, Any], axes: int) -> tuple[list[int], list[int], list[int], int]:
    """Strides, dilations, pads and groups of a Conv."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UnknownDerivativeError("auto_pad")
    strides = list(attributes.get("strides", [1] * axes))
    dilations = list(attributes.get("dilations", [1] * axes))
    return strides, dilations, list(attributes.get("pads", [0] * 2 * axes)), int(attributes.get("group", 1))
