"""What follows a layer channel by channel goes into its weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from models import Net, op_counts, random_feed, relative_error, run
from tetris_onnx.graph import io
from tetris_onnx.passes import Pass, fuse_batchnorm, normalize_layers, run_passes

STEPS = [Pass("normalize_layers", normalize_layers), Pass("fuse_batchnorm", fuse_batchnorm)]


def fused(net: Net) -> onnx.ModelProto:
    model = net.build()
    result = io.to_proto(run_passes(io.to_graph(model), STEPS), model)
    onnx.checker.check_model(result, full_check=True)
    feed = random_feed(model, dynamic=3)
    # The scaled weight is rounded once, so every product has a relative error of 6e-8.
    assert relative_error(run(model, feed), run(result, feed)) < 1e-6
    return result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_behind_a_convolution(bias: bool, epsilon: float, axes: int) -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 4, *[5] * axes]), (4, 6), bias=bias, axes=axes)
    net.output(net.op("Relu", net.batchnorm(a, 6, epsilon=epsilon)))
    assert op_counts(fused(net)) == {"Conv": 1, "Relu": 1}


@pytest.mark.parametrize("form", ["gemm", "matmul"])
def test_behind_a_matrix_product(form: str) -> None:
    net = Net()
    x = net.input("x", ["N", 4])
    a = net.gemm(x, (4, 6)) if form == "gemm" else net.matmul(x, (4, 6))
    net.output(net.op("Relu", net.batchnorm(a, 6)))
    assert op_counts(fused(net)) == {"Gemm": 1, "Relu": 1}


@pytest.mark.parametrize(
    "write",
    [
        lambda net, a: net.op("Mul", a, net.random(6, 1, 1)),
        lambda net, a: net.op("Mul", net.random(1, 6, 1, 1), a),
        lambda net, a: net.op("Add", a, net.random(6, 1, 1)),
        lambda net, a: net.op("Mul", a, net.random()),
        lambda net, a: net.op("Add", net.random(1), a),
        lambda net, a: net.op("Add", net.op("Mul", net.batchnorm(a, 6), net.random(6, 1, 1)), net.random(6, 1, 1)),
    ],
)
def test_factors_and_addends(write: Callable[[Net, str], str]) -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 4, 5, 5]), (4, 6))
    net.output(net.op("Relu", write(net, a)))
    assert op_counts(fused(net)) == {"Conv": 1, "Relu": 1}


@pytest.mark.parametrize(
    "write",
    [
        lambda net, a: net.op("Mul", a, net.random(6)),  # along the width
        lambda net, a: net.op("Mul", a, net.random(1, 1, 6)),
        lambda net, a: net.op("Mul", a, net.random(2, 1, 6, 1, 1)),  # a rank more
        lambda net, a: net.op("Mul", a, net.random(6, 6, 6)),
        lambda net, a: net.op("Mul", a, a),
        lambda net, a: net.op("Mul", a, net.op("Relu", a)),
        lambda net, a: net.batchnorm(net.op("Relu", a), 6),
        lambda net, a: net.op("Mul", a, net.op("GlobalAveragePool", "x6")),
    ],
)
def test_what_is_not_fused(write: Callable[[Net, str], str]) -> None:
    net = Net()
    a = net.conv(net.input("x", [2, 4, 6, 6]), (4, 6))
    net.input("x6", [2, 6, 6, 6])
    net.output(net.op("Sigmoid", write(net, a)))
    before = op_counts(net.build())
    assert op_counts(fused(net)) == before


def test_values_that_others_see_stay() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 4, 5, 5]), (4, 6))
    net.output(a)
    b = net.conv(net.op("Relu", net.batchnorm(a, 6)), (6, 6))
    net.output(net.batchnorm(b, 6))  # an output keeps its name
    assert op_counts(fused(net))["BatchNormalization"] == 2


def test_a_shared_weight_is_scaled_for_one_layer_only() -> None:
    net = Net()
    x = net.input("x", ["N", 4, 5, 5])
    weight = net.constant(net.weight_values(4, 4, 3, 3))
    a = net.op("Relu", net.batchnorm(net.op("Conv", x, weight, pads=[1] * 4), 4))
    net.output(net.op("Relu", net.op("Conv", a, weight)))
    assert op_counts(fused(net)) == {"Conv": 2, "Relu": 2}


def test_the_layer_keeps_its_name() -> None:
    net = Net()
    net.output(net.op("Relu", net.batchnorm(net.conv(net.input("x", ["N", 4, 5, 5]), (4, 6)), 6)))
    assert fused(net).graph.node[0].output[0] == "conv1"


def test_dense_layers_that_cannot_be_reordered_are_left_alone() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 6, 5, 5]), (6, 6), group=2)
    net.output(net.op("Relu", net.batchnorm(a, 6)))
    assert op_counts(fused(net))["BatchNormalization"] == 1


def test_a_scale_of_zero() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 4, 5, 5]), (4, 6))
    net.output(net.op("Relu", net.op("Mul", a, net.constant(np.zeros((6, 1, 1), np.float32)))))
    result = fused(net)
    assert op_counts(result) == {"Conv": 1, "Relu": 1}
