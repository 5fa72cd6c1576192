"""The layout of values between our convolutions on the CUDA target.

That values stay right is tested on every topology: models.check_rewrite runs what this pass makes, too.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from models import Net, op_counts, random_feed, random_plan, relative_error, rewrite, run
from tetris_onnx import runtime
from tetris_onnx.graph.layers import CONV, CONV_ADD, MAX_POOL
from tetris_onnx.optimize import masked_dense

FIRST, LAST = [0, 1, 2, 3], [0, 2, 3, 1]
TO_FIRST = [0, 3, 1, 2]


def check(net: Net, skip: tuple[str, ...] = (), dynamic: int = 2) -> onnx.ModelProto:
    """The model for CUDA, which computes the same in any runtime."""
    model = net.build()
    plan = random_plan(model, skip=skip)
    result = rewrite(model, plan, target="cuda")
    onnx.checker.check_model(result, full_check=True)
    feed = random_feed(model, dynamic)
    assert relative_error(run(masked_dense(model, plan), feed), run(result, feed)) < 1e-5
    return result


def layouts(model: onnx.ModelProto) -> list[tuple[bool, bool]]:
    """Of each of our convolutions, in order: whether its input and its output are channels-last."""
    found = []
    for node in model.graph.node:
        if node.op_type in (CONV, CONV_ADD):
            perms = {a.name: list(a.ints) for a in node.attribute}
            assert perms["input_transpose"] in (FIRST, TO_FIRST) and perms["output_transpose"] in (FIRST, LAST)
            found.append((perms["input_transpose"] != FIRST, perms["output_transpose"] != FIRST))
    return found


def test_a_chain_with_pooling_has_no_conversion_inside() -> None:
    net = Net()
    a = net.input("x", ["N", 8, 12, 12])
    for i, channels in enumerate([(8, 12), (12, 16), (16, 12), (12, 8)]):
        a = net.op("Relu", net.conv(a, channels))
        if i == 1:
            a = net.op("MaxPool", a, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    net.output(a)
    result = check(net)
    assert layouts(result) == [(False, True), (True, True), (True, True), (True, False)]
    counts = op_counts(result)
    assert (counts["Transpose"], counts[MAX_POOL], counts["MaxPool"]) == (0, 1, 0)


def test_residual_connections_are_inside() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16)))
    for _ in range(2):
        b = net.conv(net.op("Relu", net.conv(a, (16, 12))), (12, 16))
        a = net.op("Relu", net.op("Add", b, a))
    a = net.op("Flatten", net.op("GlobalAveragePool", net.conv(a, (16, 12))))
    net.output(net.gemm(a, (12, 10)))
    result = check(net)
    assert layouts(result) == [(False, True), *[(True, True)] * 4, (True, False)]
    assert (op_counts(result)["Transpose"], op_counts(result)[CONV_ADD]) == (0, 2)


def test_concat_and_vectors_of_channels_are_inside() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16))
    a = net.op("PRelu", net.op("Mul", a, net.random(16, 1, 1)), net.random(1, 16, 1, 1))
    parts = [net.conv(net.op("Add", a, net.random(1)), (16, c), kernel=k) for c, k in ((6, 1), (10, 3))]
    net.output(net.conv(net.op("Concat", *parts, axis=-3), (16, 8)))
    result = check(net)
    assert layouts(result) == [(False, True), (True, True), (True, True), (True, False)]
    assert op_counts(result)["Transpose"] == 0


@pytest.mark.parametrize("opset", [13, 18])
def test_squeeze_and_excite_is_inside(opset: int) -> None:
    net = Net(opset)
    b = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16)))
    s = net.op("Relu", net.conv(net.op("GlobalAveragePool", b), (16, 8), kernel=1))
    s = net.op("Sigmoid", net.conv(s, (8, 16), kernel=1))
    net.output(net.conv(net.op("Mul", b, s), (16, 8)))
    result = check(net)
    assert layouts(result) == [(False, True), (True, True), (True, True), (True, False)]
    counts = op_counts(result)
    assert (counts["Transpose"], counts["ReduceMean"], counts["GlobalAveragePool"]) == (0, 1, 0)


def test_one_conversion_for_many_readers_of_a_dense_layer() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12)))
    for _ in range(3):
        net.output(net.conv(a, (12, 12)))
    result = check(net, skip=("conv1",))
    assert op_counts(result)["Transpose"] == 1
    assert layouts(result) == [(True, False)] * 3


def test_a_dense_layer_in_between_costs_no_more_than_before() -> None:
    """The sparse layers beside it read and write the dense one's layout themselves."""
    net = Net()
    a = net.input("x", ["N", 8, 8, 8])
    for _ in range(3):
        a = net.op("Relu", net.conv(a, (8, 8)))
    net.output(a)
    result = check(net, skip=("conv2",))
    assert op_counts(result)["Transpose"] == 0
    assert "input_transpose" not in {a.name for n in result.graph.node for a in n.attribute}


def test_ceil_mode_and_average_pooling_are_borders() -> None:
    for op, attributes in (("MaxPool", {"ceil_mode": 1}), ("AveragePool", {})):
        net = Net()
        a = net.conv(net.input("x", ["N", 8, 9, 9]), (8, 12))
        a = net.op(op, a, kernel_shape=[2, 2], strides=[2, 2], **attributes)
        net.output(net.conv(a, (12, 8)))
        result = check(net)
        assert op_counts(result)[op] == 1 and op_counts(result)["Transpose"] == 0


@pytest.mark.parametrize("axes", [1, 3])
def test_other_ranks(axes: int) -> None:
    net = Net()
    a = net.input("x", ["N", 6, *[7, 6, 5][:axes]])
    for channels in ((6, 10), (10, 12), (12, 7)):
        a = net.op("Relu", net.conv(a, channels, axes=axes))
    net.output(a)
    result = check(net)
    nodes = [node for node in result.graph.node if node.op_type == CONV]
    last = [0, *range(2, axes + 2), 1]
    perms = [next(list(a.ints) for a in node.attribute if a.name == "output_transpose") for node in nodes]
    assert perms == [last, last, [*range(axes + 2)]]


def test_a_value_that_is_also_an_output_is_converted_once() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12)))
    net.output(a)
    net.output(net.conv(a, (12, 8)))
    net.output(net.conv(a, (12, 8)))
    result = check(net)
    assert op_counts(result)["Transpose"] == 1
    assert [output.name for output in result.graph.output] == [output.name for output in net.build().graph.output]


def test_the_library_runs_it_on_the_cpu() -> None:
    """Slowly, but right."""
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 12, 12]), (8, 12)))
    a = net.op("MaxPool", net.op("Relu", net.conv(a, (12, 16))), kernel_shape=[2, 2], strides=[2, 2])
    net.output(net.conv(a, (16, 8)))
    model = net.build()
    plan = random_plan(model)
    result = rewrite(model, plan, target="cuda")
    feed = random_feed(model)
    session = runtime.InferenceSession(result.SerializeToString())
    expected = run(masked_dense(model, plan), feed)
    np.testing.assert_allclose(session.run(None, feed)[0], expected[0], atol=1e-5)
    assert layouts(result)[1] == (True, True)
