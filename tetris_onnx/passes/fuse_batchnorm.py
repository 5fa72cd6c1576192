"""Fuse a BatchNormalization, or a Mul or Add with one constant per channel, into the layer before it.

    scale * (W x + b) + shift  =  (scale W) x + (scale b + shift)

for a BatchNormalization with scale = gamma / sqrt(variance + epsilon) and shift = beta - scale * mean. Scaling whole
rows of the weight does not change which weights are zero: a plan fits the model before and after this pass.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.graph.layers import WEIGHT_TYPES, Layer, layer_of, weight_type
from tetris_onnx.passes.surgery import change_weight, is_output, only_consumer, remove_node, replace_uses, set_constant


def fuse_batchnorm(graph: gs.Graph) -> None:
    """Apply the pass."""
    for node in list(graph.nodes):
        layer = layer_of(node)
        while layer is not None:
            follower = only_consumer(graph, layer.output)
            if follower is None or is_output(graph, follower.outputs[0]):
                break
            affine = _affine(follower, layer)
            if affine is None:
                break
            _scale(layer, *affine)
            # The layer keeps the name of its output: plans are keyed by it.
            replace_uses(follower.outputs[0], layer.output)
            remove_node(graph, follower)


def _affine(node: gs.Node, layer: Layer) -> tuple[NDArray, NDArray] | None:
    """(scale, shift) per output channel, in float64, where ``node`` is such an operator; else None."""
    channels, axis, shape = layer.weight_shape[0], layer.out_axis, layer.output.shape
    if node.domain not in (None, "", "ai.onnx") or axis is None:
        return None
    if node.op == "BatchNormalization":
        vectors = node.inputs[1:5]
        if node.inputs[0] is not layer.output or axis != 1 or node.attrs.get("training_mode", 0):
            return None
        if not all(isinstance(v, gs.Constant) and tuple(v.shape) == (channels,) for v in vectors):
            return None
        if len(node.outputs) > 1:  # statistics, in training
            return None
        gamma, beta, mean, variance = (v.values.astype(np.float64) for v in vectors)
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        return scale, beta - scale * mean
    if node.op not in ("Mul", "Add") or not layer.is_conv or shape is None or len(node.inputs) != 2:
        return None  # (a matrix product's bias is fused when its operator is made: see fuse_epilogue)
    operand = node.inputs[1] if node.inputs[0] is layer.output else node.inputs[0]
    if (
        not isinstance(operand, gs.Constant)
        or weight_type(operand) not in WEIGHT_TYPES
        or len(operand.shape) > len(shape)
    ):
        return None
    # [C, 1, 1], [1, C, 1, 1] or a single number
    padded = (1,) * (len(shape) - len(operand.shape)) + tuple(operand.shape)
    if any(d != 1 for a, d in enumerate(padded) if a != axis) or padded[axis] not in (1, channels):
        return None
    vector = np.broadcast_to(operand.values.reshape(-1).astype(np.float64), (channels,))
    return (vector, np.zeros(channels)) if node.op == "Mul" else (np.ones(channels), vector)


def _scale(layer: Layer, scale: NDArray, shift: NDArray) -> None:
    if not np.all(scale == 1):
        change_weight(layer, partial(_scaled, scale), f"{layer.name}/weight")
    bias = layer.bias
    fused = shift if bias is None else scale * bias + shift
    if layer.node.op == "MatMul":
        layer.node.op = "Gemm"  # the same for the matrices that a BatchNormalization takes, and it has a bias
    set_constant(layer.node, 2, fused.astype(layer.node.inputs[1].dtype), f"{layer.name}/bias")


def _scaled(scale: NDArray, weight: NDArray) -> NDArray:
    return (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(weight.dtype)
