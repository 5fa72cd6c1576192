"""Gathers move into the operators and dense layers around them."""

from __future__ import annotations

import numpy as np
import onnx

from models import (
    TOLERANCE,
    Net,
    block_sparse_nodes,
    op_counts,
    random_feed,
    random_plan,
    relative_error,
    rewrite,
    run,
    weights_of,
)
from tetris_onnx.graph import io
from tetris_onnx.optimize import pipeline
from tetris_onnx.passes import Pass, absorb_gathers, attach_fallback, run_passes
from tetris_onnx.plan import Plan

PERM = [3, 1, 4, 0, 7, 2, 6, 5]
SHAPE = ["N", 8, 6, 6]


def absorbed(net: Net, plan: Plan | None = None) -> onnx.ModelProto:
    """The model with its own Gathers absorbed, lowered first where there is a ``plan`` (of identity permutations)."""
    model = net.build()
    graph = io.to_graph(model)
    if plan is not None:
        graph = run_passes(graph, [s for s in pipeline(plan) if s.name in ("normalize_layers", "lower_block_sparse")])
    graph = run_passes(graph, [Pass("absorb_gathers", absorb_gathers), Pass("attach_fallback", attach_fallback)])
    result = io.to_proto(graph, model)
    onnx.checker.check_model(result, full_check=True)
    feed = random_feed(model)
    assert relative_error(run(model, feed), run(result, feed)) < TOLERANCE
    return result


def sparse_plan(net: Net) -> Plan:
    """All blocks kept, all orders identity, for every layer."""
    model = net.build()
    names = [p.layer for p in random_plan(model)]
    return random_plan(model, density=1.0, fixed=[f"{n}.{end}" for n in names for end in ("in", "out")])


def gather(net: Net, x: str, perm: list[int] | None = None) -> str:
    return net.op("Gather", x, net.constant(perm or PERM), axis=1)


def between_two_layers() -> Net:
    net = Net()
    a = gather(net, net.conv(net.input("x", SHAPE), (8, 8)))
    net.output(net.conv(net.op("Relu", a), (8, 4)))
    return net


def test_into_the_producer() -> None:
    net = between_two_layers()
    result = absorbed(net, sparse_plan(net))
    first, second = block_sparse_nodes(result)
    weights = weights_of(result)
    assert weights[first.input[4]].tolist() == np.argsort(PERM).tolist()
    np.testing.assert_array_equal(weights[first.input[5]], weights_of(net.build())["const2"][PERM])
    for name in (first.input[3], second.input[3], second.input[4]):
        assert weights[name].tolist() == list(range(len(weights[name])))
    assert op_counts(result)["Gather"] == 0


def test_into_a_dense_producer() -> None:
    result = absorbed(between_two_layers())
    assert op_counts(result) == {"Conv": 2, "Relu": 1}
    np.testing.assert_array_equal(
        weights_of(result)[result.graph.node[0].input[1]], weights_of(between_two_layers().build())["const1"][PERM]
    )


def fork() -> Net:
    """A region that a layer writes into, with a reader in its order and a larger one in another order."""
    net = Net()
    a = net.op("PRelu", net.conv(net.input("x", SHAPE), (8, 8)), net.random(8, 1, 1))
    net.output(net.conv(a, (8, 4)))
    net.output(net.conv(gather(net, a), (8, 12)))
    net.output(net.conv(gather(net, a, [7, 6, 5, 4, 3, 2, 1, 0]), (8, 3)))
    return net


def test_into_the_region() -> None:
    net = fork()
    result = absorbed(net, sparse_plan(net))
    assert op_counts(result)["Gather"] == 0
    weights = weights_of(result)
    writer, *readers = block_sparse_nodes(result)
    assert weights[writer.input[4]].tolist() == np.argsort(PERM).tolist()
    orders = {len(weights[r.input[4]]): weights[r.input[3]].tolist() for r in readers}
    assert orders[12] == list(range(8))  # the largest reads its channels in a row
    assert orders[4] == np.argsort(PERM).tolist()
    assert orders[3] == np.argsort(PERM)[::-1].tolist()
    slope = next(node.input[1] for node in result.graph.node if node.op_type == "PRelu")
    np.testing.assert_array_equal(weights[slope], weights_of(net.build())["const3"][PERM])


def test_into_the_region_of_dense_layers() -> None:
    assert op_counts(absorbed(fork())) == {"Conv": 4, "PRelu": 1}


def test_into_the_consumers_where_the_region_cannot_change() -> None:
    net = Net()
    a = net.conv(gather(net, net.input("x", SHAPE)), (8, 8))
    b = net.op("LRN", a, size=3)
    net.output(net.op("Add", net.conv(gather(net, b), (8, 8)), net.conv(gather(net, b), (8, 8), kernel=3)))
    plan = sparse_plan(net)
    result = absorbed(net, plan)
    assert op_counts(result)["Gather"] == 0
    weights = weights_of(result)
    assert [weights[n.input[3]].tolist() for n in block_sparse_nodes(result)] == [PERM, PERM, PERM]
    assert op_counts(absorbed(net))["Gather"] == 0


def test_behind_a_flatten() -> None:
    net = Net()
    a = net.op("Flatten", net.op("Relu", net.conv(net.input("x", SHAPE), (8, 8))))
    perm = net.rng.permutation(8 * 36).tolist()
    net.output(net.gemm(net.op("Gather", a, net.constant(perm), axis=1), (8 * 36, 8)))
    result = absorbed(net, sparse_plan(net))
    assert op_counts(result)["Gather"] == 0
    assert weights_of(result)[block_sparse_nodes(result)[1].input[3]].tolist() == perm


def test_gathers_that_others_read_stay() -> None:
    net = Net()
    x = net.input("x", SHAPE)
    a = gather(net, x)
    net.output(net.conv(a, (8, 4)))
    net.output(net.op("LRN", a, size=3))
    net.output(gather(net, net.op("Relu", x)))
    assert op_counts(absorbed(net))["Gather"] == 2


def test_a_gather_of_the_weight_input_is_not_one_of_the_data() -> None:
    net = Net()
    x = net.input("x", [2, 8])
    w = net.op("Gather", net.input("w", [4, 8]), net.constant(PERM), axis=1)
    net.output(net.op("MatMul", x, net.op("Transpose", w, perm=[1, 0])))
    assert op_counts(absorbed(net))["Gather"] == 1


def test_the_order_of_a_value_that_is_an_output_stays() -> None:
    net = Net()
    a = net.conv(net.input("x", SHAPE), (8, 8))
    net.output(a)
    net.output(net.conv(gather(net, a), (8, 8)))
    result = absorbed(net, sparse_plan(net))
    first, second = block_sparse_nodes(result)
    assert weights_of(result)[first.input[4]].tolist() == list(range(8))
    assert weights_of(result)[second.input[3]].tolist() == PERM


def test_permutations_are_stored_once_in_a_chain() -> None:
    net = Net()
    a = net.input("x", SHAPE)
    for _ in range(3):
        a = net.op("Relu", net.conv(a, (8, 8)))
    net.output(net.conv(a, (8, 8)))
    result = rewrite(net.build(), random_plan(net.build()))
    nodes = block_sparse_nodes(result)
    # Inner layers read in a row: their input_perm is one constant.
    assert len({node.input[3] for node in nodes[1:]}) == 1
