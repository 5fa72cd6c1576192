"""Put side by side the channels of a value that are written together and read together (for ``--target cuda``).

A row of blocks writes its channels at once, a column of blocks reads its own at once, and which channels these are has
nothing to do with each other: of 64 written channels some 8 are in each of 8 columns. A GPU moves memory in sectors of
32 bytes, 16 values of float16; channels scattered one by one cost a sector each. The order inside a column of blocks is
free, so channels that one row of blocks writes are put side by side there.

`absorb_gathers` has given each value the order of its largest reader. This pass changes that order within the reader's
columns only: the reader's blocks take it up, other readers and the writers their permutations. Exact.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.algorithms.permutation import inverse, is_identity
from tetris_onnx.graph.channels import ChannelAxis, Region, find_region, gather_permutation
from tetris_onnx.graph.layers import Layer, layer_of
from tetris_onnx.passes.absorb_gathers import fill_in_order, undo
from tetris_onnx.passes.surgery import set_constant


def group_channels(graph: gs.Graph) -> None:
    """Apply the pass."""
    done: set[int] = set()
    for node in list(graph.nodes):
        layer = layer_of(node)
        if layer is None or not _reads_in_a_row(layer) or id(layer.data) in done or layer.in_axis is None:
            continue
        region = find_region(graph, layer.data, ChannelAxis(layer.in_axis, layer.weight_shape[1]))
        done |= {id(value) for value, _ in region.values}
        order = _order(region, layer.weight_shape[1])
        if order is not None and not is_identity(order):
            _apply(graph, region, order)


def _reads_in_a_row(layer: Layer) -> bool:
    return layer.block_sparse and is_identity(layer.node.inputs[3].values)


def _order(region: Region, channels: int) -> NDArray[np.int64] | None:
    """The new order of a region's channels; None where it has to stay."""
    sources = [layer_of(source.node) for source in region.sources]
    sinks = [layer_of(sink.node) for sink in region.sinks]
    if region.barriers or any(layer is None for layer in sources) or not all(s.where.plain for s in region.sources):
        return None
    if any(layer is None and gather_permutation(s.node) is None for layer, s in zip(sinks, region.sinks, strict=True)):
        return None  # it ends at a Concat
    readers = [
        (layer, sink) for layer, sink in zip(sinks, region.sinks, strict=True) if layer and _reads_in_a_row(layer)
    ]
    widths = [layer.node.attrs["block_size"][1] for layer, _ in readers]
    if not all(sink.where.plain for _, sink in readers) or any(width % min(widths) for width in widths):
        return None
    columns = np.arange(channels) // min(widths)
    keys = [columns]
    for layer in sources:
        if layer is not None and layer.block_sparse:
            row_of = inverse(layer.node.inputs[4].values) // layer.node.attrs["block_size"][0]
            keys.append(row_of)
    return np.lexsort(keys[::-1]) if len(keys) > 1 else None


def _apply(graph: gs.Graph, region: Region, order: NDArray[np.int64]) -> None:
    fill_in_order(region, order)
    for sink in region.sinks:
        layer = layer_of(sink.node)
        if layer is not None and _reads_in_a_row(layer):
            _reorder_columns(layer, order)
        else:
            undo(graph, sink, order)


def _reorder_columns(layer: Layer, order: NDArray[np.int64]) -> None:
    """Let a layer take x[order] where it took x; ``order`` keeps each channel in its column of blocks."""
    node = layer.node
    width = node.attrs["block_size"][1]
    blocks = node.inputs[1].values.copy()
    columns = node.inputs[2].values[:, 1]
    for column in np.unique(columns):
        inside = order[column * width : (column + 1) * width] - column * width
        blocks[columns == column, :, : len(inside)] = blocks[columns == column][:, :, inside]
    set_constant(node, 1, blocks, f"{node.name}/blocks_grouped")
