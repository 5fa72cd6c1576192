"""The backward pass: gradients by weights and biases against what the forward pass itself gives."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tetris_onnx.graph.backward import Backward, UnknownDerivativeError

# One layer per case: the text of its node, the shapes of its input, weight and output.
CONV = "Conv <kernel_shape = {}, strides = {}, pads = {}, dilations = {}, group = {}> (x, w, b)"
LAYERS = {
    "plain": ("Conv (x, w, b)", "N, 3, 6, 5", (4, 3, 3, 2), "N, 4, 4, 4"),
    "uneven": (CONV.format([3, 2], [2, 3], [2, 0, 1, 1], [1, 2], 1), "N, 4, 9, 8", (6, 4, 3, 2), "N, 6, 5, 3"),
    "groups": (CONV.format([3, 3], [1, 2], [1, 1, 1, 1], [1, 1], 3), "N, 6, 7, 7", (9, 2, 3, 3), "N, 9, 7, 4"),
    "depthwise": (CONV.format([3, 3], [1, 1], [2, 2, 2, 2], [2, 2], 4), "N, 4, 7, 6", (4, 1, 3, 3), "N, 4, 7, 6"),
    "pointwise, padded": (
        CONV.format([1, 1], [1, 1], [1, 0, 0, 2], [1, 1], 1),
        "N, 3, 4, 4",
        (5, 3, 1, 1),
        "N, 5, 5, 6",
    ),
    "1-D": (CONV.format([4], [3], [0, 2], [1], 1), "N, 2, 11", (3, 2, 4), "N, 3, 4"),
    "3-D": (
        CONV.format([2, 1, 3], [1, 1, 2], [0] * 6, [1, 1, 1], 1),
        "N, 2, 4, 3, 7",
        (3, 2, 2, 1, 3),
        "N, 3, 3, 3, 3",
    ),
    "product": ("Gemm <alpha = 0.5> (x, w, b)", "N, 6", (6, 4), "N, 4"),
    "product, transposed": ("Gemm <transB = 1, alpha = 2.0> (x, w, b)", "N, 6", (4, 6), "N, 4"),
    "rows": ("MatMul (x, w)", "N, 5, 6", (6, 4), "N, 5, 4"),
}


def one_layer(case: str) -> tuple[onnx.ModelProto, int]:
    """A model of one layer, and the axis of its channels."""
    node, data, shape, made = LAYERS[case]
    text = f'<ir_version: 8, opset_import: ["" : 17]> net (float[{data}] x) => (float[{made}] y) {{ y = {node} }}'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    axis = 2 if "MatMul" in node else 1
    bias = rng.standard_normal(int(made.split(", ")[axis]))
    for name, value in {"w": rng.standard_normal(shape), "b": bias}.items():
        if name in model.graph.node[0].input:
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return model, axis


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def direction(shape: list[int | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("r", TensorProto.FLOAT, shape)


@pytest.mark.parametrize("case", LAYERS)
def test_gradients_of_a_layer_are_those_of_its_own_forward_pass(case: str) -> None:
    model, axis = one_layer(case)
    backward = Backward(model)
    backward.seed("y", "r")
    assert backward.gradients(["x", "y"]) == {"x", "y"}
    wanted = [backward.weight_gradient(model.graph.node[0]), backward.bias_gradient("y", axis), backward.gradient("x")]
    free = [t.name for t in model.graph.initializer]
    rng = np.random.default_rng(1)
    sizes = [2 if d is None else d for d in backward.shape("x")]
    feed = {"x": rng.standard_normal(sizes).astype(np.float32)}
    feed["r"] = rng.standard_normal([2, *(d for d in backward.shape("y")[1:])]).astype(np.float32)  # type: ignore[list-item]
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    by_weight, by_bias, by_data = session(backward.model(wanted, [direction([None] * feed["r"].ndim)], free)).run(
        None, feed | weights
    )
    forward = session(backward.model(["y"], [direction([None] * feed["r"].ndim)], free))

    def linear(name: str) -> NDArray[np.float64]:
        """What each entry of a value does to r y, which is linear in it: exact, one entry at a time."""
        given = feed | weights
        found = np.empty(given[name].size)
        nothing = {key: np.zeros_like(value) if key in (name, "b") else value for key, value in given.items()}
        for i in range(found.size):
            single = np.zeros_like(given[name])
            single.flat[i] = 1
            found[i] = np.sum(feed["r"].astype(np.float64) * forward.run(None, nothing | {name: single})[0])
        return found.reshape(given[name].shape)

    # Sums of up to a hundred float32 products of size 1.
    np.testing.assert_allclose(by_weight, linear("w"), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_data, linear("x"), rtol=1e-4, atol=1e-4)
    others = tuple(a for a in range(feed["r"].ndim) if a != axis)
    np.testing.assert_allclose(by_bias, feed["r"].sum(axis=others), rtol=1e-4, atol=1e-4)


NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 8, 8] x) => (float[N, 5] z)
{
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, wa)
  ar = Relu (a)
  b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (ar, wb)
  s = Add (b, ar)
  c = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], group = 2> (s, wc)
  g = GlobalAveragePool (c)
  f = Flatten (g)
  y = MatMul (f, wy)
  z = Softmax (y)
}
"""


def test_gradients_through_a_residual_network_are_its_differences() -> None:
    model = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(2)
    weights = {
        name: (rng.standard_normal(shape) / 4).astype(np.float32)
        for name, shape in {"wa": (6, 3, 3, 3), "wb": (6, 6, 3, 3), "wc": (8, 3, 3, 3), "wy": (8, 5)}.items()
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    backward = Backward(model)
    assert backward.targets() == [("y", (5,))]
    backward.seed("y", "r")
    nodes = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    assert backward.gradients([n.output[0] for n in nodes]) == {"a", "b", "c", "y"}
    gradients = [backward.weight_gradient(node) for node in nodes]
    x, r = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3, 8, 8), (4, 5)))
    found = session(backward.model(gradients, [direction([None, 5])], list(weights))).run(
        None, {"x": x, "r": r} | weights
    )
    forward = session(backward.model(["y"], [direction([None, 5])], list(weights)))

    def loss(given: dict[str, NDArray]) -> float:
        return float(np.sum(r.astype(np.float64) * forward.run(None, {"x": x, "r": r} | given)[0]))

    for node, gradient in zip(nodes, found, strict=True):
        name, step = node.input[1], 1e-3
        away = rng.standard_normal(gradient.shape).astype(np.float32)
        sides = [loss(weights | {name: weights[name] + sign * step * away}) for sign in (1, -1)]
        # Central differences in float32 across a few kinks of a Relu.
        expected = float(np.linalg.norm(gradient) * np.linalg.norm(away))
        assert np.sum(gradient * away) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=5e-3 * expected), name


def test_what_is_not_known_is_said() -> None:
    model = onnx.parser.parse_model(NETWORK.replace("s = Add (b, ar)", "e = Erf (b)\n  s = Add (e, ar)"))
    shapes = {"wa": (6, 3, 3, 3), "wb": (6, 6, 3, 3), "wc": (8, 3, 3, 3), "wy": (8, 5)}
    model.graph.initializer.extend(numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in shapes.items())
    backward = Backward(model)
    backward.seed("y", "r")
    # a has a way that is known (ar, s) and one that is not: what is known of it would be wrong.
    assert backward.gradients(["a", "b", "c"]) == {"c"}
    with pytest.raises(UnknownDerivativeError, match="the weight of such a Relu"):
        backward.seed("ar", "r")
        backward.weight_gradient(model.graph.node[1])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "open"
    with pytest.raises(UnknownDerivativeError, match="has no fixed size"):
        Backward(onnx.parser.parse_model(NETWORK.replace("float[N, 5] z", "float[N, M] z"))).targets()
