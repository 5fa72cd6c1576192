"""One view of every layer: its weight whatever form it is stored in, why it stays dense, its window."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from models import Net, random_feed, relative_error, run
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import Layer, conv_window, find_layers, layer_of
from tetris_onnx.passes import Pass, normalize_layers, run_passes


def layers(net: Net, normalize: bool = False) -> list[Layer]:
    graph = io.to_graph(net.build())
    return find_layers(run_passes(graph, [Pass("normalize_layers", normalize_layers)]) if normalize else graph)


def only_layer(net: Net, normalize: bool = False) -> Layer:
    (layer,) = layers(net, normalize)
    return layer


class TestWeight:
    @pytest.mark.parametrize("axes", [1, 2, 3])
    def test_conv(self, axes: int) -> None:
        net = Net()
        net.output(net.conv(net.input("x", ["N", 5, *[9] * axes]), (5, 7), axes=axes))
        layer = only_layer(net)
        assert layer.why_dense == "" and layer.is_conv
        assert layer.weight_shape == (7, 5, *[3] * axes) == layer.weight.shape
        assert (layer.in_axis, layer.out_axis) == (1, 1)
        assert layer.bias is not None and layer.bias.shape == (7,)
        assert layer.multiplications == 9**axes * 7 * 5 * 3**axes

    @pytest.mark.parametrize("trans", [0, 1])
    def test_gemm(self, trans: int) -> None:
        net = Net()
        weight = net.rng.normal(size=(7, 5)).astype(np.float32)  # [out, in]
        x = net.input("x", ["N", 5])
        net.output(net.op("Gemm", x, net.constant(weight if trans else weight.T), transB=trans))
        layer = only_layer(net)
        assert layer.why_dense == "" and layer.bias is None
        assert np.array_equal(layer.weight, weight) and layer.weight_shape == (7, 5)
        assert np.array_equal(layer.stored(layer.weight), layer.node.inputs[1].values)
        assert (layer.in_axis, layer.out_axis, layer.multiplications) == (1, 1, 35)

    @pytest.mark.parametrize("shape", [["N", 5], ["N", 4, 5], [2, 3, 4, 5]])
    def test_matmul(self, shape: list[int | str]) -> None:
        net = Net()
        net.output(net.matmul(net.input("x", shape), (5, 7)))
        layer = only_layer(net)
        assert layer.why_dense == "" and layer.weight_shape == (7, 5)
        assert layer.in_axis == layer.out_axis == len(shape) - 1
        assert layer.multiplications == 35 * int(np.prod([d for d in shape[1:-1] if isinstance(d, int)]))

    def test_the_name_is_that_of_the_output(self) -> None:
        net = Net()
        net.output(net.conv(net.input("x", [1, 4, 5, 5]), (4, 4)))
        layer = only_layer(net)
        assert layer.name == "conv1" and layer.node.name == "node_conv1"


def dense(net: Net, reason: str) -> None:
    layer = only_layer(net)
    assert reason in layer.why_dense
    assert layer_of(layer.node) is None


class TestWhyDense:
    def test_grouped_and_depthwise(self) -> None:
        net = Net()
        net.output(net.conv(net.input("x", [1, 8, 5, 5]), (8, 8), group=2))
        dense(net, "grouped (2 groups")
        net = Net()
        net.output(net.conv(net.input("x", [1, 8, 5, 5]), (8, 8), group=8))
        dense(net, "depthwise")

    def test_a_weight_that_is_computed(self) -> None:
        net = Net()
        net.output(net.op("MatMul", net.input("x", [2, 4]), net.input("w", [4, 6])))
        dense(net, "not a constant")

    def test_the_constant_on_the_left(self) -> None:
        net = Net()
        net.output(net.op("MatMul", net.random(6, 4), net.input("x", [4, 2])))
        dense(net, "left operand")

    def test_quantized(self) -> None:
        net = Net()
        weight = net.op(
            "DequantizeLinear",
            net.constant(np.ones((4, 6), np.int8)),
            net.constant(np.float32(0.1)),
            net.constant(np.int8(0)),
        )
        net.output(net.op("MatMul", net.input("x", [2, 4]), weight))
        dense(net, "quantized")
        (layer,) = layers(net, normalize=True)  # folding constants must not undo the quantization
        assert "quantized" in layer.why_dense

    @pytest.mark.parametrize("dtype", [np.float64, np.int32])
    def test_other_types(self, dtype: type) -> None:
        net = Net()
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        weight = net.constant(np.ones((4, 6), dtype))
        net.output(net.op("MatMul", net.input("x", [2, 4], kind), weight), dtype=kind)
        dense(net, f"{np.dtype(dtype).name}, not float32")

    def test_half_types(self) -> None:
        for kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            net = Net()
            net.initializers.append(onnx.helper.make_tensor("w", kind, [4, 6], [1.0] * 24))
            net.output(net.op("MatMul", net.input("x", [2, 4], kind), "w"), dtype=kind)
            layer = only_layer(net)
            assert layer.why_dense == ""
            np.testing.assert_array_equal(layer.weight.astype(np.float32), np.ones((6, 4)))

    def test_a_batch_of_matrices(self) -> None:
        net = Net()
        net.output(net.op("MatMul", net.input("x", [3, 2, 4]), net.random(3, 4, 6)))
        dense(net, "3 axes, not 2")

    def test_a_vector(self) -> None:
        net = Net()
        net.output(net.op("MatMul", net.input("x", [4]), net.random(4, 6)))
        dense(net, "input is a vector")
        net = Net()
        net.output(net.op("MatMul", net.input("x", [2, 4]), net.random(4)))
        dense(net, "1 axes, not 2")

    def test_unknown_rank(self) -> None:
        net = Net()
        x = net.op("Magic", net.input("x", [2, 4]), domain="com.example")
        net.output(net.matmul(x, (4, 6)), shape=[2, 6])
        dense(net, "rank of its input is not known")

    def test_four_spatial_axes(self) -> None:
        net = Net()
        net.output(net.conv(net.input("x", [1, 2, 4, 4, 4, 4]), (2, 3), axes=4))
        dense(net, "over 4 axes (1 to 3")

    def test_an_empty_weight(self) -> None:
        net = Net()
        net.output(net.op("MatMul", net.input("x", [2, 4]), net.constant(np.zeros((4, 0), np.float32))))
        dense(net, "empty")

    def test_same_padding_of_an_unknown_size(self) -> None:
        net = Net()
        x = net.input("x", [1, 4, "H", "W"])
        net.output(net.conv(x, (4, 4), auto_pad="SAME_UPPER", strides=[2, 2]))
        dense(net, "depends on the input size")

    def test_a_computed_bias(self) -> None:
        net = Net()
        x = net.input("x", [1, 4, 5, 5])
        net.output(net.op("Conv", x, net.random(4, 4, 1, 1), net.input("b", [4])))
        dense(net, "bias is not a constant")

    @pytest.mark.parametrize("attributes", [{"transA": 1}, {"alpha": 0.5}, {"beta": 2.0}])
    def test_gemm_that_is_not_normalized(self, attributes: dict[str, Any]) -> None:
        net = Net()
        net.output(net.op("Gemm", net.input("x", [4, 4]), net.random(4, 6), net.random(6), **attributes))
        dense(net, "not in a form")
        assert only_layer(net, normalize=True).why_dense == ""

    def test_no_weight_at_all(self) -> None:
        net = Net()
        net.input("x", [1, 4, 5, 5])
        net.op("Conv", "x", out="y")
        net.output("y", shape=[1, 4, 5, 5])
        dense(net, "no weight input")

    def test_operators_of_another_domain_are_not_layers(self) -> None:
        net = Net()
        x = net.op("Gemm", net.input("x", [2, 4]), net.random(4, 6), domain="com.example")
        net.output(x, shape=[2, 6])
        assert layers(net) == []


class TestConvWindow:
    # (onnxruntime runs SAME_* without dilations only)
    @pytest.mark.parametrize(
        ("mode", "dilation"), [("NOTSET", 1), ("NOTSET", 2), ("VALID", 2), ("SAME_UPPER", 1), ("SAME_LOWER", 1)]
    )
    @pytest.mark.parametrize("stride", [1, 2, 3])
    @pytest.mark.parametrize("kernel", [1, 2, 3, 5])
    def test_written_out_it_computes_the_same(self, mode: str, stride: int, kernel: int, dilation: int) -> None:
        for size in (9, 10, 11, 13):
            net = Net()
            x = net.input("x", [1, 2, size, size + 3])
            attributes: dict[str, Any] = {"strides": [stride, stride], "dilations": [dilation, dilation]}
            extra = {"pads": [1, 0, 0, 2]} if mode == "NOTSET" else {"auto_pad": mode}
            weight = net.random(3, 2, kernel, kernel)
            net.output(net.op("Conv", x, weight, **attributes, **extra))
            window = conv_window(only_layer(net).node)
            assert window is not None
            explicit = Net()
            explicit.input("x", [1, 2, size, size + 3])
            explicit.initializers = net.initializers
            explicit.output(explicit.op("Conv", x, weight, **window))
            feed = random_feed(net.build())
            assert relative_error(run(net.build(), feed), run(explicit.build(), feed)) == 0

    def test_a_dynamic_size_does_not_matter_at_stride_1(self) -> None:
        net = Net()
        net.output(net.conv(net.input("x", [1, 4, "H", "W"]), (4, 4), auto_pad="SAME_UPPER", dilations=[1, 2]))
        window = conv_window(only_layer(net).node)
        assert window is not None and window["pads"] == [1, 2, 1, 2]

    def test_defaults_are_filled_in(self) -> None:
        net = Net()
        net.output(net.op("Conv", net.input("x", [1, 4, 5, 5]), net.random(4, 4, 3, 1)))
        assert conv_window(only_layer(net).node) == {
            "kernel_shape": [3, 1],
            "strides": [1, 1],
            "pads": [0, 0, 0, 0],
            "dilations": [1, 1],
        }

    def test_cutting_is_left_alone(self) -> None:
        net = Net()
        net.output(net.op("Conv", net.input("x", [1, 4, 9, 9]), net.random(4, 4, 3, 3), pads=[-1, 0, 0, 0]))
        assert conv_window(only_layer(net).node) is None
