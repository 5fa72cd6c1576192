"""Replace each planned layer by our operator, with only the kept blocks of its reordered weight stored.

The specification of the operators is in custom_ops/README.md. Their permutations are the identity here: what the
Gathers around them do moves in later (absorb_gathers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tetris_onnx.algorithms.blocks import block_grid
from tetris_onnx.algorithms.packing import pack
from tetris_onnx.algorithms.permutation import identity
from tetris_onnx.graph.layers import CONV, DOMAIN, GEMM, Layer, conv_window, find_layers
from tetris_onnx.plan import LayerPlan, Plan

# What the slots of both operators are called.
INPUTS = ("X", "blocks", "block_index", "input_perm", "output_perm", "bias")

_WHOLE_ROWS = 32


class ConstantPool:
    """Makes constants; equal values are stored once."""

    def __init__(self) -> None:
        self._made: dict[tuple, gs.Constant] = {}

    def __call__(self, name: str, values: NDArray) -> gs.Constant:
        """A constant with these values: a new one under ``name``, or one made before."""
        values = np.ascontiguousarray(values)
        key = values.dtype.str, values.shape, hashlib.blake2b(values.tobytes(), digest_size=16).digest()
        return self._made.setdefault(key, gs.Constant(name, values))


def lower_block_sparse(graph: gs.Graph, plan: Plan, whole: Collection[str] = ()) -> None:
    """Apply the pass; the layers named in ``whole`` are not pruned, and are lowered with all their blocks."""
    pool = ConstantPool()
    plan = Plan((*plan, *(_all_blocks(layer) for layer in find_layers(graph) if layer.name in whole)))
    missing = {decision.layer for decision in plan}
    for layer in find_layers(graph):
        decision = plan.get(layer.name)
        if decision is not None:
            _lower(layer, decision, pool)
            missing.discard(layer.name)
    if missing:
        raise ValueError(f"the graph has no layer {min(missing)!r}")
    if len(plan) and all(domain.domain != DOMAIN for domain in graph.import_domains):
        graph.import_domains.append(onnx.helper.make_opsetid(DOMAIN, 1))


def is_whole(node: gs.Node) -> bool:
    """Whether one of our operators has all blocks of its weight."""
    rows, columns = block_grid(tuple(node.attrs["weight_shape"][:2]), tuple(node.attrs["block_size"]))
    return bool(node.inputs[1].shape[0] == rows * columns)


def whole_block(layer: Layer) -> tuple[int, int]:
    """The block size of a layer with all its blocks: bands of rows, which are what the kernels work on."""
    out, in_ = layer.weight_shape[:2]
    return min(_WHOLE_ROWS, out), in_


def whole_conv(
    node: onnx.NodeProto, weight: NDArray, bias: NDArray | None
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]] | None:
    """A Conv node of one group as our operator with all its weights, and its constants, to run it in another model.

    None where its padding depends on a size that is open.
    """
    name = node.output[0]
    constants = [gs.Constant(f"{name}/{i}", array) for i, array in enumerate((weight, bias)) if array is not None]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if isinstance(attributes.get("auto_pad"), bytes):
        attributes["auto_pad"] = attributes["auto_pad"].decode()
    conv = gs.Node("Conv", node.name, attributes, [gs.Variable(node.input[0]), *constants], [gs.Variable(name)])
    if conv_window(conv) is None:
        return None
    layer = Layer(conv, "")
    _lower(layer, _all_blocks(layer), ConstantPool())
    made = {t.name: numpy_helper.from_array(t.values, t.name) for t in conv.inputs[1:]}
    inputs = [t.name for t in conv.inputs]
    return helper.make_node(conv.op, inputs, [name], node.name, domain=DOMAIN, **conv.attrs), list(made.values())


def _all_blocks(layer: Layer) -> LayerPlan:
    out, in_ = layer.weight_shape[:2]
    block = whole_block(layer)
    return LayerPlan(layer.name, identity(out), identity(in_), block, np.ones(block_grid((out, in_), block), bool))


def _lower(layer: Layer, plan: LayerPlan, pool: ConstantPool) -> None:
    node, name = layer.node, layer.name
    packed = pack(layer.weight, plan.keep, plan.block_size)
    blocks, block_index = packed.blocks, packed.block_index
    # The fallback function cannot reshape an empty tensor: one block of zeros is the same weight.
    if not len(block_index):
        blocks = np.zeros((1, *blocks.shape[1:]), blocks.dtype)
        block_index = np.zeros((1, 2), np.int64)
    out, in_ = layer.weight_shape[:2]
    attributes: dict = {
        "weight_shape": list(layer.weight_shape),
        "block_size": list(plan.block_size),
        "activation_min": float("-inf"),
        "activation_max": float("inf"),
    }
    if layer.is_conv:
        window = conv_window(node)
        assert window is not None  # such a layer is never planned
        attributes |= window | {"group": 1}
    bias = layer.bias
    inputs = [
        layer.data,
        pool(f"{name}/blocks", blocks),
        pool(f"{name}/block_index", block_index),
        pool(f"{name}/input_perm", identity(in_)),
        pool(f"{name}/output_perm", identity(out)),
    ]
    # Not every runtime can call a function without its last input (onnx.reference): no bias is one of zeros.
    inputs.append(pool(f"{name}/bias_reordered", np.zeros(out, blocks.dtype) if bias is None else bias))
    node.op, node.domain, node.attrs = (CONV if layer.is_conv else GEMM), DOMAIN, attributes
    node.inputs = inputs
