"""Move every Gather into the layers around it: into the permutations of our operators, into the weights of dense ones.

Three moves, until no Gather of the reordering is left:

1. ``y = W x``, ``y[p]`` read by nothing else: the layer writes its output in the order ``p``.
2. A region that only layers write into (see graph.channels) takes the order that its largest reader wants: its
sources write
   in that order, and its readers undo it. The largest reader then reads its channels in a row, as the kernels like it
   best.
3. ``W x[p]``: the layer reads its input through ``p``.

With W[output_perm[i], input_perm[j]] = W_reordered[i, j]: reading x[p] turns input_perm into ``p[input_perm]``,
writing y[p] turns output_perm into ``inverse(p)[output_perm]`` and the bias into ``bias[p]``.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.algorithms.permutation import compose, expand, inverse, is_identity
from tetris_onnx.graph.channels import ChannelAxis, End, Region, find_region, gather_permutation
from tetris_onnx.graph.layers import Layer, layer_of
from tetris_onnx.passes.fold_gathers import permute_parameters
from tetris_onnx.passes.surgery import is_output, reads_alone, remove_node, replace_uses, set_constant


def absorb_gathers(graph: gs.Graph) -> None:
    """Apply the pass."""
    for move in (_into_producer, _into_region, _into_consumers):
        for node in list(graph.nodes):
            perm = gather_permutation(node) if node.outputs else None
            if perm is not None:
                move(graph, node, perm, node.attrs.get("axis", 0) % len(node.inputs[0].shape))


def _into_producer(graph: gs.Graph, gather: gs.Node, perm: NDArray[np.int64], axis: int) -> None:
    value = gather.inputs[0]
    layer = layer_of(value.inputs[0]) if value.inputs else None
    if layer is None or layer.out_axis != axis or not reads_alone(graph, gather, value):
        return
    _write_in_order(layer, perm)
    # The result keeps the name that its readers know it by.
    result = gather.outputs[0]
    remove_node(graph, gather)
    layer.node.outputs = [result]


def _into_region(graph: gs.Graph, gather: gs.Node, perm: NDArray[np.int64], axis: int) -> None:
    value = gather.inputs[0]
    region = find_region(graph, value, ChannelAxis(axis, perm.size))
    if region.barriers or not all(s.where.plain and layer_of(s.node) is not None for s in region.sources):
        return
    if any(gather_permutation(s.node) is None and layer_of(s.node) is None for s in region.sinks):
        return  # it ends at a Concat
    largest = max(region.sinks, key=_reads)
    order = gather_permutation(largest.node)
    if order is None or not largest.where.plain:
        return  # it is in the right order already, or wants one of flattened positions, not of channels
    fill_in_order(region, order)
    for sink in region.sinks:
        undo(graph, sink, order)


def fill_in_order(region: Region, order: NDArray[np.int64]) -> None:
    """Let the layers that write into ``region`` give its channels in ``order``."""
    for source in region.sources:
        layer = layer_of(source.node)
        assert layer is not None
        _write_in_order(layer, order)
    permute_parameters(region, order)


def undo(graph: gs.Graph, sink: End, order: NDArray[np.int64]) -> None:
    """Let ``sink`` see its channels as they were before they got into ``order``."""
    undo = expand(inverse(order), sink.where.outer, sink.where.inner)
    following = gather_permutation(sink.node)
    if following is None:
        layer = layer_of(sink.node)
        assert layer is not None
        _read_in_order(layer, undo)
        return
    merged = compose(undo, following)
    result = sink.node.outputs[0]
    if is_identity(merged) and not is_output(graph, result):
        data = sink.node.inputs[0]
        remove_node(graph, sink.node)
        replace_uses(result, data)
    else:
        set_constant(sink.node, 1, merged, f"{sink.node.name}/order")


def _into_consumers(graph: gs.Graph, gather: gs.Node, perm: NDArray[np.int64], axis: int) -> None:
    data, result = gather.inputs[0], gather.outputs[0]
    inside = {id(node) for node in graph.nodes}
    if is_output(graph, result):
        return
    layers = []
    for consumer in result.outputs:
        layer = layer_of(consumer) if id(consumer) in inside else None
        if layer is None or layer.in_axis != axis or layer.data is not result:
            return
        layers.append(layer)
    for layer in layers:
        _read_in_order(layer, perm)
    remove_node(graph, gather)
    replace_uses(result, data)


def _reads(sink: End) -> int:
    """Weights of our operators that read their channels in a row where the region has the order of ``sink``.

    For a dense layer every order is as good: it goes into the weight.
    """
    readers = [sink.node] if gather_permutation(sink.node) is None else sink.node.outputs[0].outputs
    layers = [layer for layer in map(layer_of, readers) if layer is not None and layer.block_sparse]
    return sum(int(np.prod(layer.weight_shape)) for layer in layers if is_identity(layer.node.inputs[3].values))


def _read_in_order(layer: Layer, perm: NDArray[np.int64]) -> None:
    """Let ``layer`` take x where it took x[perm]."""
    node = layer.node
    if layer.block_sparse:
        set_constant(node, 3, compose(perm, node.inputs[3].values), f"{node.name}/input_perm")
    else:
        set_constant(node, 1, layer.stored(layer.weight[:, inverse(perm)]), f"{node.name}/weight_in")


def _write_in_order(layer: Layer, perm: NDArray[np.int64]) -> None:
    """Let ``layer`` give y[perm] where it gave y."""
    node = layer.node
    bias = layer.bias
    if layer.block_sparse:
        set_constant(node, 4, inverse(perm)[node.inputs[4].values], f"{node.name}/output_perm")
    else:
        set_constant(node, 1, layer.stored(layer.weight[perm]), f"{node.name}/weight_out")
    if bias is not None:
        set_constant(node, 5 if layer.block_sparse else 2, bias[perm], f"{node.name}/bias_out")
