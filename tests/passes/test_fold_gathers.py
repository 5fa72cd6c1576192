"""Gathers sink and merge, and not a bit changes."""

from __future__ import annotations

import numpy as np
import onnx

from models import Net, op_counts, random_feed, run
from tetris_onnx.graph import io
from tetris_onnx.passes import Pass, fold_gathers, run_passes

PERM = [3, 1, 4, 0, 7, 2, 6, 5]
INVERSE = np.argsort(PERM).tolist()
SHAPE = ["N", 8, 6, 6]


def folded(net: Net) -> onnx.ModelProto:
    model = net.build()
    result = io.to_proto(run_passes(io.to_graph(model), [Pass("fold_gathers", fold_gathers)]), model)
    onnx.checker.check_model(result, full_check=True)
    feed = random_feed(model)
    for before, after in zip(run(model, feed, optimized=False), run(result, feed, optimized=False), strict=True):
        np.testing.assert_array_equal(before, after)
    return result


def gather(net: Net, x: str, perm: list[int], axis: int = 1) -> str:
    return net.op("Gather", x, net.constant(perm), axis=axis)


def gathers(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """(what is before, what is behind) of each Gather."""
    makers = {value: node.op_type for node in model.graph.node for value in node.output}
    readers = {value: node.op_type for node in model.graph.node for value in node.input}
    return [
        (makers.get(node.input[0], "input"), readers.get(node.output[0], "output"))
        for node in model.graph.node
        if node.op_type == "Gather"
    ]


def test_inverse_gathers_meet_and_vanish() -> None:
    net = Net()
    a = gather(net, net.conv(net.input("x", SHAPE), (8, 8)), PERM)
    a = net.op("MaxPool", net.op("Relu", net.batchnorm(a, 8)), kernel_shape=[2, 2])
    net.output(net.conv(gather(net, a, INVERSE), (8, 4)))
    assert gathers(folded(net)) == []


def test_two_become_one() -> None:
    net = Net()
    a = gather(net, net.conv(net.input("x", SHAPE), (8, 8)), PERM)
    net.output(net.conv(gather(net, net.op("Relu", a), PERM), (8, 4)))
    result = folded(net)
    assert gathers(result) == [("Relu", "Conv")]
    (node,) = (n for n in result.graph.node if n.op_type == "Gather")
    order = next(onnx.numpy_helper.to_array(i) for i in result.graph.initializer if i.name == node.input[1])
    assert order.tolist() == np.array(PERM)[PERM].tolist()


def test_one_that_changes_nothing_goes() -> None:
    net = Net()
    net.output(net.conv(gather(net, net.op("Relu", net.input("x", SHAPE)), list(range(8))), (8, 4)))
    assert gathers(folded(net)) == []


def test_a_fork_needs_one_for_each_reader_that_wants_another_order() -> None:
    net = Net()
    a = net.op("Relu", gather(net, net.conv(net.input("x", SHAPE), (8, 8)), PERM))
    for inner in (INVERSE, INVERSE, PERM):
        net.output(net.conv(gather(net, a, inner), (8, 4)))
    net.output(net.conv(a, (8, 4)))
    net.output(net.conv(a, (8, 4)))
    # two readers get their order for nothing, two share one, one has its own
    assert sorted(gathers(folded(net))) == [("Relu", "Conv")] * 2


def test_a_join_of_equal_orders() -> None:
    net = Net()
    x = net.input("x", SHAPE)
    a = gather(net, net.conv(x, (8, 8)), PERM)
    b = gather(net, net.conv(x, (8, 8)), PERM)
    net.output(net.conv(net.op("Relu", net.op("Add", a, b)), (8, 4)))
    assert gathers(folded(net)) == [("Relu", "Conv")]


def test_a_join_of_different_orders_stays() -> None:
    net = Net()
    x = net.input("x", SHAPE)
    a = gather(net, net.conv(x, (8, 8)), PERM)
    b = gather(net, net.conv(x, (8, 8)), INVERSE)
    net.output(net.conv(net.op("Add", a, b), (8, 4)))
    assert gathers(folded(net)) == [("Conv", "Add")] * 2


def test_before_a_concat_they_are_joined() -> None:
    net = Net()
    x = net.input("x", SHAPE)
    parts = [gather(net, net.conv(x, (8, 8)), PERM), net.conv(x, (8, 4)), gather(net, net.conv(x, (8, 8)), INVERSE)]
    a = net.op("Relu", net.op("Concat", *parts, axis=-3))
    net.output(net.conv(a, (20, 4)))
    assert gathers(folded(net)) == [("Relu", "Conv")]


def test_before_a_concat_that_nothing_passes_they_stay() -> None:
    net = Net()
    x = net.input("x", SHAPE)
    a = net.op("Relu", gather(net, net.conv(x, (8, 8)), PERM))
    net.output(net.op("Concat", a, net.conv(x, (8, 4)), axis=1))
    assert gathers(folded(net)) == [("Conv", "Relu")]


def test_one_value_twice_in_a_concat() -> None:
    net = Net()
    a = net.op("Relu", gather(net, net.conv(net.input("x", SHAPE), (8, 8)), PERM))
    net.output(net.conv(net.op("Concat", a, a, axis=1), (16, 4)))
    folded(net)


def test_through_a_flatten_it_grows() -> None:
    net = Net()
    a = net.op("Relu", gather(net, net.conv(net.input("x", SHAPE), (8, 8)), PERM))
    net.output(net.gemm(net.op("Flatten", a), (8 * 36, 5)))
    result = folded(net)
    assert gathers(result) == [("Flatten", "Gemm")]
    assert 288 in [i.dims[0] for i in result.graph.initializer]


def test_barriers() -> None:
    """Outputs, unknown operators, a second order."""
    net = Net()
    x = net.input("x", SHAPE)
    net.output(net.op("Relu", gather(net, net.conv(x, (8, 8)), PERM)))
    net.output(net.conv(net.op("LRN", gather(net, net.conv(x, (8, 8)), PERM), size=3), (8, 4)))
    assert gathers(folded(net)) == [("Conv", "Relu"), ("Conv", "LRN")]


def test_a_sum_with_its_own_permutation() -> None:
    net = Net()
    a = gather(net, net.conv(net.input("x", SHAPE), (8, 8)), PERM)
    net.output(net.conv(net.op("Add", a, gather(net, a, PERM)), (8, 4)))
    assert len(gathers(folded(net))) == 2


def test_other_gathers_are_left_alone() -> None:
    net = Net()
    x = net.input("x", SHAPE)
    a = net.op("Relu", gather(net, x, [0, 1, 2, 2, 4, 5, 6, 7]))
    b = net.op("Relu", gather(net, x, [1, 0, 3, 2, 5, 4], axis=2))
    net.output(net.conv(net.op("Add", a, b), (8, 4)))
    assert op_counts(folded(net))["Gather"] == 2
