"""The table of operators that keep channels apart, each entry tried out; reshapes; what stops a reordering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from models import Net, random_feed, run
from tetris_onnx.algorithms.permutation import expand
from tetris_onnx.graph import channels, io
from tetris_onnx.graph.channels import ChannelAxis, Region, find_region, gather_permutation, reshape_axis
from tetris_onnx.passes.fold_gathers import permute_parameters

CHANNELS = 6
PERM = np.array([3, 0, 5, 1, 4, 2])
SHAPE = [2, CHANNELS, 4, 5]
PLAIN = ChannelAxis(1, CHANNELS)


def region_of(model: onnx.ModelProto, value: str, where: ChannelAxis = PLAIN) -> Region:
    graph = io.to_graph(model)
    return find_region(graph, graph.tensors()[value], where)


def evaluate(model: onnx.ModelProto, feed: dict[str, NDArray]) -> list[NDArray]:
    try:
        return run(model, feed, optimized=False)
    except Exception:  # onnxruntime does not have every operator for every type and opset
        return ReferenceEvaluator(model).run(None, feed)


def check(net: Net, start: str = "x", where: ChannelAxis = PLAIN, passes: bool = True) -> Region:
    """Give the region of ``start`` another channel order: everything in it comes out in that order, bit for bit.

    All outputs of the model are in the region where ``passes``, and none where not.
    """
    model = net.build()
    graph = io.to_graph(model)
    region = find_region(graph, graph.tensors()[start], where)
    inside = {tensor.name: axis for tensor, axis in region.values}
    for output in model.graph.output:
        assert (output.name in inside) == passes, (output.name, region.barriers)
    if not passes:
        assert any("not known to treat channels" in barrier for barrier in region.barriers)
        return region
    assert not any("not known" in barrier or "two orders" in barrier for barrier in region.barriers)

    def reordered(name: str, value: NDArray) -> NDArray:
        axis = inside.get(name)
        if axis is None:
            return value
        assert value.shape[axis.axis] == axis.length
        return np.take(value, expand(PERM, axis.outer, axis.inner), axis.axis)

    permute_parameters(region, PERM)
    feed = random_feed(model)
    expected = evaluate(model, feed)
    actual = evaluate(io.to_proto(graph, model), {name: reordered(name, value) for name, value in feed.items()})
    for output, before, after in zip(model.graph.output, expected, actual, strict=True):
        np.testing.assert_array_equal(reordered(output.name, before), after)
    return region


OPSETS = {"Gelu": 20, "Swish": 24}


class TestElementwise:
    @pytest.mark.parametrize("op", sorted(channels.ELEMENTWISE))
    def test_each(self, op: str) -> None:
        net = Net(OPSETS.get(op, 18))
        kind = TensorProto.BOOL if op == "Not" else TensorProto.FLOAT
        x = net.input("x", SHAPE, kind)
        attributes = {"to": TensorProto.INT32} if op == "Cast" else {}
        net.output(net.op(op, x, **attributes), {"Cast": 6, "Not": 9, "IsInf": 9, "IsNaN": 9}.get(op, 1), SHAPE)
        check(net)

    def test_clip_with_limits(self) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        net.output(net.op("Clip", x, net.constant(np.float32(-0.5)), net.constant(np.float32(0.5))))
        check(net)

    @pytest.mark.parametrize("used", ["by a node", "as an output"])
    def test_a_mask_that_is_used(self, used: str) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        y, mask = net.ops("Dropout", [x], 2)
        if used == "by a node":
            net.output(net.op("Where", mask, y, y))
        else:
            net.output(mask, TensorProto.BOOL)
        assert any("not known" in barrier for barrier in region_of(net.build(), "x").barriers)

    def test_indices_of_a_pooling_that_are_used(self) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        y, indices = net.ops("MaxPool", [x], 2, kernel_shape=[2, 2])
        net.output(y)
        net.output(indices, TensorProto.INT64)
        check(net, passes=False)


class TestBroadcast:
    @pytest.mark.parametrize("op", sorted(channels.BROADCAST - {"Where"}))
    @pytest.mark.parametrize(
        "operand",
        [[2, CHANNELS, 4, 5], [CHANNELS, 1, 1], [1, CHANNELS, 1, 1], [4, 5], [], [1, 1, 1, 1], [CHANNELS, 4, 1]],
    )
    @pytest.mark.parametrize("constant", [True, False])
    def test_each(self, op: str, operand: list[int], constant: bool) -> None:
        logical = op in ("And", "Or", "Xor")
        compares = op.startswith(("Equal", "Greater", "Less"))
        kind = TensorProto.BOOL if logical else TensorProto.FLOAT
        net = Net(17)
        x = net.input("x", SHAPE, kind)
        if constant:
            values = net.rng.uniform(0.5, 1.5, operand).astype(np.float32)
            y = net.constant(values > 1 if logical else values)
        else:
            y = net.input("y", operand, kind)
        attributes = {"fmod": 1} if op == "Mod" else {}
        swaps = op not in ("PRelu",) and len(operand) < 4
        for inputs in [(x, y), (y, x)] if swaps else [(x, y)]:
            net.output(net.op(op, *inputs, **attributes), TensorProto.BOOL if compares or logical else 1, SHAPE)
        region = check(net)
        per_channel = CHANNELS in operand
        assert len(region.parameters) == (len(net.outputs) if per_channel and constant else 0)

    @pytest.mark.parametrize("op", ["Max", "Min", "Mean", "Sum"])
    def test_many_operands(self, op: str) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        net.output(net.op(op, x, net.input("z", SHAPE), net.random(CHANNELS, 1, 1), x))
        check(net)

    def test_where(self) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        condition = net.op("Greater", x, net.random(CHANNELS, 1, 1))
        net.output(net.op("Where", condition, x, net.random(CHANNELS, 1, 1)))
        assert len(check(net).parameters) == 2

    def test_a_lower_rank_that_brings_the_channels(self) -> None:
        net = Net()
        x = net.input("x", [CHANNELS, 1, 1])
        net.output(net.op("Mul", net.input("z", SHAPE), x))
        check(net, where=ChannelAxis(0, CHANNELS))

    def test_behind_a_flatten(self) -> None:
        net = Net()
        flat = net.op("Flatten", net.input("x", SHAPE))
        net.output(net.op("Mul", flat, net.random(CHANNELS * 20)))
        (parameter,) = check(net).parameters
        assert parameter.where == ChannelAxis(0, CHANNELS, 1, 20)

    def test_a_sum_with_its_own_transpose(self) -> None:
        net = Net()
        x = net.input("x", [CHANNELS, CHANNELS])
        net.output(net.op("Add", x, net.op("Transpose", x, perm=[1, 0])))
        assert any("two orders" in barrier for barrier in region_of(net.build(), "x").barriers)

    def test_one_channel_that_is_spread_over_many(self) -> None:
        net = Net()
        net.output(net.op("Add", net.input("x", [2, 1, 4, 4]), net.input("y", [*SHAPE[:2], 4, 4])))
        assert any("not known" in barrier for barrier in region_of(net.build(), "x", ChannelAxis(1, 1)).barriers)


class TestPerChannel:
    @pytest.mark.parametrize("op", sorted(channels._POOLING))
    def test_pooling(self, op: str) -> None:
        net = Net(18)
        x = net.input("x", SHAPE)
        net.output(net.op(op, x, **({} if op.startswith("Global") else {"kernel_shape": [3, 2], "strides": [1, 2]})))
        check(net)
        # the same node with the channels on another axis
        assert any("not known" in barrier for barrier in region_of(net.build(), "x", ChannelAxis(2, 4)).barriers)

    @pytest.mark.parametrize("op", sorted(channels._NORMALIZATION))
    def test_normalization(self, op: str) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        vectors = [net.random(CHANNELS, low=0.5, high=1.5) for _ in channels._NORMALIZATION[op]]
        net.output(net.op(op, x, *vectors))
        assert len(check(net).parameters) == len(vectors)

    def test_normalization_with_computed_vectors(self) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        net.output(net.op("InstanceNormalization", x, net.input("s", [CHANNELS]), net.random(CHANNELS)))
        check(net, passes=False)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("axes", [1, 2, 3])
    def test_depthwise_convolution(self, bias: bool, axes: int) -> None:
        net = Net()
        x = net.input("x", [2, CHANNELS, *[5] * axes])
        net.output(net.conv(x, (CHANNELS, CHANNELS), group=CHANNELS, bias=bias, axes=axes))
        assert len(check(net).parameters) == 1 + bias

    @pytest.mark.parametrize("group", [2, 3])
    def test_grouped_convolution(self, group: int) -> None:
        net = Net()
        net.output(net.conv(net.input("x", SHAPE), (CHANNELS, CHANNELS), group=group))
        check(net, passes=False)

    def test_depthwise_with_a_multiplier(self) -> None:
        net = Net()
        net.output(net.conv(net.input("x", SHAPE), (CHANNELS, 2 * CHANNELS), group=CHANNELS))
        check(net, passes=False)

    @pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
    @pytest.mark.parametrize(("axis", "passes"), [(-1, True), (2, True), (1, False), (-3, False)])
    def test_softmax(self, op: str, axis: int, passes: bool) -> None:
        net = Net()
        net.output(net.op(op, net.input("x", SHAPE), axis=axis))
        check(net, passes=passes)


class TestAxes:
    @pytest.mark.parametrize("op", sorted(channels._REDUCTIONS))
    @pytest.mark.parametrize("keepdims", [0, 1])
    @pytest.mark.parametrize(
        ("axes", "passes"), [([2, 3], True), ([-1], True), ([0, 3], True), ([1], False), ([-3, 2], False)]
    )
    @pytest.mark.parametrize("opset", [13, 18])
    def test_reductions(self, op: str, keepdims: int, axes: list[int], passes: bool, opset: int) -> None:
        net = Net(opset)
        x = net.op("Abs", net.input("x", SHAPE))
        as_input = opset >= 18 or op == "ReduceSum"
        if as_input:
            net.output(net.op(op, x, net.constant(axes), keepdims=keepdims))
        else:
            net.output(net.op(op, x, keepdims=keepdims, axes=axes))
        check(net, passes=passes)

    def test_reductions_over_everything(self) -> None:
        net = Net()
        net.output(net.op("ReduceMean", net.input("x", SHAPE)))
        check(net, passes=False)

    @pytest.mark.parametrize("keepdims", [0, 1])
    def test_found_from_behind(self, keepdims: int) -> None:
        net = Net()
        y = net.op("ReduceMean", net.input("x", SHAPE), axes=[0, 2], keepdims=keepdims)
        net.output(y)
        check(net, y, ChannelAxis(1 if keepdims else 0, CHANNELS))

    @pytest.mark.parametrize("perm", [[0, 2, 3, 1], [1, 0, 3, 2], [3, 2, 1, 0], None])
    def test_transpose(self, perm: list[int] | None) -> None:
        net = Net()
        y = net.op("Transpose", net.input("x", SHAPE), **({} if perm is None else {"perm": perm}))
        net.output(y)
        region = check(net)
        where = dict((t.name, w) for t, w in region.values)[y]
        assert where.axis == (perm or [3, 2, 1, 0]).index(1)
        check(net, y, where)

    @pytest.mark.parametrize(
        ("op", "target"),
        [
            ("Flatten", None),
            ("Reshape", [2, -1]),
            ("Reshape", [0, CHANNELS, 20]),
            ("Reshape", [2, 2, 3, 4, 5]),
            ("Reshape", [2, CHANNELS, 2, 2, 5]),
            ("Reshape", [-1]),
            ("Unsqueeze", [1]),
            ("Unsqueeze", [-1]),
        ],
    )
    def test_reshapes(self, op: str, target: list[int] | None) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        net.output(net.op(op, x, *([] if target is None else [net.constant(target)])))
        check(net, passes=target != [2, 2, 3, 4, 5])

    def test_squeeze(self) -> None:
        net = Net()
        net.output(net.op("Squeeze", net.input("x", [1, CHANNELS, 1, 5]), net.constant([0, 2])))
        check(net)

    def test_flatten_and_back(self) -> None:
        net = Net()
        flat = net.op("Flatten", net.input("x", SHAPE))
        net.output(net.op("Reshape", net.op("Relu", flat), net.constant([2, CHANNELS, 4, 5])))
        check(net)

    def test_flatten_behind_a_transpose_to_nhwc(self) -> None:
        net = Net()
        nhwc = net.op("Transpose", net.input("x", ["N", CHANNELS, 4, 5]), perm=[0, 2, 3, 1])
        flat = net.op("Flatten", nhwc)
        net.output(flat)
        where = dict((t.name, w) for t, w in check(net).values)[flat]
        assert where == ChannelAxis(1, CHANNELS, 20, 1)

    def test_concat_along_another_axis(self) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        net.output(net.op("Concat", x, net.input("y", [2, CHANNELS, 3, 5]), axis=-2))
        check(net)

    def test_concat_of_channels_is_an_end(self) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        net.output(net.op("Concat", x, x, axis=1))
        region = region_of(net.build(), "x")
        assert [sink.slot for sink in region.sinks] == [0, 1]  # once each
        (source,) = region_of(net.build(), "concat1", ChannelAxis(1, 2 * CHANNELS)).sources
        assert source.node.op == "Concat"

    def test_split_along_another_axis(self) -> None:
        net = Net(13)
        for part in net.ops("Split", [net.input("x", SHAPE), net.constant([1, 3])], 2, axis=2):
            net.output(part)
        check(net)

    def test_split_of_channels(self) -> None:
        net = Net(13)
        for part in net.ops("Split", [net.input("x", SHAPE), net.constant([2, 4])], 2, axis=1):
            net.output(part)
        check(net, passes=False)


class TestSizes:
    @pytest.mark.parametrize(
        ("pads", "axes", "passes"),
        [
            ([0, 0, 1, 2, 0, 0, 0, 1], None, True),
            ([1, 2, 0, 1], [2, 3], True),
            ([1, 1], [-1], True),
            ([0, 1, 0, 0, 0, -1, 0, 0], None, False),  # the same size, but shifted
            ([1, -1], [1], False),
        ],
    )
    @pytest.mark.parametrize("mode", ["constant", "edge"])
    def test_pad(self, pads: list[int], axes: list[int] | None, passes: bool, mode: str) -> None:
        net = Net(18)
        x = net.input("x", SHAPE)
        extra = [] if axes is None else ["", net.constant(axes)]
        net.output(net.op("Pad", x, net.constant(pads), *extra, mode=mode))
        check(net, passes=passes)

    def test_computed_pads(self) -> None:
        net = Net()
        net.output(net.op("Pad", net.input("x", SHAPE), net.input("p", [8], TensorProto.INT64)), shape=SHAPE)
        check(net, passes=False)

    @pytest.mark.parametrize(
        ("starts", "axes", "passes"),
        [([1, 0], [2, 3], True), ([0], [-1], True), ([0], [1], False), ([0, 0], None, False), ([0], None, True)],
    )
    def test_slice(self, starts: list[int], axes: list[int] | None, passes: bool) -> None:
        net = Net()
        x = net.input("x", SHAPE)
        extra = [] if axes is None else [net.constant(axes)]
        net.output(net.op("Slice", x, net.constant(starts), net.constant([100] * len(starts)), *extra))
        check(net, passes=passes)

    @pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
    @pytest.mark.parametrize("by", ["scales", "sizes"])
    def test_resize(self, mode: str, by: str) -> None:
        net = Net(18)
        x = net.input("x", SHAPE)
        if by == "scales":
            extra = ["", net.constant(np.array([1, 1, 2, 1.5], np.float32))]
        else:
            extra = ["", "", net.constant([2, CHANNELS, 8, 9])]
        net.output(net.op("Resize", x, *extra, mode=mode))
        check(net)

    def test_resize_of_some_axes(self) -> None:
        net = Net(18)
        scales = net.constant(np.array([2, 1.5], np.float32))
        net.output(net.op("Resize", net.input("x", SHAPE), "", scales, axes=[2, 3]))
        check(net)

    def test_resize_between_channels(self) -> None:
        """A scale of 1.1 leaves 6 channels 6, but each is a mixture."""
        net = Net(18)
        scales = net.constant(np.array([1, 1.1, 1, 1], np.float32))
        net.output(net.op("Resize", net.input("x", SHAPE), "", scales, mode="linear"))
        check(net, passes=False)

    def test_resize_to_sizes_computed_at_run_time(self) -> None:
        net = Net(18)
        x = net.input("x", ["N", CHANNELS, "H", "W"])
        first = net.op("Slice", net.op("Shape", x), net.constant([0]), net.constant([2]))
        last = net.op(
            "Slice", net.op("Shape", net.input("z", [2, 3, "H2", "W2"])), net.constant([2]), net.constant([4])
        )
        net.output(net.op("Resize", x, "", "", net.op("Concat", first, last, axis=0)))
        check(net)


class TestBarriers:
    def test_inputs_and_outputs(self) -> None:
        net = Net()
        net.output(net.op("Relu", net.input("x", SHAPE)))
        assert region_of(net.build(), "x").barriers == [
            "'x' is an input of the model",
            "'relu1' is an output of the model",
        ]

    def test_between_two_layers_there_is_none(self) -> None:
        net = Net()
        a = net.conv(net.input("x", SHAPE), (CHANNELS, 8))
        b = net.op("MaxPool", net.op("Relu", net.batchnorm(a, 8)), kernel_shape=[2, 2])
        net.output(net.conv(b, (8, 4)))
        region = region_of(net.build(), a, ChannelAxis(1, 8))
        assert region.barriers == []
        assert [s.node.name for s in region.sources] == ["node_conv1"]
        assert [s.node.name for s in region.sinks] == ["node_conv2"]
        assert len(region.parameters) == 4

    @pytest.mark.parametrize(
        "write",
        [
            lambda net, x: net.op("LRN", x, size=3),
            lambda net, x: net.op("CumSum", x, net.constant(np.array(1))),
            lambda net, x: net.op("Relu", x, domain="com.example"),
            lambda net, x: net.op("Shape", x, domain="com.example"),
            lambda net, x: net.op("Concat", x, domain="com.example"),
            lambda net, x: net.op("DepthToSpace", net.op("Concat", x, x, axis=1), blocksize=2),
            lambda net, x: net.op("MatMul", x, net.random(5, 3)),  # over the last axis
            lambda net, x: net.op("Gather", x, net.constant([0, 2]), axis=1),
            lambda net, x: net.op("Gather", x, net.constant([1, 0, 2, 3]), axis=2),
            lambda net, x: net.op("ArgMax", x, axis=1),
            lambda net, x: net.op("Expand", x, net.constant([2, CHANNELS, 4, 5])),
        ],
    )
    def test_operators_that_are_not_in_the_table(self, write: Callable[[Net, str], str]) -> None:
        net = Net()
        x = net.op("Relu", net.input("in", SHAPE))
        net.output(write(net, x), shape=SHAPE)
        region = region_of(net.build(), x)
        if net.nodes[-1].op_type == "DepthToSpace":
            region = region_of(net.build(), "concat1", ChannelAxis(1, 2 * CHANNELS))
        assert any("not known" in barrier for barrier in region.barriers)

    def test_shape_does_not_look_at_the_order(self) -> None:
        net = Net()
        a = net.conv(net.input("x", SHAPE), (CHANNELS, 8))
        net.output(net.op("Shape", a), TensorProto.INT64)
        net.output(net.conv(a, (8, 4)))
        assert region_of(net.build(), a, ChannelAxis(1, 8)).barriers == []

    def test_values_that_a_subgraph_reads(self) -> None:
        net = Net()
        a = net.conv(net.input("x", SHAPE), (CHANNELS, 8))
        net.input("flag", [], TensorProto.BOOL)
        branches = {}
        for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
            node = onnx.helper.make_node(op, [a], [f"{name}_y"])
            info = onnx.helper.make_tensor_value_info(f"{name}_y", 1, [2, 8, 4, 5])
            branches[name] = onnx.helper.make_graph([node], name, [], [info])
        net.output(net.op("If", "flag", **branches), shape=[2, 8, 4, 5])
        net.output(net.conv(a, (8, 4)))
        assert any("subgraph" in barrier for barrier in region_of(net.build(), a, ChannelAxis(1, 8)).barriers)

    def test_a_gather_between_two_values_of_one_region(self) -> None:
        """y + y[p]: the Gather would have to be moved out of the region that it reads from."""
        net = Net()
        a = net.conv(net.input("x", SHAPE), (CHANNELS, CHANNELS))
        g = net.op("Gather", a, net.constant(PERM.tolist()), axis=1)
        net.output(net.conv(net.op("Add", a, g), (CHANNELS, 4)))
        assert any("reorders" in barrier for barrier in region_of(net.build(), a).barriers)

    def test_shapes_that_are_not_known(self) -> None:
        net = Net()
        x = net.op("Magic", net.input("in", SHAPE), domain="com.example", out="x")
        net.value_infos.append(onnx.helper.make_tensor_value_info(x, 1, [None, CHANNELS, None, None]))
        net.output(net.op("Reshape", x, net.input("s", [2], TensorProto.INT64)), shape=["A", "B"])
        region = region_of(net.build(), x)
        assert len(region.barriers) == 2

    def test_long_chains_do_not_take_long(self) -> None:
        net = Net()
        x = net.input("x", [1, CHANNELS])
        for _ in range(3000):
            x = net.op("Relu", x)
        net.output(x)
        assert len(region_of(net.build(), "x", ChannelAxis(1, CHANNELS)).values) == 3001


class TestGatherPermutation:
    @staticmethod
    def perm_of(indices: NDArray, axis: int = 1, shape: list[Any] | None = None) -> NDArray | None:
        net = Net()
        net.output(net.op("Gather", net.input("x", shape or [2, 4]), net.constant(indices), axis=axis))
        (node,) = io.to_graph(net.build()).nodes
        return gather_permutation(node)

    @pytest.mark.parametrize("axis", [1, -1])
    @pytest.mark.parametrize("dtype", [np.int32, np.int64])
    def test_permutations(self, axis: int, dtype: type) -> None:
        found = self.perm_of(np.array([2, 0, 3, 1], dtype), axis)
        assert found is not None and found.dtype == np.int64 and found.tolist() == [2, 0, 3, 1]

    @pytest.mark.parametrize("indices", [[0, 1, 2], [0, 1, 2, 2], [-1, 0, 1, 2], [[2, 0, 3, 1]], 1])
    def test_other_indices(self, indices: list[int]) -> None:
        assert self.perm_of(np.array(indices)) is None

    def test_a_dynamic_axis(self) -> None:
        assert self.perm_of(np.array([1, 0]), 0, ["N", 4]) is None

    def test_computed_indices(self) -> None:
        net = Net()
        net.output(net.op("Gather", net.input("x", [2, 4]), net.input("i", [4], TensorProto.INT64), axis=1))
        (node,) = io.to_graph(net.build()).nodes
        assert isinstance(node.inputs[1], gs.Variable) and gather_permutation(node) is None


class TestReshapeAxis:
    @pytest.mark.parametrize(
        ("before", "after", "where", "found"),
        [
            (["N", 8, 4, 4], ["N", 128], ChannelAxis(1, 8), ChannelAxis(1, 8, 1, 16)),
            (["N", 4, 4, 8], ["N", 128], ChannelAxis(3, 8), ChannelAxis(1, 8, 16, 1)),
            (["N", 128], ["N", 8, 4, 4], ChannelAxis(1, 8, 1, 16), ChannelAxis(1, 8)),
            (["N", 128], ["N", 8, 16], ChannelAxis(1, 8, 1, 16), ChannelAxis(1, 8)),
            (["N", 128], ["?", 4, 4, 8], ChannelAxis(1, 8, 16, 1), ChannelAxis(3, 8)),
            (["N", 8, 4, 4], ["N", 2, 4, 4, 4], ChannelAxis(1, 8), None),
            (["N", 8, 4, 4], ["N", 2, 64], ChannelAxis(1, 8), None),
            (["N", 8, 1, 1], ["N", 8], ChannelAxis(1, 8), ChannelAxis(1, 8)),
            (["N", 8], ["N", 8, 1, 1], ChannelAxis(1, 8), ChannelAxis(1, 8)),
            (["B", 16, 8], ["?", 8], ChannelAxis(2, 8), None),  # the dynamic sizes differ
            (["B", 16, 8], [16, "B", 8], ChannelAxis(2, 8), ChannelAxis(2, 8)),
            (["B", 16, 8], [16, "B", 8], ChannelAxis(1, 16), None),
            (["N", 8, "H", "W"], ["N", 8, "?"], ChannelAxis(1, 8), None),
            ([0, 8], [0, 8], ChannelAxis(1, 8), None),
            ([8], [8], ChannelAxis(0, 8), ChannelAxis(0, 8)),
        ],
    )
    def test_known_cases(
        self, before: list[int | str], after: list[int | str], where: ChannelAxis, found: ChannelAxis | None
    ) -> None:
        assert reshape_axis(before, after, where) == found

    @given(st.data())
    def test_what_is_found_is_right(self, data: st.DataObject) -> None:
        """Reordering before and after any reshape gives the same, and it can be followed back."""
        sizes = st.sampled_from([1, 2, 3, 4, 6])
        before = data.draw(st.lists(sizes, min_size=1, max_size=4))
        numbers = np.arange(int(np.prod(before)))
        after, rest = [], int(np.prod(before))
        while rest > 1 and len(after) < 4:
            after.append(data.draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0])))
            rest //= after[-1]
        after.append(rest)
        axis = data.draw(st.integers(0, len(before) - 1))
        inner = data.draw(st.sampled_from([d for d in range(1, before[axis] + 1) if before[axis] % d == 0]))
        where = ChannelAxis(axis, before[axis] // inner, 1, inner)
        dynamic = data.draw(st.sampled_from([None, *(i for i in range(len(before)) if i != axis)]))
        shapes: list[list[int | str]] = [list(before), list(after)]
        if dynamic is not None and before[dynamic] in after:
            shapes[0][dynamic] = "N"
            shapes[1][after.index(before[dynamic])] = "N"
        found = reshape_axis(*shapes, where)
        if found is None:
            return
        assert found.channels == where.channels and shapes[1][found.axis] == found.length
        perm = np.random.default_rng(0).permutation(where.channels)
        reordered = np.take(numbers.reshape(before), expand(perm, where.outer, where.inner), where.axis).reshape(after)
        behind = np.take(numbers.reshape(after), expand(perm, found.outer, found.inner), found.axis)
        np.testing.assert_array_equal(reordered, behind)
        if where.channels > 1:
            assert reshape_axis(*shapes[::-1], found) == where
