"""lower_first_layer: a first convolution that is kept whole runs in our operator where only ours read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

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
)
from tetris_onnx import Config, optimize
from tetris_onnx.graph.layers import DOMAIN
from tetris_onnx.optimize import masked_dense, pipeline
from tetris_onnx.runtime import InferenceSession

POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}


def network(kernel: int = 3, channels: int = 3, between: str = "Relu", **window: Any) -> Net:
    """x -> first convolution -> ``between`` -> a second one."""
    net = Net()
    x = net.conv(net.input("x", ["N", channels, 12, 10]), (channels, 40), kernel, **window)
    for op in between.split():
        x = net.op(op, x, **(POOL if op == "MaxPool" else {}))
    net.output(net.conv(x, (40, 24)))
    return net


@pytest.mark.parametrize("between", ["", "Relu", "Relu MaxPool", "MaxPool Relu"])
@pytest.mark.parametrize(("kernel", "channels"), [(3, 3), (1, 1), (2, 4)])
def test_it_is_lowered_with_all_its_blocks(kernel: int, channels: int, between: str) -> None:
    net = network(kernel, channels, between, pads=[kernel // 2] * 4)
    model = net.build()
    plan = random_plan(model, skip=["conv1"])
    result = rewrite(model, plan)
    first, second = block_sparse_nodes(result)
    assert first.name == "node_conv1"
    assert first.op_type == ("BlockSparseConvMaxPool" if "MaxPool" in between else "BlockSparseConv")
    assert set(op_counts(result)) == {first.op_type, second.op_type}
    blocks = next(t for t in result.graph.initializer if t.name == first.input[1])
    assert list(blocks.dims) == [2, 32, channels, kernel, kernel]  # 40 rows in blocks of 32
    feed = random_feed(model)
    expected = run(masked_dense(model, plan), feed)
    assert relative_error(expected, run(result, feed)) <= TOLERANCE
    assert relative_error(expected, InferenceSession(result.SerializeToString()).run(None, feed)) <= TOLERANCE


@pytest.mark.parametrize(
    "net",
    [
        network(kernel=7, pads=[3] * 4),
        network(strides=[2, 2]),
        network(channels=5),
        network(between="Sigmoid"),
        network(between="Relu Sigmoid"),
    ],
)
def test_it_stays_where_that_would_not_gain(net: Net) -> None:
    model = net.build()
    result = rewrite(model, random_plan(model, skip=["conv1"]))
    assert op_counts(result)["Conv"] == 1


def test_it_stays_where_a_dense_layer_reads_it() -> None:
    net = network()
    net.output(net.conv("relu1", (40, 8), 1))
    model = net.build()
    assert op_counts(rewrite(model, random_plan(model, skip=["conv1", "conv3"])))["Conv"] == 2
    assert op_counts(rewrite(model, random_plan(model, skip=["conv1"])))["Conv"] == 0


def test_it_stays_where_it_is_an_output_or_the_only_layer() -> None:
    net = network()
    net.output("relu1")
    model = net.build()
    assert op_counts(rewrite(model, random_plan(model, skip=["conv1"])))["Conv"] == 1
    net = Net()
    net.output(net.conv(net.input("x", ["N", 3, 8, 8]), (3, 8)))
    model = net.build()
    assert op_counts(rewrite(model, random_plan(model, skip=["conv1"]))) == {"Conv": 1}


def test_not_in_the_middle_and_not_for_cuda() -> None:
    net = Net()
    x = net.conv(net.input("x", ["N", 16, 8, 8]), (16, 4))
    net.output(net.conv(net.conv(x, (4, 16)), (16, 16)))
    model = net.build()
    assert op_counts(rewrite(model, random_plan(model, skip=["conv2"])))["Conv"] == 1
    assert "lower_first_layer" not in [step.name for step in pipeline(random_plan(model), target="cuda")]


def test_the_report_says_so_and_counts_it_as_dense() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [1, 3, 32, 32]), (3, 64)))
    net.output(net.conv(net.op("Relu", net.conv(x, (64, 64))), (64, 64)))
    result = optimize(net.build(), Config(sparsity=0.75, workers=1))
    row = result.report.layers[0]
    assert (row.status, row.density, row.kept_parameters) == ("dense", 1.0, row.parameters)
    assert "kept whole" in row.reason and "first layer" in row.reason
    assert "conv1" not in {plan.layer for plan in result.plan}
    assert [n.domain for n in result.model.graph.node if n.name == "node_conv1"] == [DOMAIN]
    assert all("kept whole" not in other.reason for other in result.report.layers[1:])
    assert np.isfinite(result.report.max_error)
