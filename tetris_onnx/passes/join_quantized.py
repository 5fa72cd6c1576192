"""Quantized models: no rounding to bytes and back between operators that work on floats.

    DequantizeLinear(QuantizeLinear(x))  ->  Clip(x, least, greatest)

for each such pair that neither comes from a quantized layer nor goes to one: onnxruntime fuses those pairs with their
layer, and all others cost two passes over the memory. The Clip goes into the operator before it (`fuse_epilogue`). What
the bytes stand for becomes the ``input_range`` of our operators that read them: their int8 products work on the very
bytes that the pair would have made.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tetris_onnx.graph.channels import ELEMENTWISE
from tetris_onnx.graph.layers import DOMAIN, OUR_OPS, is_multiplier
from tetris_onnx.graph.quantized import value_range
from tetris_onnx.passes.surgery import is_output, reads_alone, remove_node


def join_quantized(graph: gs.Graph) -> None:
    """Apply the pass, before the fusions."""
    if not any(node.domain == DOMAIN for node in graph.nodes):
        return
    for node in list(graph.nodes):
        if node.op != "DequantizeLinear" or not node.inputs or not node.inputs[0].inputs:
            continue
        limits, result = _range_of(node), node.outputs[0]
        if limits is None:
            continue
        for reader in result.outputs:
            if reader.domain == DOMAIN and reader.op in OUR_OPS and reader.inputs[0] is result:
                reader.attrs["input_range"] = list(limits)
        first = node.inputs[0].inputs[0]
        if first.op != "QuantizeLinear" or not _same_steps(first, node) or is_output(graph, result):
            continue
        if not reads_alone(graph, node, first.outputs[0]) or _is_of_layer(first.inputs[0]):
            continue
        if all(not is_multiplier(reader) for reader in result.outputs):
            kind = node.inputs[1].values.dtype
            ends = [
                gs.Constant(f"{node.name}/{name}", np.array(limit, kind))
                for name, limit in zip(("least", "greatest"), limits, strict=True)
            ]
            data = first.inputs[0]
            remove_node(graph, first)
            node.op, node.attrs, node.inputs = "Clip", {}, [data, *ends]


def _range_of(node: gs.Node) -> tuple[float, float] | None:
    """The values that the bytes of a QuantizeLinear or DequantizeLinear stand for, where they are known."""
    constants = [t for t in node.inputs[1:] if not t.is_empty()]
    if not constants or not all(isinstance(t, gs.Constant) for t in constants):
        return None
    return value_range(constants[0].values, constants[1].values if len(constants) > 1 else None)


def _same_steps(first: gs.Node, second: gs.Node) -> bool:
    """Whether both have the same scale and zero point."""
    return len(first.inputs) == len(second.inputs) and all(
        a is b or (isinstance(a, gs.Constant) and isinstance(b, gs.Constant) and np.array_equal(a.values, b.values))
        for a, b in zip(first.inputs[1:], second.inputs[1:], strict=True)
    )


def _is_of_layer(value: gs.Tensor) -> bool:
    """Whether ``value`` is the result of a layer that is not ours, or of an activation behind one."""
    while value.inputs and value.inputs[0].op in ELEMENTWISE and value.inputs[0].domain in (None, "", "ai.onnx"):
        value = value.inputs[0].inputs[0]
    return bool(value.inputs) and is_multiplier(value.inputs[0])
