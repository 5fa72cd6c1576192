"""Let our operator run a first convolution that is kept whole, where only our operators read its result.

A network's first convolution has too few input channels to be pruned in blocks. onnxruntime runs it in a layout of its
own and changes the layout of the result, the network's largest map, for our operators. Ours writes what they read, and
can take the pooling behind it. Nothing is pruned: all blocks are stored.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from tetris_onnx.algorithms.blocks import block_grid
from tetris_onnx.algorithms.permutation import identity
from tetris_onnx.graph.layers import DOMAIN, OUR_OPS, Layer, conv_window, find_layers
from tetris_onnx.passes.fuse_epilogue import clip_bounds
from tetris_onnx.passes.lower_block_sparse import lower_block_sparse
from tetris_onnx.passes.surgery import is_output, only_consumer
from tetris_onnx.plan import LayerPlan, Plan

# More of them fill the lanes of onnxruntime's kernels, which are faster then.
_MOST_CHANNELS = 4
_BLOCK_ROWS = 32


def lower_first_layer(graph: gs.Graph) -> None:
    """Apply the pass."""
    plans = []
    for layer in find_layers(graph):
        if not layer.why_dense and _gains(graph, layer):
            out, in_ = layer.weight_shape[:2]
            block = min(_BLOCK_ROWS, out), in_
            keep = np.ones(block_grid((out, in_), block), bool)
            plans.append(LayerPlan(layer.name, identity(out), identity(in_), block, keep))
    if plans:
        lower_block_sparse(graph, Plan(tuple(plans)))


def is_first_convolution(node: gs.Node) -> bool:
    """Whether a Conv or one of our convolutions reads few channels, of an input of the model."""
    return not node.inputs[0].inputs and Layer(node, "").weight_shape[1] <= _MOST_CHANNELS


def _gains(graph: gs.Graph, layer: Layer) -> bool:
    """Whether ``layer`` is a convolution 3x3 or smaller of stride 1, over the model's input, that only we read.

    Wider kernels and strides cost our operator a copy of the input, and more than the change of layout saves.
    """
    if layer.node.op != "Conv" or not is_first_convolution(layer.node):
        return False
    window = conv_window(layer.node)
    if window is None or max(window["kernel_shape"]) > 3 or max(window["strides"]) > 1:
        return False
    value = layer.output
    while (follower := only_consumer(graph, value)) is not None:
        is_pool = follower.op == "MaxPool" and follower.attrs.get("kernel_shape") == follower.attrs.get("strides") == [
            2,
            2,
        ]
        if clip_bounds(follower) is None and not is_pool:
            break
        value = follower.outputs[0]
    readers = value.outputs
    return (
        bool(readers) and not is_output(graph, value) and all(n.op in OUR_OPS and n.domain == DOMAIN for n in readers)
    )
