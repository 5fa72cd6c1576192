"""Let the model carry the definition of our operators as ONNX functions, so that it runs without our library.

A runtime that does not know the operator expands the function: it builds the dense weight from the blocks (which
constant folding does once, when the model is loaded) and runs the ordinary Conv or Gemm. onnx's checker and shape
inference use it too.

    dense[r, c] = blocks[k] for (r, c) = block_index[k], else 0         the grid of blocks, as one weight [M, C, taps]
    W[output_perm[i], input_perm[j]] = dense[i, j]
    Y = Clip(Conv(X, W, bias), activation_min, activation_max)

The operators with something fused in have an Add before the Clip, or a MaxPool behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, NodeProto, helper, numpy_helper
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from tetris_onnx.graph.layers import CONV_ADD, CONV_MAX_POOL, DOMAIN, GEMM, MAX_POOL
from tetris_onnx.passes.lower_block_sparse import INPUTS

_CASTLIKE_OPSET = 15
_CONV_ATTRIBUTES = ("kernel_shape", "strides", "pads", "dilations")
_POOL_ATTRIBUTES = ("kernel_shape", "strides", "pads")
_TRANSPOSES = ("input_transpose", "output_transpose")


def attach_fallback(graph: gs.Graph) -> None:
    """Apply the pass: add the functions of the operators that the graph uses."""
    used = {node.op for node in graph.nodes if node.domain == DOMAIN}
    transposed = _name_transposes(graph)
    kept = [f for f in graph.functions if (f.domain, f.name) not in {(DOMAIN, op) for op in used}]
    made = [
        OnnxImporter.import_function(
            fallback_function(op, graph.opset, op in transposed),
            model_opset=graph.opset,
            model_import_domains=graph.import_domains,
        )
        for op in sorted(used)
    ]
    ranged = {node.op for node in graph.nodes if node.domain == DOMAIN and "input_range" in node.attrs}
    for function in made:
        if function.name in ranged:
            function.attrs["input_range"] = None  # its nodes have it, and its body has no use for it
    graph.functions = kept + made


def _name_transposes(graph: gs.Graph) -> set[str]:
    """The convolutions of which some node is channels-last: all of their nodes now say whether they are.

    A function body refers to attributes, but cannot ask whether there are any.
    """
    nodes = [node for node in graph.nodes if node.domain == DOMAIN and node.op != MAX_POOL]
    found = {node.op for node in nodes if any(name in node.attrs for name in _TRANSPOSES)}
    for node in nodes:
        if node.op in found:
            for name in _TRANSPOSES:
                node.attrs.setdefault(name, list(range(len(node.attrs["weight_shape"]))))
    return found


def fallback_function(op: str, opset: int, transposes: bool = False) -> FunctionProto:
    """The definition of ``op`` (one of graph.layers.OUR_OPS, or MAX_POOL) in operators of ``opset``, 13 or later.

    ``transposes``: with the attributes ``input_transpose`` and ``output_transpose``.
    """
    if op == MAX_POOL:
        return _max_pool(opset)
    body = _Body()
    body.attribute("weight_shape", AttributeProto.INTS)
    body.attribute("block_size", AttributeProto.INTS)
    body.constant("zero", [0])
    body.constant("one", [1])
    body.constant("two", [2])
    body.constant("minus_one", [-1])
    body.constant("two_zeros", [0, 0])
    body.constant("two_axes", [0, 1])
    # grid = ceil(weight_shape / block_size)
    body("Slice", ["weight_shape", "zero", "two"], "channels")
    body("Add", ["channels", "block_size"], "grid_sum")
    body("Sub", ["grid_sum", "one"], "grid_rounded")
    body("Div", ["grid_rounded", "block_size"], "grid")
    body("Mul", ["grid", "block_size"], "padded")
    # All kernel positions are one axis: taps (of length 1 for a matrix).
    body("ReduceProd", ["weight_shape"], "weight_size", keepdims=1)
    body("ReduceProd", ["channels"], "matrix_size", keepdims=1)
    body("Div", ["weight_size", "matrix_size"], "taps")
    body("Concat", ["minus_one", "block_size", "taps"], "blocks_shape", axis=0)
    body("Reshape", ["blocks", "blocks_shape"], "flat_blocks")
    body("Concat", ["grid", "block_size", "taps"], "grid_shape", axis=0)
    body.zeros("grid_shape", "no_blocks", opset)
    body("ScatterND", ["no_blocks", "block_index", "flat_blocks"], "all_blocks")
    body("Transpose", ["all_blocks"], "rows", perm=[0, 2, 1, 3, 4])
    body("Concat", ["padded", "taps"], "padded_shape", axis=0)
    body("Reshape", ["rows", "padded_shape"], "padded_weight")
    body("Slice", ["padded_weight", "two_zeros", "channels", "two_axes"], "dense")
    # Scattering along one axis and then the other puts W_reordered[i, j] at [output_perm[i], input_perm[j]].
    body("Concat", ["channels", "taps"], "flat_shape", axis=0)
    body.zeros("flat_shape", "no_weight", opset)
    body("Unsqueeze", ["output_perm", "minus_one"], "row_index")
    body("ScatterND", ["no_weight", "row_index", "dense"], "rows_placed")
    body("Transpose", ["rows_placed"], "by_column", perm=[1, 0, 2])
    body("Transpose", ["no_weight"], "no_columns", perm=[1, 0, 2])
    body("Unsqueeze", ["input_perm", "minus_one"], "column_index")
    body("ScatterND", ["no_columns", "column_index", "by_column"], "columns_placed")
    attributes = ["weight_shape", "block_size", "activation_min", "activation_max"]
    if op != GEMM:
        body("Transpose", ["columns_placed"], "flat_weight", perm=[1, 0, 2])
        body("Reshape", ["flat_weight", "weight_shape"], "W")
        if transposes:
            body("Transpose", ["X"], "X_first")
            body.refer(["input_transpose"], AttributeProto.INTS, "perm")
        body("Conv", ["X_first" if transposes else "X", "W", "bias"], "convolution" if transposes else "product")
        body.refer(_CONV_ATTRIBUTES, AttributeProto.INTS)
        body.refer(["group"], AttributeProto.INT)
        attributes += [*_CONV_ATTRIBUTES, "group"]
        if transposes:
            body("Transpose", ["convolution"], "product")
            body.refer(["output_transpose"], AttributeProto.INTS, "perm")
            attributes += _TRANSPOSES
    else:
        body("Squeeze", ["columns_placed", "two"], "W")  # [in, out], as MatMul takes it
        body("MatMul", ["X", "W"], "matrix_product")
        body("Add", ["matrix_product", "bias"], "product")
    result = "product"
    if op == CONV_ADD:
        result = "sum"
        body("Add", ["product", "addend"], result)
    for name in ("activation_min", "activation_max"):
        body.attribute(name, AttributeProto.FLOAT)
    if opset >= _CASTLIKE_OPSET:
        body("CastLike", ["activation_min", "product"], "low")
        body("CastLike", ["activation_max", "product"], "high")
        limits = ["low", "high"]
    else:
        limits = ["activation_min", "activation_max"]
    body("Clip", [result, *limits], "clipped" if op == CONV_MAX_POOL else "Y")
    if op == CONV_MAX_POOL:
        body("MaxPool", ["clipped"], "Y")
        for name in ("kernel_shape", "strides"):
            body.nodes[-1].attribute.append(
                AttributeProto(name=name, ref_attr_name="pool_shape", type=AttributeProto.INTS)
            )
        attributes.append("pool_shape")
    return helper.make_function(
        DOMAIN,
        op,
        [*INPUTS, *(["addend"] if op == CONV_ADD else [])],
        ["Y"],
        body.nodes,
        [helper.make_opsetid("", opset)],
        attributes,
    )


def _max_pool(opset: int) -> FunctionProto:
    body = _Body()
    body("Transpose", ["X"], "first", perm=[0, 3, 1, 2])
    body("MaxPool", ["first"], "pooled")
    body.refer(_POOL_ATTRIBUTES, AttributeProto.INTS)
    body("Transpose", ["pooled"], "Y", perm=[0, 2, 3, 1])
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, MAX_POOL, ["X"], ["Y"], body.nodes, opsets, list(_POOL_ATTRIBUTES))


class _Body:
    """The nodes of a function, written one after the other."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def __call__(self, op: str, inputs: list[str], output: str, **attributes: int | list[int]) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))

    def constant(self, name: str, values: list[int]) -> None:
        self.nodes.append(helper.make_node("Constant", [], [name], value_ints=values))

    def attribute(self, name: str, kind: AttributeProto.AttributeType) -> None:
        """The node's attribute ``name`` as a value of the same name."""
        field = "value_ints" if kind == AttributeProto.INTS else "value_float"
        node = helper.make_node("Constant", [], [name])
        node.attribute.append(AttributeProto(name=field, ref_attr_name=name, type=kind))
        self.nodes.append(node)

    def refer(self, names: Sequence[str], kind: AttributeProto.AttributeType, name: str | None = None) -> None:
        """Let the last node take these attributes from the operator's node, where it calls them so (or ``name``)."""
        self.nodes[-1].attribute.extend(AttributeProto(name=name or n, ref_attr_name=n, type=kind) for n in names)

    def zeros(self, shape: str, output: str, opset: int) -> None:
        """Zeros of the blocks' type."""
        zero = numpy_helper.from_array(np.zeros(1, np.float32))
        cast = opset >= _CASTLIKE_OPSET
        self("ConstantOfShape", [shape], f"{output}_float" if cast else output)
        self.nodes[-1].attribute.append(helper.make_attribute("value", zero))
        if cast:
            self("CastLike", [f"{output}_float", "blocks"], output)
