"""The precision is an attribute of our operators only, and the functions that the model carries ignore it."""

from __future__ import annotations

import numpy as np
import onnx

from models import Net, op_counts, random_feed, random_plan, rewrite, run
from tetris_onnx.config import PRECISIONS
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import DOMAIN, OUR_OPS
from tetris_onnx.passes import Pass, run_passes, set_precision
from tetris_onnx.passes.set_precision import PRECISION_ATTRIBUTES


def network() -> onnx.ModelProto:
    net = Net()
    y = net.op("Relu", net.conv(net.input("x", ["N", 32, 6, 6]), (32, 32)))
    y = net.op("Flatten", net.op("GlobalAveragePool", net.conv(y, (32, 32))))
    net.output(net.gemm(y, (32, 10)), shape=["N", 10])
    return net.build()


def rounded(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    step = Pass("set_precision", lambda graph: set_precision(graph, precision))
    return io.to_proto(run_passes(io.to_graph(model), [step]), model)


def test_every_precision_has_an_attribute() -> None:
    assert tuple(PRECISION_ATTRIBUTES) == PRECISIONS


def test_only_our_operators_have_the_attribute_and_their_functions_ignore_it() -> None:
    dense = network()
    exact = rewrite(dense, random_plan(dense))
    model = rounded(exact, "int8")
    onnx.checker.check_model(model, full_check=True)
    ours = 0
    for node in model.graph.node:
        values = [a.s for a in node.attribute if a.name == "precision"]
        assert values == ([b"int8"] if node.domain == DOMAIN and node.op_type in OUR_OPS else [])
        ours += len(values)
    assert ours == 3
    assert all("precision" in f.attribute for f in model.functions if f.name in OUR_OPS)
    feed = random_feed(model)
    for y, z in zip(run(exact, feed), run(model, feed), strict=True):
        np.testing.assert_array_equal(y, z)


def test_the_graph_stays_what_it_was() -> None:
    dense = network()
    exact = rewrite(dense, random_plan(dense))
    before = exact.SerializeToString(deterministic=True)
    model = rounded(exact, "bf16")
    assert exact.SerializeToString(deterministic=True) == before
    assert op_counts(model) == op_counts(exact)


def test_input_ranges_are_an_attribute_that_the_functions_ignore() -> None:
    dense = network()
    exact = rewrite(dense, random_plan(dense))
    names = [node.name for node in exact.graph.node if node.domain == DOMAIN]
    ranges = {names[0]: (-1.0, 2.5)}
    step = Pass("set_precision", lambda graph: set_precision(graph, "int8", ranges))
    model = io.to_proto(run_passes(io.to_graph(exact), [step]), exact)
    onnx.checker.check_model(model, full_check=True)
    found = {n.name: list(a.floats) for n in model.graph.node for a in n.attribute if a.name == "input_range"}
    assert found == {names[0]: [-1.0, 2.5]}
    feed = random_feed(model)
    for y, z in zip(run(exact, feed), run(model, feed), strict=True):
        np.testing.assert_array_equal(y, z)  # without the op library
