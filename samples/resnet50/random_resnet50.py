"""Write ResNet-50 v1.5 (224x224, 25.5 M weights) with random weights as ONNX, to time without a trained file.

    python samples/resnet50/random_resnet50.py resnet50.onnx

Nodes have the names of torchvision's exports, and as there BatchNormalization is already in the convolutions' weights.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Of each stage: bottlenecks, channels inside a bottleneck; it gives four times as many.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
EXPANSION = 4
# Share of a bottleneck's branch in its sum: the activations stay of one size over all 16.
BRANCH_GAIN = 0.5


class _Builder:
    """Appends nodes and weights; every method takes the name of a value and returns the one it makes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weights(self, name: str, gain: float, *shape: int) -> list[str]:
        """A weight and a bias of He's scale times `gain`; the norms of channels vary as in trained networks."""
        spread = np.exp(0.5 * self.rng.standard_normal((shape[0], *[1] * (len(shape) - 1))) - 0.25)
        weight = self.rng.standard_normal(shape, dtype=np.float32) * spread * gain * np.sqrt(2 / np.prod(shape[1:]))
        values = {f"{name}.weight": weight, f"{name}.bias": 0.1 * gain * self.rng.standard_normal(shape[0])}
        self.initializers.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items())
        return list(values)

    def node(self, op: str, inputs: list[str], path: str, **attributes: object) -> str:
        """A node named as the exporter does: `path` is its module."""
        output = f"{path}_output_0"
        self.nodes.append(helper.make_node(op, inputs, [output], path, **attributes))
        return output

    def conv(self, x: str, module: str, outputs: int, inputs: int, kernel: int, stride: int, gain: float = 1.0) -> str:
        """A square convolution that keeps the map's size, divided by `stride`."""
        weights = self.weights(module, gain, outputs, inputs, kernel, kernel)
        path = "/".join(["", *_path(module), "Conv"])
        window = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        return self.node("Conv", [x, *weights], path, **window)

    def bottleneck(self, x: str, module: str, inputs: int, channels: int, stride: int) -> str:
        """1x1, 3x3 (with the stride: "v1.5"), 1x1, plus the input, which is fitted where the shapes differ."""
        outputs, path = EXPANSION * channels, "/".join(["", *_path(module)])
        y = self.conv(x, f"{module}.conv1", channels, inputs, 1, 1)
        y = self.node("Relu", [y], f"{path}/relu/Relu")
        y = self.conv(y, f"{module}.conv2", channels, channels, 3, stride)
        y = self.node("Relu", [y], f"{path}/relu_1/Relu")
        y = self.conv(y, f"{module}.conv3", outputs, channels, 1, 1, BRANCH_GAIN)
        if stride != 1 or inputs != outputs:
            x = self.conv(x, f"{module}.downsample.0", outputs, inputs, 1, stride, np.sqrt(0.5))
        y = self.node("Add", [y, x], f"{path}/Add")
        return self.node("Relu", [y], f"{path}/relu_2/Relu")


def _path(module: str) -> list[str]:
    """layer1.0.downsample.0 -> layer1, layer1.0, downsample, downsample.0: how the exporter nests scopes."""
    path: list[str] = []
    for part in module.split("."):
        path.append(f"{path[-1]}.{part}" if part.isdigit() else part)
    return path


def resnet50(seed: int = 0) -> onnx.ModelProto:
    """The network, "input" [batch, 3, 224, 224] to "logits" [batch, 1000]."""
    net = _Builder(seed)
    x = net.node("Relu", [net.conv("input", "conv1", 64, 3, 7, 2)], "/relu/Relu")
    x = net.node("MaxPool", [x], "/maxpool/MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    inputs = 64
    for stage, (count, channels) in enumerate(STAGES):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            x = net.bottleneck(x, f"layer{stage + 1}.{block}", inputs, channels, stride)
            inputs = EXPANSION * channels
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "/avgpool/GlobalAveragePool")], "/Flatten", axis=1)
    weights = net.weights("fc", np.sqrt(0.5), 1000, inputs)
    net.nodes.append(helper.make_node("Gemm", [x, *weights], ["logits"], "/fc/Gemm", transB=1))
    graph = helper.make_graph(
        net.nodes,
        "resnet50",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1000])],
        net.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: random_resnet50.py OUT.onnx")
    onnx.save(resnet50(), sys.argv[1])
