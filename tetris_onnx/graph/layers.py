"""One view of every layer that multiplies by a weight: Conv, ConvTranspose, Gemm, MatMul, and our own operators.

Whatever the node's own form (``transB``, a MatMul's [in, out] weight), a `Layer` shows its weight as ``[out, in,
*kernel]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from tetris_onnx.graph.tensors import values_of

DOMAIN = "ai.tetris"
# Element types that our operators take.
WEIGHT_TYPES = ("float32", "float16", "bfloat16")
CONV, GEMM = "BlockSparseConv", "BlockSparseGemm"
CONV_ADD, CONV_MAX_POOL = "BlockSparseConvAdd", "BlockSparseConvMaxPool"  # CONV with what follows it
OUR_OPS = (CONV, CONV_ADD, CONV_MAX_POOL, GEMM)
MAX_POOL = "ChannelsLastMaxPool"  # no layer: what a MaxPool between channels-last layers becomes
# Smaller groups of channels do not fill a kernel's registers.
LEAST_GROUP = 8
# ONNX's operators that layers are made of.
MULTIPLIERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Other operators with weights, which no pass touches.
_RECURRENT = ("RNN", "GRU", "LSTM")
_QUANTIZED = (
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    *("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QGemm"),
)
_FUSED = ("Attention", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv", "TransposeMatMul")
# Ends the name of a layer's output where reorder_weights has put a Gather behind it, so that the layer keeps its name.
REORDERED = "/reordered"


def is_multiplier(node: gs.Node) -> bool:
    """Whether ``node`` is one of ONNX's operators that layers are made of."""
    return node.domain in (None, "", "ai.onnx") and node.op in MULTIPLIERS


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with a weight. ``why_dense`` says why it cannot be reordered and pruned; empty where it can."""

    node: gs.Node
    why_dense: str

    @property
    def name(self) -> str:
        """Name of the layer's output value in the original model: what plans are keyed by."""
        name = str(self.output.name)
        while name.endswith(REORDERED):
            name = name.removesuffix(REORDERED)
        return name

    @property
    def block_sparse(self) -> bool:
        """Whether the layer is one of our operators."""
        return self.node.domain == DOMAIN

    @property
    def data(self) -> gs.Tensor:
        """The activations that the layer reads."""
        return self.node.inputs[0]

    @property
    def output(self) -> gs.Tensor:
        """The activations that the layer writes."""
        return self.node.outputs[0]

    @property
    def is_conv(self) -> bool:
        """Whether channels are on axis 1 (convolutions), not on the last one (matrix products)."""
        return self.node.op in ("Conv", "ConvTranspose", CONV, CONV_ADD, CONV_MAX_POOL)

    @property
    def in_axis(self) -> int | None:
        """Axis of the input channels in `data`; None where its rank is not known."""
        if self.is_conv or self.node.op == "Gemm":
            return 1
        return None if self.data.shape is None else len(self.data.shape) - 1

    @property
    def out_axis(self) -> int | None:
        """Axis of the output channels in `output`, which has the rank of `data`; None where that is not known."""
        return self.in_axis

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``[out, in, *kernel]``; for a grouped convolution, ``in`` is the number of channels of one group."""
        if self.block_sparse:
            return tuple(self.node.attrs["weight_shape"])
        shape = tuple(self.node.inputs[1].shape)
        if self.node.op == "ConvTranspose":
            groups = self.node.attrs.get("group", 1)
            return (shape[1] * groups, shape[0] // groups, *shape[2:])
        return shape[::-1] if self.stored_transposed else shape

    @property
    def weight(self) -> NDArray:
        """The weight of a dense layer as ``[out, in, *kernel]``; one that is in a file is read each time."""
        values = values_of(self.node.inputs[1])
        return values.T if self.stored_transposed else values

    @property
    def groups(self) -> int:
        """How many groups the weight of a Conv of one group falls into: blocks on its diagonal, zeros beside them.

        So what `passes.open_layers` has made of a grouped convolution is told from others, for which this is 1.
        """
        node = self.node
        if node.op != "Conv" or node.attrs.get("group", 1) != 1 or not isinstance(node.inputs[1], gs.Constant):
            return 1
        weight = self.weight
        out, in_ = weight.shape[:2]
        if weight[0, -1].any() or weight[-1, 0].any():
            return 1
        rows, columns = weight.reshape(out, in_, -1).any(axis=2).nonzero()
        counts = (g for g in range(min(out, in_) // LEAST_GROUP, 1, -1) if out % g == 0 and in_ % g == 0)
        fitting = (g for g in counts if np.array_equal(rows // (out // g), columns // (in_ // g)))
        return next(fitting, 1) if rows.size else 1

    @property
    def opened(self) -> bool:
        """Whether the layer has another form in the model, which it keeps if it is not pruned (passes.open_layers)."""
        return any(node.op == "DequantizeLinear" for node in self.data.inputs) or self.groups > 1

    @property
    def bias(self) -> NDArray | None:
        """The bias ``[out]``, or None. For our operators and layers in normal form (passes.normalize_layers)."""
        index = 5 if self.block_sparse else 2
        if len(self.node.inputs) <= index or self.node.inputs[index].is_empty():
            return None
        return cast(NDArray, self.node.inputs[index].values)

    @property
    def multiplications(self) -> int | None:
        """Multiplications of the dense layer per sample; None where the output size is not known."""
        transposed = self.node.op == "ConvTranspose"
        shape = (self.data if transposed else self.output).shape
        if shape is None or not all(isinstance(d, int) for d in shape[1:]):
            return None
        # Of an output; a transposed convolution has as many of an input.
        each = int(np.prod(self.node.inputs[1].shape[1:] if transposed else self.weight_shape[1:]))
        if self.node.op == CONV_MAX_POOL:
            each *= int(np.prod(self.node.attrs["pool_shape"]))
        return int(np.prod(shape[1:], dtype=np.int64)) * each

    @property
    def stored_transposed(self) -> bool:
        """Whether the node stores its weight as ``[in, out]``."""
        return self.node.op == "MatMul" or (self.node.op == "Gemm" and not self.node.attrs.get("transB", 0))

    def stored(self, weight: NDArray) -> NDArray:
        """``weight`` [out, in, *kernel] in the form that the node stores."""
        return np.ascontiguousarray(weight.T if self.stored_transposed else weight)


def weight_type(weight: gs.Constant) -> str:
    """The name of a constant's element type."""
    kind = weight.dtype  # ONNX's number for a type that numpy does not have
    return TensorProto.DataType.Name(kind).lower() if isinstance(kind, int) else str(np.dtype(kind).name)


def find_layers(graph: gs.Graph) -> list[Layer]:
    """The layers of the main graph in node order; for those in subgraphs, see `nested_layers`."""
    layers = []
    for node in graph.nodes:
        if node.domain == DOMAIN and node.op in OUR_OPS:
            layers.append(Layer(node, "it is block-sparse already"))
        elif is_multiplier(node):
            layers.append(Layer(node, _why_dense(node)))
    return layers


def nested_layers(graph: gs.Graph) -> list[Layer]:
    """The layers in the bodies of If, Loop and Scan nodes, which no pass touches."""
    layers = []
    for node in graph.nodes:
        for body in node.attrs.values():
            if isinstance(body, gs.Graph):
                reason = f"it is in the body of {node.op} {node.name!r}"
                layers += [Layer(layer.node, reason) for layer in find_layers(body)] + nested_layers(body)
    return layers


def other_layers(graph: gs.Graph) -> list[Layer]:
    """Nodes of the main graph that multiply by weights in a form which no pass touches: recurrent, quantized, fused."""
    layers = []
    for node in graph.nodes:
        ours, theirs = node.domain in (None, "", "ai.onnx"), node.domain == "com.microsoft"
        if ours and node.op in _RECURRENT:
            layers.append(Layer(node, "it is recurrent"))
        elif (ours or theirs) and node.op in _QUANTIZED:
            layers.append(Layer(node, "it is quantized, but not in QDQ form"))
        elif theirs and node.op in _FUSED:
            layers.append(Layer(node, "onnxruntime has fused it: give the model as it was exported"))
    return [layer for layer in layers if layer.node.outputs]


def malformed(node: gs.Node) -> str:
    """What is wrong with a node of one of our operators, as far as passes rely on it; "" for nothing or other nodes."""
    if node.domain != DOMAIN or node.op not in OUR_OPS:
        return ""
    for name, least, most in (("weight_shape", 2, 5), ("block_size", 2, 2)):
        sizes = node.attrs.get(name)
        if not isinstance(sizes, list) or not least <= len(sizes) <= most:
            return f"has no attribute {name!r} of {least}{f' to {most}' * (most > least)} sizes"
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return f"has the attribute {name!r} {sizes}: expected sizes above 0"
    if node.op == CONV_MAX_POOL and node.attrs.get("pool_shape") != [2, 2]:
        return "has no attribute 'pool_shape' of [2, 2]"
    if (node.op == GEMM) != (len(node.attrs["weight_shape"]) == 2):
        return f"has the attribute 'weight_shape' {node.attrs['weight_shape']}"
    constants = node.inputs[1:5]
    if len(constants) < 4 or not node.outputs or not all(isinstance(t, gs.Constant) for t in constants):
        return "has not the inputs of its specification: X and four constants"
    return ""


def layer_of(node: gs.Node) -> Layer | None:
    """``node`` as a layer whose channels can take any order (prunable or one of ours), else None.

    The channels of a `CONV_ADD` are those of its addend too, so it is none.
    """
    if node.domain == DOMAIN and node.op in (CONV, CONV_MAX_POOL, GEMM):
        return Layer(node, "")
    if node.domain in (None, "", "ai.onnx") and node.op in ("Conv", "Gemm", "MatMul") and not _why_dense(node):
        return Layer(node, "")
    return None


def _why_dense(node: gs.Node) -> str:
    if len(node.inputs) < 2 or node.inputs[1].is_empty():
        return "it has no weight input"
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant):
        if isinstance(node.inputs[0], gs.Constant):
            return "its constant is the left operand"
        if any(producer.op == "DequantizeLinear" for producer in weight.inputs):
            return "its weight is quantized (precision int8 prunes it)"
        return "its weight is not a constant"
    if weight_type(weight) not in WEIGHT_TYPES:
        return f"its weight is {weight_type(weight)}, not {', '.join(WEIGHT_TYPES[:-1])} or {WEIGHT_TYPES[-1]}"
    if node.op == "ConvTranspose":
        # As convolutions, one for each phase of the stride, it would write its pixels apart: measured, 0.55 to 1.4
        # times onnxruntime's speed with 30 % of the weights.
        return "it is a transposed convolution"
    if node.op == "Conv":
        if len(weight.shape) not in (3, 4, 5):
            return f"it is a convolution over {len(weight.shape) - 2} axes (1 to 3 are supported)"
        groups = node.attrs.get("group", 1)
        if groups != 1:
            depthwise = groups == weight.shape[0] and weight.shape[1] == 1
            small = "" if is_openable_group(node) else f", of fewer than {LEAST_GROUP} channels each"
            return "it is depthwise" if depthwise else f"it is grouped ({groups} groups{small})"
    elif len(weight.shape) != 2:
        return f"its weight has {len(weight.shape)} axes, not 2"
    if 0 in weight.shape:
        return "its weight is empty"
    if node.op == "MatMul" and (node.inputs[0].shape is None or len(node.inputs[0].shape) < 2):
        return "the rank of its input is not known" if node.inputs[0].shape is None else "its input is a vector"
    if node.op == "Gemm" and not _is_normal(node):
        return "its bias or a transposed input is not in a form that can be reordered"
    if node.op == "Conv" and conv_window(node) is None:
        return "its padding depends on the input size"
    if (
        node.op == "Conv"
        and len(node.inputs) > 2
        and not node.inputs[2].is_empty()
        and not isinstance(node.inputs[2], gs.Constant)
    ):
        return "its bias is not a constant"
    return ""


def is_openable_group(conv: gs.Node) -> bool:
    """Whether a Conv is grouped and has a constant weight and groups that are large enough for blocks."""
    groups, weight = conv.attrs.get("group", 1), conv.inputs[1]
    if groups <= 1 or not isinstance(weight, gs.Constant) or weight_type(weight) not in WEIGHT_TYPES:
        return False
    return len(weight.shape) in (3, 4, 5) and min(weight.shape[0] // groups, weight.shape[1]) >= LEAST_GROUP


def conv_window(node: gs.Node) -> dict[str, list[int]] | None:
    """kernel_shape, strides, pads and dilations of a Conv; None if ``auto_pad`` needs a size that is not known."""
    kernel = list(node.inputs[1].shape[2:])
    axes = len(kernel)
    strides = list(node.attrs.get("strides", [1] * axes))
    dilations = list(node.attrs.get("dilations", [1] * axes))
    pads = list(node.attrs.get("pads", [0] * 2 * axes))
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode == "VALID":
        pads = [0] * 2 * axes
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        sizes = node.inputs[0].shape[2:] if node.inputs[0].shape is not None else ["?"] * axes
        ahead, behind = [], []
        for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            reach = (k - 1) * dilation + 1
            if isinstance(size, str):
                if stride != 1:
                    return None
                size = reach  # any size gives the same padding
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            small, large = total // 2, total - total // 2
            ahead.append(small if mode == "SAME_UPPER" else large)
            behind.append(large if mode == "SAME_UPPER" else small)
        pads = ahead + behind
    if min(pads, default=0) < 0:
        return None
    return {"kernel_shape": kernel, "strides": strides, "pads": pads, "dilations": dilations}


def _is_normal(gemm: gs.Node) -> bool:
    if gemm.attrs.get("transA", 0) or gemm.attrs.get("alpha", 1.0) != 1.0 or gemm.attrs.get("beta", 1.0) != 1.0:
        return False
    if len(gemm.inputs) < 3 or gemm.inputs[2].is_empty():
        return True
    out = gemm.inputs[1].shape[0 if gemm.attrs.get("transB", 0) else 1]
    return isinstance(gemm.inputs[2], gs.Constant) and tuple(gemm.inputs[2].shape) == (out,)
