"""Which dimensions are the same for every input size."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models import Dim, Net
from tetris_onnx.graph.shapes import infer_shapes, run_node


def shape(net: Net, value: str) -> tuple[int | str, ...]:
    """With every dynamic dimension as "?"."""
    return tuple(d if isinstance(d, int) else "?" for d in infer_shapes(net.build())[value][1])


def flatten_at_run_time(net: Net, x: str) -> str:
    """Shape -> Cast -> Slice -> Concat(-1) -> Cast -> Reshape, as keras2onnx writes a Flatten."""
    dims = net.op("Cast", net.op("Shape", x), to=TensorProto.INT32)
    first = net.op("Slice", dims, net.constant([0]), net.constant([1]), net.constant([0]))
    rest = net.constant(np.array([-1], np.int32))
    target = net.op("Cast", net.op("Concat", first, rest, axis=0), to=TensorProto.INT64)
    return net.op("Reshape", x, target)


def test_a_flatten_computed_at_run_time_has_a_static_length() -> None:
    net = Net()
    x = net.input("x", ["N", 3, 224, 224])
    a = net.conv(x, (3, 8))
    for _ in range(5):
        a = net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    flat = flatten_at_run_time(net, a)
    product = net.matmul(flat, (8 * 7 * 7, 10))
    net.output(product)
    assert shape(net, a) == ("?", 8, 7, 7)
    assert shape(net, flat) == ("?", 392)
    assert shape(net, product) == ("?", 10)
    # onnx's own inference does not see it: if it learns to, this module can go.
    known = {v.name: v for v in onnx.shape_inference.infer_shapes(net.build(), data_prop=True).graph.value_info}
    assert flat not in known or not known[flat].type.tensor_type.shape.dim[1].dim_value


def test_a_flatten_with_gather_and_unsqueeze() -> None:
    net = Net()
    x = net.input("x", ["N", 6, 4, 4])
    batch = net.op("Gather", net.op("Shape", x), net.constant(np.array(0)), axis=0)
    target = net.op("Concat", net.op("Unsqueeze", batch, net.constant([0])), net.constant([-1]), axis=0)
    flat = net.op("Reshape", x, target)
    net.output(flat)
    assert shape(net, flat) == ("?", 96)


@pytest.mark.parametrize("opset", [7, 9, 13, 17, 21])
def test_opsets(opset: int) -> None:
    net = Net(opset)
    a = net.op("Flatten", net.conv(net.input("x", ["batch", 3, 8, 8]), (3, 4)))
    net.output(net.gemm(a, (256, 5)))
    assert shape(net, a) == ("?", 256)


def test_dynamic_sizes_stay_dynamic_and_keep_their_names() -> None:
    net = Net()
    x = net.input("x", ["N", 3, "H", "W"])
    a = net.conv(x, (3, 4))
    pooled = net.op("GlobalAveragePool", a)
    net.output(pooled, shape=["N", 4, 1, 1])
    shapes = infer_shapes(net.build())
    assert shapes[x][1] == ("N", 3, "H", "W")
    assert shapes[a][1] == ("?", 4, "?", "?")
    assert shapes[pooled][1] == ("N", 4, 1, 1)


def test_one_name_is_one_size() -> None:
    """A mask [S, S] beside tokens [B, S, D]: the sizes that are tried have to agree."""
    net = Net()
    tokens = net.input("tokens", ["B", "S", 16])
    mask = net.input("mask", ["S", "S"])
    scores = net.op("MatMul", tokens, net.op("Transpose", tokens, perm=[0, 2, 1]))
    product = net.op("MatMul", net.op("Add", scores, mask), tokens)
    net.output(product)
    assert shape(net, product) == ("?", "?", 16)


def test_initializers_among_the_inputs() -> None:
    net = Net(9)
    x = net.input("x", [1, 3, 8, 8])
    a = net.conv(x, (3, 4))
    for initializer in net.initializers:
        net.input(initializer.name, list(initializer.dims))
    net.output(a)
    shapes = infer_shapes(net.build(ir_version=3))
    assert shapes[a] == (np.dtype(np.float32), (1, 4, 8, 8))


def test_values_behind_a_clamp_are_not_taken_for_static() -> None:
    """min(size, 100) is 100 for any large size, but not for a small one."""
    net = Net()
    x = net.input("x", ["N", "S", 4])
    part = net.op("Slice", x, net.constant([0]), net.constant([100]), net.constant([1]))
    net.output(part)
    assert shape(net, part) == ("?", "?", 4)


def test_sizes_with_a_remainder_are_not_taken_for_static() -> None:
    """size % 32 is 0 for every size that is a multiple."""
    net = Net()
    x = net.input("x", ["N", "S"])
    size = net.op("Slice", net.op("Shape", x), net.constant([1]), net.constant([2]))
    rest = net.op("Add", net.op("Mod", size, net.constant([32])), net.constant([5]))
    part = net.op("Slice", x, net.constant([0]), rest, net.constant([1]))
    net.output(part)
    assert shape(net, part) == ("?", "?")


def test_contradictions_and_unknown_operators_do_no_harm() -> None:
    net = Net()
    x = net.input("x", ["N", 3, 8, 8])
    a = net.conv(x, (5, 4))  # x has 3 channels, not 5
    b = net.op("Magic", a, domain="com.example")
    c = net.op("Relu", b)
    net.output(c)
    shapes = infer_shapes(net.build())
    assert shapes["x"][1] == ("N", 3, 8, 8)
    assert b not in shapes and c not in shapes


def test_a_reshape_that_does_not_fit_does_no_harm() -> None:
    net = Net()
    x = net.input("x", [2, 6])
    y = net.op("Reshape", x, net.constant([5, 5]))
    net.output(net.op("Relu", y))
    infer_shapes(net.build())


def test_cyclic_and_incomplete_graphs_do_no_harm() -> None:
    net = Net()
    net.input("x", [2, 6])
    net.op("Add", "x", "b", out="a")
    net.op("Relu", "a", out="b")
    net.op("Relu", "nowhere", out="c")
    net.output("c")
    infer_shapes(net.build())
    infer_shapes(onnx.ModelProto())


def test_absurd_sizes_are_not_computed() -> None:
    net = Net()
    x = net.input("x", ["N", 4])
    dims = net.op("Concat", net.constant([10**6]), net.constant([10**6]), axis=0)
    big = net.op("ConstantOfShape", dims)
    bigger = net.op("Expand", net.constant(np.ones((1, 1), np.float32)), dims)
    longest = net.op("Range", net.constant(np.array(0)), net.constant(np.array(10**12)), net.constant(np.array(1)))
    net.output(net.op("Relu", x))
    for value in (big, bigger, longest):
        net.output(net.op("Identity", value), dtype=TensorProto.INT64 if value == longest else TensorProto.FLOAT)
    assert infer_shapes(net.build())[x][1] == ("N", 4)


def test_large_weights_are_neither_copied_nor_computed() -> None:
    net = Net()
    x = net.input("x", ["N", 64])
    weight = net.op("Transpose", net.random(48, 64), perm=[1, 0])
    y = net.op("MatMul", x, weight)
    net.output(y)
    assert shape(net, weight) == (64, 48)
    assert shape(net, y) == ("?", 48)


def test_run_node() -> None:
    opsets = [helper.make_opsetid("", 17)]
    node = helper.make_node("Add", ["a", "b"], ["c"])
    assert run_node(node, {"a": np.array([1, 2]), "b": np.array([3, 4])}, opsets).tolist() == [4, 6]
    assert run_node(node, {"a": np.zeros(2), "b": np.zeros(3)}, opsets) is None
    assert run_node(helper.make_node("Magic", ["a"], ["c"]), {"a": np.zeros(2)}, opsets) is None


def test_sequences_are_left_out() -> None:
    net = Net()
    x: str = net.input("x", ["N", 4])
    dims: list[Dim] = ["N", 4]
    net.op("SequenceConstruct", x, x, out="s")
    model = net.build()
    model.graph.output.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, dims))
    shapes = infer_shapes(model)
    assert "s" not in shapes and shapes["x"][1] == ("N", 4)
