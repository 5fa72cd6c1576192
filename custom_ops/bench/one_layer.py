"""Models of one layer with random weights: the block-sparse op, and onnxruntime's own op on the same weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shapes import Layer  # beside this file


@dataclass(frozen=True)
class RandomLayer:
    """A layer's weight as the block-sparse op takes it; the permutations are as random as those of a real plan."""

    layer: Layer
    block_size: tuple[int, int]
    weight_shape: tuple[int, ...]
    constants: Mapping[str, NDArray]  # inputs of the op after X
    density: float  # share of the weights that is in kept blocks

    def dense_weight(self) -> NDArray[np.float32]:
        """The weight with its zeros, in the order of the layer's channels."""
        bo, bi = self.block_size
        rows, columns = (math.ceil(size / block) for size, block in zip(self.weight_shape, (bo, bi), strict=False))
        padded = np.zeros((rows * bo, columns * bi, *self.weight_shape[2:]), np.float32)
        for block, (row, column) in zip(self.constants["blocks"], self.constants["block_index"], strict=True):
            padded[row * bo : (row + 1) * bo, column * bi : (column + 1) * bi] = block
        weight = np.empty(self.weight_shape, np.float32)
        index = np.ix_(self.constants["output_perm"], self.constants["input_perm"])
        weight[index] = padded[: self.weight_shape[0], : self.weight_shape[1]]
        return weight

    def sparse_model(self, batch: int, precision: str = "float32") -> bytes:
        """x -> y by the block-sparse op, with its bias and Relu, in a precision of the op's."""
        op = "BlockSparseConv" if self.layer.is_conv else "BlockSparseGemm"
        attributes = {"weight_shape": self.weight_shape, "block_size": self.block_size, "precision": precision}
        attributes |= window(self.layer)
        node = helper.make_node(
            op, ["x", *self.constants], ["y"], op, domain="ai.tetris", activation_min=0.0, **attributes
        )
        return _model([node], self.layer, batch, self.constants)

    def dense_model(self, batch: int) -> bytes:
        """x -> y by onnxruntime's own op."""
        return dense_model(self.layer, self.dense_weight(), self.constants["bias"], batch)


def random_layer(layer: Layer, block_size: int, density: float, rng: np.random.Generator) -> RandomLayer:
    """Kept blocks as near to `density` as the grid allows, the same number in each block row (to one)."""
    bo, bi = min(block_size, layer.outputs), min(block_size, layer.inputs)
    rows, columns = math.ceil(layer.outputs / bo), math.ceil(layer.inputs / bi)
    kept = max(1, round(density * rows * columns))
    keep = np.zeros((rows, columns), bool)
    for row in range(rows):
        count = kept * (row + 1) // rows - kept * row // rows
        keep[row, rng.choice(columns, count, replace=False)] = True
    index = np.argwhere(keep).astype(np.int64)
    # Without what the last blocks pad.
    heights = np.minimum(bo, layer.outputs - bo * np.arange(rows))
    widths = np.minimum(bi, layer.inputs - bi * np.arange(columns))
    kernel = (layer.kernel, layer.kernel) if layer.is_conv else ()
    constants = {
        "blocks": rng.standard_normal((len(index), bo, bi, *kernel), dtype=np.float32),
        "block_index": index,
        "input_perm": rng.permutation(layer.inputs),
        "output_perm": rng.permutation(layer.outputs),
        "bias": rng.standard_normal(layer.outputs, dtype=np.float32),
    }
    share = float(heights @ keep @ widths) / (layer.outputs * layer.inputs)
    return RandomLayer(layer, (bo, bi), (layer.outputs, layer.inputs, *kernel), constants, share)


def dense_model(layer: Layer, weight: NDArray, bias: NDArray, batch: int) -> bytes:
    """x -> y by onnxruntime's Conv or Gemm, and Relu."""
    transposed = {} if layer.is_conv else {"transB": 1}
    op = "Conv" if layer.is_conv else "Gemm"
    nodes = [
        helper.make_node(op, ["x", "w", "b"], ["linear"], op, **transposed, **window(layer)),
        helper.make_node("Relu", ["linear"], ["y"]),
    ]
    return _model(nodes, layer, batch, {"w": weight, "b": bias})


def window(layer: Layer) -> dict[str, list[int]]:
    """The attributes of a convolution's window; none for a product."""
    return {"strides": [layer.stride] * 2, "pads": [layer.pad] * 4} if layer.is_conv else {}


def _model(nodes: Sequence[onnx.NodeProto], layer: Layer, batch: int, constants: Mapping[str, NDArray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, layer.inputs, *layer.map_size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.tetris", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return model.SerializeToString()
