"""Values that a graph computes from constants alone: weights in Constant nodes, behind Transpose or ConstantOfShape."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from tetris_onnx.graph.shapes import MAX_FOLDED, run_node
from tetris_onnx.graph.tensors import values_of

# Operators that exporters put between a stored weight and the layer. DequantizeLinear is not among them: a quantized
# weight has to stay one, unless the layer is to be pruned.
_FOLDABLE = frozenset(
    """
    Abs Add Cast Concat Constant ConstantOfShape Div Exp Expand Flatten Gather Identity Mul Neg Pad Reciprocal
    ReduceL2 ReduceMean ReduceSum Reshape Slice Sqrt Squeeze Sub Tile Transpose Unsqueeze
    """.split()
)
_MAX_DEPTH = 64


def constant_value(
    graph: gs.Graph,
    tensor: gs.Tensor,
    known: dict[int, NDArray | None] | None = None,
    depth: int = 0,
    dequantize: bool = False,
) -> NDArray | None:
    """The value of ``tensor`` where the graph computes it from constants alone, else None.

    ``known`` holds what was found before, by the id of the tensor: hand the same one over while the graph lives.
    ``dequantize``: look through DequantizeLinear, too.
    """
    if isinstance(tensor, gs.Constant):
        return values_of(tensor)
    known = {} if known is None else known
    if id(tensor) not in known:
        known[id(tensor)] = _compute(graph, tensor, known, depth, dequantize)
    return known[id(tensor)]


def _compute(
    graph: gs.Graph, tensor: gs.Tensor, known: dict[int, NDArray | None], depth: int, dequantize: bool
) -> NDArray | None:
    if len(tensor.inputs) != 1 or depth > _MAX_DEPTH:
        return None
    node = tensor.inputs[0]
    foldable = node.op in _FOLDABLE or (dequantize and node.op == "DequantizeLinear")
    if not foldable or node.domain not in (None, "", "ai.onnx") or node.outputs[0] is not tensor:
        return None
    if node.op == "Constant" and isinstance(node.attrs.get("value"), gs.Constant):
        return node.attrs["value"].values
    inputs = {}
    for operand in node.inputs:
        if not operand.is_empty():
            value = constant_value(graph, operand, known, depth + 1, dequantize)
            if value is None:
                return None
            inputs[operand.name] = value
    if node.op == "DequantizeLinear":
        return _dequantized(node, list(inputs.values()))
    # What is known already counts too: a small file can hold many nodes that each make a large constant.
    left = MAX_FOLDED - sum(value.size for value in known.values() if value is not None)
    return run_node(OnnxExporter.export_node(node), inputs, graph.import_domains, left)


def _dequantized(node: gs.Node, inputs: list[NDArray]) -> NDArray | None:
    """``(x - zero) * scale``, for one scale or one per slice of ``axis``; None for scales of blocks."""
    x, scale, *zero = inputs
    if x.dtype.kind not in "iu" or node.attrs.get("block_size", 0) or scale.ndim > 1:
        return None
    shape = [1] * x.ndim
    if scale.size > 1:
        shape[node.attrs.get("axis", 1)] = scale.size
    offset = zero[0].reshape(shape).astype(np.int32) if zero else 0
    return ((x.astype(np.int32) - offset) * scale.reshape(shape).astype(np.float64)).astype(scale.dtype)
