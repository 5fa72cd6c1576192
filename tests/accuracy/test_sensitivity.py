"""Sensitivities: the measured loss is that of the network, the curve goes through it, and important layers show."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from models import Net
from tetris_onnx.accuracy.activations import Activations
from tetris_onnx.accuracy.sensitivity import Sensitivity, estimate, interpolate, measure, output_loss
from tetris_onnx.config import Config
from tetris_onnx.graph import io
from tetris_onnx.planner import prepare, survey

CONFIG = Config(block_size=(8, 8), allocation="global", workers=1)


def network(scale: float = 1.0, softmax: bool = False) -> onnx.ModelProto:
    """Two branches of one convolution each, the second one ``scale`` times as large, and a classifier."""
    net = Net()
    x = net.input("x", ["N", 16, 8, 8])
    a, b = net.conv(x, (16, 32)), net.conv(x, (16, 32))
    b = net.op("Mul", b, net.constant(np.array([scale], np.float32)))
    sums = net.op("Add", net.op("Relu", a), net.op("Relu", b))
    y = net.gemm(net.op("Flatten", net.op("GlobalAveragePool", sums)), (32, 6))
    net.output(net.op("Softmax", y, axis=1) if softmax else y)
    return net.build()


def images(n: int = 32) -> NDArray[np.float32]:
    rng = np.random.default_rng(5)
    return (rng.standard_normal((n, 16, 8, 8)) + 2 * rng.standard_normal((n, 16, 1, 1))).astype(np.float32)


def sensitivities(model: onnx.ModelProto) -> list[Sensitivity]:
    graph = prepare(io.to_graph(model))
    return measure(survey(graph, CONFIG), io.to_proto(graph, model), CONFIG, {"x": images()})


def run(model: onnx.ModelProto, x: NDArray) -> NDArray:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_the_branch_that_matters_is_the_sensitive_one() -> None:
    small, large = (sensitivities(network(scale)) for scale in (0.1, 10.0))
    assert [s.layer for s in small] == [s.layer for s in large] == ["conv1", "conv2"]
    for found in (*small, *large):
        assert found.loss[-1] == 0 and (np.diff(found.loss) <= 0).all() and found.loss[0] > 0
        assert found.error is not None and found.error.shape == found.loss.shape
    assert small[0].half > 10 * small[1].half
    assert large[1].half > 10 * large[0].half


def test_a_softmax_does_not_hide_the_loss() -> None:
    plain, squashed = sensitivities(network()), sensitivities(network(softmax=True))
    for a, b in zip(plain, squashed, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4)


def test_measuring_is_deterministic() -> None:
    one, two = sensitivities(network()), sensitivities(network())
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.loss, b.loss)


@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_a_consequence_is_what_the_changed_model_computes(layer: str) -> None:
    model = network()
    x = images(24)
    node = next(n for n in model.graph.node if n.output[0] == layer)
    weight = np.zeros((32, 16, 3, 3), np.float32)
    weight[3] = 0.1
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for name, values in zip(node.input[1:], (weight, np.full(32, 0.5, np.float32)), strict=False):
        stored = next(t for t in changed.graph.initializer if t.name == name)
        stored.CopyFrom(numpy_helper.from_array(values, name))
    bias = np.full(32, 0.5 if len(node.input) > 2 else 0, np.float32)
    output = model.graph.output[0].name
    with Activations(model, [], {"x": x}, 10**9) as activations:
        activations.advance(layer)
        (dense,) = activations.consequence(layer, {}, [output], 8)
        (after,) = activations.consequence(layer, {layer: (weight, bias)}, [output], 8, 16)
    np.testing.assert_allclose(dense, run(model, x)[8:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after, run(changed, x)[8:16], rtol=1e-4, atol=1e-5)
    assert np.abs(after - dense[:8]).max() > 1e-2


def test_the_curve_goes_through_what_was_measured() -> None:
    error = np.array([1.0, 0.9, 0.5, 0.2, 0.05, 0.01, 0.0])
    loss = interpolate(error, {2: 0.1, 5: 0.001})
    assert loss[2] == pytest.approx(0.1) and loss[5] == pytest.approx(0.001) and loss[6] == 0
    assert loss[1] == pytest.approx(0.1 * 0.9 / 0.5) and (np.diff(loss) <= 0).all()
    # Where the measured loss does not rise with the sparsity, the curve does not either, but it never falls.
    assert (np.diff(interpolate(error, {2: 0.001, 5: 0.1})) <= 0).all()


def test_output_loss_is_relative_to_the_variance() -> None:
    y = np.array([[1.0, 2.0], [3.0, 6.0]])
    assert output_loss([y], [y]) == 0
    assert output_loss([y], [np.broadcast_to(y.mean(axis=0), y.shape)]) == pytest.approx(1)
    assert output_loss([y, y], [y, y[:1]]) == pytest.approx(0.5)
    assert output_loss([y[:1]], [0 * y[:1]]) == pytest.approx(1)  # a single sample has no variance
    assert output_loss([y], [np.full_like(y, np.nan)]) > 100


def test_without_samples_the_weights_decide() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 32, 8, 8]), (32, 32), kernel=1)
    weight = next(i for i in net.initializers if i.dims == [32, 32, 1, 1])
    values = np.ones((32, 32, 1, 1), np.float32)
    values[:8, :8] = 3.0  # one of 16 blocks holds 9/24 of the squares
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    net.output(net.op("Relu", net.conv(net.op("Relu", a), (32, 32), kernel=1)))
    found = estimate(survey(prepare(io.to_graph(net.build())), CONFIG), CONFIG)
    assert found[0].loss[16] == 0
    np.testing.assert_allclose(np.exp(-found[0].loss[[1, 2, 9]]), np.array([9, 10, 17]) / 24, rtol=1e-6)
