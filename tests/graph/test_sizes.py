"""Sizes that depend on the inputs: equal only where they are for every input."""

from __future__ import annotations

import pytest

from models import Net
from tetris_onnx.graph import io
from tetris_onnx.graph.sizes import Sizes, symbolic_sizes


def sizes_of(net: Net, *values: str) -> list[Sizes]:
    for value in values:
        net.output(value)
    graph = io.to_graph(net.build())
    found = symbolic_sizes(graph)
    return [found[id(graph.tensors()[value])] for value in values]


def test_convolutions_that_keep_the_size_are_looked_through() -> None:
    net = Net()
    x = net.input("x", ["N", 8, "H", None])
    y = net.op("Add", net.op("Relu", net.conv(net.conv(x, (8, 8)), (8, 8), 1)), net.op("Sigmoid", x))
    first, second = sizes_of(net, y, net.op("Identity", x))
    assert first == second


@pytest.mark.parametrize(("stride", "same"), [(2, True), (3, False)])
def test_two_ways_to_the_same_number_of_windows(stride: int, same: bool) -> None:
    """A residual block with a stride: 3x3 with pads on one side, 1x1 without on the other."""
    net = Net()
    x = net.input("x", ["N", 8, "H", "W"])
    main = net.conv(net.conv(x, (8, 8), 1), (8, 8), 3, strides=[2, 2])
    first, second = sizes_of(net, main, net.conv(x, (8, 8), 1, strides=[stride, stride]))
    assert (first == second) is same


def test_what_is_not_known_is_only_itself() -> None:
    net = Net()
    x = net.input("x", ["N", 8, "H", "W"])
    half = net.op("Slice", x, net.constant([0]), net.constant([100]), net.constant([0]), net.constant([2]))
    again = net.op("Slice", x, net.constant([0]), net.constant([100]), net.constant([0]), net.constant([2]))
    both = net.op("Relu", half)
    first, second, third, whole = sizes_of(net, half, again, both, net.op("Relu", x))
    assert first == third
    assert first != second and first != whole


def test_other_inputs_are_other_sizes() -> None:
    net = Net()
    x, y, z = (net.input(name, [batch, 8, 4, 4]) for name, batch in (("x", "N"), ("y", "M"), ("z", "N")))
    first, second, third = sizes_of(net, *(net.conv(v, (8, 8)) for v in (x, y, z)))
    assert first != second
    assert first == third  # the model says so


def test_broadcasting() -> None:
    net = Net()
    x = net.input("x", ["N", 8, "H", "W"])
    gated = net.op("Mul", x, net.op("Sigmoid", net.op("GlobalAveragePool", x)))
    shifted = net.op("Add", x, net.random(8, 1, 1))
    other = net.op("Add", x, net.input("y", ["N", 8, "H", "V"]))
    first, second, third, plain = sizes_of(net, gated, shifted, other, net.op("Relu", x))
    assert second == plain
    assert third != plain
    assert len(first) == 4


def test_pools_count_windows_as_convolutions_do() -> None:
    net = Net()
    x = net.input("x", ["N", 8, "H", "W"])
    pooled = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    rounded_up = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    conv = net.conv(x, (8, 8), 2, strides=[2, 2], pads=[0] * 4)
    first, second, third = sizes_of(net, pooled, rounded_up, conv)
    assert first == third
    assert first != second


def test_gates_and_joined_branches_are_looked_through() -> None:
    """Squeeze-excite, a Concat and a Split of channels leave the batch and the map as they are."""
    net = Net()
    x = net.input("x", ["N", 8, "H", "W"])
    gated = net.op("Mul", x, net.op("Sigmoid", net.op("GlobalAveragePool", x)))
    parts = net.ops("Split", [net.op("Concat", x, gated, axis=1), net.constant([8, 8])], 2, axis=1)
    rows = net.op("Concat", x, x, axis=2)
    first, second, third, fourth, tall = sizes_of(net, gated, *parts, net.op("Relu", x), rows)
    assert first == second == third == fourth
    assert tall[0] == first[0] and tall[2] != first[2] and tall[3] == first[3]
