"""Which operator runs each layer: block-sparse, whole or dense, by the predicted time with the changes of layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models import Net, block_sparse_nodes, op_counts
from tetris_onnx import Config, Plan, optimize
from tetris_onnx.config import LayerRule
from tetris_onnx.graph import io
from tetris_onnx.planner import Candidate, prepare, survey
from tetris_onnx.timing.cost import AVX512, Machine

WHOLE = Config(sparsity=0.0)
POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
# What a change of layout costs is what decides in most of these: nothing, or more than all layers together.
FREE = replace(AVX512, reorder=(0.0, 0.0))
DEAR = replace(AVX512, reorder=(1e9, 0.0))


def chosen(net: Net, config: Config = WHOLE, machine: Machine = AVX512) -> dict[str, Candidate]:
    return {c.layer.name: c for c in survey(prepare(io.to_graph(net.build())), config, machine)}


def whole(net: Net, config: Config = WHOLE, machine: Machine = AVX512) -> list[str]:
    return [name for name, c in chosen(net, config, machine).items() if c.whole]


def chain(kernels: tuple[int, ...], size: int = 56, channels: int = 64, **window: Any) -> Net:
    """Convolutions of 64 channels one behind the other, a depthwise one, which stays dense, at both ends."""
    net = Net()
    x = net.conv(net.input("x", [1, channels, size, size]), (channels, channels), group=64)
    for kernel in kernels:
        x = net.op("Relu", net.conv(x, (channels, channels), kernel, pads=[kernel // 2] * 4, **window))
    net.output(net.conv(x, (channels, channels), group=64))
    return net


def test_a_3x3_layer_is_kept_whole_where_winograd_wins() -> None:
    candidates = chosen(chain((3, 1)))
    assert [c.whole for c in candidates.values()] == [False, True, False, False]
    three = candidates["conv2"]
    assert three.why_dense == "its sparsity is 0"
    dense, ours = three.predict(1.0) or (0.0, 0.0)
    assert ours < 0.6 * dense
    assert three.unpruned_seconds == pytest.approx(1e-3 * ours)
    assert [c.faster_whole for c in candidates.values()] == [False, True, False, False]


@pytest.mark.parametrize("window", [{"strides": [2, 2]}, {"dilations": [2, 2]}])
def test_not_where_there_is_no_winograd(window: dict) -> None:
    assert whole(chain((3,), **window)) == []


def test_the_changes_of_layout_have_to_pay() -> None:
    assert whole(chain((3,)), machine=DEAR) == []
    # Three in a row share the two changes at their ends.
    alike = {"fork": (0.0, 0.0), "serial": (0.0, 0.0)}  # with any number of threads
    of_three = replace(AVX512, reorder=(400_000.0, 0.0), **alike)  # half a millisecond is won by each
    assert whole(chain((3,)), machine=of_three) == []
    assert whole(chain((3, 3, 3)), machine=of_three) == ["conv2", "conv3", "conv4"]
    # One that wins nothing by itself goes along where it saves two changes.
    assert whole(chain((3, 1, 3)), machine=of_three) == ["conv2", "conv3", "conv4"]
    assert whole(chain((3, 1, 3)), machine=FREE) == ["conv2", "conv4"]


def test_a_layer_kept_whole_does_not_lose_with_two_threads() -> None:
    machine = replace(AVX512, fork=(0.0, 1e6))  # a second thread costs our operator a millisecond
    assert whole(chain((3,))) == ["conv2"] and whole(chain((3,)), machine=machine) == []
    assert whole(chain((3,)), replace(WHOLE, threads=2), machine) == []
    pruned = chosen(chain((3,)), Config(sparsity=0.6), machine)["conv2"]
    assert not pruned.why_dense, "this one is asked for, and for one thread"


def test_pruned_layers_go_dense_where_changes_of_layout_cost_more_than_they_win() -> None:
    net = chain((1,), size=14)
    config = Config(sparsity=0.4)
    assert chosen(net, config, FREE)["conv2"].why_dense == ""
    reason = chosen(net, config, DEAR)["conv2"].why_dense
    assert reason.startswith("predicted ") and reason.endswith("too little for the changes of layout around it")
    asked = replace(config, layers=(LayerRule("node_conv2", sparsity=0.4),))
    assert chosen(net, asked, DEAR)["conv2"].why_dense == "", "the user asks for it"


def test_what_is_skipped_is_left_alone() -> None:
    assert whole(chain((3,)), Config(sparsity=0.0, layers=(LayerRule("*", skip=True),))) == []
    assert whole(chain((3,)), Config(sparsity=0.0, target="cuda")) == []


def test_weights_that_are_no_numbers_are_left_alone() -> None:
    net = chain((3,))
    weight = next(n for n in net.nodes if n.name == "node_conv2").input[1]
    next(t for t in net.initializers if t.name == weight).raw_data = np.full((64, 64, 3, 3), np.nan, "f").tobytes()
    assert whole(net) == []


def test_a_first_layer_goes_to_our_operator_where_it_saves_a_change_of_layout() -> None:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", [1, 3, 112, 112]), (3, 64)))
    net.output(net.op("Relu", net.conv(x, (64, 64))))
    candidates = chosen(net, Config(sparsity=0.7))
    assert candidates["conv1"].whole and "first layer" in candidates["conv1"].why_dense
    assert candidates["conv2"].why_dense == ""
    net.output(net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2]))  # wants the other layout
    assert not chosen(net, Config(sparsity=0.7), replace(DEAR, reorder=(0.0, 1.0)))["conv1"].whole


def test_a_pooling_that_is_taken_over_has_no_layout_of_its_own() -> None:
    def pooled(**attributes: Any) -> Net:
        net = Net()
        x = net.op("Relu", net.conv(net.input("x", [1, 64, 56, 56]), (64, 64)))
        net.output(net.op("MaxPool", x, **attributes))
        return net

    dear = replace(AVX512, reorder=(0.0, 5.0))  # 1 ms for the map, a quarter for the pooled one
    assert whole(pooled(**POOL), machine=dear) == ["conv1"]
    assert whole(pooled(kernel_shape=[3, 3], strides=[2, 2]), machine=dear) == []


def test_a_residual_add_has_one_layout() -> None:
    """Ours on both branches, or dense on both: an Add in onnxruntime's layout needs all of its inputs in it."""
    net = Net()
    x = net.input("x", [1, 64, 28, 28])
    a = net.op("Relu", net.conv(x, (64, 64)))
    b = net.conv(a, (64, 64), 1)
    net.output(net.conv(net.op("Add", net.conv(x, (64, 64), 1), b), (64, 64), group=64))
    assert whole(net, machine=FREE) == ["conv1"]
    assert "conv1" in whole(net)


def test_a_plan_is_followed_and_the_rest_is_chosen() -> None:
    model = chain((3, 3)).build()
    full = optimize(model, Config(sparsity=0.5, workers=1))
    plan = Plan(tuple(p for p in full.plan if p.layer == "conv3"))
    result = optimize(model, Config(), plan=plan)
    status = {row.layer: row.status for row in result.report.layers}
    assert status["conv3"] == "block-sparse" and status["conv2"] == "whole"
    reason = next(row.reason for row in result.report.layers if row.layer == "conv2")
    assert reason.startswith("it is not in the plan; ") and reason.endswith("x by Winograd")


def test_sparsity_0_gives_a_network_that_computes_the_same_faster() -> None:
    model = chain((3, 3), size=20).build()
    result = optimize(model, Config(sparsity=0.0))
    nodes = block_sparse_nodes(result.model)
    assert [n.name for n in nodes] == ["node_conv2", "node_conv3"]
    assert len(result.plan) == 0 and op_counts(result.model)["Conv"] == 2
    assert result.report.max_error < 1e-5
    assert result.report.parameters[0] == result.report.parameters[1]
    rows = {row.layer: row for row in result.report.layers}
    assert rows["conv2"].status == "whole" and rows["conv2"].density == 1.0
    before, after = rows["conv2"].predicted_ms or (0.0, 0.0)
    assert after < before
    assert any("2 of its layers run whole" in note for note in result.report.notes)


def test_a_layer_kept_whole_stays_float32() -> None:
    net = chain((3, 3), size=28)
    rule = (LayerRule("node_conv3", sparsity=0.5),)
    result = optimize(net.build(), Config(sparsity=0.0, layers=rule, precision="int8", workers=1))
    precision = {n.name: [a.s for a in n.attribute if a.name == "precision"] for n in block_sparse_nodes(result.model)}
    assert precision == {"node_conv2": [], "node_conv3": [b"int8"]}
