"""lower_block_sparse stores the kept blocks; fuse_epilogue takes in what follows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from models import (
    TOLERANCE,
    Net,
    block_sparse_nodes,
    check_rewrite,
    op_counts,
    random_feed,
    random_plan,
    relative_error,
    rewrite,
    run,
    weights_of,
)
from reference import dense_weight
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import DOMAIN
from tetris_onnx.optimize import masked_dense
from tetris_onnx.passes import Pass, PassError, attach_fallback, fuse_epilogue, lower_block_sparse, run_passes
from tetris_onnx.passes.lower_block_sparse import ConstantPool
from tetris_onnx.plan import LayerPlan, Plan


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


class TestLower:
    def test_a_convolution(self) -> None:
        net = Net()
        x = net.input("x", ["N", 7, 9, 9])
        net.output(net.conv(x, (7, 10), strides=[2, 1], auto_pad="SAME_LOWER"))
        model = net.build()
        plan = random_plan(model, (4, 3))
        result = rewrite(model, plan)
        (node,) = block_sparse_nodes(result)
        assert node.op_type == "BlockSparseConv" and node.domain == DOMAIN
        assert {o.domain: o.version for o in result.opset_import} == {"": 17, DOMAIN: 1}
        assert attributes(node) == {
            "kernel_shape": [3, 3],
            "strides": [2, 1],
            "pads": [1, 1, 1, 1],
            "dilations": [1, 1],
            "group": 1,
            "weight_shape": [10, 7, 3, 3],
            "block_size": [4, 3],
            "activation_min": -np.inf,
            "activation_max": np.inf,
        }
        weights = weights_of(result)
        blocks, index, input_perm, output_perm, bias = (weights[name] for name in node.input[1:])
        (decision,) = plan
        assert blocks.shape == (decision.keep.sum(), 4, 3, 3, 3) and blocks.dtype == np.float32
        assert index.tolist() == np.argwhere(decision.keep).tolist() and index.dtype == np.int64
        np.testing.assert_array_equal(np.sort(input_perm), np.arange(7))
        dense = dense_weight(blocks, index, input_perm, output_perm, [10, 7, 3, 3])
        masked = weights_of(masked_dense(model, plan))
        np.testing.assert_array_equal(dense, masked[masked_dense(model, plan).graph.node[0].input[1]])
        np.testing.assert_array_equal(bias[output_perm.argsort()][output_perm], bias)

    @pytest.mark.parametrize("form", ["gemm", "gemm without bias", "matmul", "matmul 3-D"])
    def test_matrix_products(self, form: str) -> None:
        net = Net()
        x = net.input("x", ["N", 5, 7] if "3-D" in form else ["N", 7])
        net.output(net.gemm(x, (7, 10), bias=form == "gemm") if form.startswith("gemm") else net.matmul(x, (7, 10)))
        result = check_rewrite(net.build(), gathers="absorb")
        (node,) = block_sparse_nodes(result)
        assert node.op_type == "BlockSparseGemm" and len(node.input) == 6  # a bias of zeros where there was none
        assert attributes(node)["weight_shape"] == [10, 7]

    def test_a_convolution_without_bias_gets_zeros(self) -> None:
        net = Net()
        net.output(net.conv(net.input("x", ["N", 4, 9, 9]), (4, 4), bias=False))
        result = check_rewrite(net.build())
        (node,) = block_sparse_nodes(result)
        assert len(node.input) == 6 and weights_of(result)[node.input[5]].tolist() == [0.0] * 4

    @pytest.mark.parametrize("density", [0.0, 1.0])
    def test_no_block_and_all_blocks(self, density: float) -> None:
        net = Net()
        a = net.conv(net.input("x", ["N", 4, 9, 9]), (4, 8))
        net.output(net.conv(net.op("Relu", a), (8, 4)))
        model = net.build()
        keep = {p.layer: np.full(p.keep.shape, density == 1) for p in random_plan(model)}
        plan = Plan(
            tuple(LayerPlan(p.layer, p.out_perm, p.in_perm, p.block_size, keep[p.layer]) for p in random_plan(model))
        )
        result = check_rewrite(model, plan)
        for node in block_sparse_nodes(result):
            blocks = weights_of(result)[node.input[1]]
            assert len(blocks) == (1 if density == 0 else keep[node.name.removeprefix("node_")].size)
            assert density or not blocks.any()

    def test_a_plan_for_another_graph(self) -> None:
        net = Net()
        net.output(net.conv(net.input("x", ["N", 4, 9, 9]), (4, 8)))
        (p,) = random_plan(net.build())
        plan = Plan((LayerPlan("other", p.out_perm, p.in_perm, p.block_size, p.keep),))
        step = Pass("lower_block_sparse", lambda graph: lower_block_sparse(graph, plan))
        with pytest.raises(PassError, match="no layer 'other'"):
            run_passes(io.to_graph(net.build()), [step])

    def test_equal_constants_are_stored_once(self) -> None:
        pool = ConstantPool()
        first = pool("a", np.arange(4))
        assert pool("b", np.arange(4)) is first
        assert pool("c", np.arange(4, dtype=np.int32)) is not first
        assert pool("d", np.arange(4).reshape(2, 2)) is not first
        assert pool("e", np.arange(4)[::-1]).values.tolist() == [3, 2, 1, 0]


def fused(write: Callable[[Net, str], str], kind: str = "conv") -> tuple[onnx.ModelProto, onnx.NodeProto]:
    net = Net()
    if kind == "conv":
        a = net.conv(net.input("x", ["N", 4, 6, 6]), (4, 8))
    else:
        a = net.matmul(net.input("x", ["N", 6, 4]), (4, 8))
    net.output(net.op("Sqrt", net.op("Abs", write(net, a))))
    model = net.build()
    names = ["conv1", "matmul1"]
    plan = random_plan(model, fixed=[f"{n}.{end}" for n in names for end in ("in", "out")])
    result = check_rewrite(model, plan)
    (node,) = block_sparse_nodes(result)
    return result, node


def bounds(node: onnx.NodeProto) -> tuple[object, object]:
    values = attributes(node)
    return values["activation_min"], values["activation_max"]


def clip(net: Net, a: str, low: float | None, high: float | None) -> str:
    limits = ["" if v is None else net.constant(np.float32(v)) for v in (low, high)]
    return net.op("Clip", a, *limits)


class TestFuse:
    @pytest.mark.parametrize("kind", ["conv", "matmul"])
    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ((0.0, 0.5), (0.0, 0.5)),
            ((None, 0.5), (-np.inf, 0.5)),
            ((-0.25, None), (-0.25, np.inf)),
            ((None, None), (-np.inf, np.inf)),
        ],
    )
    def test_clip(self, kind: str, limits: tuple[float | None, float | None], expected: tuple[float, float]) -> None:
        result, node = fused(lambda net, a: clip(net, a, *limits), kind)
        assert bounds(node) == expected and op_counts(result)["Clip"] == 0

    @pytest.mark.parametrize("kind", ["conv", "matmul"])
    def test_relu(self, kind: str) -> None:
        result, node = fused(lambda net, a: net.op("Relu", a), kind)
        assert bounds(node) == (0.0, np.inf) and op_counts(result)["Relu"] == 0

    def test_bias_and_relu_of_a_matrix_product(self) -> None:
        result, node = fused(lambda net, a: net.op("Relu", net.op("Add", net.random(8), a)), "matmul")
        assert op_counts(result) == {"BlockSparseGemm": 1, "Abs": 1, "Sqrt": 1}
        assert weights_of(result)[node.input[5]].any()

    @pytest.mark.parametrize(
        "write",
        [
            lambda net, a: net.op("Relu", net.op("Mul", a, a)),
            lambda net, a: net.op("Add", a, net.random(6, 8)),  # another one for each row
            lambda net, a: net.op("Add", a, net.random(6, 1)),
            lambda net, a: net.op("Add", a, net.random(1, 1, 1, 8)),  # a rank more
            lambda net, a: net.op("Add", a, net.op("Relu", a)),
            lambda net, a: clip(net, a, 1.0, -1.0),
            lambda net, a: net.op("LeakyRelu", a),
        ],
    )
    def test_what_is_not_fused(self, write: Callable[[Net, str], str]) -> None:
        result, node = fused(write, "matmul")
        assert bounds(node) == (-np.inf, np.inf)
        assert not weights_of(result)[node.input[5]].any()

    @pytest.mark.parametrize(
        ("limits", "expected"),
        [((-1.0, 0.25), (0.0, 0.25)), ((0.125, 0.25), (0.125, 0.25)), ((-2.0, -1.0), (-1.0, -1.0))],
    )
    def test_activations_in_a_row(self, limits: tuple[float, float], expected: tuple[float, float]) -> None:
        """Where their limits do not overlap, the last one decides."""
        result, node = fused(lambda net, a: clip(net, net.op("Relu", a), *limits))
        assert bounds(node) == expected and op_counts(result)["Clip"] == op_counts(result)["Relu"] == 0

    def test_a_second_run_leaves_what_is_fused(self) -> None:
        """Relu, Clip and Add behind an operator that has an activation already."""
        result, _ = fused(
            lambda net, a: net.op("Add", clip(net, net.op("Relu", a), -1.0, 0.25), net.random(8)), "matmul"
        )
        steps = [Pass("fuse_epilogue", fuse_epilogue), Pass("attach_fallback", attach_fallback)]
        again = io.to_proto(run_passes(io.to_graph(result), steps), result)
        feed = random_feed(result)
        assert relative_error(run(result, feed), run(again, feed)) <= TOLERANCE
        assert op_counts(again) == op_counts(result)

    def test_values_that_others_see_are_not_fused(self) -> None:
        net = Net()
        a = net.conv(net.input("x", ["N", 4, 6, 6]), (4, 8))
        net.output(a)
        b = net.conv(net.op("Relu", a), (8, 8))
        net.output(net.op("Add", net.op("Relu", b), net.op("Sigmoid", b)))
        assert op_counts(check_rewrite(net.build()))["Relu"] == 2
