"""What operators do to the channel axis, and the regions of a graph that have to share one channel order.

The table below names every operator that treats channels one by one: if its inputs come with their channels
reordered, its outputs come reordered alike, bit for bit (vectors of its own, such as a BatchNormalization's, are
reordered with them). An operator that is not in the table is a barrier: no reordering passes it, so a model with
unknown operators stays right.

A channel axis can be folded into a longer one: after Flatten, channel c of [N, C, H, W] owns the positions c*H*W to
(c+1)*H*W - 1. `ChannelAxis` says where the channels of a value are: its axis has ``outer * channels * inner``
positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.algorithms.permutation import is_permutation
from tetris_onnx.graph.layers import layer_of

# y = f(x), value by value. (Dropout and Cast too; a Dropout's mask is not.)
ELEMENTWISE = frozenset(
    """
    Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid
    HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
    Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
    """.split()
)
# y = f(a, b, ...) with ONNX's (numpy's) broadcasting.
BROADCAST = frozenset(
    """
    Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum Where
    Xor
    """.split()
)
_QUANTIZATION = frozenset(("QuantizeLinear", "DequantizeLinear"))
# Each channel of axis 1 on its own, over the axes behind it.
_POOLING = frozenset(["AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"])
# As pooling, with vectors of one value per channel in these inputs.
_NORMALIZATION = {"BatchNormalization": (1, 2, 3, 4), "InstanceNormalization": (1, 2)}
_REDUCTIONS = frozenset(
    """
    ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    """.split()
)
# Takes no notice of the order.
_ORDER_FREE = frozenset(("Shape", "Size"))


@dataclass(frozen=True)
class ChannelAxis:
    """Where the channels of a value are: ``axis`` has ``outer * channels * inner`` positions."""

    axis: int
    channels: int
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        """Whether the axis holds the channels and nothing else."""
        return self.outer == self.inner == 1

    @property
    def length(self) -> int:
        """Positions of the axis."""
        return self.outer * self.channels * self.inner


@dataclass(frozen=True)
class End:
    """Where a region ends: ``node`` reads (a source writes) one of its values, with the channels at ``where``."""

    node: gs.Node
    slot: int  # index of the input (of the output, for a source)
    where: ChannelAxis


@dataclass
class Region:
    """Values that have to share one channel order, with all that has to be changed to give them another one."""

    values: list[tuple[gs.Tensor, ChannelAxis]] = field(default_factory=list)
    # Constants of one value per channel; ``where`` is in the constant.
    parameters: list[End] = field(default_factory=list)
    sources: list[End] = field(default_factory=list)  # layers, Gathers and Concats that write into the region
    sinks: list[End] = field(default_factory=list)  # layers, Gathers and Concats that read from it
    barriers: list[str] = field(default_factory=list)  # why it cannot be reordered; empty where it can


@dataclass(frozen=True)
class _Relation:
    """The slots of one node that share the channel order."""

    inputs: tuple[tuple[int, ChannelAxis], ...]
    outputs: tuple[tuple[int, ChannelAxis], ...]
    parameters: tuple[tuple[int, ChannelAxis], ...] = ()


def gather_permutation(node: gs.Node) -> NDArray[np.int64] | None:
    """The permutation of a Gather that only reorders its axis, else None."""
    if node.op != "Gather" or not _is_standard(node) or len(node.inputs) != 2:
        return None
    data, indices = node.inputs
    if not isinstance(indices, gs.Constant):
        return None
    axis = node.attrs.get("axis", 0)
    if data.shape is None or len(indices.shape) != 1 or data.shape[axis] != indices.shape[0]:
        return None
    perm = np.asarray(indices.values, np.int64)
    return perm if is_permutation(perm) else None


def find_region(graph: gs.Graph, value: gs.Tensor, where: ChannelAxis) -> Region:
    """All values that have to share the channel order of ``value``, found in both directions from it."""
    region = Region()
    inside = {id(node) for node in graph.nodes}
    outputs = {id(tensor) for tensor in graph.outputs}
    seen: dict[int, ChannelAxis] = {}
    related: set[int] = set()
    todo = [(value, where)]
    while todo:
        tensor, axis = todo.pop()
        if id(tensor) in seen:
            if seen[id(tensor)] != axis:
                region.barriers.append(f"{tensor.name!r} would need two orders")
            continue
        seen[id(tensor)] = axis
        region.values.append((tensor, axis))
        if id(tensor) in outputs:
            region.barriers.append(f"{tensor.name!r} is an output of the model")
        if not tensor.inputs:
            region.barriers.append(f"{tensor.name!r} is an input of the model")
        # A node that reads a value twice is among its readers twice.
        readers = list({id(node): node for node in tensor.outputs}.values())
        for node, is_input in [(n, False) for n in tensor.inputs] + [(n, True) for n in readers]:
            slots = [i for i, t in enumerate(node.inputs if is_input else node.outputs) if t is tensor]
            if id(node) not in inside:
                region.barriers.append(f"{tensor.name!r} is used in a subgraph")
                continue
            for slot in slots:
                end = End(node, slot, axis)
                if is_input and node.op in _ORDER_FREE and _is_standard(node):
                    continue
                if _is_end(end, is_input):
                    (region.sinks if is_input else region.sources).append(end)
                    continue
                relation = _relate(node, slot, is_input, axis)
                # A Dropout's mask, a MaxPool's indices (which count through all channels), ...
                extra = node.op != "Split" and any(t.outputs or id(t) in outputs for t in node.outputs[1:])
                if relation is None or extra:
                    region.barriers.append(f"{node.op} {node.name!r} is not known to treat channels one by one")
                    continue
                todo += [(node.inputs[i], a) for i, a in relation.inputs]
                todo += [(node.outputs[i], a) for i, a in relation.outputs]
                if id(node) not in related:
                    related.add(id(node))
                    region.parameters += [End(node, i, a) for i, a in relation.parameters]
    ends = {id(source.node) for source in region.sources}
    for sink in region.sinks:
        if id(sink.node) in ends and gather_permutation(sink.node) is not None:
            region.barriers.append(f"{sink.node.name!r} reorders the channels within it")
    return region


def _is_end(end: End, is_input: bool) -> bool:
    """Whether the node is a layer, a reordering Gather or a Concat whose own axis is the channel axis."""
    node = end.node
    layer = layer_of(node)
    if layer is not None:
        if is_input:
            return end.slot == 0 and layer.in_axis == end.where.axis and layer.weight_shape[1] == end.where.length
        return layer.out_axis == end.where.axis and layer.weight_shape[0] == end.where.length
    if gather_permutation(node) is not None:
        return end.slot == 0 and _axis(node.attrs.get("axis", 0), node.inputs[0]) == end.where.axis
    return (
        node.op == "Concat"
        and _is_standard(node)
        and end.where.plain
        and _axis(node.attrs["axis"], node.outputs[0]) == end.where.axis
    )


def _relate(node: gs.Node, slot: int, is_input: bool, where: ChannelAxis) -> _Relation | None:
    """How the channel axis of one slot continues in the others; None for an operator that is not in the table."""
    if not _is_standard(node) or any(t.shape is None for t in (*node.inputs, *node.outputs) if not t.is_empty()):
        return None
    tensor = node.inputs[slot] if is_input else node.outputs[slot]
    if tensor.shape[where.axis] != where.length:
        return None
    op = node.op
    if op in ELEMENTWISE:
        return _same(node, where) if slot == 0 else None
    if op in BROADCAST:
        return _broadcast(node, tensor, where)
    if op in _QUANTIZATION:  # by one scale
        return _same(node, where) if slot == 0 and all(math.prod(t.shape) == 1 for t in node.inputs[1:]) else None
    if op in _POOLING:
        return _same(node, where) if slot == 0 and where.axis == 1 else None
    if op in _NORMALIZATION:
        if slot != 0 or where.axis != 1:
            return None
        vectors = tuple((i, ChannelAxis(0, where.channels, where.outer, where.inner)) for i in _NORMALIZATION[op])
        return _same(node, where, vectors)
    if op == "Conv" and _is_depthwise(node):
        if slot != 0 or where.axis != 1:
            return None
        vectors = tuple(
            (i, ChannelAxis(0, where.channels, where.outer, where.inner))
            for i in (1, 2)
            if i < len(node.inputs) and not node.inputs[i].is_empty()
        )
        return _same(node, where, vectors)
    if op in ("Softmax", "LogSoftmax"):
        return _same(node, where) if _axis(node.attrs.get("axis", -1), node.inputs[0]) != where.axis else None
    if op == "Concat":  # along another axis: see _is_end
        return (
            _Relation(tuple((i, where) for i in range(len(node.inputs))), ((0, where),))
            if _all_fit(node, where)
            else None
        )
    if op == "Split":
        if _axis(node.attrs.get("axis", 0), node.inputs[0]) == where.axis or (is_input and slot != 0):
            return None
        return _Relation(((0, where),), tuple((i, where) for i in range(len(node.outputs))))
    if op in ("Pad", "Resize", "Slice"):
        return _same(node, where) if slot == 0 and _leaves_axis_alone(node, where.axis) else None
    if op == "Transpose":
        perm = list(node.attrs.get("perm", range(len(node.inputs[0].shape))[::-1]))
        axes = (where.axis, perm.index(where.axis)) if is_input else (perm[where.axis], where.axis)
        return _moved(where, *axes)
    if op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        if is_input and slot != 0:
            return None
        shapes = node.inputs[0].shape, node.outputs[0].shape
        other = reshape_axis(*(shapes if is_input else shapes[::-1]), where)
        if other is None:
            return None
        return _Relation(((0, where if is_input else other),), ((0, other if is_input else where),))
    if op in _REDUCTIONS:
        return _reduction(node, slot, is_input, where)
    return None


def reshape_axis(before: Sequence[int | str], after: Sequence[int | str], where: ChannelAxis) -> ChannelAxis | None:
    """Where the channels at ``where`` are after a reshape; None if they are torn apart or a size is not known."""
    sizes = _sizes(before), _sizes(after)
    for old, new in _matching_groups(*sizes):
        if where.axis not in old:
            continue
        outer = math.prod(sizes[0][i] for i in old if i < where.axis) * where.outer
        inner = math.prod(sizes[0][i] for i in old if i > where.axis) * where.inner
        for axis in new:
            ahead = math.prod(sizes[1][i] for i in new if i < axis)
            behind = math.prod(sizes[1][i] for i in new if i > axis)
            found = ChannelAxis(axis, where.channels, outer // ahead, inner // behind)
            if outer % ahead == 0 and inner % behind == 0 and found.length == after[axis]:
                return found
    return None


def _sizes(shape: Sequence[int | str]) -> list[int]:
    """The shape with a stand-in for its dynamic dimension: a prime, so that only the other dynamic dimension equals it.

    With one dynamic dimension on each side of a reshape and the same number of other elements, the two are equal; more
    than one cannot be told apart (empty list).
    """
    if sum(isinstance(d, str) for d in shape) > 1:
        return []
    return [2**31 - 1 if isinstance(d, str) else d for d in shape]


def _matching_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Split both shapes into runs of axes with equal products; empty where that cannot be done."""
    if not before or 0 in before or math.prod(before) != math.prod(after):
        return []
    groups = []
    i = j = 0
    while i < len(before) and j < len(after):
        first = i, j
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif left > right and j < len(after):
                right, j = right * after[j], j + 1
            else:
                return []
        groups.append((range(first[0], i), range(first[1], j)))
    return groups  # axes that are left over have length 1


def _same(node: gs.Node, where: ChannelAxis, parameters: tuple[tuple[int, ChannelAxis], ...] = ()) -> _Relation | None:
    if node.outputs[0].shape[where.axis : where.axis + 1] != node.inputs[0].shape[where.axis : where.axis + 1]:
        return None
    if any(
        not isinstance(node.inputs[i], gs.Constant) or node.inputs[i].shape[0] != where.length for i, _ in parameters
    ):
        return None
    return _Relation(((0, where),), ((0, where),), parameters)


def _moved(where: ChannelAxis, input_axis: int, output_axis: int) -> _Relation:
    return _Relation(
        ((0, ChannelAxis(input_axis, where.channels, where.outer, where.inner)),),
        ((0, ChannelAxis(output_axis, where.channels, where.outer, where.inner)),),
    )


def _broadcast(node: gs.Node, tensor: gs.Tensor, where: ChannelAxis) -> _Relation | None:
    from_end = len(tensor.shape) - where.axis
    inputs: list[tuple[int, ChannelAxis]] = []
    parameters: list[tuple[int, ChannelAxis]] = []
    for i, operand in enumerate(node.inputs):
        axis = len(operand.shape) - from_end
        if axis < 0 or operand.shape[axis] == 1:
            continue  # the same for every channel
        if operand.shape[axis] != where.length:
            return None
        there = ChannelAxis(axis, where.channels, where.outer, where.inner)
        (parameters if isinstance(operand, gs.Constant) else inputs).append((i, there))
    axis = len(node.outputs[0].shape) - from_end
    if axis < 0 or node.outputs[0].shape[axis] != where.length:
        return None
    there = ChannelAxis(axis, where.channels, where.outer, where.inner)
    return _Relation(tuple(inputs), ((0, there),), tuple(parameters))


def _reduction(node: gs.Node, slot: int, is_input: bool, where: ChannelAxis) -> _Relation | None:
    rank = len(node.inputs[0].shape)
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        axes = node.inputs[1].values.tolist()
    if not axes or (is_input and slot != 0):
        return None
    reduced = {a % rank for a in axes}
    kept = [a for a in range(rank) if a not in reduced]
    if node.attrs.get("keepdims", 1):
        return _moved(where, where.axis, where.axis) if where.axis in kept else None
    if is_input:
        return _moved(where, where.axis, kept.index(where.axis)) if where.axis in kept else None
    return _moved(where, kept[where.axis], where.axis)


def _leaves_axis_alone(node: gs.Node, axis: int) -> bool:
    """Whether a Pad, Resize or Slice does nothing along ``axis``."""
    data, output = node.inputs[0], node.outputs[0]
    if not isinstance(data.shape[axis], int) or data.shape[axis] != output.shape[axis]:
        return False
    rank = len(data.shape)
    if node.op == "Resize":
        if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
            return False
        if len(node.inputs) > 3 and not node.inputs[3].is_empty():  # sizes: the same one is a scale of 1
            return node.attrs.get("keep_aspect_ratio_policy", "stretch") == "stretch"
        resized = [a % rank for a in node.attrs.get("axes", range(rank))]
        scales = _values(node, 2)  # (1.01 may give the same size, but not the same values)
        return axis not in resized or (len(scales) == len(resized) and scales[resized.index(axis)] == 1)
    if any(not isinstance(t, gs.Constant) for t in node.inputs[1:] if not t.is_empty()):
        return False
    if node.op == "Pad":
        axes = _values(node, 3) or list(range(rank))
        pads = _values(node, 1) or list(node.attrs.get("pads", ()))
        ahead, behind = pads[: len(axes)], pads[len(axes) :]
        return all(
            a % rank != axis or (b == 0 and e == 0) for a, b, e in zip(axes, ahead, behind, strict=False)
        ) and bool(pads)
    starts = _values(node, 1) or list(node.attrs.get("starts", ()))
    axes = _values(node, 3) or list(node.attrs.get("axes", range(len(starts))))
    return bool(starts) and axis not in {a % rank for a in axes}


def _values(node: gs.Node, index: int) -> list[int]:
    if index >= len(node.inputs) or not isinstance(node.inputs[index], gs.Constant):
        return []
    return list(node.inputs[index].values.reshape(-1).tolist())


def _is_depthwise(node: gs.Node) -> bool:
    weight, groups = node.inputs[1], node.attrs.get("group", 1)
    return groups > 1 and isinstance(weight, gs.Constant) and weight.shape[0] == groups and weight.shape[1] == 1


def _all_fit(node: gs.Node, where: ChannelAxis) -> bool:
    return all(
        not isinstance(t, gs.Constant) and t.shape[where.axis : where.axis + 1] == [where.length]
        for t in (*node.inputs, *node.outputs)
    )


def _is_standard(node: gs.Node) -> bool:
    return node.domain in (None, "", "ai.onnx")


def _axis(axis: int, tensor: gs.Tensor) -> int | None:
    if axis >= 0:
        return axis
    return None if tensor.shape is None else axis % len(tensor.shape)
