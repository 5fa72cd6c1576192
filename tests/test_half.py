"""Models of float16 and bfloat16: pruned like any other, verified, and run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models import Net, op_counts, random_plan, run
from tetris_onnx import Config, optimize, runtime
from tetris_onnx.accuracy.verification import VerificationError, verify
from tetris_onnx.config import LayerRule
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import find_layers
from tetris_onnx.graph.widen import rounding, widen
from tetris_onnx.optimize import masked_dense

# A rule for all: small layers, too, are pruned.
CONFIG = Config(block_size=(16, 16), layers=(LayerRule("*"),))
KINDS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def convert(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """Everything in another type."""
    numpy_type = helper.tensor_dtype_to_np_dtype(KINDS[kind])
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(numpy_type)
            tensor.CopyFrom(helper.make_tensor(tensor.name, KINDS[kind], values.shape, values.tobytes(), raw=True))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = KINDS[kind]
    return model


def network(opset: int = 22) -> Net:
    """Every place where the passes make a constant: BatchNormalization, scaled Gemm, bias Add, no bias."""
    net = Net(opset)
    a = net.op("Relu", net.batchnorm(net.conv(net.input("x", ["N", 16, 8, 8]), (16, 32)), 32))
    a = net.op("MaxPool", net.op("Relu", net.conv(a, (32, 32), bias=False)), kernel_shape=[2, 2], strides=[2, 2])
    a = net.op("Flatten", a)
    a = net.op("Gemm", a, net.weight(32, 512), net.random(1, 32), transB=1, alpha=0.5, beta=2.0)
    net.output(net.op("Add", net.matmul(net.op("Relu", a), (32, 32)), net.random(32)))
    return net


def x_of(*shape: int) -> NDArray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def widened(model: onnx.ModelProto, x: NDArray) -> NDArray:
    return run(widen(model), {"x": x.astype(np.float32)})[0]


@pytest.mark.parametrize(("kind", "opset"), [("float16", 13), ("float16", 17), ("bfloat16", 22)])
def test_layers_are_pruned_and_stay_in_their_type(kind: str, opset: int) -> None:
    model = convert(network(opset).build(), kind)
    result = optimize(model, CONFIG)
    assert [row.status for row in result.report.layers] == ["block-sparse"] * 4
    counts = op_counts(result.model)
    ours = [counts[name] for name in ("BlockSparseConv", "BlockSparseConvMaxPool", "BlockSparseGemm")]
    assert (ours, counts["Relu"], counts["Add"]) == ([1, 1, 2], 0, 0)
    types = {t.data_type for t in result.model.graph.initializer}
    assert types == {KINDS[kind], TensorProto.INT64}
    assert io.opset(result.model) >= 15
    onnx.checker.check_model(result.model, full_check=True)
    # Rounding of the fused weights, in float32: see graph.widen.
    x = x_of(3, 16, 8, 8)
    expected = widened(masked_dense(io.raise_opset(model), result.plan), x)
    error = np.abs(widened(result.model, x) - expected).max() / np.abs(expected).max()
    assert 0 < error < 2 * rounding(model)


def test_float16_runs_on_the_cpu_with_and_without_the_library() -> None:
    """onnxruntime puts Casts around the operators of its CPU provider: products in float32, values in float16."""
    model = convert(network().build(), "float16")
    result = optimize(model, CONFIG)
    x = x_of(3, 16, 8, 8)
    expected = widened(result.model, x)
    fallback = run(result.model, {"x": x})[0]
    session = runtime.InferenceSession(result.model.SerializeToString())
    y = session.run(None, {"x": x})[0]
    assert y.dtype == fallback.dtype == np.float16
    # Four layers, each output rounded to 11 bits.
    tolerance = 4 * 2.0**-11 * np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(fallback, expected, rtol=0, atol=tolerance)


def test_a_mixed_model_keeps_its_casts() -> None:
    net = Net()
    x = net.input("x", ["N", 16, 8, 8])
    wide = net.op("Relu", net.conv(x, (16, 32)))
    half = net.op("Cast", wide, to=TensorProto.FLOAT16)
    weight = net.constant(net.weight_values(32, 32, 3, 3).astype(np.float16))
    half = net.op("Relu", net.op("Conv", half, weight, pads=[1] * 4))
    net.output(net.conv(net.op("Cast", half, to=TensorProto.FLOAT), (32, 16)))
    model = net.build()
    result = optimize(model, CONFIG)
    assert [row.status for row in result.report.layers] == ["block-sparse"] * 3
    assert op_counts(result.model)["Cast"] == 2
    types = [t.data_type for t in result.model.graph.initializer if t.name.endswith("/blocks")]
    assert sorted(types) == [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT16]
    feed = {"x": x_of(2, 16, 8, 8).astype(np.float32)}
    expected = run(masked_dense(model, result.plan), feed)[0]
    for y in (
        run(result.model, feed)[0],
        runtime.InferenceSession(result.model.SerializeToString()).run(None, feed)[0],
    ):
        np.testing.assert_allclose(y, expected, rtol=0, atol=2.0**-10 * np.abs(expected).max())


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_calibration(tmp_path: Path, allocation: str) -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 16, 8, 8]), (16, 32)))
    net.output(net.matmul(net.op("Flatten", a), (32 * 64, 16)))
    model = convert(net.build(), "float16")
    np.savez(tmp_path / "samples.npz", x=x_of(16, 16, 8, 8))
    config = replace(CONFIG, allocation=allocation)
    result = optimize(model, config, calibration=tmp_path / "samples.npz")
    pruned = {row.status for row in result.report.layers}
    assert pruned == {"block-sparse"} if allocation == "uniform" else "block-sparse" in pruned
    assert {t.data_type for t in result.model.graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_mistake_in_one_channel_is_found(kind: str) -> None:
    """One bias of the last layer that is off by a tenth of the largest output."""
    model = io.raise_opset(convert(network().build(), kind))
    result = optimize(model, CONFIG)
    reference = masked_dense(model, result.plan)
    assert verify(result.model, reference, 1e-4) < 8 * rounding(model)
    wrong = result.model
    (last,) = (n for n in wrong.graph.node if n.output[0] == wrong.graph.output[0].name)
    tensor = next(t for t in wrong.graph.initializer if t.name == last.input[5])
    values = numpy_helper.to_array(tensor).copy()
    y = widened(reference, x_of(3, 16, 8, 8))
    values[3] += values.dtype.type(np.abs(y).max() / 10)
    tensor.CopyFrom(helper.make_tensor(tensor.name, KINDS[kind], values.shape, values.tobytes(), raw=True))
    with pytest.raises(VerificationError):
        verify(wrong, reference, 1e-4)


def test_other_types_stay_dense() -> None:
    net = Net()
    weight = net.constant(net.weight_values(32, 16, 3, 3).astype(np.float64))
    net.output(net.op("Conv", net.input("x", ["N", 16, 8, 8], TensorProto.DOUBLE), weight), TensorProto.DOUBLE)
    (layer,) = find_layers(io.to_graph(net.build()))
    assert layer.why_dense == "its weight is float64, not float32, float16 or bfloat16"


def test_widening_reaches_subgraphs_and_leaves_the_model_alone() -> None:
    net = Net()
    net.input("flag", [], TensorProto.BOOL)
    x = net.input("x", ["N", 4], TensorProto.FLOAT16)
    branches = {}
    for name, value in (("then_branch", 2), ("else_branch", 3)):
        constant = helper.make_node(
            "Constant", [], [f"{name}_c"], value=numpy_helper.from_array(np.array(value, np.float16))
        )
        node = helper.make_node("Mul", [x, f"{name}_c"], [f"{name}_y"])
        info = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT16, ["N", 4])
        branches[name] = helper.make_graph([constant, node], name, [], [info])
    net.output(net.op("If", "flag", **branches), TensorProto.FLOAT16, ["N", 4])
    model = net.build()
    before = model.SerializeToString()
    wide = widen(model)
    assert model.SerializeToString() == before and rounding(model) == 2.0**-11 and rounding(wide) == 0
    y = run(wide, {"x": np.ones((2, 4), np.float32), "flag": np.array(False)})[0]
    np.testing.assert_array_equal(y, np.full((2, 4), 3, np.float32))


def test_random_plans_in_float16() -> None:
    """Whatever the permutations: the Gathers and the absorbed orders know no type."""
    model = io.raise_opset(convert(network().build(), "float16"))
    plan = random_plan(model)
    result = optimize(model, plan=plan)
    assert len(result.plan) == 4
