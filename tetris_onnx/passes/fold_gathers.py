"""Sink Gathers towards the next layer and merge them: one Gather between adjacent layers. Bit-exact.

Gathers that write into one region (see graph.channels) leave it together when all of them have the same order and
nothing else writes into it: the region then works on reordered channels, its per-channel constants are reordered, and
a Gather with the same order stands at each place where the region ends. Two Gathers in a row become one; one that
changes nothing goes. A region with a barrier keeps its Gathers where they are.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.algorithms.permutation import compose, expand, identity, inverse, is_identity
from tetris_onnx.graph.channels import ChannelAxis, End, Region, find_region, gather_permutation
from tetris_onnx.passes.surgery import add_gather, is_output, reads_alone, remove_node, replace_uses, set_constant


def fold_gathers(graph: gs.Graph) -> None:
    """Apply the pass."""
    moved = True
    while moved:
        moved = False
        for node in list(graph.nodes):
            if gather_permutation(node) is not None and node.outputs:
                moved |= _sink(graph, node)
        for node in list(graph.nodes):
            if node.op == "Concat" and node.domain in (None, "", "ai.onnx"):
                moved |= _merge_before_concat(graph, node)
    _share(graph)


def permute_parameters(region: Region, perm: NDArray[np.int64]) -> None:
    """Let the region's per-channel constants have the order ``perm`` [channels]: ``constant[perm]``."""
    for end in region.parameters:
        values = end.node.inputs[end.slot].values
        order = expand(perm, end.where.outer, end.where.inner)
        set_constant(end.node, end.slot, np.take(values, order, end.where.axis), f"{end.node.name}/parameter{end.slot}")


def _sink(graph: gs.Graph, gather: gs.Node) -> bool:
    """Move ``gather`` and its equals to the ends of the region that they write into. Returns whether that was done."""
    perm = gather_permutation(gather)
    assert perm is not None
    value = gather.outputs[0]
    if is_identity(perm) and not is_output(graph, value):
        replace_uses(value, gather.inputs[0])
        remove_node(graph, gather)
        return True
    where = ChannelAxis(gather.attrs.get("axis", 0) % len(gather.inputs[0].shape), perm.size)
    region = find_region(graph, value, where)
    if region.barriers or not all(_has_order(source, perm) for source in region.sources):
        return False
    if len(region.values) == 1 and not any(gather_permutation(sink.node) is not None for sink in region.sinks):
        return False  # it stands at the end already
    if any(sink.node.op == "Concat" for sink in region.sinks) and not _concats_can_take(graph, region):
        return False
    permute_parameters(region, inverse(perm))  # a * x[p] = (a[inverse(p)] * x)[p]
    for sink in region.sinks:
        order = expand(perm, sink.where.outer, sink.where.inner)
        following = gather_permutation(sink.node)
        data = sink.node.inputs[sink.slot]
        if following is None:
            name = f"{sink.node.name}/input{sink.slot}"
            sink.node.inputs[sink.slot] = add_gather(graph, data, order, sink.where.axis, name)
        else:
            merged = compose(order, following)
            set_constant(sink.node, 1, merged, f"{sink.node.name}/order")
    for source in region.sources:
        replace_uses(source.node.outputs[0], source.node.inputs[0])
        remove_node(graph, source.node)
    return True


def _has_order(source: End, perm: NDArray[np.int64]) -> bool:
    order = gather_permutation(source.node)
    return order is not None and source.where.plain and np.array_equal(order, perm)


def _concats_can_take(graph: gs.Graph, region: Region) -> bool:
    """Whether the Gathers that would stand before a Concat can go on behind it."""
    return all(_takes_order(graph, sink.node) for sink in region.sinks if sink.node.op == "Concat")


def _takes_order(graph: gs.Graph, concat: gs.Node) -> bool:
    output = concat.outputs[0]
    if output.shape is None or any(t.shape is None for t in concat.inputs):
        return False
    axis = concat.attrs["axis"] % len(output.shape)
    if not isinstance(output.shape[axis], int) or not all(isinstance(t.shape[axis], int) for t in concat.inputs):
        return False
    region = find_region(graph, output, ChannelAxis(axis, output.shape[axis]))
    if region.barriers or any(source.node is not concat for source in region.sources):
        return False
    return all(_takes_order(graph, sink.node) for sink in region.sinks if sink.node.op == "Concat")


def _merge_before_concat(graph: gs.Graph, concat: gs.Node) -> bool:
    """Concat(a[p], b[q]) -> Concat(a, b)[p, q + len(a)], where the result can sink further."""
    orders = []
    found = False
    for tensor in concat.inputs:
        perm = None
        if tensor.shape is not None and len(tensor.inputs) == 1 and reads_alone(graph, concat, tensor):
            gather, rank = tensor.inputs[0], len(tensor.shape)
            if gather.op == "Gather" and gather.attrs.get("axis", 0) % rank == concat.attrs["axis"] % rank:
                perm = gather_permutation(gather)
        orders.append(perm)
        found |= perm is not None
    if not found or not _takes_order(graph, concat):
        return False
    axis = concat.attrs["axis"] % len(concat.outputs[0].shape)
    parts, start = [], 0
    for slot, perm in enumerate(orders):
        length = concat.inputs[slot].shape[axis]
        parts.append(start + (identity(length) if perm is None else perm))
        start += length
        if perm is not None:
            gather = concat.inputs[slot].inputs[0]
            concat.inputs[slot] = gather.inputs[0]
            remove_node(graph, gather)
    output = concat.outputs[0]
    joined = gs.Variable(f"{output.name}/joined", output.dtype, output.shape)
    concat.outputs = [joined]
    add_gather(graph, joined, np.concatenate(parts), axis, f"{concat.name}/out", output)
    return True


def _share(graph: gs.Graph) -> None:
    """One Gather for several consumers that read the same value in the same order."""
    made: dict[tuple[int, int, bytes], gs.Node] = {}
    for node in list(graph.nodes):
        perm = gather_permutation(node)
        if perm is None or is_output(graph, node.outputs[0]):
            continue
        key = id(node.inputs[0]), node.attrs.get("axis", 0), perm.tobytes()
        first = made.setdefault(key, node)
        if first is not node:
            replace_uses(node.outputs[0], first.outputs[0])
            remove_node(graph, node)
