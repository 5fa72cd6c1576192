"""What a graph computes from constants alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from models import Net
from tetris_onnx.graph import io
from tetris_onnx.graph.constants import constant_value


def value_of(net: Net, name: str) -> np.ndarray | None:
    graph = io.to_graph(net.build())
    return constant_value(graph, graph.tensors()[name])


@pytest.mark.parametrize("attribute", ["value", "value_float", "value_floats", "value_int", "value_ints"])
def test_constant_nodes(attribute: str) -> None:
    value = {
        "value": onnx.numpy_helper.from_array(np.array([1.5, 2.5], np.float32)),
        "value_float": 1.5,
        "value_floats": [1.5, 2.5],
        "value_int": 3,
        "value_ints": [3, 4],
    }[attribute]
    net = Net()
    c = net.op("Constant", **{attribute: value})
    net.output(net.op("Identity", c), dtype=7 if "int" in attribute else 1)
    expected = [1.5, 2.5] if attribute in ("value", "value_floats") else value
    found = value_of(net, c)
    assert found is not None and found.tolist() == expected


def test_chains_of_operators() -> None:
    net = Net()
    weight = net.rng.normal(size=(3, 4)).astype(np.float32)
    a = net.op("Identity", net.op("Transpose", net.constant(weight), perm=[1, 0]))
    b = net.op("Mul", a, net.op("ConstantOfShape", net.constant([4, 3]), value=helper.make_tensor("v", 1, [1], [2.0])))
    net.output(b)
    found = value_of(net, b)
    assert found is not None and np.array_equal(found, weight.T * np.float32(2))


def test_inputs_random_numbers_and_unknown_operators_are_not_constant() -> None:
    net = Net()
    x = net.op("Add", net.input("x", [2]), net.random(2))
    r = net.op("RandomNormal", shape=[2])
    q = net.op("Identity", net.op("Magic", net.random(2), domain="com.example"))
    net.output(x)
    net.output(net.op("Add", r, x))
    net.output(q, shape=[2])
    assert value_of(net, x) is value_of(net, r) is value_of(net, q) is None


def test_a_value_used_twice_is_computed_once() -> None:
    """2**60 evaluations otherwise."""
    net = Net()
    a = net.constant(np.ones(1, np.float32))
    for _ in range(60):
        a = net.op("Add", a, a)
    net.output(a)
    found = value_of(net, a)
    assert found is not None and found.tolist() == [2.0**60]


def test_the_stored_model_is_not_renamed() -> None:
    net = Net()
    c = net.op("Constant", value=onnx.numpy_helper.from_array(np.ones(2, np.float32), "inner"))
    net.output(net.op("Identity", c))
    model = net.build()
    before = model.SerializeToString()
    graph = io.to_graph(model)
    constant_value(graph, graph.tensors()[c])
    io.to_proto(graph, model)
    assert model.SerializeToString() == before
