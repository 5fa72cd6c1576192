"""Write VGG16 (224x224, 138 M weights) with random weights as ONNX: for timing, where no trained file is at hand.

    python samples/vgg16/random_vgg16.py vgg16.onnx

Nodes have the names of torchvision's exports, so that deep_compression.toml and uniform.toml fit.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

# Output channels of the convolutions; "M" is a 2x2 max pooling. Each entry is one or two modules of `features`.
CONFIGURATION = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
CLASSIFIER = (4096, 4096, 1000)


def vgg16(seed: int = 0) -> onnx.ModelProto:
    """The network. Weights keep the size of activations; the norms of channels vary as in trained networks."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []

    def weights(name: str, *shape: int) -> list[str]:
        scale = np.exp(0.5 * rng.standard_normal((shape[0], *[1] * (len(shape) - 1)))) * np.sqrt(2 / np.prod(shape[1:]))
        values: dict[str, NDArray] = {
            f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) * scale.astype(np.float32),
            f"{name}.bias": np.zeros(shape[0], np.float32),
        }
        initializers.extend(numpy_helper.from_array(v, k) for k, v in values.items())
        return list(values)

    value, channels, module = "input", 3, 0
    for entry in CONFIGURATION:
        prefix = f"/features/features.{module}"
        if entry == "M":
            output = f"{prefix}/MaxPool_output_0"
            window = {"kernel_shape": [2, 2], "strides": [2, 2]}
            nodes.append(helper.make_node("MaxPool", [value], [output], f"{prefix}/MaxPool", **window))
            module += 1
        else:
            inputs = [value, *weights(f"features.{module}", int(entry), channels, 3, 3)]
            window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
            nodes.append(helper.make_node("Conv", inputs, [f"{prefix}/Conv_output_0"], f"{prefix}/Conv", **window))
            output = f"/features/features.{module + 1}/Relu_output_0"
            nodes.append(helper.make_node("Relu", [f"{prefix}/Conv_output_0"], [output]))
            channels, module = int(entry), module + 2
        value = output
    nodes.append(helper.make_node("Flatten", [value], ["flat"]))
    value, features = "flat", channels * 7 * 7
    for i, out in enumerate(CLASSIFIER):
        prefix, last = f"/classifier/classifier.{3 * i}", i == len(CLASSIFIER) - 1
        output = "logits" if last else f"{prefix}/Gemm_output_0"
        inputs = [value, *weights(f"classifier.{3 * i}", out, features)]
        nodes.append(helper.make_node("Gemm", inputs, [output], f"{prefix}/Gemm", transB=1))
        if not last:
            nodes.append(helper.make_node("Relu", [output], [f"{output}/relu"]))
        value, features = f"{output}/relu", out
    graph = helper.make_graph(
        nodes,
        "vgg16",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: random_vgg16.py OUT.onnx")
    onnx.save(vgg16(), sys.argv[1])
