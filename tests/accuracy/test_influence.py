"""Influence: the squared gradients of the backward graph against PyTorch's, and what is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from tetris_onnx.accuracy import influence
from tetris_onnx.accuracy.influence import Influence, measure_influence
from tetris_onnx.graph.layers import DOMAIN
from tetris_onnx.session import open_session

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 11, 10] x) => (float[N, 6] z)
<int64[8] pads = {0, 1, 0, 0, 0, 1, 0, 0}, int64[2] from = {0, 1}, int64[2] to = {9223372036854775807, 100},
 int64[2] axes = {2, 3}, int64[2] steps = {2, 2}, float[1, 8, 1, 1] scale = {2, -1, 0.5, 1, 1, 3, -2, 1}>
{
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 2]> (x, wa)
  ar = Relu (a)
  b = Conv <kernel_shape = [3, 3], pads = [2, 1, 2, 1], dilations = [2, 1], group = 2> (ar, wb)
  short = Slice (ar, from, to, axes, steps)
  wide = Pad (short, pads)
  c = Conv <kernel_shape = [1, 3], strides = [2, 2], pads = [0, 0, 0, 0]> (b, wc)
  s = Add (c, wide)
  scaled = Mul (s, scale)
  r = Relu (scaled)
  p = MaxPool <kernel_shape = [2, 1], strides = [2, 1]> (r)
  t = Transpose <perm = [0, 2, 3, 1]> (p)
  f = Flatten (t)
  h = MatMul (f, wh)
  hr = Relu (h)
  y = Gemm <transB = 1, alpha = 0.5> (hr, wy, by)
  z = Softmax (y)
}
"""
SHAPES = {"wa": (6, 3, 3, 3), "wb": (6, 3, 3, 3), "wc": (8, 6, 1, 3), "wh": (48, 12), "wy": (6, 12), "by": (6,)}


def network(text: str = TEXT) -> tuple[onnx.ModelProto, dict[str, NDArray]]:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model, weights


def test_squared_gradients_are_those_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    model, weights = network()
    w = {name: torch.from_numpy(value) for name, value in weights.items()}
    x = np.random.default_rng(1).standard_normal((5, 3, 11, 10)).astype(np.float32)

    a = functional.conv2d(torch.from_numpy(x), w["wa"], stride=(1, 2), padding=1).requires_grad_(True)
    ar = functional.relu(a)
    b = functional.conv2d(ar, w["wb"], padding=(2, 1), dilation=(2, 1), groups=2)
    c = functional.conv2d(b, w["wc"], stride=2)
    wide = functional.pad(ar[:, :, ::2, 1::2], (0, 0, 0, 0, 1, 1))
    scale = torch.tensor([2, -1, 0.5, 1, 1, 3, -2, 1]).reshape(1, 8, 1, 1)
    p = functional.max_pool2d(functional.relu((c + wide) * scale), (2, 1))
    h = p.permute(0, 2, 3, 1).flatten(1) @ w["wh"]
    y = 0.5 * functional.relu(h) @ w["wy"].T + w["by"]
    y = y - y.mean(dim=1, keepdim=True)  # what all logits share, the Softmax does not see
    squares = {name: 0.0 for name in "abch"}
    products = {name: 0.0 for name in "abch"}
    for k in range(6):
        found = torch.autograd.grad(y[:, k].sum(), [a, b, c, h], retain_graph=True)
        for name, gradient in zip("abch", found, strict=True):
            g = gradient.numpy().astype(np.float64)
            squares[name] = squares[name] + g**2
            rows = np.moveaxis(g, 1, 0).reshape(g.shape[1], -1)
            products[name] = products[name] + rows @ rows.T / len(g)

    got = measure_influence(model, [(name, 1) for name in "abch"], {"x": x}, draws=2000)
    assert set(got) == set("abch")
    for name, expected in squares.items():
        found_influence = got[name]
        assert found_influence.positions is not None
        assert found_influence.positions.shape == (5, *np.shape(expected)[2:])
        # The expectation over random signs, from 2000 draws: 3 % off in the mean of squares of normal numbers.
        np.testing.assert_allclose(
            found_influence.channels, np.mean(np.sum(expected, axis=tuple(range(2, expected.ndim))), axis=0), rtol=0.12
        )
        np.testing.assert_allclose(
            found_influence.positions,
            np.sum(expected, axis=1),
            rtol=0.3,
            atol=0.05 * float(np.max(np.sum(expected, axis=1))),
        )
        assert found_influence.metric is not None
        np.testing.assert_allclose(
            found_influence.metric, products[name], rtol=0.12, atol=0.05 * float(np.max(products[name]))
        )
        np.testing.assert_array_equal(np.diag(found_influence.metric), found_influence.channels)


def test_a_layer_before_an_unknown_operator_has_no_known_influence() -> None:
    model, _ = network(TEXT.replace("hr = Relu (h)", "hr = Erf (h)"))
    x = np.ones((3, 3, 11, 10), np.float32)
    got = measure_influence(model, [("a", 1), ("h", 1), ("y", 1)], {"x": x})
    assert list(got) == ["y"]
    assert isinstance(got["y"], Influence)
    # Signs without their mean: 5/6 on average, from 3 samples; what all logits share counts nothing.
    assert 0.3 < got["y"].channels.mean() < 1
    assert got["y"].metric is not None
    np.testing.assert_allclose(got["y"].metric.sum(axis=0), 0, atol=1e-6)


def test_signs_are_whole_where_no_softmax_follows() -> None:
    model, _ = network(TEXT.replace("z = Softmax (y)", "z = Identity (y)"))
    got = measure_influence(model, [("y", 1)], {"x": np.ones((3, 3, 11, 10), np.float32)})
    np.testing.assert_allclose(got["y"].channels, 1.0)


def test_of_very_many_channels_only_the_squares_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = network()
    x = np.random.default_rng(2).standard_normal((9, 3, 11, 10)).astype(np.float32)
    layers = [("a", 1), ("h", 1)]
    both = measure_influence(model, layers, {"x": x})
    monkeypatch.setattr(influence, "_MOST_CHANNELS", 6)  # a has 6, h 12
    got = measure_influence(model, layers, {"x": x})
    assert got["a"].metric is not None
    assert got["h"].metric is None
    for name in got:
        np.testing.assert_allclose(got[name].channels, both[name].channels, rtol=1e-5)


def test_an_output_that_is_not_float32_has_none() -> None:
    model, _ = network()
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    assert measure_influence(model, [("a", 1)], {"x": np.ones((1, 3, 11, 10), np.float32)}) == {}


def test_it_does_not_depend_on_anything_but_its_seed() -> None:
    model, _ = network()
    x = np.random.default_rng(2).standard_normal((9, 3, 11, 10)).astype(np.float32)
    first, second, other = (measure_influence(model, [("a", 1)], {"x": x}, seed=seed)["a"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.channels, second.channels)
    assert not np.array_equal(first.channels, other.channels)


def test_our_operator_goes_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and back through a convolution: two of its nodes in the place of two."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 9, 8] x) => (float[N, 4] z)
    {
      a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, wa)
      ar = Relu (a)
      b = Conv <kernel_shape = [3, 3], pads = [0, 2, 1, 1]> (ar, wb, bb)
      br = Relu (b)
      c = Conv <kernel_shape = [3, 3], strides = [2, 2]> (br, wc)
      pooled = GlobalAveragePool (c)
      y = Flatten (pooled)
      z = Softmax (y)
    }
    """
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    for name, shape in {"wa": (6, 3, 3, 3), "wb": (5, 6, 3, 3), "bb": (5,), "wc": (4, 5, 3, 3)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    x = rng.standard_normal((7, 3, 9, 8)).astype(np.float32)
    layers = [("a", 1), ("b", 1), ("c", 1)]
    plain = measure_influence(model, layers, {"x": x})
    nodes: list[str] = []

    def spy(model: onnx.ModelProto) -> Any:
        nodes.extend(node.output[0] for node in model.graph.node if node.domain == DOMAIN)
        return open_session(model)

    monkeypatch.setattr(influence, "open_session", spy)
    got = measure_influence(model, layers, {"x": x}, whole=["a", "b"])
    assert len(nodes) == 3 and nodes[:2] == ["a", "b"] and nodes[2].startswith("backward/")
    for name, _ in layers:
        np.testing.assert_allclose(got[name].positions, plain[name].positions, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got[name].metric, plain[name].metric, rtol=1e-4, atol=1e-6)
