"""Keep the values between our convolutions channels-last, as the CUDA kernels read them (for ``--target cuda``).

The CUDA kernels read [N, D1..Dk, C]; from anything else they make that first, in a pass of its own over the memory.
Values that are joined by operators which take either layout (activations, Add, Concat, pooling) form a group, which
gets one layout. A group becomes channels-last where that saves more conversions (by the convolutions that read it) than
it costs: Transposes at its borders, where an operator in between, a model output or a dense layer wants [N, C, D1..Dk].

Inside a group, BlockSparseConv gets the attributes ``input_transpose`` and ``output_transpose`` (see
custom_ops/README.md), MaxPool becomes ChannelsLastMaxPool, GlobalAveragePool a ReduceMean over the other axes, Concat
gets another axis, and constants another layout. Exact: not a single value changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from tetris_onnx.graph.channels import BROADCAST, ELEMENTWISE
from tetris_onnx.graph.layers import CONV, CONV_ADD, DOMAIN, MAX_POOL
from tetris_onnx.passes.surgery import is_output, set_constant

_ADDEND = 6  # input of BlockSparseConvAdd
_AXES_INPUT_OPSET = 18  # of ReduceMean


@dataclass
class _Group:
    """Values that have to have one layout."""

    values: list[gs.Tensor] = field(default_factory=list)
    nodes: list[gs.Node] = field(default_factory=list)  # that take either layout, and keep it


def channels_last(graph: gs.Graph) -> None:
    """Apply the pass."""
    ends = {id(node): _ends(node) for node in graph.nodes}
    for group in _groups(graph, ends):
        if _gain(graph, group, ends) > 0:
            _convert(graph, group, ends)


def to_channels_last(rank: int) -> list[int]:
    """The Transpose from [N, C, D1..Dk] to [N, D1..Dk, C]."""
    return [0, *range(2, rank), 1]


def to_channels_first(rank: int) -> list[int]:
    """The Transpose from [N, D1..Dk, C] to [N, C, D1..Dk]."""
    return [0, rank - 1, *range(1, rank - 1)]


@dataclass(frozen=True)
class _Ends:
    """What a node makes of layouts: ``joined`` values get one layout, each of ``free`` has any, the rest has none."""

    joined: tuple[gs.Tensor, ...] = ()
    free: tuple[gs.Tensor, ...] = ()

    def takes(self, value: gs.Tensor) -> bool:
        return any(value is tensor for tensor in (*self.joined, *self.free))


def _ends(node: gs.Node) -> _Ends:
    if node.domain == DOMAIN:
        if node.op == CONV:
            return _Ends(free=(node.inputs[0], node.outputs[0]))
        if node.op == CONV_ADD and isinstance(node.inputs[_ADDEND], gs.Variable):
            return _Ends(joined=(node.inputs[_ADDEND], node.outputs[0]), free=(node.inputs[0],))
        return _Ends()
    if node.domain not in (None, "", "ai.onnx") or len(node.outputs) != 1:
        return _Ends()
    output = node.outputs[0]
    variables = [t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
    if not variables or not _is_map(output) or any(t.shape is None for t in variables):
        flat = node.op == "Flatten" and node.attrs.get("axis", 1) == 1 and _is_point(node.inputs[0])
        return _Ends(free=(node.inputs[0],)) if flat else _Ends()
    rank = len(output.shape)
    same_rank = all(len(t.shape) == rank for t in variables)
    if node.op in ELEMENTWISE:
        # (What else an elementwise operator reads are scalars.)
        takes = len(variables) == 1 and variables[0] is node.inputs[0] and same_rank
    elif node.op in BROADCAST:
        takes = same_rank and all(len(t.shape) <= rank for t in node.inputs)
    elif node.op == "Concat":
        takes = same_rank and len(variables) == len(node.inputs) and node.attrs["axis"] % rank == 1
    elif node.op == "MaxPool":
        takes = rank == 4 and _is_plain_pool(node)
    else:
        takes = node.op == "GlobalAveragePool"
    return _Ends(joined=(*variables, output)) if takes else _Ends()


def _is_map(value: gs.Tensor) -> bool:
    """Whether a value has the rank of [N, C, D1..Dk], k = 1, 2 or 3."""
    return isinstance(value, gs.Variable) and value.shape is not None and len(value.shape) in (3, 4, 5)


def _is_point(value: gs.Tensor) -> bool:
    """Whether each map is a single value, so that both layouts are the same in memory."""
    return _is_map(value) and all(d == 1 for d in value.shape[2:])


def _is_plain_pool(node: gs.Node) -> bool:
    attributes = node.attrs
    kernel, pads = list(attributes["kernel_shape"]), list(attributes.get("pads", [0] * 4))
    return (
        attributes.get("auto_pad", "NOTSET") == "NOTSET"
        and not attributes.get("ceil_mode", 0)
        and not attributes.get("storage_order", 0)
        and all(d == 1 for d in attributes.get("dilations", ()))
        and all(p < k for p, k in zip(pads, kernel * 2, strict=True))
    )


def _groups(graph: gs.Graph, ends: dict[int, _Ends]) -> list[_Group]:
    """The values that our convolutions read or write, and all that are joined with them, in the order of the graph."""
    members: dict[int, list[gs.Node]] = {}
    for node in graph.nodes:
        for value in ends[id(node)].joined:
            members.setdefault(id(value), []).append(node)
    groups = []
    seen: set[int] = set()
    for node in graph.nodes:
        if node.domain != DOMAIN:
            continue
        for start in ends[id(node)].free:
            if id(start) in seen or not _is_map(start):
                continue
            group, todo, done = _Group(), [start], set()
            while todo:
                value = todo.pop()
                if id(value) in seen:
                    continue
                seen.add(id(value))
                group.values.append(value)
                for member in members.get(id(value), ()):
                    if id(member) not in done:
                        done.add(id(member))
                        group.nodes.append(member)
                        todo += ends[id(member)].joined
            groups.append(group)
    return groups


def _gain(graph: gs.Graph, group: _Group, ends: dict[int, _Ends]) -> int:
    """Values of a sample that need no conversion any more, less those that now do."""
    gain = 0
    for value in group.values:
        size = int(np.prod([d for d in value.shape[1:] if isinstance(d, int)], dtype=np.int64))
        for node in value.outputs:
            end = ends.get(id(node))
            if node.domain == DOMAIN and end is not None and any(value is t for t in end.free):
                gain += size
        if _needs_first(graph, value, ends):
            gain -= size
        if not any(ends[id(n)].takes(value) for n in value.inputs if id(n) in ends):
            gain -= size  # a Transpose of what another operator, or the user, gives
    # The CUDA kernel adds within its own registers where the output is channels-last, else in a pass over the memory.
    adds = [node for node in group.nodes if node.op == CONV_ADD]
    return gain + sum(int(np.prod([d for d in n.outputs[0].shape[1:] if isinstance(d, int)])) for n in adds)


def _needs_first(graph: gs.Graph, value: gs.Tensor, ends: dict[int, _Ends]) -> bool:
    """Whether somebody reads ``value`` as [N, C, D1..Dk]: another operator, a subgraph, or the user."""
    return is_output(graph, value) or any(id(n) not in ends or not ends[id(n)].takes(value) for n in value.outputs)


def _convert(graph: gs.Graph, group: _Group, ends: dict[int, _Ends]) -> None:
    for node in group.nodes:
        _adapt(node, len(node.outputs[0].shape), graph.opset)
    for value in group.values:
        rank = len(value.shape)
        perm, back = to_channels_last(rank), to_channels_first(rank)
        last = gs.Variable(f"{value.name}/channels_last", value.dtype, [value.shape[axis] for axis in perm])
        needs_first = _needs_first(graph, value, ends)
        writers = [node for node in value.inputs if id(node) in ends and ends[id(node)].takes(value)]
        readers = [node for node in value.outputs if id(node) in ends and ends[id(node)].takes(value)]
        for node in {id(n): n for n in readers}.values():
            if node.domain == DOMAIN and node.inputs[0] is value and node.op in (CONV, CONV_ADD):
                node.attrs["input_transpose"] = back
            for slot, tensor in enumerate(node.inputs):
                if tensor is value:
                    node.inputs[slot] = last
        for node in writers:
            if node.domain == DOMAIN and node.op in (CONV, CONV_ADD):
                node.attrs["output_transpose"] = perm
            node.outputs = [last]
        if not writers:
            graph.nodes.append(_transpose(f"{value.name}/to_channels_last", perm, value, last))
        elif needs_first:
            graph.nodes.append(_transpose(f"{value.name}/to_channels_first", back, last, value))
        replaced = {id(value): last}
        for node in (*writers, *readers):
            end = ends[id(node)]
            ends[id(node)] = _Ends(
                tuple(replaced.get(id(t), t) for t in end.joined), tuple(replaced.get(id(t), t) for t in end.free)
            )


def _transpose(name: str, perm: list[int], data: gs.Tensor, output: gs.Tensor) -> gs.Node:
    return gs.Node("Transpose", name, {"perm": perm}, [data], [output])


def _adapt(node: gs.Node, rank: int, opset: int) -> None:
    """Let a node that keeps the layout work on channels-last values."""
    if node.op == "Concat":
        node.attrs["axis"] = rank - 1
    elif node.op == "MaxPool":
        kept = ("kernel_shape", "strides", "pads")
        defaults = {"strides": [1, 1], "pads": [0, 0, 0, 0]}
        node.attrs = {name: list(node.attrs.get(name, defaults.get(name))) for name in kept}
        node.op, node.domain = MAX_POOL, DOMAIN
    elif node.op == "GlobalAveragePool":
        axes = list(range(1, rank - 1))
        node.op, node.attrs = "ReduceMean", {"keepdims": 1}
        if opset >= _AXES_INPUT_OPSET:
            node.inputs.append(gs.Constant(f"{node.name}/axes", np.array(axes, np.int64)))
        else:
            node.attrs["axes"] = axes
    elif node.op in BROADCAST:
        for slot, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and tensor.values.size > 1:
                values = tensor.values.reshape((1,) * (rank - tensor.values.ndim) + tensor.values.shape)
                set_constant(
                    node, slot, values.transpose(to_channels_last(rank)), f"{node.name}/input{slot}_channels_last"
                )
