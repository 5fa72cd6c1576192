"""Which nodes onnxruntime's CPU provider runs in a layout of its own, where many channels of a pixel lie side by side.

It converts convolutions and poolings to that layout (its transformer is called NCHWc), lets what follows them keep it
where it can, and puts a ReorderInput or ReorderOutput wherever the layout changes. Our operators read and write the
model's own layout. This says what holds for a node of a dense model; where changes go is `tetris_onnx.operators`.
"""

from __future__ import annotations

from enum import Enum

import onnx_graphsurgeon as gs

from tetris_onnx.graph.layers import weight_type

_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_FOLLOWERS = (
    "Relu",
    "Sigmoid",
    "Tanh",
    "LeakyRelu",
    "HardSigmoid",
    "HardSwish",  # as HardSigmoid and Mul
    "Gelu",
    "Clip",
    "BatchNormalization",
    "Identity",
    "Dropout",
)
_JOINING = ("Add", "Sum", "Mul")


class Layout(Enum):
    """In which layout a node works."""

    PLAIN = "that of the model"
    BLOCKED = "onnxruntime's own"
    FOLLOWS = "that of its first input"
    JOINS = "onnxruntime's own where all inputs have it"


def layout_of(node: gs.Node, channels: int) -> Layout:
    """The layout of a node of a dense model, where ``channels`` lie side by side (1: nowhere)."""
    if channels < 2 or node.domain not in (None, "", "ai.onnx") or not node.outputs or not _is_map(node.outputs[0]):
        return Layout.PLAIN
    if node.op == "Conv":
        return Layout.BLOCKED if _is_blocked(node, channels) else Layout.PLAIN
    if node.op in _POOLS:
        whole = _channels(node.inputs[0]) % channels == 0 and not any(t.outputs for t in node.outputs[1:])
        return Layout.BLOCKED if whole else Layout.PLAIN
    if node.op in _FOLLOWERS:
        return Layout.FOLLOWS
    same = all(t.shape == node.outputs[0].shape for t in node.inputs)
    if node.op in _JOINING and same and not any(isinstance(t, gs.Constant) for t in node.inputs):
        return Layout.JOINS
    if node.op == "Concat" and node.attrs.get("axis") == 1 and all(_channels(t) % channels == 0 for t in node.inputs):
        return Layout.JOINS
    return Layout.PLAIN


def reads_plain(conv: gs.Node, channels: int) -> bool:
    """Whether a convolution in onnxruntime's layout reads the model's: where its input has few channels."""
    return int(conv.inputs[1].shape[1]) * int(conv.attrs.get("group", 1)) < channels


def is_pool_2x2(pool: gs.Node) -> bool:
    """Whether ``pool`` is a MaxPool over windows of 2x2, one beside the other, which our convolution takes over."""
    if pool.op != "MaxPool" or pool.domain not in (None, "", "ai.onnx") or any(t.outputs for t in pool.outputs[1:]):
        return False
    attributes = pool.attrs
    return (
        list(attributes.get("kernel_shape", ())) == [2, 2]
        and list(attributes.get("strides", ())) == [2, 2]
        and not any(attributes.get("pads", ()))
        and all(d == 1 for d in attributes.get("dilations", ()))
        and attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and (not attributes.get("ceil_mode", 0) or _is_even(pool.inputs[0]))
    )


def _is_blocked(conv: gs.Node, channels: int) -> bool:
    weight, groups = conv.inputs[1], int(conv.attrs.get("group", 1))
    if not isinstance(weight, gs.Constant) or weight_type(weight) != "float32":
        return False
    out, in_ = weight.shape[:2]
    if groups <= 1:
        return groups == 1
    depthwise = in_ == 1 and out == groups
    return out % channels == 0 and (depthwise or (in_ % channels == 0 and out // groups % channels == 0))


def _is_map(value: gs.Tensor) -> bool:
    return value.shape is not None and len(value.shape) == 4


def _channels(value: gs.Tensor) -> int:
    """How many, or 1 where that is not known: no layout's multiple."""
    known = value.shape is not None and len(value.shape) == 4 and isinstance(value.shape[1], int)
    return value.shape[1] if known else 1


def _is_even(maps: gs.Tensor) -> bool:
    return maps.shape is not None and all(isinstance(d, int) and d % 2 == 0 for d in maps.shape[2:])
