"""Models of float16 and bfloat16 values: which they are, and the same in float32.

The verification of a block-sparse model runs in float32 what the model computes in a narrower type. There the order of
sums matters to the seventh digit only, so that a mistake shows as clearly as in a float32 model; in float16, which
keeps three digits of every layer's output, small mistakes would pass for rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from tetris_onnx.graph.tensors import TensorFile, bodies_of, is_external, read_tensor

# With half a unit in the last place of each: numbers of 11 and of 8 bits.
_HALF_TYPES = {TensorProto.FLOAT16: 2.0**-11, TensorProto.BFLOAT16: 2.0**-8}
# Attributes that name an element type: of Cast, of operators that make values, of QuantizeLinear and the like.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def rounding(model: onnx.ModelProto) -> float:
    """By how much of itself rounding to the narrowest type of the model's constants changes a value; 0 for float32."""
    return max((_HALF_TYPES.get(tensor.data_type, 0.0) for tensor in _constants(model.graph)), default=0.0)


def widen(model: onnx.ModelProto, weights: TensorFile | None = None) -> onnx.ModelProto:
    """A copy of ``model`` that computes in float32 what it computes in float16 or bfloat16.

    Weights that it has in files are written to ``weights``.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in wide.graph.initializer:
        if weights is not None and is_external(tensor) and tensor.data_type in _HALF_TYPES:
            values = read_tensor(tensor).astype(np.float32)
            tensor.data_type = TensorProto.FLOAT
            weights.add(tensor, values.tobytes())
    _widen_graph(wide.graph)
    for function in wide.functions:
        _widen_nodes(function.node)
    return wide


def _constants(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
        for body in bodies_of(node):
            yield from _constants(body)


def _widen_graph(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.elem_type in _HALF_TYPES:
            kind.elem_type = TensorProto.FLOAT
    _widen_nodes(graph.node)


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _HALF_TYPES:
                attribute.i = TensorProto.FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
        for body in bodies_of(node):
            _widen_graph(body)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _HALF_TYPES:
        values = read_tensor(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
