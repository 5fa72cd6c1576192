"""One form for every layer, with the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from models import Net, check_rewrite, op_counts, random_feed, relative_error, run
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import find_layers
from tetris_onnx.passes import Pass, normalize_layers, run_passes

STEP = [Pass("normalize_layers", normalize_layers)]


def normalized(net: Net, tolerance: float = 0.0) -> tuple[gs.Graph, onnx.ModelProto]:
    model = net.build()
    graph = run_passes(io.to_graph(model), STEP)
    result = io.to_proto(graph, model)
    onnx.checker.check_model(result, full_check=True)
    feed = random_feed(model, dynamic=5)
    assert relative_error(run(model, feed), run(result, feed)) <= tolerance
    return graph, result


@pytest.mark.parametrize("form", ["Constant", "Identity", "Transpose", "Reshape", "Mul", "ConstantOfShape"])
def test_computed_weights_become_constants(form: str) -> None:
    net = Net()
    values = net.weight_values(6, 4, 3, 3)
    if form == "Constant":
        weight = net.op("Constant", value=onnx.numpy_helper.from_array(values))
    elif form == "Identity":
        weight = net.op("Identity", net.op("Identity", net.constant(values)))
    elif form == "Transpose":
        weight = net.op("Transpose", net.constant(values.transpose(2, 3, 1, 0).copy()), perm=[3, 2, 0, 1])
    elif form == "Reshape":
        weight = net.op("Reshape", net.constant(values.ravel()), net.constant([6, 4, 3, 3]))
    elif form == "Mul":
        weight = net.op("Mul", net.constant(values), net.constant(np.float32(0.5)))
        values = values / 2
    else:
        fill = onnx.helper.make_tensor("v", 1, [1], [0.25])
        weight = net.op("ConstantOfShape", net.constant([6, 4, 3, 3]), value=fill)
        values = np.full_like(values, 0.25)
    net.output(net.op("Conv", net.input("x", ["N", 4, 8, 8]), weight))
    assert find_layers(io.to_graph(net.build()))[0].why_dense == "its weight is not a constant"
    graph, result = normalized(net)
    (layer,) = find_layers(graph)
    assert layer.why_dense == ""
    np.testing.assert_array_equal(layer.weight, values)
    assert op_counts(result) == {"Conv": 1}


def test_a_computed_weight_that_is_shared_stays_shared() -> None:
    net = Net()
    weight = net.op("Identity", net.constant(net.weight_values(4, 4, 1, 1)))
    a = net.op("Conv", net.input("x", ["N", 4, 8, 8]), weight)
    net.output(net.op("Conv", a, weight))
    graph, result = normalized(net)
    first, second = find_layers(graph)
    assert first.node.inputs[1] is second.node.inputs[1]
    assert len(result.graph.initializer) == 1


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [1.0, -2.0])
@pytest.mark.parametrize("addend", [None, (6,), (1, 6), (1,), (1, 1), (), (5, 6), (5, 1)])
@pytest.mark.parametrize("constant", [True, False])
def test_gemm(
    trans_a: int, trans_b: int, alpha: float, beta: float, addend: tuple[int, ...] | None, constant: bool
) -> None:
    net = Net()
    x = net.input("x", [4, 5] if trans_a else [5, 4])
    inputs = [x, net.random(6, 4) if trans_b else net.random(4, 6)]
    if addend is not None:
        inputs.append(net.random(*addend) if constant else net.input("c", addend))
    net.output(net.op("Gemm", *inputs, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta))
    graph, result = normalized(net, 1e-6)  # alpha * W and beta * C are rounded, and the addend added later
    (layer,) = find_layers(graph)
    assert layer.why_dense == "" and layer.weight_shape == (6, 4)
    vector = addend is not None and constant and (not addend or addend[:-1] in ((), (1,)))
    assert (layer.bias is not None) == vector
    if layer.bias is not None:
        assert layer.bias.shape == (6,)
    counts = op_counts(result)
    assert counts["Transpose"] == trans_a
    assert counts["Add"] == (addend is not None and not vector)
    assert counts["Mul"] == (addend is not None and not vector and beta != 1)


def test_a_gemm_in_another_type_is_left_alone() -> None:
    net = Net()
    x = net.input("x", [5, 4], onnx.TensorProto.DOUBLE)
    weight = net.constant(net.rng.normal(size=(4, 6)))
    net.output(net.op("Gemm", x, weight, alpha=0.5), dtype=onnx.TensorProto.DOUBLE)
    _, result = normalized(net)
    assert result.graph.node[0].attribute[0].name == "alpha"


@pytest.mark.parametrize(
    ("op", "extra"),
    [
        ("BatchNormalization", [[4], [4], [4], [4]]),
        ("InstanceNormalization", [[4], [4]]),
        ("Mul", [[4, 1, 1]]),
        ("PRelu", [[4, 1, 1]]),
    ],
)
def test_constants_of_other_operators(op: str, extra: list[Any]) -> None:
    """A Gather can only pass them when their vectors are constants."""
    net = Net()
    vectors = [net.op("Identity", net.random(*shape, low=0.5)) for shape in extra]
    net.output(net.op(op, net.input("x", ["N", 4, 8, 8]), *vectors))
    graph, result = normalized(net)
    (node,) = graph.nodes
    assert all(isinstance(t, gs.Constant) for t in node.inputs[1:])
    assert op_counts(result) == {op: 1}


def test_constant_arguments_of_resize_slice_pad_and_reductions() -> None:
    net = Net(18)

    def folded(values: Any) -> str:
        return net.op("Constant", value=onnx.numpy_helper.from_array(np.asarray(values)))

    a = net.op("Resize", net.input("x", ["N", 4, 8, 8]), "", folded(np.array([1, 1, 2, 2], np.float32)))
    a = net.op("Slice", a, folded([1]), folded([9]), folded([2]))
    a = net.op("Pad", a, folded([0, 0, 0, 1, 0, 0, 1, 0]))
    net.output(net.op("ReduceMean", a, folded([2, 3])))
    _, result = normalized(net)
    assert op_counts(result) == {"Resize": 1, "Slice": 1, "Pad": 1, "ReduceMean": 1}


def test_a_sum_of_two_is_an_add_that_a_convolution_takes() -> None:
    """Caffe2's residual connections."""
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12)))
    net.output(net.op("Relu", net.op("Sum", net.conv(a, (12, 12)), a)))
    net.output(net.op("Sum", a, a, a))
    counts = op_counts(check_rewrite(net.build(), left=None))
    assert counts["BlockSparseConvAdd"] == 1 and counts["Sum"] == 1
