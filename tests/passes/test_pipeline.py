"""Running passes: on copies, checked, dumped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from models import Net, random_feed, random_plan, relative_error, run, weights_of
from tetris_onnx.graph import io
from tetris_onnx.optimize import masked_dense, pipeline
from tetris_onnx.passes import Pass, PassError, run_passes


def model() -> onnx.ModelProto:
    net = Net()
    a = net.op("Relu", net.batchnorm(net.conv(net.input("x", ["N", 4, 6, 6]), (4, 8)), 8))
    net.output(net.gemm(net.op("Flatten", a), (288, 10)))
    proto = net.build()
    proto.producer_name = "maker"
    return proto


def test_neither_graph_nor_model_is_changed() -> None:
    proto = model()
    before = proto.SerializeToString()
    graph = io.to_graph(proto)
    original = io.to_proto(graph, proto).SerializeToString()
    result = run_passes(graph, pipeline(random_plan(proto)))
    assert result is not graph and len(result.nodes) < len(graph.nodes)
    assert io.to_proto(graph, proto).SerializeToString() == original
    assert proto.SerializeToString() == before


def test_no_pass_writes_into_a_shared_weight() -> None:
    proto = model()
    graph = io.to_graph(proto)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = tensor.values.copy()
            tensor.values.flags.writeable = False
    run_passes(graph, pipeline(random_plan(proto)))


@pytest.mark.parametrize("gathers", ["absorb", "keep"])
def test_every_dump_is_a_model_that_computes_the_same(tmp_path: Path, gathers: str) -> None:
    proto = model()
    plan = random_plan(proto)
    steps = pipeline(plan, gathers)
    run_passes(io.to_graph(proto), steps, tmp_path / "a" / "b", proto)
    dumps = sorted((tmp_path / "a" / "b").iterdir())
    assert [d.name for d in dumps] == [f"{i:02d}_{s.name}.onnx" for i, s in enumerate(steps, 1)]
    pruned = [step.name for step in steps].index("prune_blocks")
    feed = random_feed(proto)
    dense, masked = run(proto, feed), run(masked_dense(proto, plan), feed)
    assert relative_error(dense, masked) > 0.01
    for dump in dumps:
        step = io.load(dump)
        assert step.producer_name == "maker"
        has_blocks = any(node.domain == "ai.tetris" for node in step.graph.node)
        if has_blocks and not step.functions:
            continue  # not runnable before the last pass has attached the definitions
        expected = dense if dumps.index(dump) < pruned else masked
        assert relative_error(expected, run(step, feed)) < 1e-5


def passing(apply: object) -> None:
    run_passes(io.to_graph(model()), [Pass("bad", apply)])  # type: ignore[arg-type]


def test_a_pass_that_raises_is_named() -> None:
    def fail(graph: gs.Graph) -> None:
        raise KeyError("x")

    with pytest.raises(PassError, match="pass bad: 'x'"):
        passing(fail)


def test_a_pass_that_changes_the_outputs() -> None:
    def rename(graph: gs.Graph) -> None:
        graph.outputs[0].name = "other"

    with pytest.raises(PassError, match="pass bad changed the inputs or outputs"):
        passing(rename)


def test_a_pass_that_leaves_a_value_without_a_producer() -> None:
    def cut(graph: gs.Graph) -> None:
        graph.nodes[1].outputs.clear()

    with pytest.raises(PassError, match=r"pass bad left the value 'batchnormalization1' without a producer"):
        passing(cut)


def test_constants_get_a_name_of_their_own() -> None:
    def add(graph: gs.Graph) -> None:
        for node in graph.nodes:
            for slot, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant):
                    node.inputs[slot] = gs.Constant("relu1", tensor.values)

    proto = model()
    result = io.to_proto(run_passes(io.to_graph(proto), [Pass("add", add)]), proto)
    assert {name.split("_")[0] for name in weights_of(result)} == {"relu1"}
    assert len(weights_of(result)) == len(proto.graph.initializer)
    feed = random_feed(proto)
    assert relative_error(run(proto, feed), run(result, feed)) == 0


def test_two_values_of_one_name() -> None:
    def add(graph: gs.Graph) -> None:
        copy = gs.Variable("conv1", np.float32)
        graph.nodes.append(gs.Node("Relu", "copy", {}, [graph.inputs[0]], [copy]))
        graph.nodes[0].inputs[0] = copy

    with pytest.raises(PassError, match="same name"):
        passing(add)


def test_long_chains() -> None:
    """onnx-graphsurgeon sorts by recursion."""
    net = Net()
    a = net.conv(net.input("x", ["N", 4, 6, 6]), (4, 8))
    for _ in range(1500):
        a = net.op("Sigmoid", a)
    net.output(net.conv(a, (8, 4)))
    proto = net.build()
    result = run_passes(io.to_graph(proto), pipeline(random_plan(proto)))
    assert len(result.nodes) == 1502
