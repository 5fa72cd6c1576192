"""fuse_add_and_pool: what goes into the convolutions, what must not, and that the result stays the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from models import (
    TOLERANCE,
    Net,
    block_sparse_nodes,
    check_rewrite,
    op_counts,
    random_feed,
    random_plan,
    relative_error,
    rewrite,
    run,
)
from tetris_onnx import Config, optimize
from tetris_onnx.graph.layers import CONV, CONV_ADD, CONV_MAX_POOL
from tetris_onnx.optimize import masked_dense
from tetris_onnx.plan import Plan
from tetris_onnx.runtime import InferenceSession

POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}


def limits(node: onnx.NodeProto) -> tuple[float, float]:
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return found["activation_min"], found["activation_max"]


def check(net: Net, dynamic: int = 2, **counts: int) -> onnx.ModelProto:
    """Rewrite ``net``, compare it with and without the library, and count its operators."""
    model = net.build()
    plan = random_plan(model)
    result = check_rewrite(model, plan, dynamic=dynamic)
    found = op_counts(result)
    assert {op: found[op] for op in counts} == counts
    feed = random_feed(model, dynamic)
    expected = run(masked_dense(model, plan), feed)
    assert relative_error(expected, InferenceSession(result.SerializeToString()).run(None, feed)) <= TOLERANCE
    return result


def residual_block(net: Net, x: str, channels: int, shortcut: bool = False) -> str:
    a = net.op("Relu", net.conv(x, (channels, 8), 1))
    a = net.conv(net.op("Relu", net.conv(a, (8, 8))), (8, channels), 1)
    other = net.conv(x, (channels, channels), 1) if shortcut else x
    return net.op("Relu", net.op("Add", a, other))


@pytest.mark.parametrize("shortcut", [True, False])
def test_residual_blocks(shortcut: bool) -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 4, 9, 7]), (4, 16)))
    for number in range(3):
        x = residual_block(net, x, 16, shortcut and number == 0)
    net.output(x)
    result = check(net, BlockSparseConvAdd=3, BlockSparseConv=7 + shortcut, Add=0, Relu=0)
    assert all(limits(n) == (0.0, np.inf) for n in block_sparse_nodes(result) if n.op_type == CONV_ADD)
    assert {f.name for f in result.functions} == {CONV, CONV_ADD}


def test_the_later_of_two_convolutions_takes_the_add() -> None:
    net = Net()
    x = net.input("x", ["N", 8, 6, 6])
    early, late = net.conv(x, (8, 12)), net.conv(x, (8, 12), 1)
    net.output(net.op("Add", late, early))
    result = check(net, BlockSparseConvAdd=1, BlockSparseConv=1, Add=0)
    fused = next(n for n in result.graph.node if n.op_type == CONV_ADD)
    assert fused.name == f"node_{late}" and fused.input[6] == early


@pytest.mark.parametrize("axes", [1, 3])
def test_an_add_over_any_number_of_axes(axes: int) -> None:
    net = Net()
    x = net.input("x", ["N", 8, *[5] * axes])
    net.output(net.op("Clip", net.op("Add", net.conv(x, (8, 8), axes=axes), x), net.constant(np.float32(-0.5))))
    (node,) = block_sparse_nodes(check(net, BlockSparseConvAdd=1, Add=0, Clip=0))
    assert limits(node) == (-0.5, np.inf)


def test_adds_that_stay() -> None:
    net = Net()
    x = net.input("x", ["N", 8, 6, 6])
    a = net.op("Add", net.op("Relu", net.conv(x, (8, 8))), x)  # the activation comes first
    pixel = net.op("GlobalAveragePool", a)
    b = net.op("Add", net.conv(a, (8, 8)), pixel)  # broadcast
    c = net.conv(b, (8, 8))
    c = net.op("Mul", net.op("Add", c, b), c)  # read twice
    d = net.conv(c, (8, 8))
    net.output(d)  # seen from outside
    net.output(net.op("Add", d, c))
    e = net.conv(c, (8, 8))
    net.output(net.op("Add", e, e))
    check(net, BlockSparseConvAdd=0, BlockSparseConv=5, Add=5)


def test_shapes_that_may_differ() -> None:
    net = Net()
    x = net.input("x", ["N", 8, "H", "W"])
    y = net.input("y", ["M", 8, "H", "W"])
    net.output(net.op("Add", net.conv(x, (8, 8)), y))
    model = net.build()
    assert op_counts(rewrite(model, random_plan(model)))["Add"] == 1


@pytest.mark.parametrize("order", ["Relu MaxPool", "MaxPool Relu", "MaxPool", "Relu MaxPool Relu", "Clip MaxPool"])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (33, 30)])
def test_pools(order: str, size: tuple[int, int]) -> None:
    net = Net()
    x = net.conv(net.input("x", ["N", 8, *size]), (8, 12))
    for op in order.split():
        if op == "Clip":
            x = net.op("Clip", x, net.constant(np.float32(-0.5)), net.constant(np.float32(0.5)))
        else:
            x = net.op(op, x, **(POOL if op == "MaxPool" else {}))
    net.output(net.conv(x, (12, 8)))
    result = check(net, BlockSparseConvMaxPool=1, BlockSparseConv=1, MaxPool=0, Relu=0, Clip=0)
    fused = next(n for n in result.graph.node if n.op_type == CONV_MAX_POOL)
    assert limits(fused) == ((-0.5, 0.5) if "Clip" in order else (0.0 if "Relu" in order else -np.inf, np.inf))
    assert CONV_MAX_POOL in {f.name for f in result.functions}


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3], "strides": [2, 2]},
        {"kernel_shape": [2, 2]},
        {"kernel_shape": [2, 2], "strides": [2, 1]},
        {**POOL, "pads": [1, 0, 0, 0]},
        {**POOL, "dilations": [2, 1]},
        {**POOL, "auto_pad": "SAME_UPPER"},
        {**POOL, "ceil_mode": 1},
    ],
)
def test_pools_that_stay(attributes: dict[str, Any]) -> None:
    net = Net()
    x = net.conv(net.input("x", ["N", 8, 9, 9]), (8, 12))
    net.output(net.op("MaxPool", x, **attributes))
    check(net, BlockSparseConvMaxPool=0, MaxPool=1)


@pytest.mark.parametrize(
    "attributes", [{"ceil_mode": 1}, {"auto_pad": "VALID"}, {"pads": [0] * 4, "dilations": [1, 1]}]
)
def test_other_ways_to_write_the_same_pool(attributes: dict[str, Any]) -> None:
    net = Net()
    net.output(net.op("MaxPool", net.conv(net.input("x", ["N", 8, 8, 6]), (8, 12)), **POOL, **attributes))
    check(net, BlockSparseConvMaxPool=1, MaxPool=0)


def test_a_pool_whose_indices_are_read_stays() -> None:
    net = Net()
    x = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12))
    value, indices = net.ops("MaxPool", [x], 2, **POOL)
    net.output(value)
    net.output(net.op("Cast", indices, to=onnx.TensorProto.FLOAT))
    check(net, BlockSparseConvMaxPool=0, MaxPool=1)


def test_a_convolution_over_one_axis_is_not_pooled() -> None:
    net = Net()
    x = net.conv(net.input("x", ["N", 8, 12]), (8, 12), axes=1)
    net.output(net.op("MaxPool", x, kernel_shape=[2], strides=[2]))
    check(net, MaxPool=1)


@pytest.mark.parametrize("gathers", ["absorb", "keep"])
def test_with_gathers_only_what_is_exact(gathers: str) -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16)))
    x = net.op("MaxPool", residual_block(net, x, 16), **POOL)
    net.output(net.op("MaxPool", net.conv(x, (16, 16)), **POOL))
    model = net.build()
    result = check_rewrite(model, gathers=gathers, left=0 if gathers == "absorb" else None)
    counts = op_counts(result)
    assert counts[CONV_ADD] + counts["Add"] == 1 and counts[CONV_MAX_POOL] + counts["MaxPool"] == 2
    if gathers == "absorb":
        assert (counts[CONV_ADD], counts[CONV_MAX_POOL]) == (1, 1)  # behind the Add there is no convolution to take it


def test_no_pool_for_cuda() -> None:
    net = Net()
    x = net.conv(net.input("x", [1, 32, 8, 8]), (32, 32))
    net.output(net.op("MaxPool", net.op("Relu", x), **POOL))
    model = net.build()
    for target, fused in (("cpu", 1), ("cuda", 0)):
        result = optimize(model, Config(block_size=(8, 8), workers=1, target=target))
        assert op_counts(result.model)[CONV_MAX_POOL] == fused
        assert result.report.fused == (0, fused)


def test_an_optimized_model_can_be_optimized_again() -> None:
    """The channels of a fused Add belong to its addend too: they stay as they are."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16)))
    x = residual_block(net, x, 16)
    x = net.op("MaxPool", net.op("Relu", net.conv(x, (16, 16))), **POOL)
    net.output(net.conv(x, (16, 8)))
    model = net.build()
    plan = random_plan(model)
    ends = {"conv1", "conv6"}  # pruned in the second run
    first = rewrite(model, Plan(tuple(p for p in plan if p.layer not in ends)))
    assert {CONV_ADD, CONV_MAX_POOL} <= set(op_counts(first))
    second = Plan(tuple(p for p in plan if p.layer in ends))
    again = rewrite(first, second)
    assert len(block_sparse_nodes(again)) == len(plan)
    feed = random_feed(model)
    expected = run(masked_dense(first, second), feed)
    assert relative_error(expected, run(again, feed)) <= TOLERANCE
    assert relative_error(expected, InferenceSession(again.SerializeToString()).run(None, feed)) <= TOLERANCE
