"""What our graphs cannot hold or look into is written out: sparse weights, functions with layers, overloads."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models import Net, check_rewrite, op_counts, random_feed, random_plan, relative_error, run
from tetris_onnx.graph import io
from tetris_onnx.graph.plain import plain_form
from tetris_onnx.optimize import masked_dense, optimize
from tetris_onnx.planner import inspect


def residual_function() -> onnx.ModelProto:
    """Two calls of a function with a convolution, one of them inside another function; a function without a layer."""
    net = Net()
    weight = net.weight(12, 12, 3, 3)
    x = net.input("x", ["N", 12, 6, 6])
    a = net.op("block", net.op("soft", x, domain="local", alpha=0.3), weight, domain="local")
    net.output(net.op("soft", net.op("twice", a, weight, domain="local"), domain="local"), shape=["N", 12, 6, 6])
    model = net.build()
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    conv = helper.make_node("Conv", ["x", "w"], ["t"], pads=[1] * 4)
    block = helper.make_function(
        "local", "block", ["x", "w"], ["y"], [conv, helper.make_node("Add", ["t", "x"], ["y"])], imports
    )
    call = [helper.make_node("block", ["x", "w"], ["t"], domain="local"), helper.make_node("Relu", ["t"], ["y"])]
    twice = helper.make_function("local", "twice", ["x", "w"], ["y"], call, imports)
    leaky = helper.make_node("LeakyRelu", ["x"], ["y"])
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT))
    default = helper.make_attribute("alpha", 0.5)
    soft = helper.make_function("local", "soft", ["x"], ["y"], [leaky], imports, attribute_protos=[default])
    model.functions.extend([block, twice, soft])
    return model


def test_layers_in_functions_are_pruned_and_other_functions_stay() -> None:
    model = residual_function()
    plain = io.raise_opset(model)
    assert [f.name for f in plain.functions] == ["soft"]
    assert op_counts(plain)["Conv"] == 2
    result = check_rewrite(plain)
    assert {f.name for f in result.functions} == {"soft", "BlockSparseConvAdd"}
    feed = random_feed(model)
    assert relative_error(run(model, feed), run(plain, feed)) < 1e-6
    assert [row.op_type for row in inspect(model)] == ["Conv", "Conv"]


def test_overloads() -> None:
    """Two functions of one name and domain (IR version 10)."""
    model = residual_function()
    model.ir_version = 10
    other = model.functions.add()
    other.CopyFrom(next(f for f in model.functions if f.name == "soft"))
    other.overload, other.node[0].op_type = "exponential", "Elu"
    next(n for n in model.graph.node if n.op_type == "soft").overload = "exponential"
    plain = io.raise_opset(model)
    assert not plain.functions
    feed = random_feed(model)
    assert relative_error(run(model, feed), run(plain, feed)) < 1e-6
    check_rewrite(plain)


def sparse_tensor(dense: np.ndarray, name: str, flat: bool) -> onnx.SparseTensorProto:
    where = np.argwhere(dense)
    indices = np.flatnonzero(dense) if flat else where
    values = numpy_helper.from_array(dense[tuple(where.T)], name)
    return helper.make_sparse_tensor(
        values, numpy_helper.from_array(indices.astype(np.int64), f"{name}_i"), dense.shape
    )


def test_sparse_weights() -> None:
    net = Net()
    weights = [net.weight_values(12, 10), net.weight_values(12, 10)]
    for weight in weights:
        weight[np.abs(weight) < 0.3] = 0
    a = net.op("Relu", net.op("MatMul", net.input("x", ["N", 12]), "w0"))
    net.output(net.op("Gemm", a, "w1", transB=1), shape=["N", 12])
    model = net.build()
    for weight, name, flat in zip(weights, ("w0", "w1"), (True, False), strict=True):
        model.graph.sparse_initializer.append(sparse_tensor(weight, name, flat))
    plain = io.raise_opset(model)
    assert not plain.graph.sparse_initializer and len(model.graph.sparse_initializer) == 2
    feed = random_feed(model)
    assert relative_error(run(model, feed), run(plain, feed)) < 1e-6
    plan = random_plan(plain)
    assert len(plan) == 2
    assert relative_error(run(masked_dense(plain, plan), feed), run(check_rewrite(plain, plan), feed)) < 1e-5


def test_nodes_in_any_order() -> None:
    """Also in the bodies of If, whose nodes read values of the graph around them."""
    net = Net()
    x = net.input("x", ["N", 12, 6, 6])
    a = net.op("Relu", net.conv(x, (12, 12)))
    shape = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    bodies = [
        helper.make_graph([helper.make_node("Add", ["s", a], ["z"]), helper.make_node(op, [a], ["s"])], op, [], [shape])
        for op in ("Sigmoid", "Neg")
    ]
    yes = net.constant(np.array(True))
    net.output(net.op("If", yes, then_branch=bodies[0], else_branch=bodies[1]), shape=["N", 12, 6, 6])
    model = net.build()
    order = [node.op_type for node in model.graph.node]
    shuffled = onnx.ModelProto.FromString(model.SerializeToString())
    shuffled.graph.ClearField("node")
    shuffled.graph.node.extend(reversed(model.graph.node))
    plain = plain_form(shuffled)
    assert [node.op_type for node in plain.graph.node] == order == ["Conv", "Relu", "If"]
    found = {body.name: [node.op_type for node in body.g.node] for body in plain.graph.node[2].attribute}
    assert found == {"then_branch": ["Sigmoid", "Add"], "else_branch": ["Neg", "Add"]}
    assert [node.op_type for node in shuffled.graph.node] == order[::-1]  # the model given is not changed
    onnx.checker.check_model(plain)
    feed = random_feed(model)
    assert relative_error(run(plain, feed), run(plain_form(model), feed)) == 0  # the same nodes
    check_rewrite(shuffled)


def test_nodes_on_a_cycle_are_left_as_they_are() -> None:
    net = Net()
    net.output(net.op("Add", net.input("x", [2, 2]), net.op("Relu", "loop", out="a"), out="loop"), shape=[2, 2])
    model = net.build()
    assert plain_form(model) is model


def test_a_model_without_any_of_it_is_returned_as_it_is() -> None:
    net = Net()
    net.output(net.conv(net.input("x", ["N", 8, 6, 6]), (8, 8)))
    model = net.build()
    assert plain_form(model) is model


def test_our_own_functions_stay() -> None:
    net = Net()
    net.output(net.conv(net.input("x", ["N", 8, 6, 6]), (8, 8)))
    result = check_rewrite(net.build())
    assert plain_form(result) is result
    assert optimize(result).report.layers[0].reason == "it is block-sparse already"


def test_documentation_is_kept() -> None:
    """Of the graph, its values and its nodes, those that became our operators among them."""
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 6, 6]), (8, 8))
    net.output(net.op("Sigmoid", net.conv(net.op("Tanh", a), (8, 8))))
    net.value_infos.append(helper.make_tensor_value_info("tanh1", TensorProto.FLOAT, ["N", 8, 6, 6], "a value"))
    model = net.build()
    model.graph.doc_string, model.doc_string = "a graph", "a model"
    model.graph.input[0].doc_string = "an input"
    for number, node in enumerate(model.graph.node):
        node.doc_string = f"node {number}"
        node.metadata_props.add(key="number", value=str(number))
    model.graph.node[0].name = ""  # it is called like its output then
    model.graph.metadata_props.add(key="made", value="here")
    result = check_rewrite(model)
    assert (result.doc_string, result.graph.doc_string) == ("a model", "a graph")
    assert [node.doc_string for node in result.graph.node] == [f"node {i}" for i in range(4)]
    assert [node.metadata_props[0].value for node in result.graph.node] == list("0123")
    assert result.graph.metadata_props[0].key == "made"
    assert {v.name: v.doc_string for v in result.graph.value_info}["tanh1"] == "a value"
    assert result.graph.input[0].doc_string == "an input"
