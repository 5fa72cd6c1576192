"""prune_blocks and reorder_weights, each alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest

from models import TOLERANCE, Net, op_counts, random_feed, random_plan, relative_error, run, weights_of
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import find_layers
from tetris_onnx.passes import Pass, normalize_layers, prune_blocks, reorder_weights, run_passes
from tetris_onnx.passes.prune_blocks import weight_mask
from tetris_onnx.plan import LayerPlan, Plan


def after(model: onnx.ModelProto, plan: Plan, *names: str) -> onnx.ModelProto:
    steps = {"prune": partial(prune_blocks, plan=plan), "reorder": partial(reorder_weights, plan=plan)}
    passes = [Pass("normalize_layers", normalize_layers), *(Pass(name, steps[name]) for name in names)]
    return io.to_proto(run_passes(io.to_graph(model), passes), model)


def test_a_mask_by_hand() -> None:
    """The reordered rows are 2, 0, 1, the columns 1, 0: the block of rows 2, 0 and column 1 stays."""
    plan = LayerPlan("y", np.array([2, 0, 1]), np.array([1, 0]), (2, 1), np.array([[True, False], [False, False]]))
    assert weight_mask(plan).tolist() == [[False, True], [False, False], [False, True]]


LAYERS = pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "gemm", "gemm transB", "matmul", "matmul 3-D"])


def one_layer(kind: str, bias: bool = True) -> Net:
    net = Net()
    if kind.startswith("conv"):
        axes = int(kind[4])
        net.output(net.conv(net.input("x", ["N", 7, *[5] * axes]), (7, 10), axes=axes, bias=bias))
    elif kind == "gemm":
        extra = [net.random(10)] if bias else []
        net.output(net.op("Gemm", net.input("x", ["N", 7]), net.random(7, 10), *extra))
    elif kind == "gemm transB":
        net.output(net.gemm(net.input("x", ["N", 7]), (7, 10), bias))
    else:
        net.output(net.matmul(net.input("x", ["N", 3, 7] if "3-D" in kind else ["N", 7]), (7, 10)))
    return net


@LAYERS
def test_pruning_zeroes_the_dropped_blocks_and_nothing_else(kind: str) -> None:
    model = one_layer(kind).build()
    plan = random_plan(model, (4, 3))
    (decision,) = plan
    (before,) = find_layers(io.to_graph(model))
    (pruned,) = find_layers(io.to_graph(after(model, plan, "prune")))
    mask = np.broadcast_to(weight_mask(decision).reshape(10, 7, *[1] * (before.weight.ndim - 2)), before.weight.shape)
    np.testing.assert_array_equal(pruned.weight[mask], before.weight[mask])
    assert not pruned.weight[~mask].any() and 0 < mask.mean() < 1
    assert (pruned.weight != 0).mean() == pytest.approx(decision.density)


@LAYERS
@pytest.mark.parametrize("bias", [True, False])
def test_reordering_changes_no_result(kind: str, bias: bool) -> None:
    model = one_layer(kind, bias).build()
    plan = random_plan(model)
    result = after(model, plan, "reorder")
    assert op_counts(result)["Gather"] == 2
    feed = random_feed(model)
    assert relative_error(run(model, feed), run(result, feed)) < TOLERANCE
    (decision,) = plan
    (layer,) = find_layers(io.to_graph(result))
    (before,) = find_layers(io.to_graph(model))
    np.testing.assert_array_equal(layer.weight, before.weight[decision.out_perm][:, decision.in_perm])
    assert layer.name == decision.layer  # although another value has the name now


@pytest.mark.parametrize(("fixed", "gathers"), [(["conv1.in"], 1), (["conv1.out"], 1), (["conv1.in", "conv1.out"], 0)])
def test_no_gather_where_nothing_is_reordered(fixed: list[str], gathers: int) -> None:
    model = one_layer("conv2d").build()
    result = after(model, random_plan(model, fixed=fixed), "reorder")
    assert op_counts(result)["Gather"] == gathers


def test_layers_that_are_not_planned_stay() -> None:
    model = one_layer("conv2d").build()
    result = after(model, Plan(()), "prune", "reorder")
    assert op_counts(result) == op_counts(model)
    np.testing.assert_array_equal(weights_of(result)["const1"], weights_of(model)["const1"])


def test_shared_weights_are_pruned_once_where_the_plans_agree() -> None:
    net = Net()
    weight = net.constant(net.weight_values(8, 8, 1, 1))
    a = net.input("x", ["N", 8, 5, 5])
    for _ in range(4):
        a = net.op("Conv", a, weight)
    net.output(a)
    model = net.build()
    first, second, _, _ = random_plan(model)
    plan = Plan(
        tuple(
            LayerPlan(f"conv{i}", p.out_perm, p.in_perm, p.block_size, p.keep)
            for i, p in ((1, first), (2, second), (3, first))
        )
    )
    result = after(model, plan, "prune")
    names = [node.input[1] for node in result.graph.node]
    assert names[0] == names[2] and len(set(names)) == 3
    np.testing.assert_array_equal(weights_of(result)[names[3]], weights_of(model)["const1"])


def test_equal_plans_of_different_weights_share_nothing() -> None:
    """Also not when a weight that was replaced leaves its place in memory to another one."""
    net = Net()
    a = net.input("x", ["N", 8, 5, 5])
    for _ in range(30):
        a = net.conv(a, (8, 8), kernel=1, bias=False)
    net.output(a)
    model = net.build()
    (first, *_) = random_plan(model)
    plan = Plan(
        tuple(LayerPlan(f"conv{i}", first.out_perm, first.in_perm, first.block_size, first.keep) for i in range(1, 31))
    )
    mask = weight_mask(first).reshape(8, 8, 1, 1)
    before, result = weights_of(model), after(model, plan, "prune")
    for i, node in enumerate(result.graph.node, 1):
        np.testing.assert_array_equal(weights_of(result)[node.input[1]], before[f"const{i}"] * mask)
