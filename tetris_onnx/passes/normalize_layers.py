"""Give every layer one form: constant weights, and a Gemm that is ``x W^T + b`` or ``x W + b`` with a vector ``b``.

Weights that the graph computes from constants (Constant nodes, Transpose, ConstantOfShape, ...) become constants, as
do the vectors of a BatchNormalization and the constant operands of elementwise operators. A Gemm's ``transA`` becomes
a Transpose, ``alpha`` and ``beta`` go into weight and bias, and a ``C`` that is no vector of output channels becomes
an Add of its own. A Sum of two becomes an Add, which later passes know. Exact but for the rounding of ``alpha * W``.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.graph.constants import constant_value
from tetris_onnx.graph.layers import WEIGHT_TYPES, weight_type
from tetris_onnx.graph.tensors import values_of
from tetris_onnx.passes.surgery import set_constant

# Operators whose inputs are worth folding: layers, and those that a reordering has to pass (see graph.channels).
_FOLDED = frozenset(
    """
    Add BatchNormalization Clip Conv Div Gemm InstanceNormalization MatMul Max Min Mul PRelu Pad Pow ReduceL1 ReduceL2
    ReduceMax ReduceMean ReduceMin ReduceSum Reshape Resize Slice Sub Sum Where
    """.split()
)


def normalize_layers(graph: gs.Graph) -> None:
    """Apply the pass."""
    folded: dict[int, gs.Constant] = {}  # by value: layers that share a weight go on sharing it
    known: dict[int, NDArray | None] = {}
    for node in list(graph.nodes):
        if node.domain not in (None, "", "ai.onnx") or node.op not in _FOLDED:
            continue
        for slot, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Variable) and tensor.inputs and id(tensor) not in folded:
                value = constant_value(graph, tensor, known)
                if value is not None:
                    folded[id(tensor)] = gs.Constant(f"{tensor.name}/constant", value)
            if id(tensor) in folded:
                node.inputs[slot] = folded[id(tensor)]
        if node.op == "Gemm" and len(node.inputs) > 1:
            normalize_gemm(graph, node)
        if node.op == "Sum" and len(node.inputs) == 2:
            node.op = "Add"


def normalize_gemm(graph: gs.Graph, gemm: gs.Node) -> None:
    """Give one Gemm with a constant weight the form ``x W^T + b`` or ``x W + b``."""
    data, weight = gemm.inputs[:2]
    if not isinstance(weight, gs.Constant) or weight_type(weight) not in WEIGHT_TYPES or len(weight.shape) != 2:
        return
    if gemm.attrs.get("transA", 0):
        shape = None if data.shape is None else data.shape[::-1]
        swapped = gs.Variable(f"{gemm.name}/transposed", data.dtype, shape)
        graph.nodes.append(gs.Node("Transpose", f"{gemm.name}/Transpose", {"perm": [1, 0]}, [data], [swapped]))
        gemm.inputs[0] = swapped
        gemm.attrs["transA"] = 0
    alpha = gemm.attrs.pop("alpha", 1.0)
    if alpha != 1.0:
        set_constant(gemm, 1, values_of(weight) * weight.dtype.type(alpha), f"{gemm.name}/weight")
    beta = gemm.attrs.pop("beta", 1.0)
    if len(gemm.inputs) < 3 or gemm.inputs[2].is_empty():
        return
    out = gemm.inputs[1].shape[0 if gemm.attrs.get("transB", 0) else 1]
    addend = gemm.inputs[2]
    if isinstance(addend, gs.Constant) and np.prod(addend.shape[:-1], dtype=np.int64) == 1 and len(addend.shape) <= 2:
        bias = np.broadcast_to(addend.values.reshape(-1) * addend.dtype.type(beta), (out,))
        if beta != 1.0 or tuple(addend.shape) != (out,):
            set_constant(gemm, 2, bias, f"{gemm.name}/bias")
        return
    product = gs.Variable(f"{gemm.name}/product", gemm.outputs[0].dtype, gemm.outputs[0].shape)
    total = gemm.outputs[0]
    del gemm.inputs[2]
    gemm.outputs = [product]
    if beta != 1.0:
        scaled = gs.Variable(f"{gemm.name}/scaled", addend.dtype, addend.shape)
        factor = gs.Constant(f"{gemm.name}/beta", np.array(beta, gemm.inputs[1].dtype))
        graph.nodes.append(gs.Node("Mul", f"{gemm.name}/Mul", {}, [addend, factor], [scaled]))
        addend = scaled
    graph.nodes.append(gs.Node("Add", f"{gemm.name}/Add", {}, [product, addend], [total]))
