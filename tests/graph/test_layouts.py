"""Which nodes onnxruntime runs in its own layout: against what it makes of a model."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest

from models import Net
from tetris_onnx.graph import io
from tetris_onnx.graph.layouts import Layout, is_pool_2x2, layout_of, reads_plain
from tetris_onnx.planner import prepare

POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
WIDE = {"kernel_shape": [3, 3], "strides": [2, 2]}


def network() -> Net:
    """Every kind of node behind convolutions of 32 channels."""
    net = Net(20)
    first = net.op("Relu", net.conv(net.input("x", [1, 3, 32, 32]), (3, 32)))
    a = net.op("MaxPool", first, **WIDE)
    b = net.op("Relu", net.conv(a, (32, 32), 1))
    c = net.op("HardSwish", net.conv(a, (32, 32)))
    joined = net.op("Gelu", net.op("Add", b, c))
    d = net.op("Concat", joined, net.op("AveragePool", joined, kernel_shape=[1, 1]), axis=1)
    e = net.op("Softplus", net.conv(d, (64, 24)))
    net.output(net.op("Flatten", net.op("GlobalAveragePool", e)))
    return net


def test_of_each_node() -> None:
    graph = prepare(io.to_graph(network().build()))
    found = {node.outputs[0].name: layout_of(node, 16) for node in graph.nodes}
    ops = {node.outputs[0].name: node.op for node in graph.nodes}
    assert {layout for name, layout in found.items() if ops[name] == "Conv"} == {Layout.BLOCKED}
    by_op = {ops[name]: layout for name, layout in found.items()}
    assert by_op["MaxPool"] is by_op["AveragePool"] is Layout.BLOCKED
    assert by_op["Relu"] is by_op["HardSwish"] is by_op["Gelu"] is Layout.FOLLOWS
    assert by_op["Add"] is by_op["Concat"] is Layout.JOINS
    # 24 channels do not fill the lanes.
    assert by_op["Softplus"] is by_op["Flatten"] is by_op["GlobalAveragePool"] is Layout.PLAIN
    assert all(layout_of(node, 1) is Layout.PLAIN for node in graph.nodes)
    first, *others = [node for node in graph.nodes if node.op == "Conv"]
    assert reads_plain(first, 16) and not any(reads_plain(node, 16) for node in others)


def test_a_convolution_of_no_groups_is_not_blocked() -> None:
    graph = prepare(io.to_graph(network().build()))
    conv = next(node for node in graph.nodes if node.op == "Conv")
    conv.attrs["group"] = 0
    assert layout_of(conv, 16) is Layout.PLAIN


def test_onnxruntime_does_so(tmp_path: Path) -> None:
    """No change of layout where none is expected: at the Softplus, which its layout does not have, and at no other."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(network().build().SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    if not any("nchwc" in node.domain for node in nodes):
        pytest.skip("onnxruntime has no layout of its own on this processor")
    ops = [node.op_type for node in nodes]
    assert ops.count("ReorderInput") == 0
    assert ops.count("ReorderOutput") == 1


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (POOL, True),
        (WIDE, False),
        ({**POOL, "strides": [1, 1]}, False),
        ({"kernel_shape": [2, 2]}, False),
        ({**POOL, "pads": [0, 0, 1, 1]}, False),
        ({**POOL, "dilations": [2, 2]}, False),
        ({**POOL, "auto_pad": "SAME_UPPER"}, False),
        ({**POOL, "auto_pad": "VALID"}, True),
        ({**POOL, "ceil_mode": 1}, True),  # of an even map
        ({"kernel_shape": [2], "strides": [2]}, False),
    ],
)
def test_the_pools_that_a_convolution_takes_over(attributes: dict, expected: bool) -> None:
    net = Net()
    axes = len(attributes["kernel_shape"])
    net.output(net.op("MaxPool", net.input("x", ["N", 8, *[6] * axes]), **attributes))
    (node,) = io.to_graph(net.build()).nodes
    assert is_pool_2x2(node) is expected


def test_a_pool_of_an_odd_map_that_rounds_up_is_none() -> None:
    net = Net()
    net.output(net.op("MaxPool", net.input("x", ["N", 8, 7, 7]), **POOL, ceil_mode=1))
    (node,) = io.to_graph(net.build()).nodes
    assert not is_pool_2x2(node)
