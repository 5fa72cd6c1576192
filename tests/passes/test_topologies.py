"""All passes together on the topologies of real networks: right values, and the expected number of Gathers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from models import (
    Net,
    block_sparse_nodes,
    check_rewrite,
    op_counts,
    our_gathers,
    random_feed,
    random_plan,
    relative_error,
    rewrite,
    run,
)
from tetris_onnx.optimize import masked_dense

BOTH = pytest.mark.parametrize("gathers", ["absorb", "keep"])


def chain() -> Net:
    net = Net()
    a = net.input("x", ["N", 8, 10, 10])
    for i, channels in enumerate([(8, 12), (12, 16), (16, 9)]):
        a = net.op("Relu", net.conv(a, channels))
        if i == 1:
            a = net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    a = net.op("Relu", net.gemm(net.op("Flatten", a), (9 * 25, 20)))
    net.output(net.gemm(a, (20, 10)))
    return net


BORDERS = ("conv1.in", "gemm2.out")


def test_chain_keeps_one_gather_between_adjacent_layers() -> None:
    model = chain().build()
    plan = random_plan(model, fixed=BORDERS)
    result = check_rewrite(model, plan, "keep", left=4)
    assert op_counts(result)["Gather"] == 4
    # ... each directly before the layer that reads it
    readers = {value: node for node in result.graph.node for value in node.input}
    for node in result.graph.node:
        if node.op_type == "Gather":
            assert readers[node.output[0]].op_type.startswith("BlockSparse")
    assert op_counts(result)["Relu"] == 0  # fused


def test_chain_with_reordered_borders_keeps_gathers_there_too() -> None:
    check_rewrite(chain().build(), gathers="keep", left=6)


def test_chain_absorbs_all() -> None:
    result = check_rewrite(chain().build())
    counts = op_counts(result)
    assert counts == {"BlockSparseConv": 2, "BlockSparseConvMaxPool": 1, "BlockSparseGemm": 2, "Flatten": 1}


@BOTH
def test_chain_with_dense_neighbours(gathers: str) -> None:
    model = chain().build()
    plan = random_plan(model, skip=["conv1", "conv3", "gemm2"])
    result = check_rewrite(model, plan, gathers, left=0 if gathers == "absorb" else 4)
    assert op_counts(result)["Conv"] == 2 and op_counts(result)["Gemm"] == 1


def test_identity_permutations_leave_no_trace() -> None:
    model = chain().build()
    names = ("conv1", "conv2", "conv3", "gemm1", "gemm2")
    plan = random_plan(model, fixed=[f"{n}.{end}" for n in names for end in ("in", "out")])
    check_rewrite(model, plan, "keep", left=0)


@BOTH
@pytest.mark.parametrize("project", [False, True])
def test_residual(gathers: str, project: bool) -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16)))
    for _ in range(3):
        b = net.conv(net.op("Relu", net.conv(a, (16, 12))), (12, 16))
        skip = net.conv(a, (16, 16), kernel=1) if project else a
        a = net.op("Relu", net.op("Add", b, skip))
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", a)), (16, 10)))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_fire_modules(gathers: str) -> None:
    """SqueezeNet: a fork into two convolutions, joined by a Concat."""
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16)))
    for _ in range(2):
        s = net.op("Relu", net.conv(a, (16, 8), kernel=1))
        parts = [net.op("Relu", net.conv(s, (8, c), kernel=k)) for c, k in ((6, 1), (10, 3))]
        a = net.op("Concat", *parts, axis=1)
    a = net.op("MaxPool", a, kernel_shape=[2, 2])
    net.output(net.op("Softmax", net.op("Flatten", net.op("GlobalAveragePool", net.conv(a, (16, 5), kernel=1)))))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_dense_block(gathers: str) -> None:
    """DenseNet: every layer reads all before it, through its own BatchNormalization and Relu."""
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 8))
    width = 8
    for _ in range(3):
        b = net.op("Relu", net.batchnorm(a, width))
        b = net.op("Relu", net.batchnorm(net.conv(b, (width, 12), kernel=1), 12))
        a = net.op("Concat", a, net.conv(b, (12, 4)), axis=1)
        width += 4
    a = net.op(
        "AveragePool", net.conv(net.op("Relu", net.batchnorm(a, width)), (width, 8), kernel=1), kernel_shape=[2, 2]
    )
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", a)), (8, 5)))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_inverted_residual_with_squeeze_and_excite(gathers: str) -> None:
    """MobileNetV3: expand, depthwise, squeeze-excite by 1x1 convolutions, HardSwish, project, add."""
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12))
    for _ in range(2):
        b = net.op("HardSwish", net.batchnorm(net.conv(a, (12, 24), kernel=1), 24))
        b = net.op("Relu", net.batchnorm(net.conv(b, (24, 24), group=24), 24))
        s = net.op("Relu", net.conv(net.op("GlobalAveragePool", b), (24, 8), kernel=1))
        s = net.op("HardSigmoid", net.conv(s, (8, 24), kernel=1))
        a = net.op("Add", net.batchnorm(net.conv(net.op("Mul", b, s), (24, 12), kernel=1), 12), a)
    net.output(net.op("Flatten", net.op("GlobalAveragePool", a)))
    net.output(net.conv(a, (12, 8)))
    # conv1's output is read by the model's output through the pooling: its regions keep the model's order.
    check_rewrite(net.build(), gathers=gathers, left=None)


@BOTH
def test_squeeze_and_excite_by_matrix_products(gathers: str) -> None:
    net = Net()
    b = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16)))
    s = net.op("Flatten", net.op("GlobalAveragePool", b))
    s = net.op("Sigmoid", net.gemm(net.op("Relu", net.gemm(s, (16, 8))), (8, 16)))
    s = net.op("Unsqueeze", s, net.constant([2, 3]))
    net.output(net.conv(net.op("Mul", b, s), (16, 8)))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_u_net(gathers: str) -> None:
    net = Net(18)
    down1 = net.op("Relu", net.conv(net.input("x", ["N", 4, 16, 16]), (4, 8)))
    down2 = net.op("Relu", net.conv(net.op("MaxPool", down1, kernel_shape=[2, 2], strides=[2, 2]), (8, 12)))
    a = net.op("Relu", net.conv(net.op("MaxPool", down2, kernel_shape=[2, 2], strides=[2, 2]), (12, 16)))
    for skip, channels in ((down2, 16 + 12), (down1, 12 + 8)):
        a = net.op("Resize", a, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
        a = net.op("Relu", net.conv(net.op("Concat", skip, a, axis=1), (channels, 12)))
    net.output(net.op("Sigmoid", net.conv(a, (12, 3), kernel=1)))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_inception(gathers: str) -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 9, 9]), (8, 12)))
    for _ in range(2):
        pooled = net.op("MaxPool", a, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        parts = [
            net.conv(a, (12, 4), kernel=1),
            net.conv(net.op("Relu", net.conv(a, (12, 8), kernel=1)), (8, 4)),
            net.conv(pooled, (12, 4), kernel=1),
        ]
        a = net.op("Relu", net.op("Concat", *parts, axis=1))
    net.output(net.conv(a, (12, 8)))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_flatten_behind_nhwc(gathers: str) -> None:
    """keras: Transpose in, Transpose before the Flatten, MatMul and Add."""
    net = Net()
    a = net.op("Transpose", net.input("x", ["N", 8, 8, 4]), perm=[0, 3, 1, 2])
    a = net.op("Relu", net.conv(a, (4, 12)))
    a = net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    a = net.op("Reshape", net.op("Transpose", a, perm=[0, 2, 3, 1]), net.constant([-1, 12 * 16]))
    a = net.op("Relu", net.op("Add", net.matmul(a, (12 * 16, 24)), net.random(24)))
    net.output(net.op("Softmax", net.op("Add", net.random(10), net.matmul(a, (24, 10)))))
    plan = random_plan(net.build(), fixed=["matmul2.out"])
    result = check_rewrite(net.build(), plan, gathers, left=0 if gathers == "absorb" else 3)
    counts = op_counts(result)
    assert (counts["BlockSparseGemm"], counts["Add"], counts["Relu"]) == (2, 0, 0)


@BOTH
def test_batchnorm_behind_relu_is_not_fused_but_passed(gathers: str) -> None:
    net = Net()
    a = net.batchnorm(net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12))), 12)
    net.output(net.conv(a, (12, 8)))
    plan = random_plan(net.build(), fixed=["conv1.in", "conv2.out"])
    result = check_rewrite(net.build(), plan, gathers, left=0 if gathers == "absorb" else 1)
    assert op_counts(result)["BatchNormalization"] == 1 and op_counts(result)["Relu"] == 0


@BOTH
def test_prelu_and_depthwise_in_between(gathers: str) -> None:
    net = Net()
    a = net.op("PRelu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12)), net.random(12, 1, 1))
    a = net.op("Clip", net.conv(a, (12, 12), group=12), net.constant(np.float32(0)), net.constant(np.float32(6)))
    net.output(net.conv(a, (12, 8)))
    plan = random_plan(net.build(), fixed=["conv1.in", "conv3.out"])
    check_rewrite(net.build(), plan, gathers, left=0 if gathers == "absorb" else 1)


@BOTH
def test_transformer_block(gathers: str) -> None:
    """Heads tear the channels apart, LayerNormalization mixes them: Gathers stop there and are absorbed at once."""
    net = Net(17)
    x = net.input("x", ["B", 6, 16])
    norm = net.op("LayerNormalization", x, net.random(16), net.random(16))
    heads = []
    for _ in range(3):
        h = net.op("Reshape", net.op("Add", net.matmul(norm, (16, 16)), net.random(16)), net.constant([0, 6, 2, 8]))
        heads.append(net.op("Transpose", h, perm=[0, 2, 1, 3]))
    q, k, v = heads
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])))
    a = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    a = net.op("Reshape", a, net.constant([0, 6, 16]))
    x = net.op("Add", net.op("Add", net.matmul(a, (16, 16)), net.random(16)), x)
    h = net.op(
        "Add", net.matmul(net.op("LayerNormalization", x, net.random(16), net.random(16)), (16, 24)), net.random(24)
    )
    h = net.op("Mul", h, net.op("Sigmoid", h))
    net.output(net.op("Add", x, net.op("Add", net.matmul(h, (24, 16)), net.random(16))))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
@pytest.mark.parametrize("conv_axes", [1, 2, 3])
def test_convolutions_over_one_to_three_axes(gathers: str, conv_axes: int) -> None:
    net = Net()
    a = net.input("x", ["N", 6, *[7, 6, 5][:conv_axes]])
    a = net.op("Relu", net.conv(a, (6, 10), axes=conv_axes, auto_pad="SAME_UPPER", strides=[2] * conv_axes))
    net.output(
        net.conv(a, (10, 7), kernel=3, axes=conv_axes, dilations=[2] * conv_axes, pads=[2] * 2 * conv_axes, bias=False)
    )
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_a_layer_that_is_an_output_and_is_read_too(gathers: str) -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12))
    net.output(a)
    net.output(net.conv(net.op("Relu", a), (12, 8)))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_values_that_a_subgraph_reads(gathers: str) -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12))
    net.input("flag", [], TensorProto.BOOL)
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        node = onnx.helper.make_node(op, [a], [f"{name}_y"])
        info = onnx.helper.make_tensor_value_info(f"{name}_y", 1, ["N", 12, 8, 8])
        branches[name] = onnx.helper.make_graph([node], name, [], [info])
    chosen = net.op("If", "flag", **branches)
    net.output(net.conv(chosen, (12, 8)))
    net.output(net.conv(a, (12, 8)))
    model = net.build()
    for flag in (False, True):
        plan = random_plan(model)
        result = rewrite(model, plan, gathers)
        assert len(block_sparse_nodes(result)) == 3
        feed = random_feed(model) | {"flag": np.array(flag)}
        assert relative_error(run(masked_dense(model, plan), feed), run(result, feed)) < 1e-5


@BOTH
def test_the_users_own_permutations(gathers: str) -> None:
    net = Net()
    perm = net.rng.permutation(12).tolist()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12)))
    a = net.op("Gather", a, net.constant(perm), axis=1)
    a = net.conv(a, (12, 12))
    a = net.op("Gather", a, net.constant(perm), axis=-3)
    net.output(a)
    model = net.build()
    result = check_rewrite(model, gathers=gathers, left=None)
    assert our_gathers(result, model) <= (0 if gathers == "absorb" else 2)


@pytest.mark.parametrize("layers", [True, False])
@BOTH
def test_a_sum_with_its_own_permutation(gathers: str, layers: bool) -> None:
    """The user's Gather reads from and writes into one region: y + y[p], with the order that the plan has chosen."""
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12))
    plan = random_plan(chain().build())  # only to have some permutation of 12
    perm = next(p.out_perm for p in plan if p.layer == "conv1")
    g = net.op("Gather", a, net.constant(np.argsort(perm).tolist()), axis=1)
    b = net.op("Add", a, g)
    net.output(net.conv(b, (12, 8)) if layers else b)
    check_rewrite(net.build(), gathers=gathers, left=None)


@BOTH
def test_a_shared_weight(gathers: str) -> None:
    net = Net()
    a = net.input("x", ["N", 12, 8, 8])
    weight = net.random(12, 12, 3, 3, name="w")
    for _ in range(3):
        a = net.op("Relu", net.op("Conv", a, weight, pads=[1] * 4))
    net.output(a)
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_one_value_twice_in_a_concat(gathers: str) -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12)))
    net.output(net.conv(net.op("Concat", a, a, axis=1), (24, 8)))
    check_rewrite(net.build(), gathers=gathers, left=None)


@BOTH
def test_several_heads(gathers: str) -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12)))
    for channels in (4, 6):
        head = net.conv(net.op("Relu", net.conv(a, (12, 10))), (10, channels), kernel=1)
        net.output(net.op("Reshape", net.op("Transpose", head, perm=[0, 2, 3, 1]), net.constant([0, -1, channels])))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
def test_channel_shuffle_and_split(gathers: str) -> None:
    """ShuffleNet: what tears channels apart stops a Gather."""
    net = Net(13)
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 8, 8]), (8, 16)))
    s = net.op("Reshape", a, net.constant([0, 2, 8, 8, 8]))
    s = net.op("Reshape", net.op("Transpose", s, perm=[0, 2, 1, 3, 4]), net.constant([0, 16, 8, 8]))
    left, right = net.ops("Split", [s, net.constant([8, 8])], 2, axis=1)
    net.output(net.op("Concat", left, net.conv(right, (8, 8)), axis=1))
    check_rewrite(net.build(), gathers=gathers, left=0 if gathers == "absorb" else None)


@BOTH
@pytest.mark.parametrize("size", [16, 21])
def test_dynamic_sizes(gathers: str, size: int) -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, "H", "W"]), (8, 12), strides=[2, 2]))
    a = net.op("Relu", net.conv(a, (12, 12), strides=[2, 2]))
    net.output(net.conv(net.op("Relu", net.conv(a, (12, 12))), (12, 4)))
    check_rewrite(net.build(), gathers=gathers, dynamic=size, left=0 if gathers == "absorb" else None)


@BOTH
def test_names_that_the_passes_would_give(gathers: str) -> None:
    """The model has values called like the constants that the passes make, and shares them with a layer that stays."""
    net = Net()
    weight = net.random(8, 8, 3, 3, name="y/weight")
    bias = net.random(8, name="y/bias_reordered")
    a = net.op("Conv", net.input("x", ["N", 8, 8, 8]), weight, bias, pads=[1] * 4, out="y")
    b = net.op("Conv", net.batchnorm(a, 8), weight, bias, pads=[1] * 4, out="z")
    net.output(net.op("Mul", b, net.op("Conv", net.op("Sigmoid", b), weight, group=1, pads=[1] * 4)))
    check_rewrite(net.build(), random_plan(net.build(), skip=["z"]), gathers, left=None)


def test_operators_of_another_domain_are_kept() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 8, 8, 8]), (8, 12))
    for op in ("Relu", "Concat", "Add", "Gather"):
        b = net.op(op, a, net.random(12, 1, 1), domain="com.example", axis=1)
        net.value_infos.append(onnx.helper.make_tensor_value_info(b, 1, ["N", 12, 8, 8]))
        a = net.conv(b, (12, 12))
    net.output(a, shape=["N", 12, 8, 8])
    model = net.build()
    result = rewrite(model, random_plan(model))
    assert len(block_sparse_nodes(result)) == 5
    assert sum(node.domain == "com.example" for node in result.graph.node) == 4
