"""Give layers the weights and biases that a refit found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.graph.layers import REORDERED, find_layers
from tetris_onnx.passes.surgery import set_constant


@dataclass(frozen=True, eq=False)
class NewWeights:
    """What a refit gives a layer: its whole weight, zero where it is pruned, and its bias."""

    weight: NDArray  # [out, in, *kernel], of the element type of the layer's own
    bias: NDArray  # [out], too


def set_weights(graph: gs.Graph, weights: Mapping[str, NewWeights]) -> None:
    """Apply the pass: ``weights`` by layer name, for a prepared graph."""
    for layer in find_layers(graph):
        new = weights.get(layer.name)
        if new is None:
            continue
        node, name, output = layer.node, layer.name, layer.output
        set_constant(node, 1, layer.stored(new.weight), f"{name}/weight_refit")
        if node.op == "MatMul":
            # An Add behind it, which becomes the operator's bias later; the layer keeps the name of its result.
            node.outputs = [gs.Variable(output.name + REORDERED, output.dtype, output.shape)]
            bias = gs.Constant(f"{name}/bias_refit", new.bias)
            graph.nodes.append(gs.Node("Add", f"{node.name}/bias", {}, [node.outputs[0], bias], [output]))
        else:
            set_constant(node, 2, new.bias, f"{name}/bias_refit")
