"""Models of quantized values (QDQ): what a pair of QuantizeLinear and DequantizeLinear does but for the rounding.

    DequantizeLinear(QuantizeLinear(x))  =  clip(round(x / scale), first - zero, last - zero) * scale

first and last are those of the integer type. The range is part of what the model computes: quantizers remove a Relu
whose zero is the least value. The rounding is not: a sum in another order can fall on the other side of a step, so
verification compares models without it (`without_rounding`), where a mistake shows as clearly as in a float model.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_BITS = {np.dtype(np.uint8): (0, 255), np.dtype(np.int8): (-128, 127)}
_WIDE = {np.dtype(np.uint16): (0, 65535), np.dtype(np.int16): (-32768, 32767)}


def value_range(scale: NDArray, zero: NDArray | None, wide: bool = False) -> tuple[float, float] | None:
    """(least, greatest) value that 8 bits (``wide``: or 16) stand for; None for more than one scale or other types."""
    kind = np.dtype(np.uint8) if zero is None else zero.dtype
    limits = (_BITS | _WIDE if wide else _BITS).get(kind)
    if limits is None or scale.size != 1 or (zero is not None and zero.size != 1):
        return None
    step, offset = float(scale.reshape(-1)[0]), 0 if zero is None else int(zero.reshape(-1)[0])
    return (limits[0] - offset) * step, (limits[1] - offset) * step


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether the main graph quantizes a value."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in floats: a Clip to their range in the place of such pairs of the main graph."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    constants = {t.name: t for t in graph.initializer}
    constants |= {
        n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].HasField("t")
    }
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | set(constants)
    replaced = set()
    for node in list(graph.node):
        following = readers.get(node.output[0], []) if node.op_type == "QuantizeLinear" else []
        if not following or node.output[0] in outputs:
            continue
        parameters = list(node.input[1:])
        if any(n.op_type != "DequantizeLinear" or list(n.input[1:]) != parameters for n in following):
            continue
        if any(name not in constants for name in parameters if name):
            continue
        scale, *zero = (numpy_helper.to_array(constants[name]) for name in parameters if name)
        limits = value_range(scale, zero[0] if zero else None, wide=True)
        if limits is None:
            continue
        names = []
        for end, limit in zip(("least", "greatest"), limits, strict=True):
            name = f"{node.output[0]}/{end}"
            while name in taken:
                name += "_"
            taken.add(name)
            names.append(name)
            graph.initializer.append(numpy_helper.from_array(np.array(limit, scale.dtype), name))
        node.CopyFrom(helper.make_node("Clip", [node.input[0], *names], list(node.output), node.name))
        replaced.add(node.output[0])
        for reader in following:
            reader.CopyFrom(helper.make_node("Identity", [node.output[0]], list(reader.output), reader.name))
    for value in list(graph.value_info):
        if value.name in replaced:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return plain
