"""What is planned for each layer, and why not."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import tetris_onnx
from models import Net, check_rewrite, rewrite, weights_of
from tetris_onnx import planner
from tetris_onnx.algorithms.permutation import is_identity
from tetris_onnx.algorithms.reorder import Reordering
from tetris_onnx.config import Config, LayerRule
from tetris_onnx.data.calibration import CalibrationError
from tetris_onnx.graph import io
from tetris_onnx.graph.channels import gather_permutation
from tetris_onnx.graph.layers import find_layers
from tetris_onnx.plan import LayerPlan, Plan, PlanError
from tetris_onnx.planner import inspect, layer_shapes, make_plan, match_plan, prepare, set_sizes, survey
from tetris_onnx.reports.report import LayerReport
from tetris_onnx.timing.cost import AVX512, LayerShape, predict, predict_dense


def planned(net: Net, **options: object) -> tuple[Plan, dict[str, LayerReport]]:
    config = Config(**({"workers": 1, "block_size": (16, 16)} | options))  # type: ignore[arg-type]
    plan, rows = make_plan(survey(prepare(io.to_graph(net.build())), config), config)
    return plan, {row.layer: row for row in rows}


def network() -> Net:
    """Four layers of 32 channels between a small first and a small last one."""
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 3, 16, 16]), (3, 32)))
    for _ in range(3):
        a = net.op("Relu", net.batchnorm(net.conv(a, (32, 32)), 32))
    a = net.op("Flatten", net.op("MaxPool", a, kernel_shape=[4, 4], strides=[4, 4]))
    a = net.op("Relu", net.gemm(a, (512, 128)))
    net.output(net.gemm(a, (128, 10)))
    return net


def test_every_layer_has_a_row_with_a_reason_or_a_plan() -> None:
    plan, rows = planned(network())
    assert list(rows) == ["conv1", "conv2", "conv3", "conv4", "gemm1", "gemm2"]
    assert [p.layer for p in plan] == ["conv2", "conv3", "conv4", "gemm1"]
    for name, row in rows.items():
        decision = plan.get(name)
        if decision is None:
            assert row.status == ("whole" if name == "conv1" else "dense")
            assert row.reason and row.density == 1 and row.block_size is None
            assert row.kept_parameters == row.parameters and row.retained is None
        else:
            assert row.status == "block-sparse" and row.reason == ""
            assert row.block_size == decision.block_size == (16, 16)
            assert row.density == pytest.approx(0.5) and row.kept_parameters == row.parameters // 2
            assert row.retained is not None and row.baseline is not None
            assert row.baseline <= row.retained <= 1
    assert "first layer" in rows["conv1"].reason and "3 x 32" in rows["conv1"].reason
    assert "last layer" in rows["gemm2"].reason
    assert rows["conv2"].macs == 16 * 16 * 32 * 32 * 9 and rows["gemm1"].macs == 512 * 128


def test_the_kept_blocks_are_the_best_of_the_reordered_weight() -> None:
    net = network()
    plan, rows = planned(net)
    decision = plan.get("conv3")
    assert decision is not None
    graph = prepare(io.to_graph(net.build()))
    weight = next(n for n in graph.nodes if n.outputs[0].name == "conv3").inputs[1].values
    scores = np.abs(weight).sum((2, 3))[decision.out_perm][:, decision.in_perm]
    sums = scores.reshape(2, 16, 2, 16).sum((1, 3))
    assert sums[decision.keep].min() >= sums[~decision.keep].max()
    assert rows["conv3"].retained == pytest.approx(sums[decision.keep].sum() / sums.sum(), rel=1e-5)


@pytest.mark.parametrize("reorder", ["exact", "greedy", "none"])
def test_reordering_never_retains_less(reorder: str) -> None:
    plan, rows = planned(network(), reorder=reorder)
    for decision in plan:
        row = rows[decision.layer]
        assert row.retained is not None and row.baseline is not None
        if reorder == "none":
            assert is_identity(decision.out_perm) and is_identity(decision.in_perm)
            assert row.retained == row.baseline
        else:
            assert row.retained > row.baseline  # (not only at least: the weights are random)


def same(a: Plan, b: Plan) -> bool:
    return len(a) == len(b) and all(
        p.layer == q.layer
        and all(np.array_equal(getattr(p, f), getattr(q, f)) for f in ("out_perm", "in_perm", "keep", "block_size"))
        for p, q in zip(a, b, strict=True)
    )


def test_deterministic_whatever_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetris_onnx.planner._WORTH_PROCESSES", 0)
    net = Net()
    a = net.conv(net.input("x", ["N", 32, 16, 16]), (32, 32), kernel=1)
    net.output(net.conv(a, (32, 48), kernel=1))
    first = planned(net, workers=1)[0]
    assert len(first) == 2
    assert same(first, planned(net, workers=1)[0])
    assert same(first, planned(net, workers=2)[0])


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    graph = prepare(io.to_graph(network().build()))
    config = Config(workers=1, block_size=(16, 16))
    make_plan(survey(graph, config), config, lambda *step: seen.append(step))
    assert seen == [("search", i, 4) for i in (1, 2, 3, 4)]


def test_rules() -> None:
    net = network()
    rules = (
        LayerRule("node_conv1", sparsity=0.25),  # explicit: although it is small
        LayerRule("node_conv2", skip=True),
        LayerRule("node_conv3", sparsity=0.0),
        LayerRule("node_conv*", block_size=(8, 4)),
        LayerRule("conv4", skip=True),  # the name of the output is not that of the node
    )
    plan, rows = planned(net, layers=rules)
    assert [p.layer for p in plan] == ["conv1", "conv4", "gemm1"]
    assert rows["conv2"].reason == "the config skips it"
    assert rows["conv3"].reason.startswith("its sparsity is 0")
    first = plan.get("conv1")
    assert first is not None and first.block_size == (16, 2)  # shrunk until there are two along each axis
    assert rows["conv1"].density == pytest.approx(0.75, abs=0.13)
    fourth = plan.get("conv4")
    assert fourth is not None and fourth.block_size == (8, 4)


def small_layers() -> Net:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 32, 8, 8]), (32, 8)))
    a = net.op("Relu", net.conv(a, (8, 32)))
    a = net.conv(net.op("GlobalAveragePool", a), (32, 32), kernel=1)
    net.output(net.conv(a, (32, 32)))
    return net


def test_layers_that_would_not_get_faster_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_layers()
    machine = replace(AVX512, dense={**AVX512.dense, "call": 0.0}, sparse={**AVX512.sparse, "call": 2000.0})
    machine = replace(machine, reorder=(0.0, 0.0))  # no layer helps its neighbors
    monkeypatch.setattr(planner, "load_machine", lambda: machine)
    rows = planned(net, block_size=(32, 32))[1]
    assert "first layer" in rows["conv1"].reason
    for name in ("conv2", "conv3", "conv4"):
        row = rows[name]
        assert row.status == "dense"
        found = re.fullmatch(r"predicted (\S+) ms block-sparse against (\S+) ms dense", row.reason)
        assert found and float(found[1]) >= 0.95 * float(found[2])
        # It takes what it takes dense: 32 x 32 products in the cache.
        assert row.predicted_ms is not None and row.predicted_ms[0] == row.predicted_ms[1]
        assert float(found[2]) == pytest.approx(row.predicted_ms[0], rel=0.05)
    # What the user asks for is done.
    plan, rows = planned(net, block_size=(32, 32), layers=(LayerRule("node_conv[23]"),))
    assert [p.layer for p in plan] == ["conv2", "conv3"]
    predicted = rows["conv3"].predicted_ms
    assert predicted is not None and predicted[1] > predicted[0]
    # A machine on which calls cost nothing.
    monkeypatch.setattr(planner, "load_machine", lambda: replace(machine, sparse={**machine.sparse, "call": 0.0}))
    assert [p.layer for p in planned(net, block_size=(32, 32))[0]] == ["conv2", "conv3", "conv4"]


def test_the_predicted_time_is_that_of_the_blocks_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "load_machine", lambda: AVX512)
    plan, rows = planned(network(), sparsity=0.75)
    shape = LayerShape(32, 32, (3, 3), (1, 1), (1, 1), (16, 16), (16, 16))
    decision = plan.get("conv2")
    assert decision is not None
    dense, sparse = 1e3 * predict_dense(shape, AVX512), 1e3 * float(predict(shape, 0.25, (16, 16), AVX512))
    assert rows["conv2"].predicted_ms == pytest.approx((dense, sparse))
    assert inspect(network().build(), Config(block_size=(16, 16), sparsity=0.75))[1].predicted_ms == pytest.approx(
        (dense, sparse)
    )


def test_shapes_of_layers() -> None:
    net = Net()
    a = net.conv(net.input("x", [4, 8, 9, 9]), (8, 16), strides=[2, 2])
    a = net.op("Relu", net.conv(net.conv(a, (16, 16), group=2), (16, 16), group=4))
    a = net.op("Reshape", a, net.constant([4, 10, 40]))
    net.output(net.matmul(a, (40, 24)))
    graph = prepare(io.to_graph(net.build()))
    assert layer_shapes(graph, find_layers(graph)) == [
        LayerShape(16, 8, (3, 3), (2, 2), (1, 1), (9, 9), (5, 5), samples=4),
        LayerShape(16, 16, (3, 3), (1, 1), (1, 1), (5, 5), (5, 5), samples=4, groups=2),
        None,  # groups of 4 channels: it stays dense in any case
        LayerShape(24, 40, samples=40),
    ]


def test_open_sizes_are_taken_as_usual_ones() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 32, "H", "W"]), (32, 64), strides=[2, 2]))
    net.output(net.conv(a, (64, 64)))
    graph = prepare(io.to_graph(net.build()))
    first, second = layer_shapes(graph, find_layers(graph))
    assert first is not None and (first.input_size, first.output_size) == ((224, 224), (112, 112))
    assert second is not None and second.samples == 1 and second.output_size == (112, 112)
    row = inspect(net.build())[1]
    assert row.macs is None and row.predicted_ms is not None and row.predicted_ms[0] > row.predicted_ms[1]


def test_open_sizes_may_be_given() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 32, "H", "W"]), (32, 64), strides=[2, 2]))
    net.output(net.conv(a, (64, 64)))
    first, second = inspect(net.build(), shapes={"x": (1, 32, 64, 96)})
    assert (first.macs, second.macs) == (32 * 64 * 9 * 32 * 48, 64 * 64 * 9 * 32 * 48)
    usual = inspect(net.build())[1].predicted_ms
    assert usual is not None and second.predicted_ms is not None and second.predicted_ms[0] < usual[0] / 4
    with pytest.raises(CalibrationError, match="shape 1x3x64x96 does not fit"):
        inspect(net.build(), shapes={"x": (1, 3, 64, 96)})


def test_given_sizes_leave_the_batch_open() -> None:
    """A size that depends on the batch, too, as of rows [batch x positions], stays open."""
    net = Net()
    a = net.conv(net.input("x", ["N", 3, "H", "W"]), (3, 8), strides=[2, 2])
    rows = net.op("Reshape", net.op("Transpose", a, perm=[0, 2, 3, 1]), net.constant([1, -1, 8]))
    net.output(a)
    net.output(rows)
    graph = prepare(io.to_graph(net.build()))
    set_sizes(graph, {"x": (1, 3, 9, 12)})
    shapes = {name: tensor.shape for name, tensor in graph.tensors().items()}
    assert shapes["x"] == ["N", 3, 9, 12]
    assert shapes[a] == ["N", 8, 5, 6]
    assert [d if isinstance(d, int) else "?" for d in shapes[rows]] == [1, "?", 8]


def test_what_a_layer_is_dense_for_stays_open_where_sizes_are_given() -> None:
    """The plan must not prune what the rewrite, which is for any size, leaves dense."""
    net = Net()
    x = net.input("x", ["N", 32, "H", "W"])
    padded = net.conv(x, (32, 32), strides=[2, 2], auto_pad="SAME_UPPER")  # how much depends on the size
    size = net.op("Slice", net.op("Shape", padded), net.constant([2]), net.constant([3]))
    shape = net.op("Concat", net.op("Mul", size, net.constant([0])), net.constant([-1, 32]), axis=0)
    net.output(net.matmul(net.op("Reshape", padded, shape), (32, 32)))
    open_rows = inspect(net.build())
    rows = inspect(net.build(), shapes={"x": (1, 32, 16, 24)})
    assert [row.reason for row in rows] == [row.reason for row in open_rows]
    assert rows[0].status == "dense" and "size" in rows[0].reason and rows[0].macs == 32 * 32 * 9 * 8 * 12
    result = tetris_onnx.optimize(net.build(), Config(block_size=(16, 16)), shapes={"x": (1, 32, 16, 24)})
    assert [row.reason for row in result.report.layers if row.status == "dense"] == [rows[0].reason]


def test_a_product_of_two_open_sizes_is_no_layer() -> None:
    """As in attention: its second operand has the shape of activations."""
    net = Net()
    a = net.matmul(net.input("x", ["N", "T", 32]), (32, 32))
    net.output(net.op("MatMul", net.op("MatMul", a, net.op("Transpose", a, perm=[0, 2, 1])), a))
    for options in ({}, {"allocation": "global"}):
        rows = planned(net, **options)[1]
        assert [rows[name].status for name in ("matmul1", "matmul2", "matmul3")] == ["block-sparse", "dense", "dense"]
        assert rows["matmul2"].reason == "its weight is not a constant" and rows["matmul2"].predicted_ms is None


def test_weights_are_cold_where_the_caches_do_not_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = prepare(io.to_graph(network().build()))
    assert not any(shape.cold for shape in layer_shapes(graph, find_layers(graph)) if shape)
    monkeypatch.setattr(planner, "CACHED_WEIGHTS", 1000)
    assert all(shape.cold for shape in layer_shapes(graph, find_layers(graph)) if shape)


def test_too_few_blocks() -> None:
    net = Net()
    net.output(net.conv(net.input("x", ["N", 32, 16, 16]), (32, 32)))
    rows = planned(net, sparsity=0.1)[1]
    assert "too few blocks" in rows["conv1"].reason


def test_a_weight_that_is_not_finite() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 32, 16, 16]), (32, 32))
    weight = np.ones((32, 32, 3, 3), np.float32)
    weight[3, 4, 1, 1] = np.nan
    a = net.op("Conv", a, net.constant(weight), pads=[1] * 4)
    net.output(net.conv(a, (32, 32)))
    plan, rows = planned(net)
    assert [p.layer for p in plan] == ["conv1", "conv3"]
    assert "NaN" in rows["conv2"].reason


def test_a_shared_weight_is_searched_once_and_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    a = net.input("x", ["N", 32, 16, 16])
    weight = net.constant(net.weight_values(32, 32, 3, 3), "w")
    for _ in range(3):
        a = net.op("Relu", net.op("Conv", a, weight, pads=[1] * 4))
    net.output(a)
    searches: list[int] = []

    def counted(tasks: list[tuple], *rest: Any) -> list[Reordering]:
        searches.append(len(tasks))
        return run(tasks, *rest)

    run = planner._run
    monkeypatch.setattr(planner, "_run", counted)
    plan, _ = planned(net)
    assert searches == [1] and len(plan) == 3
    result = check_rewrite(net.build(), plan)
    blocks = {node.input[1] for node in result.graph.node if node.op_type == "BlockSparseConv"}
    assert len(blocks) == 1
    assert sum(w.ndim == 5 for w in weights_of(result).values()) == 1


@pytest.mark.parametrize("shape", [(32, 32), (32, 64)])
def test_a_weight_shared_by_a_product_and_its_transpose(shape: tuple[int, int]) -> None:
    """Tied weights: x W and h W^T are two different searches."""
    net = Net()
    x = net.input("x", ["N", 40, shape[0]])
    weight = net.random(*shape, low=-0.3, high=0.3)
    h = net.op("Relu", net.op("MatMul", x, weight))
    h = net.op("Reshape", h, net.constant([-1, shape[1]]))
    net.output(net.op("Gemm", h, weight, transB=1))
    rules = (LayerRule("*"),)
    plan, _ = planned(net, layers=rules)
    assert [p.shape for p in plan] == [shape[::-1], shape]
    check_rewrite(net.build(), plan)
    # The same decision for both: the masks are each other's transposes only by chance.
    if shape[0] == shape[1]:
        first = plan.layers[0]
        twice = Plan(
            tuple(LayerPlan(p.layer, first.out_perm, first.in_perm, first.block_size, first.keep) for p in plan)
        )
        check_rewrite(net.build(), twice)


def test_keep_mode_leaves_the_borders_in_their_order() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 32, 16, 16]), (32, 32)))
    # The batch size comes from the input: that path carries no channels.
    batch = net.op("Slice", net.op("Shape", "x"), net.constant([0]), net.constant([1]))
    a = net.op("Relu", net.conv(a, (32, 32)))
    a = net.op("MaxPool", a, kernel_shape=[4, 4], strides=[4, 4])
    a = net.op("Reshape", a, net.op("Concat", batch, net.constant([-1]), axis=0))
    net.output(net.gemm(a, (512, 64)))
    plan, _ = planned(net, gathers="keep")
    first, middle, last = plan.layers
    assert is_identity(first.in_perm) and not is_identity(first.out_perm)
    assert not is_identity(middle.in_perm) and not is_identity(middle.out_perm)
    assert not is_identity(last.in_perm) and is_identity(last.out_perm)
    result = rewrite(net.build(), plan, "keep")
    assert sum(gather_permutation(n) is not None for n in io.to_graph(result).nodes) == 2
    free, _ = planned(net)
    assert not is_identity(free.layers[0].in_perm) and not is_identity(free.layers[2].out_perm)


def test_layers_that_are_block_sparse_already() -> None:
    net = network()
    plan, _ = planned(net)
    result = rewrite(net.build(), plan)
    graph = prepare(io.to_graph(result))
    config = Config(workers=1, block_size=(16, 16))
    again, rows = make_plan(survey(graph, config), config)
    assert len(again) == 0
    assert [row.reason for row in rows].count("it is block-sparse already") == len(plan) == 4
    with pytest.raises(PlanError):
        match_plan(survey(graph, Config()), plan, Config())


def test_no_layers_at_all() -> None:
    net = Net()
    net.output(net.op("Relu", net.input("x", [2, 2])))
    plan, rows = planned(net)
    assert len(plan) == 0 and rows == {}


class TestMatchPlan:
    def test_another_export_with_other_weights(self) -> None:
        net = network()
        plan, rows = planned(net)
        tuned = network()
        for initializer in tuned.initializers:
            if initializer.data_type == TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(initializer)
                noise = tuned.rng.normal(scale=0.01, size=values.shape).astype(np.float32)
                initializer.CopyFrom(onnx.numpy_helper.from_array(values + noise, initializer.name))
        graph = prepare(io.to_graph(tuned.build()))
        found = {row.layer: row for row in match_plan(survey(graph, Config()), plan, Config())}
        for name, row in rows.items():
            assert found[name].status == row.status and found[name].density == row.density
            if row.retained is not None and row.baseline is not None:
                assert found[name].retained == pytest.approx(row.retained, abs=0.02)
                assert found[name].baseline == pytest.approx(row.baseline, abs=0.02)
            else:
                assert found[name].reason
        check_rewrite(tuned.build(), plan)

    def test_a_layer_that_is_not_planned(self) -> None:
        net = network()
        plan, _ = planned(net)
        part = Plan(plan.layers[1:])
        config = Config(block_size=(16, 16))
        candidates = survey(prepare(io.to_graph(net.build())), config)
        rows = {r.layer: r for r in match_plan(candidates, part, config)}
        assert rows["conv2"].status == "dense" and rows["conv2"].reason == "it is not in the plan"

    @pytest.mark.parametrize("change", ["name", "shape", "grouped"])
    def test_another_model(self, change: str) -> None:
        plan, _ = planned(network())
        net = Net()
        x = net.input("x", ["N", 32, 16, 16])
        for _ in range(5):
            x = net.conv(x, (32, 32), group=8 if change == "grouped" else 1)
        if change == "shape":
            net = Net()
            x = net.conv(net.conv(net.input("x", ["N", 32, 16, 16]), (32, 32)), (32, 48))
        net.output(x)
        with pytest.raises(PlanError) as error:
            match_plan(survey(prepare(io.to_graph(net.build())), Config()), plan, Config())
        message = str(error.value)
        assert "\n" not in message
        expected = {
            "name": "no layer 'gemm1'",
            "shape": "has 32 x 32 channels, the model's 48 x 32",
            "grouped": "grouped",
        }
        assert expected[change] in message


def test_inspect() -> None:
    rows = {row.layer: row for row in inspect(network().build(), Config(block_size=(16, 16)))}
    assert [row.status for row in rows.values()] == ["whole", *["prunable"] * 4, "dense"]
    assert rows["conv2"].block_size == (16, 16) and rows["conv2"].reason == ""


def test_for_cuda_blocks_are_larger_and_layers_that_cannot_gain_stay_dense() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 128, 56, 56]), (128, 256))
    a = net.op("Relu", net.conv(net.op("Relu", a), (256, 24), kernel=1))
    net.output(net.conv(a, (24, 256), kernel=1))
    plan, rows = planned(net, target="cuda", block_size=None)
    assert [(p.layer, p.block_size) for p in plan] == [("conv1", (64, 64))]
    assert rows["conv2"].reason == "blocks of 12x64 are smaller than the CUDA kernels' tiles of 32x32"
    # A processor's times say nothing about a GPU.
    assert {row.predicted_ms for row in rows.values()} == {None}
    # What the user asks for is done.
    plan, _ = planned(net, target="cuda", layers=(LayerRule("*"),))
    assert [p.layer for p in plan] == ["conv1", "conv2", "conv3"]
    small = Net()
    small.output(small.conv(small.conv(small.input("x", [1, 64, 7, 7]), (64, 128), kernel=1), (128, 128), kernel=1))
    _, rows = planned(small, target="cuda", block_size=None)
    assert re.fullmatch(r"reckoned \S+ us block-sparse against \S+ us dense on a GPU", rows["conv1"].reason)


def test_for_cuda_blocks_are_as_tall_as_pays() -> None:
    """A 1 x 1 convolution of many channels reads its pixels half as often in tiles of 128 rows; see test_cuda_cost."""
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 1024, 28, 28]), (1024, 1024), kernel=1))
    net.output(net.conv(x, (1024, 128), kernel=1))
    plan, _ = planned(net, target="cuda", reorder="none", block_size=None, layers=(LayerRule("*"),))
    assert [p.block_size for p in plan] == [(128, 64), (64, 64)]
    # Whoever sets a block size gets that.
    plan, _ = planned(net, target="cuda", reorder="none", block_size=(64, 64), layers=(LayerRule("*"),))
    assert {p.block_size for p in plan} == {(64, 64)}
    rules = (LayerRule("node_conv1", block_size=(64, 128)),)
    plan, _ = planned(net, target="cuda", reorder="none", block_size=None, layers=rules)
    assert plan.layers[0].block_size == (64, 128)


def test_layers_in_subgraphs_are_listed_with_the_reason() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12))
    net.input("flag", [], onnx.TensorProto.BOOL)
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = onnx.helper.make_node("Conv", [a, net.weight(12, 12, 1, 1)], [f"{name}_y"])
        info = onnx.helper.make_tensor_value_info(f"{name}_y", 1, ["N", 12, 8, 8])
        branches[name] = onnx.helper.make_graph([node], name, [], [info])
    net.output(net.op("If", "flag", **branches), shape=["N", 12, 8, 8])
    rows = inspect(net.build())
    assert [row.layer for row in rows] == ["conv1", "else_branch_y", "then_branch_y"]
    assert [row.reason for row in rows[1:]] == ["it is in the body of If 'node_if1'"] * 2
    assert rows[1].weight_shape == (12, 12, 1, 1)


def test_other_operators_with_weights_are_listed() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12), out="conv")
    scale, zero = net.constant(np.float32(0.1)), net.constant(np.uint8(128))
    weight = net.constant(np.ones((12, 12, 1, 1), np.uint8))
    b = net.op("QuantizeLinear", a, scale, zero)
    b = net.op("QLinearConv", b, scale, zero, weight, scale, zero, scale, zero, out="quantized")
    net.output(b, TensorProto.UINT8, ["N", 12, 8, 8])
    net.output(net.op("FusedConv", a, net.weight(12, 12, 1, 1), domain="com.microsoft", out="fused"), shape=[1] * 4)
    net.output(net.op("FusedConv", a, net.weight(12, 12, 1, 1), domain="com.example", out="other"), shape=[1] * 4)
    steps = net.input("steps", ["S", "N", 4])
    w, r = (net.constant(np.ones((1, 12, 4 - i), np.float32)) for i in (0, 1))
    net.output(net.op("LSTM", steps, w, r, hidden_size=3, out="recurrent"), shape=["S", 1, "N", 3])
    rows = {row.layer: row for row in inspect(net.build())}
    reasons = {
        "quantized": "it is quantized, but not in QDQ form",
        "fused": "onnxruntime has fused it: give the model as it was exported",
        "recurrent": "it is recurrent",
    }
    assert rows.keys() == {"conv", *reasons}
    for name, reason in reasons.items():
        row = rows[name]
        assert (row.reason, row.weight_shape, row.macs, row.parameters) == (reason, (), None, 0)


def test_transposed_convolutions_are_listed() -> None:
    net = Net()
    weight = net.constant(net.weight_values(8, 6, 2, 2))  # [in, out of a group, *kernel]
    a = net.op("ConvTranspose", net.input("x", ["N", 8, 5, 5]), weight, strides=[2, 2], group=2)
    net.output(net.conv(a, (12, 4)))
    first, second = inspect(net.build())
    assert (first.op_type, first.reason) == ("ConvTranspose", "it is a transposed convolution")
    assert first.weight_shape == (12, 4, 2, 2) and first.parameters == 8 * 6 * 4
    assert first.macs == 8 * 25 * 6 * 4
    assert second.reason.startswith("it is the last layer")
