"""Move a residual Add or a MaxPool 2x2 into the convolution before it, with the Relu or Clip behind it.

    Y = clip(conv(X, W) + bias + addend)        BlockSparseConvAdd
    Y = MaxPool(clip(conv(X, W) + bias))        BlockSparseConvMaxPool

Both save a pass over the activations through memory, and the pooling also onnxruntime's changes of layout around its
own MaxPool. A Relu or Clip behind the MaxPool comes to the same before it: the limits leave the order of values as it
is.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from tetris_onnx.graph.layers import CONV, CONV_ADD, CONV_MAX_POOL, DOMAIN
from tetris_onnx.graph.layouts import is_pool_2x2
from tetris_onnx.graph.sizes import Sizes, symbolic_sizes
from tetris_onnx.passes.fuse_epilogue import clip_further, has_activation, take_over
from tetris_onnx.passes.surgery import only_consumer


def fuse_add_and_pool(graph: gs.Graph, pools: bool = True) -> None:
    """Apply the pass, after `fuse_epilogue`. Without ``pools``, an Add only."""
    sizes = symbolic_sizes(graph)
    # Of two convolutions that an Add joins, the later one takes it: the other's result is there by then.
    for node in reversed(list(graph.nodes)):
        if node.op != CONV or node.domain != DOMAIN:
            continue
        follower = _standard(only_consumer(graph, node.outputs[0]))
        if follower is None:
            continue
        if pools and is_pool_2x2(follower):
            node.op = CONV_MAX_POOL
            node.attrs["pool_shape"] = [2, 2]
            take_over(graph, node, follower)
        elif (addend := _addend(node, follower, sizes)) is not None:
            node.op = CONV_ADD
            take_over(graph, node, follower)
            node.inputs.append(addend)
        else:
            continue
        clip_further(graph, node)


def _standard(node: gs.Node | None) -> gs.Node | None:
    return node if node is not None and node.domain in (None, "", "ai.onnx") else None


def _addend(conv: gs.Node, add: gs.Node, sizes: Mapping[int, Sizes]) -> gs.Tensor | None:
    """What ``add`` adds to the result of ``conv``, where that has the same shape and comes right behind the bias."""
    if add.op != "Add" or has_activation(conv) or len(conv.inputs) != 6:
        return None
    value = conv.outputs[0]
    other = add.inputs[1] if add.inputs[0] is value else add.inputs[0]
    if isinstance(other, gs.Constant) or other.dtype != value.dtype:
        return None
    known = sizes.get(id(value))
    return other if known is not None and sizes.get(id(other)) == known else None  # else it may be broadcast
