"""The functions that define our operators: valid, and the same as the numpy oracle in every runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import reference
from models import Net, check_rewrite, random_feed, random_plan, relative_error, rewrite, run
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import CONV, CONV_ADD, CONV_MAX_POOL, DOMAIN, GEMM, OUR_OPS
from tetris_onnx.passes import Pass, attach_fallback, run_passes
from tetris_onnx.passes.attach_fallback import fallback_function

# onnxruntime refuses opsets that it does not know yet.
NEWEST = min(onnx.defs.onnx_opset_version(), 24)
# Sums of float32 products, against sums in float64.
TOLERANCE = 1e-5

ORACLES = {
    CONV: reference.block_sparse_conv,
    CONV_ADD: reference.block_sparse_conv_add,
    CONV_MAX_POOL: reference.block_sparse_conv_max_pool,
    GEMM: reference.block_sparse_gemm,
}


def operator(
    kind: str = CONV,
    kernel: tuple[int, ...] = (3, 3),
    opset: int = 17,
    bias: bool = True,
    count: int | None = None,
    limits: tuple[float, float] = (-np.inf, np.inf),
    batch: int | str = "N",
    **window: list[int],
) -> tuple[onnx.ModelProto, dict[str, NDArray], dict[str, Any]]:
    """A model of one operator (7 to 11 channels, 4x3 blocks, random permutations), its inputs and its attributes."""
    rng = np.random.default_rng(0)
    kernel = () if kind == GEMM else kernel
    grid = np.argwhere(rng.random((3, 3)) < 0.5) if count is None else np.argwhere(np.ones((3, 3)))[:count]
    blocks = rng.normal(size=(len(grid), 4, 3, *kernel)).astype(np.float32)
    blocks[grid[:, 0] == 2, 3] = 0  # beyond the edge
    blocks[grid[:, 1] == 2, :, 1:] = 0
    inputs = {
        "blocks": blocks,
        "block_index": grid,
        "input_perm": rng.permutation(7),
        "output_perm": rng.permutation(11),
    }
    if bias:
        inputs["bias"] = rng.normal(size=11).astype(np.float32)
    attributes: dict[str, Any] = {"weight_shape": [11, 7, *kernel]}
    if kind != GEMM:
        axes = len(kernel)
        attributes |= {"strides": [1] * axes, "pads": [1] * 2 * axes, "dilations": [1] * axes} | window
    if kind == CONV_MAX_POOL:
        attributes["pool_shape"] = [2, 2]
    node = helper.make_node(
        kind,
        ["X", *inputs, *(["addend"] if kind == CONV_ADD else [])],
        ["Y"],
        domain=DOMAIN,
        **attributes,
        block_size=[4, 3],
        activation_min=limits[0],
        activation_max=limits[1],
        **({"kernel_shape": kernel, "group": 1} if kind != GEMM else {}),
    )
    shape = [batch, 7, *[8, 9, 6][: len(kernel)]]
    out = [None, 11, *[None] * len(kernel)]
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("X", TensorProto.FLOAT, shape),
            *([helper.make_tensor_value_info("addend", TensorProto.FLOAT, out)] if kind == CONV_ADD else []),
        ],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(values, name) for name, values in inputs.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        functions=[fallback_function(kind, opset)],
        ir_version=8,
    )
    x = rng.normal(size=[2 if isinstance(d, str) else d for d in shape]).astype(np.float32)
    if kind == CONV_ADD:  # (the default window keeps the size)
        inputs["addend"] = rng.normal(size=(len(x), 11, *x.shape[2:])).astype(np.float32)
    return model, {"X": x, **inputs}, attributes | {"limits": limits}


def check(kind: str = CONV, **options: Any) -> None:
    model, inputs, attributes = operator(kind, **options)
    onnx.checker.check_model(model, full_check=True)
    low, high = attributes.pop("limits")
    oracle = ORACLES[kind]
    names = {"X": "x"}
    expected = oracle(
        **{names.get(k, k): v for k, v in inputs.items()}, **attributes, activation_min=low, activation_max=high
    ).astype(np.float32)
    feed = {name: inputs[name] for name in ("X", "addend") if name in inputs}
    assert relative_error([expected], run(model, feed)) < TOLERANCE
    if "bias" in inputs:  # (onnx.reference cannot leave an input of a function out)
        assert relative_error([expected], ReferenceEvaluator(model).run(None, feed)) < TOLERANCE


@pytest.mark.parametrize("opset", range(13, NEWEST + 1))
@pytest.mark.parametrize("kind", OUR_OPS)
def test_every_opset(kind: str, opset: int) -> None:
    check(kind, opset=opset)


@pytest.mark.parametrize("kernel", [(1,), (3,), (1, 1), (3, 3), (2, 5), (3, 3, 3), (1, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_kernels_over_one_to_three_axes(kernel: tuple[int, ...], bias: bool) -> None:
    check(kernel=kernel, bias=bias)


def test_the_evaluator_runs_what_the_passes_make() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 4, 6, 6]), (4, 8), bias=False))
    net.output(net.matmul(net.op("Flatten", a), (288, 10)))
    model = net.build()
    result = check_rewrite(model)
    feed = random_feed(model)
    assert relative_error(run(result, feed), ReferenceEvaluator(result).run(None, feed)) < TOLERANCE


@pytest.mark.parametrize(
    "window",
    [
        {"strides": [2, 3]},
        {"pads": [0, 2, 1, 0]},
        {"dilations": [2, 1], "pads": [0, 0, 0, 0]},
        {"strides": [3, 1], "pads": [2, 2, 0, 1], "dilations": [1, 2]},
    ],
)
def test_windows(window: dict[str, list[int]]) -> None:
    check(**window)


@pytest.mark.parametrize("limits", [(0.0, np.inf), (-0.5, 0.5), (-np.inf, 0.0), (0.0, 6.0)])
@pytest.mark.parametrize("kind", OUR_OPS)
def test_activations(kind: str, limits: tuple[float, float]) -> None:
    check(kind, limits=limits)


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("kind", OUR_OPS)
def test_one_block_and_all_blocks(kind: str, count: int) -> None:
    check(kind, count=count)


@pytest.mark.parametrize("kind", OUR_OPS)
def test_a_fixed_batch_of_one(kind: str) -> None:
    check(kind, batch=1)


@pytest.mark.parametrize("kind", OUR_OPS)
@pytest.mark.parametrize("opset", [13, 15, 18, NEWEST])
def test_shapes_infer_through_the_function(kind: str, opset: int) -> None:
    model, _, _ = (
        operator(kind, opset=opset, batch=2)
        if kind in (GEMM, CONV_ADD)
        else operator(kind, opset=opset, batch=2, strides=[2, 1])
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    found = [d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim]
    expected = {CONV: [2, 11, 4, 9], CONV_ADD: [2, 11, 8, 9], CONV_MAX_POOL: [2, 11, 2, 4], GEMM: [2, 11]}
    assert found == expected[kind]


def test_half_precision() -> None:
    """The body takes the type of the blocks (from opset 15, which has CastLike)."""
    model, inputs, _ = operator(GEMM)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for initializer in model.graph.initializer:
        if initializer.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(initializer).astype(np.float16)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    onnx.checker.check_model(model, full_check=True)
    exact = operator(GEMM)[0]
    (half,) = run(model, {"X": inputs["X"].astype(np.float16)})
    assert half.dtype == np.float16
    assert relative_error(run(exact, {"X": inputs["X"]}), [half.astype(np.float32)]) < 5e-3  # 11 bits, a few sums


def test_convolutions_of_different_ranks_and_products_in_one_model() -> None:
    net = Net()
    a = net.conv(net.input("x", ["N", 4, 6, 4, 4]), (4, 8), axes=3)
    a = net.op("Reshape", net.op("Relu", a), net.constant([0, 8, 6, 16]))
    a = net.op("Reshape", net.op("Relu", net.conv(a, (8, 8))), net.constant([0, 8, 96]))
    a = net.op("Relu", net.conv(a, (8, 8), axes=1))
    net.output(net.gemm(net.op("Flatten", a), (768, 12)))
    model = net.build()
    result = check_rewrite(model)
    assert sorted(f.name for f in result.functions) == [CONV, GEMM]
    assert [n.op_type for n in result.graph.node].count(CONV) == 3


def test_only_what_is_used_is_attached() -> None:
    net = Net()
    net.output(net.conv(net.input("x", ["N", 4, 6, 6]), (4, 8)))
    model = net.build()
    assert [f.name for f in rewrite(model, random_plan(model)).functions] == [CONV]
    assert list(rewrite(model, random_plan(model, skip=["conv1"])).functions) == []


def with_own_function() -> onnx.ModelProto:
    """x -> Conv -> Twice, a function of the model's own."""
    net = Net()
    a = net.conv(net.input("x", ["N", 4, 6, 6]), (4, 8))
    net.output(net.op("Twice", a, domain="org.example", out="y", factor=2.5), shape=["N", 8, 6, 6])
    model = net.build()
    constant = onnx.NodeProto(op_type="Constant", output=["f"])
    constant.attribute.append(onnx.AttributeProto(name="value_float", ref_attr_name="factor", type=1))
    nodes = [constant, helper.make_node("Mul", ["a", "f"], ["b"])]
    model.functions.append(
        helper.make_function("org.example", "Twice", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)], ["factor"])
    )
    return model


def test_functions_of_the_model_are_kept() -> None:
    model = with_own_function()
    result = check_rewrite(model)
    assert sorted((f.domain, f.name) for f in result.functions) == [(DOMAIN, CONV), ("org.example", "Twice")]
    again = io.to_proto(run_passes(io.to_graph(result), [Pass("attach_fallback", attach_fallback)]), result)
    assert len(again.functions) == 2
    x = {"x": np.ones((1, 4, 6, 6), np.float32)}
    assert relative_error(run(result, x), run(again, x)) == 0


def test_functions_and_subgraphs_in_one_model() -> None:
    model = with_own_function()
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        node = helper.make_node(op, ["y"], [f"{name}_y"])
        info = helper.make_tensor_value_info(f"{name}_y", 1, ["N", 8, 6, 6])
        branches[name] = helper.make_graph([node], name, [], [info])
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["flag"], ["z"], **branches))
    model.graph.output.append(helper.make_tensor_value_info("z", 1, ["N", 8, 6, 6]))
    check_rewrite(model)
