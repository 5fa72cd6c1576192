"""Give layers that are to be pruned the one form that is pruned: a Conv of one group, a weight of floats.

- A grouped convolution is one whose weight is zero outside the blocks on its diagonal, [out of a group, in of a group].
  Block-sparse those zeros cost nothing: they are dropped blocks.
- A quantized layer (DequantizeLinear before its weight and bias) gets the values that these stand for. What it reads
  and writes stays as it is: see `join_quantized`.

Layers that stay dense keep their own form, which is the faster one for them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.graph.constants import constant_value
from tetris_onnx.graph.layers import Layer, is_openable_group
from tetris_onnx.graph.tensors import values_of
from tetris_onnx.passes.normalize_layers import normalize_gemm
from tetris_onnx.passes.surgery import only_consumer, set_constant


def open_layers(graph: gs.Graph, names: Collection[str] | None = None, quantized: bool = False) -> None:
    """Apply the pass, after `normalize_layers`, to the layers ``names`` (None: to all), quantized ones where asked."""
    known: dict[int, NDArray | None] = {}
    for node in list(graph.nodes):
        if node.domain not in (None, "", "ai.onnx") or node.op not in ("Conv", "Gemm", "MatMul"):
            continue
        if names is not None and Layer(node, "").name not in names:
            continue
        if quantized and len(node.inputs) > 1 and _open_quantized(graph, node, known):
            follower = only_consumer(graph, node.outputs[0])
            if node.op == "Gemm":
                normalize_gemm(graph, node)
            elif node.op == "MatMul" and follower is not None and follower.op == "Add":  # its bias
                _open_quantized(graph, follower, known, range(2))
        if node.op == "Conv" and is_openable_group(node):
            weight = values_of(node.inputs[1])
            set_constant(node, 1, block_diagonal(weight, node.attrs["group"]), f"{node.name}/weight_of_one_group")
            node.attrs["group"] = 1


def block_diagonal(weight: NDArray, groups: int) -> NDArray:
    """The weight [out, in, *kernel] of one group that a grouped one [out, in / groups, *kernel] stands for."""
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    whole = np.zeros((weight.shape[0], groups * columns, *weight.shape[2:]), weight.dtype)
    for g in range(groups):
        part = slice(g * rows, (g + 1) * rows)
        whole[part, g * columns : (g + 1) * columns] = weight[part]
    return whole


def _open_quantized(
    graph: gs.Graph, node: gs.Node, known: dict[int, NDArray | None], slots: Sequence[int] = (1, 2)
) -> bool:
    """Give a node the floats that its quantized constants stand for. Whether it had any."""
    found = False
    for slot in slots:
        tensor = node.inputs[slot] if slot < len(node.inputs) else None
        if isinstance(tensor, gs.Variable) and not tensor.is_empty():
            value = constant_value(graph, tensor, known, dequantize=True)
            if value is not None:
                set_constant(node, slot, value, f"{node.name}/input{slot}_dequantized")
                found = True
    return found
