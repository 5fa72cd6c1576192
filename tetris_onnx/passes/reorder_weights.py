"""Reorder the channels of each planned layer's weight, with a Gather before and the inverse Gather behind it.

    y = W x + b    ->    y = (W[out_perm][:, in_perm] x[in_perm] + b[out_perm])[inverse(out_perm)]

Exact in real arithmetic: a layer sums the same products in another order.
"""

from __future__ import annotations

from functools import partial

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.algorithms.permutation import inverse, is_identity
from tetris_onnx.graph.layers import REORDERED, find_layers
from tetris_onnx.passes.surgery import add_gather, change_weight, set_constant
from tetris_onnx.plan import LayerPlan, Plan


def reorder_weights(graph: gs.Graph, plan: Plan) -> None:
    """Apply the pass."""
    for layer in find_layers(graph):
        decision = plan.get(layer.name)
        if decision is None or (is_identity(decision.out_perm) and is_identity(decision.in_perm)):
            continue
        name, node = layer.name, layer.node
        assert layer.in_axis is not None and layer.out_axis is not None  # a layer of unknown rank is never planned
        change_weight(layer, partial(_reordered, decision), f"{name}/weight_reordered")
        bias = layer.bias
        if bias is not None:
            set_constant(node, 2, bias[decision.out_perm], f"{name}/bias_reordered")
        node.inputs[0] = add_gather(graph, layer.data, decision.in_perm, layer.in_axis, f"{name}/in")
        if not is_identity(decision.out_perm):
            output, axis = layer.output, layer.out_axis
            node.outputs = [gs.Variable(output.name + REORDERED, output.dtype, output.shape)]
            add_gather(graph, node.outputs[0], inverse(decision.out_perm), axis, f"{name}/out", output)


def _reordered(plan: LayerPlan, weight: NDArray) -> NDArray:
    return weight[plan.out_perm][:, plan.in_perm]
