"""Move what follows one of our operators into it: the bias Add of a matrix product, and a Relu or Clip."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tetris_onnx.graph.layers import CONV_ADD, CONV_MAX_POOL, WEIGHT_TYPES, Layer, find_layers, weight_type
from tetris_onnx.passes.surgery import only_consumer, remove_node, set_constant


def fuse_epilogue(graph: gs.Graph) -> None:
    """Apply the pass."""
    for layer in find_layers(graph):
        if not layer.block_sparse or layer.node.op in (CONV_ADD, CONV_MAX_POOL) or has_activation(layer.node):
            continue
        follower = only_consumer(graph, layer.output)
        if follower is None or follower.domain not in (None, "", "ai.onnx"):
            continue
        while follower is not None and follower.op == "Add" and _add_bias(layer, follower):
            take_over(graph, layer.node, follower)
            follower = only_consumer(graph, layer.output)
        clip_further(graph, layer.node)


def clip_further(graph: gs.Graph, node: gs.Node) -> None:
    """Let one of our operators take over the Relus and Clips that follow it, on top of its own activation."""
    follower = only_consumer(graph, node.outputs[0])
    while follower is not None and follower.domain in (None, "", "ai.onnx"):
        bounds = clip_bounds(follower)
        if bounds is None:
            break
        for end in ("activation_min", "activation_max"):
            node.attrs[end] = min(max(node.attrs[end], bounds[0]), bounds[1])
        take_over(graph, node, follower)
        follower = only_consumer(graph, node.outputs[0])


def has_activation(node: gs.Node) -> bool:
    """Whether one of our operators clips its result."""
    low, high = node.attrs.get("activation_min", -np.inf), node.attrs.get("activation_max", np.inf)
    return bool(low > -np.inf or high < np.inf)


def take_over(graph: gs.Graph, node: gs.Node, follower: gs.Node) -> None:
    """Let ``node`` make the result of ``follower``, which goes."""
    result = follower.outputs[0]
    remove_node(graph, follower)
    node.outputs = [result]


def _add_bias(layer: Layer, add: gs.Node) -> bool:
    """Put the constant vector of ``add`` into the layer's bias, where it is one."""
    operand = add.inputs[1] if add.inputs[0] is layer.output else add.inputs[0]
    out, shape = layer.weight_shape[0], layer.output.shape
    if not isinstance(operand, gs.Constant) or weight_type(operand) not in WEIGHT_TYPES:
        return False
    if shape is None or layer.out_axis is None:
        return False
    if len(operand.shape) > len(shape):
        return False
    padded = (1,) * (len(shape) - len(operand.shape)) + tuple(operand.shape)
    if padded[layer.out_axis] not in (1, out) or any(d != 1 for a, d in enumerate(padded) if a != layer.out_axis):
        return False
    vector = np.broadcast_to(operand.values.reshape(-1), (out,))
    bias = layer.bias
    set_constant(layer.node, 5, vector if bias is None else bias + vector, f"{layer.node.name}/bias")
    return True


def clip_bounds(node: gs.Node) -> tuple[float, float] | None:
    """(min, max) that ``node`` clips to, where it is a Relu or a Clip with constant limits."""
    if node.op == "Relu":
        return 0.0, float("inf")
    if node.op != "Clip":
        return None
    limits = [float("-inf"), float("inf")]
    for slot in (1, 2):
        if slot < len(node.inputs) and not node.inputs[slot].is_empty():
            limit = node.inputs[slot]
            if not isinstance(limit, gs.Constant) or limit.values.size != 1:
                return None
            limits[slot - 1] = float(limit.values.reshape(-1)[0])
    low, high = limits
    return (low, high) if low <= high else None  # false for NaN too
