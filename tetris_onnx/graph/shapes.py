"""Shape inference that tells which dimensions are the same for every input size.

ONNX's own shape inference loses track where a shape is computed at run time (``Shape -> Slice -> Concat -> Reshape``,
as most exporters write a Flatten). Here the model is inferred for concrete sizes of every dynamic input dimension,
with the shape arithmetic evaluated: a dimension that comes out equal every time is static, every other one is dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

Shape = tuple[int | str, ...]

# Stands for a dimension that is dynamic and has no name.
UNKNOWN = "?"

# Sizes to try for a dynamic dimension, batch (axis 0) and others: typical enough that no pooling layer runs out of
# pixels.
_PROBES = ((2, 192), (3, 256))
# A small odd size tells a clamp (min(size, 100)) or a remainder from a static dimension. Not every model takes it: what
# does not come out for it counts as before.
_ODD_PROBE = (5, 61)
# What `example_shapes` takes for an open size: most vision models are used at 224; the others for those that cannot be.
EXAMPLE_SIZES = (224, 48, 32)
# Shape arithmetic works on vectors of a few numbers: larger values are weights and are not worth computing.
_MAX_VALUES = 1024
# The most that a constant may be computed to have: a file of a few bytes can ask for any size.
MAX_FOLDED = 2**28
# Operators that exporters build shapes with.
_SHAPE_OPS = frozenset(
    """
    Abs Add And Cast Ceil Concat Constant ConstantOfShape Div Equal Expand Floor Gather Greater Identity Less
    Max Min Mod Mul Neg Not Or Range ReduceMax ReduceMin ReduceProd ReduceSum Reshape ScatterND Shape Size Slice
    Sqrt Squeeze Sub Transpose Unsqueeze Where
    """.split()
)
_BROADCAST = frozenset("Add And Div Equal Greater Less Max Min Mod Mul Or PRelu Pow Sub Sum Where Xor".split())


def infer_shapes(
    model: onnx.ModelProto, given: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[np.dtype, Shape]]:
    """Type and shape of every value of the main graph that has a known rank.

    Static dimensions are ints; dynamic ones are names: that of the model where it gives one, else `UNKNOWN`. ``given``:
    shapes of inputs by name, whose sizes are static then, all but that of the first axis, the batch.
    """
    skeleton = _without_weights(model)
    runs = [_infer_concrete(skeleton, batch, size, given) for batch, size in _PROBES]
    odd = _infer_concrete(skeleton, *_ODD_PROBE, given)
    if not all(runs):  # a size that the model does not take: keep to what holds in general
        runs = [_inferred(skeleton)] * 2
        odd = {}
    names = {v.name: v for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
    shapes: dict[str, tuple[np.dtype, Shape]] = {}
    for name, (dtype, first) in runs[0].items():
        other = runs[1].get(name)
        if other is None or len(other[1]) != len(first):
            continue
        third = odd[name][1] if name in odd and len(odd[name][1]) == len(first) else first
        dims = [a if a is not None and a == b == c else UNKNOWN for a, b, c in zip(first, other[1], third, strict=True)]
        if name in names:
            declared = names[name].type.tensor_type.shape.dim
            if len(declared) == len(dims):
                dims = [d.dim_param or s if isinstance(s, str) else s for d, s in zip(declared, dims, strict=True)]
        shapes[name] = dtype, tuple(dims)
    return shapes


def example_shapes(model: onnx.ModelProto, batch: int = 1) -> dict[str, tuple[int | None, ...]]:
    """The shape of every value for an input of a usual size, where the model leaves its sizes open: `EXAMPLE_SIZES`.

    Empty where the model takes none of them.
    """
    skeleton = _without_weights(model)
    runs = (_infer_concrete(skeleton, batch, size) for size in EXAMPLE_SIZES)
    return {name: shape for name, (_, shape) in next((run for run in runs if run), {}).items()}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the values of large initializers, so that inference costs nothing on a large model."""
    light = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name not in ("graph", "training_info"):
            target = getattr(light, field.name)
            if isinstance(value, (int, str)):
                setattr(light, field.name, value)
            else:
                target.extend(value)
    light.ir_version = max(model.ir_version, 8)  # before 4, an initializer counts only where it is an input too
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for initializer in model.graph.initializer:
        if np.prod(initializer.dims, dtype=np.float64) <= _MAX_VALUES:
            graph.initializer.append(initializer)
        else:
            graph.initializer.add(name=initializer.name, data_type=initializer.data_type, dims=initializer.dims)
    for node in model.graph.node:
        big = [a for a in node.attribute if a.type == onnx.AttributeProto.TENSOR and _count(a.t) > _MAX_VALUES]
        if node.op_type == "Constant" and big:
            graph.initializer.add(name=node.output[0], data_type=big[0].t.data_type, dims=big[0].t.dims)
        else:
            graph.node.append(node)
    return light


def _infer_concrete(
    skeleton: onnx.ModelProto, batch: int, size: int, given: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[np.dtype, tuple[int | None, ...]]]:
    """Shapes when every dynamic input dimension takes the given size; empty where the model does not take it."""
    given = given or {}
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    fixed = {i.name for i in model.graph.initializer}
    sizes: dict[str, int] = {}  # one name is one size
    for value in sorted(model.graph.input, key=lambda value: value.name not in given):
        if value.name not in fixed:
            dims = value.type.tensor_type.shape.dim
            shape = given.get(value.name, [size] * len(dims))
            for axis, dim in enumerate(dims):
                if dim.dim_value <= 0:
                    choice = batch if axis == 0 else shape[axis]
                    dim.dim_value = sizes.setdefault(dim.dim_param, choice) if dim.dim_param else choice
    for value in model.graph.output:  # their declared names would contradict the sizes
        value.type.tensor_type.ClearField("shape")
    inferred = _inferred(model)
    values: dict[str, NDArray] = {}
    # Each round evaluates the shape arithmetic that the shapes known so far allow, and infers again with the results.
    while True:
        known = len(values)
        _evaluate(model, inferred, values)
        if len(values) == known:
            return inferred
        produced = {name for name in values if name not in fixed}
        reduced = onnx.ModelProto()
        reduced.CopyFrom(model)
        del reduced.graph.node[:]
        reduced.graph.node.extend(
            n for n in model.graph.node if not all(o in produced for o in n.output if o) or not n.output
        )
        reduced.graph.initializer.extend(onnx.numpy_helper.from_array(values[name], name) for name in produced)
        inferred = {name: (v.dtype, v.shape) for name, v in values.items()} | _inferred(reduced)


def _inferred(model: onnx.ModelProto) -> dict[str, tuple[np.dtype, tuple[int | None, ...]]]:
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # a contradiction in the model, or a size it does not take
        return {}
    shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and tensor.elem_type:
            try:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            except KeyError:
                continue
            shapes[value.name] = (
                dtype,
                tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim),
            )
    for initializer in graph.initializer:
        shapes[initializer.name] = onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type), tuple(initializer.dims)
    return shapes


def _evaluate(
    model: onnx.ModelProto, shapes: dict[str, tuple[np.dtype, tuple[int | None, ...]]], values: dict[str, NDArray]
) -> None:
    """Add to ``values`` what the graph computes from constants and known shapes alone."""
    if not values:
        for i in model.graph.initializer:
            if (
                _count(i) <= _MAX_VALUES
                and onnx.helper.tensor_dtype_to_np_dtype(i.data_type).kind in "iufb"
                and _has_data(i)
            ):
                values[i.name] = onnx.numpy_helper.to_array(i)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _SHAPE_OPS or not node.output:
            continue
        if node.output[0] in values or (node.op_type == "Shape" and not node.input):
            continue
        if node.op_type == "Shape":
            known = shapes.get(node.input[0])
            if known is None or None in known[1]:
                continue
            bounds = {a.name: a.i for a in node.attribute}
            values[node.output[0]] = np.array(known[1][bounds.get("start", 0) : bounds.get("end")], np.int64)
            continue
        inputs = [name for name in node.input if name]
        if not all(name in values for name in inputs):
            continue
        declared = shapes.get(node.output[0])
        if declared is not None and math.prod(d or 1 for d in declared[1]) > _MAX_VALUES:
            continue
        result = run_node(node, {name: values[name] for name in inputs}, model.opset_import, _MAX_VALUES)
        if result is not None and result.size <= _MAX_VALUES:
            values[node.output[0]] = result


def run_node(
    node: onnx.NodeProto,
    inputs: dict[str, NDArray],
    opset_imports: Sequence[onnx.OperatorSetIdProto],
    most: int = MAX_FOLDED,
) -> NDArray | None:
    """First output of one node on numpy arrays, or None where ONNX's reference evaluator cannot run it.

    None, too, where it would have more than ``most`` values, and more than its largest input has.
    """
    if _result_size(node, inputs) > max(most, *(array.size for array in inputs.values()), 0):
        return None
    graph = onnx.helper.make_graph(
        [node],
        "node",
        [
            onnx.helper.make_tensor_value_info(k, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ],
        [onnx.ValueInfoProto(name=node.output[0])],
    )
    try:
        model = onnx.helper.make_model(graph, opset_imports=list(opset_imports), ir_version=8)
        return np.asarray(ReferenceEvaluator(model).run([node.output[0]], inputs)[0])
    except Exception:
        return None


def _result_size(node: onnx.NodeProto, inputs: dict[str, NDArray]) -> float:
    """How many values the result has, for operators that can make more of them; inf where the inputs make no sense."""
    given: list[Any] = [inputs.get(name) for name in node.input]
    sizes = [array.size for array in given if array is not None]
    shape = given[0].shape if given and given[0] is not None else ()
    try:
        if node.op_type == "ConstantOfShape":
            return math.prod(max(int(n), 0) for n in given[0])
        if node.op_type == "Range":
            start, stop, step = (float(array) for array in given)
            return abs((stop - start) / step)
        if node.op_type == "Tile":
            return sizes[0] * math.prod(max(int(n), 0) for n in given[1])
        if node.op_type == "Expand":
            return math.prod(np.broadcast_shapes(shape, tuple(int(n) for n in given[1])))
        if node.op_type == "Gather":
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            return sizes[0] / max(shape[axis], 1) * sizes[1]
        if node.op_type == "Pad":
            pads = given[1].reshape(2, -1)
            axes = given[3] if len(given) > 3 and given[3] is not None else range(len(shape))
            grown = {int(axis) % len(shape): int(pad) for axis, pad in zip(axes, pads.sum(axis=0), strict=True)}
            return math.prod(size + max(grown.get(axis, 0), 0) for axis, size in enumerate(shape))
        if node.op_type == "Concat":
            return sum(sizes)
        if node.op_type in _BROADCAST:
            return math.prod(np.broadcast_shapes(*(array.shape for array in given if array is not None)))
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError):
        return math.inf
    return max(sizes, default=1)


def _count(tensor: onnx.TensorProto) -> float:
    return float(np.prod(tensor.dims, dtype=np.float64))


def _has_data(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location != onnx.TensorProto.EXTERNAL
