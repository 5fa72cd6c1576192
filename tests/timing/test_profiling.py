"""Layers of two networks side by side: which nodes make a row, what a row says, and when one counts as slower."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from models import Net, block_sparse_nodes, random_plan, rewrite
from tetris_onnx.timing.profiling import (
    CONVERSION,
    LAYER,
    OTHER,
    LayerTiming,
    Profile,
    Row,
    align,
    collect,
    density_of,
    find_row,
    profile,
    profilers_share,
    rows_of,
    take_turns,
    totals,
)


def parse(text: str, *names: str) -> onnx.ModelProto:
    """The model, its first nodes named (before onnx 1.17 its text has no names), weights without values zero."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17, "ai.tetris" : 1]> {text}""")
    for node, name in zip(model.graph.node, names, strict=False):
        node.name = name
    for value in model.graph.value_info:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), value.name))
    return model


DENSE = """g (float[N, 3, 8, 8] x) => (float[N, 4] y)
<float[4, 3, 3, 3] w, float[64, 4] v, float[4] b>
{
   c = Conv<pads = [1, 1, 1, 1]>(x, w)
   r = Relu(c)
   p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
   f = Flatten(p)
   m = MatMul(f, v)
   y = Add(m, b)
}"""


def event(name: str, op_type: str, microseconds: int, index: str = "0") -> dict:
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "dur": microseconds,
        "args": {"op_name": op_type, "node_index": index},
    }


def one(name: str, names: list[str], op: str, times: list[float], density: float | None = None) -> tuple:
    kind = OTHER if density is None else LAYER
    return Row(name, frozenset(("value", n) for n in names), kind, density), op, np.array(times)


def test_onnxruntimes_names_lead_back_to_the_layer() -> None:
    rows = rows_of(parse(DENSE, "conv", "act", "pool"))

    def found(node: str, op_type: str) -> tuple[str, bool]:
        row, names_it = find_row(node, op_type, rows)
        return row.name, names_it

    assert found("r_nchwc", "Conv") == ("conv", True)
    assert found("fused conv", "FusedConv") == ("conv", True)
    assert found("m/MatMulAddFusion", "Gemm") == ("m", True)
    assert found("act", "Relu") == ("conv", False)
    assert found("p_nchwc", "MaxPool") == ("pool", False)
    assert found("pool_token_3", "MaxPool") == ("pool", False)
    row, _ = find_row("c_token_3", "ReorderOutput", rows)
    assert (row.name, row.kind) == ("ReorderOutput", CONVERSION), (
        "a conversion is no part of the layer it is named after"
    )
    assert rows["value", "c"].kind == LAYER and rows["value", "p"].kind == OTHER


def test_an_activation_is_in_the_row_before_it_and_a_sum_has_its_own() -> None:
    model = parse(
        """g (float[N, 4] x, float[4, 4] w, float[4] b) => (float[N, 4] y)
        { a = MatMul(x, w)  s = Add(a, x)  y = Relu(s) }""",
        *("fc", "sum", "act"),
    )
    rows = rows_of(model)
    assert {name: row.name for name, row in rows.items()} == {
        ("node", "fc"): "fc",
        ("value", "a"): "fc",
        ("node", "sum"): "sum",
        ("value", "s"): "sum",
        ("node", "act"): "sum",
        ("value", "y"): "sum",
    }
    assert rows["node", "fc"].kind == OTHER, "a product of two activations has no weight"


def test_a_scale_computed_from_constants_follows_its_layer() -> None:
    model = parse(
        """g (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) <float[4, 3, 3, 3] w, float[4] s, int64[2] a = {1, 2}>
        { c = Conv(x, w)  t = Unsqueeze(s, a)  y = Mul(c, t) }""",
        "conv",
    )
    assert rows_of(model)["value", "y"].name == "conv"


def test_operators_that_take_over_their_neighbors_are_in_one_row_with_them() -> None:
    """A residual Add and a MaxPool in the op of one model, nodes of their own in the other."""
    dense = parse(
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 4, 4] y) <float[4, 4, 3, 3] w, float[4, 4, 3, 3] v>
        { a = Conv(x, w)  s = Add(a, x)  r = Relu(s)  c = Conv(r, v)  d = Relu(c)  y = MaxPool(d) }""",
        *("first", "sum", "act", "second", "act2", "pool"),
    )
    sparse = parse(
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 4, 4] y)
        <float[1, 2, 2, 3, 3] w, int64[1, 2] i = {0, 1}, int64[4] p = {0, 1, 2, 3}, float[4] b>
        {
            r = ai.tetris.BlockSparseConvAdd <weight_shape = [4, 4, 3, 3], block_size = [2, 2]> (x, w, i, p, p, b, x)
            y = ai.tetris.BlockSparseConvMaxPool <weight_shape = [4, 4, 3, 3], block_size = [2, 2]> (r, w, i, p, p, b)
        }""",
        *("first", "second"),
    )
    timings = align(
        [
            collect([event(n, op, us, str(k)) for k, (n, op, us) in enumerate(events)], model, [True])
            for model, events in (
                (dense, [("first", "Conv", 10), ("r", "Add", 3), ("second", "Conv", 9), ("pool", "MaxPool", 4)]),
                (sparse, [("first", "BlockSparseConvAdd", 4), ("second", "BlockSparseConvMaxPool", 5)]),
            )
        ]
    )
    assert [(t.name, t.kind, t.op_types, t.median_ms, t.density) for t in timings] == [
        ("first", LAYER, ("Conv", "BlockSparseConvAdd"), (pytest.approx(0.013), pytest.approx(0.004)), 0.25),
        ("second", LAYER, ("Conv", "BlockSparseConvMaxPool"), (pytest.approx(0.013), pytest.approx(0.005)), 0.25),
    ]
    assert timings[0].ideal_ms == pytest.approx(0.013 / 4)
    assert timings[0].fraction == pytest.approx(0.013 / 4 / 0.004)


def test_rows_are_in_the_order_of_execution_and_may_be_missing() -> None:
    dense = Profile({"conv": one("conv", ["a"], "Conv", [2.0], 1.0), "pool": one("pool", ["b"], "MaxPool", [0.5])})
    sparse = Profile(
        {"r": one("r", ["z"], "ReorderInput", [0.1]), "n1": one("n1", ["a"], "BlockSparseConv", [1.0], 0.4)}
    )
    assert align([dense, sparse]) == (
        LayerTiming("conv", LAYER, ("Conv", "BlockSparseConv"), (2.0, 1.0), (0.0, 0.0), 0.4),
        LayerTiming("pool", OTHER, ("MaxPool", ""), (0.5, None), (0.0, 0.0)),
        LayerTiming("r", OTHER, ("", "ReorderInput"), (None, 0.1), (0.0, 0.0)),
    )


def test_sums_by_kind() -> None:
    layers = (
        LayerTiming("a", LAYER, ("Conv", "B"), (3.0, 1.0), (0.3, 0.0), 0.25),
        LayerTiming("b", LAYER, ("Conv", "Conv"), (1.0, 1.0), (0.4, 0.0), 1.0),
        LayerTiming("p", OTHER, ("MaxPool", "MaxPool"), (0.5, 0.25), (0.0, 0.0)),
        LayerTiming("r", CONVERSION, ("", "ReorderInput"), (None, 0.125), (0.0, 0.0)),
    )
    sums = {row.name: row for row in totals(layers)}
    assert sums["weight layers"].median_ms == (4.0, 2.0)
    assert sums["weight layers"].noise_ms == (0.5, 0.0)
    assert sums["weight layers"].ideal_ms == 1.75 and sums["weight layers"].fraction == 0.875
    assert sums["layout conversions"].median_ms == (0.0, 0.125)
    assert sums["everything else"].median_ms == (0.5, 0.25)
    assert sums["sum"].median_ms == (4.5, 2.375) and sums["sum"].density is None
    assert totals(()) == ()


def test_slower_is_what_no_noise_explains() -> None:
    def slower(first: float, second: float, noise: float = 0.0) -> float:
        return LayerTiming("a", LAYER, ("", ""), (first, second), (noise, noise)).slower_ms

    assert slower(1.0, 1.1) == pytest.approx(0.1)
    assert slower(1.0, 0.5) == 0
    assert slower(1.0, 1.02) == 0, "a machine drifts"
    assert slower(1.0, 1.1, noise=0.05) == 0
    assert slower(0.004, 0.0049) == 0, "less than the profile resolves"
    assert LayerTiming("a", LAYER, ("", "B"), (None, 1.0), (0.0, 0.0)).slower_ms == 0
    assert LayerTiming("a", LAYER, ("B",), (1.0,), (0.0,)).slower_ms == 0


def test_warm_up_runs_do_not_count_and_turns_alternate() -> None:
    calls: list[str] = []
    counted = take_turns([lambda: calls.append("a"), lambda: calls.append("b")], settle=False)
    assert [len(c) for c in counted] == [calls.count("a"), calls.count("b")]
    assert [c.count(True) for c in counted] == [40, 40]
    assert calls[:4] == ["a", "a", "b", "b"]
    turns = "".join(calls[4:])
    assert turns == ("a" * 9 + "b" * 18 + "a" * 18 + "b" * 18 + "a" * 18 + "b" * 9)
    events = [event("conv", "Conv", 1000 if counts else 9000) for counts in counted[0]]
    rows = collect(events, parse(DENSE, "conv"), counted[0]).rows
    assert rows["conv"][2].tolist() == [1.0] * 40


def test_the_profilers_own_time_is_taken_off() -> None:
    events: list[dict] = [{"cat": "Session", "name": "model_run", "dur": 5}]
    for us in (99, 30, 30, 36):
        events += [event("conv", "Conv", us), event("pool", "MaxPool", 4, "1")]
    counted = [False, True, True, True]
    # 34, 34 and 40 us with a profile, one after the other 6, 14 and 6 less without: 3 us for each of two nodes.
    assert profilers_share(events, counted, np.array([28.0, 20.0, 34.0])) == 3.0
    assert profilers_share(events, counted, np.array([35.0])) == 0, "a profile does not make a network faster"
    assert profilers_share(events[:-1], counted, np.array([28.0])) == 0, "nodes that do not run once in every run"
    rows = collect(events, parse(DENSE, "conv", "act", "pool"), counted, 5.0).rows
    np.testing.assert_allclose(rows["conv"][2], [0.025, 0.025, 0.031])
    np.testing.assert_allclose(rows["pool"][2], [0.0004] * 3)  # no time is negative


def test_a_node_of_a_loop_gives_its_share_of_each_run() -> None:
    rows = collect([event("conv", "Conv", 1000)] * 6, parse(DENSE, "conv"), [False, True, True]).rows
    assert rows["conv"][2].tolist() == [2.0, 2.0]


def test_the_density_counts_blocks_at_the_edge_with_their_true_size() -> None:
    net = Net()
    net.output(net.conv(net.input("x", ["N", 10, 8, 8]), (10, 14)))
    plan = random_plan(net.build(), (4, 4), density=0.4)
    result = rewrite(net.build(), plan)
    (node,) = block_sparse_nodes(result)
    initializers = {i.name: i for i in result.graph.initializer}
    assert density_of(node, initializers) == pytest.approx(plan.layers[0].density)
    assert np.isnan(density_of(node, {}))


@pytest.mark.parametrize("exact", [False, True])
def test_a_block_sparse_network_against_its_dense_one(exact: bool) -> None:
    net = Net()
    a = net.op("Relu", net.batchnorm(net.conv(net.input("x", ["N", 16, 12, 12]), (16, 32)), 32))
    a = net.op("Flatten", net.op("MaxPool", a, kernel_shape=[4, 4], strides=[4, 4]))
    net.output(net.op("Relu", net.gemm(a, (288, 32))))
    dense = net.build()
    for node in dense.graph.node:
        node.name = ""
    plan = random_plan(dense, (8, 8), density=0.5)
    feed = {"x": np.zeros((1, 16, 12, 12), np.float32)}
    timings = profile([dense, rewrite(dense, plan)], [feed, feed], ["a", "b"], "cpu", 1, exact=exact)
    layers = [t for t in timings if t.kind == LAYER]
    # (onnxruntime calls it FusedGemm with the activation inside.)
    ops = [tuple(op.removeprefix("Fused") for op in t.op_types) for t in layers]
    assert ops == [("Conv", "BlockSparseConv"), ("Gemm", "BlockSparseGemm")]
    for timing, decision in zip(layers, plan, strict=True):
        assert timing.density == pytest.approx(decision.density)
        assert all(ms is not None and ms > 0 for ms in timing.median_ms)
