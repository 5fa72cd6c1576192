"""Grouped convolutions and quantized layers: pruned in the one form that is, or left in their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import Net, check_rewrite, op_counts, random_feed, random_plan, run, weights_of
from tetris_onnx.config import Config, LayerRule
from tetris_onnx.data.calibration import Data
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import find_layers
from tetris_onnx.graph.quantized import is_quantized, value_range, without_rounding
from tetris_onnx.optimize import masked_dense, optimize
from tetris_onnx.passes import Pass, open_layers, run_passes
from tetris_onnx.passes.open_layers import block_diagonal
from tetris_onnx.planner import inspect
from tetris_onnx.runtime import InferenceSession


def config(sparsity: float = 0.5, precision: str = "float32", block: int = 8) -> Config:
    """Prunes every layer that can be, whatever its time."""
    rules = (LayerRule("*", block_size=(block, block)),)
    return Config(sparsity=sparsity, precision=precision, layers=rules, workers=1)


# Grouped convolutions


def grouped(groups: int = 2, channels: int = 32) -> Net:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 9, 9]), (8, channels)))
    a = net.op("Relu", net.batchnorm(net.conv(a, (channels, channels), group=groups), channels))
    net.output(net.conv(a, (channels, 8)))
    return net


def test_the_weight_of_one_group_computes_the_same() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 5, 3)).astype(np.float32)
    whole = block_diagonal(weight, 3)
    assert whole.shape == (24, 15, 3) and np.count_nonzero(whole) == weight.size
    for g in range(3):
        assert np.array_equal(whole[8 * g : 8 * g + 8, 5 * g : 5 * g + 5], weight[8 * g : 8 * g + 8])


@pytest.mark.parametrize("gathers", ["absorb", "keep"])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_is_pruned(groups: int, gathers: str) -> None:
    model = grouped(groups).build()
    plan = random_plan(model)
    assert plan.get("conv2").shape == (32, 32)
    counts = op_counts(check_rewrite(model, plan, gathers, left=0 if gathers == "absorb" else None))
    assert (counts["BlockSparseConv"], counts["Conv"], counts["BatchNormalization"]) == (3, 0, 0)


def test_a_grouped_convolution_that_is_not_pruned_stays_grouped() -> None:
    model = grouped().build()
    result = check_rewrite(model, random_plan(model, skip=["conv2"]), left=None)
    conv = next(n for n in result.graph.node if n.op_type == "Conv")
    assert next(a.i for a in conv.attribute if a.name == "group") == 2
    assert weights_of(result)[conv.input[1]].shape == (32, 16, 3, 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_told_by_the_zeros(groups: int) -> None:
    graph = run_passes(io.to_graph(grouped(groups).build()), [Pass("open", open_layers)])
    assert [layer.groups for layer in find_layers(graph)] == [1, groups, 1]
    assert [layer.opened for layer in find_layers(graph)] == [False, groups > 1, False]


def test_small_groups_and_depthwise_convolutions_stay_and_say_so() -> None:
    rows = inspect(grouped(8).build()) + inspect(grouped(32).build())
    reasons = [row.reason for row in rows if row.layer == "conv2"]
    assert reasons == ["it is grouped (8 groups, of fewer than 8 channels each)", "it is depthwise"]


def test_the_sparsity_of_a_grouped_convolution_is_that_inside_its_groups() -> None:
    """Half of the weights that it has, not half of the zeros: those blocks are the first to go."""
    model = grouped(4, 64).build()
    result = optimize(model, config(0.5))
    row = next(row for row in result.report.layers if row.layer == "conv2")
    assert row.weight_shape == (64, 16, 3, 3) and row.parameters == 64 * 16 * 9
    assert row.density == 0.5 and row.kept_parameters == row.parameters // 2
    assert row.macs == 81 * row.parameters
    assert result.plan.get("conv2").keep.sum() == 8  # of 64 blocks, 16 of which hold the groups
    assert row.retained is not None and row.retained >= 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_refit_of_a_network_with_a_grouped_convolution(sparsity: float) -> None:
    """One that is not pruned keeps its groups: its zeros are not weights to fit."""
    model = grouped(2).build()
    samples = Data({"x": np.random.default_rng(0).standard_normal((24, 8, 9, 9)).astype(np.float32)}, None, "samples")
    rules = (LayerRule("node_conv2", sparsity=sparsity), LayerRule("*", block_size=(8, 8), sparsity=0.5))
    result = optimize(model, Config(layers=rules, workers=1), calibration=samples)
    kept = [n for n in result.model.graph.node if n.op_type == "Conv"]
    assert len(kept) == (1 if sparsity == 0 else 0)
    for conv in kept:
        assert weights_of(result.model)[conv.input[1]].shape == (32, 16, 3, 3)


# Quantized layers


def quantized(
    per_channel: bool = True,
    kind: type = np.uint8,
    layer: str = "Conv",
    hidden: Callable[[Net, str], str] | None = None,
) -> Net:
    """Two layers in QDQ form, as onnxruntime's and torch's quantizers write it, the first with a Relu in its range."""
    net = Net()
    rng = np.random.default_rng(1)
    shape = [16, 16, 3, 3] if layer == "Conv" else [16, 16]
    x = net.input("x", [2, *shape[1:2], 8, 8] if layer == "Conv" else [2, 16])

    def pair(value: str, scale: float, zero: int) -> str:
        names = [net.constant(np.float32(scale)), net.constant(np.array(zero, kind))]
        return net.op("DequantizeLinear", net.op("QuantizeLinear", value, *names), *names)

    middle, least = (128, 0) if kind is np.uint8 else (0, -128)
    a = pair(x, 2 / 255, middle)
    for number in range(2):
        axis = 0 if layer == "Conv" or number else 1
        channels = 16 if per_channel else 1
        scales = rng.uniform(0.005, 0.01, channels).astype(np.float32)
        weight = rng.integers(-127, 128, shape).astype(np.int8)
        weight[:, 0] = 127  # so that the op's own scale of a row is the same
        stored = np.ascontiguousarray(weight.T) if axis == 1 else weight
        scale = net.constant(scales if per_channel else scales.reshape(()))
        zero = net.constant(np.zeros(channels, np.int8) if per_channel else np.int8(0))
        w = net.op("DequantizeLinear", net.constant(stored), scale, zero, axis=axis)
        if layer == "MatMul" and number:  # torch: a Transpose behind it
            w = net.op("Transpose", w, perm=[1, 0])
        bias = net.op(
            "DequantizeLinear",
            net.constant(rng.integers(-500, 500, 16).astype(np.int32)),
            net.constant(np.float32(1e-3)),
        )
        if layer == "Conv":
            a = net.op("Conv", a, w, bias, pads=[1] * 4)
        elif layer == "Gemm":
            a = net.op("Gemm", a, w, bias, transB=1 - axis)
        else:
            a = net.op("Add", net.op("MatMul", a, w), bias)
        if hidden is not None and number == 0:
            a = hidden(net, pair(a, 0.05, least))
        a = pair(a, 0.05, least if number == 0 else middle)
    net.output(a)
    return net


def floats(model: onnx.ModelProto) -> list[list[float]]:
    return [list(a.floats) for n in model.graph.node for a in n.attribute if a.name == "input_range"]


@pytest.mark.parametrize("layer", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantized_layers_are_pruned_with_precision_int8(layer: str, kind: type, per_channel: bool) -> None:
    """No rounding between our operators, the range of the pair in both; a weight's scales go with their rows."""
    model = quantized(per_channel, kind, layer).build()
    before = model.SerializeToString()
    result = optimize(model, config(0.5, "int8"))
    assert model.SerializeToString() == before
    counts = op_counts(result.model)
    assert counts["BlockSparseConv" if layer == "Conv" else "BlockSparseGemm"] == 2
    assert (counts["Conv"], counts["Gemm"], counts["MatMul"]) == (0, 0, 0)
    assert (counts["QuantizeLinear"], counts["Clip"]) == (1, 1)  # of the output; of the input
    assert result.report.max_error < 1e-5 and result.report.gathers == 0
    onnx.checker.check_model(result.model, full_check=True)
    nodes = [n for n in result.model.graph.node if n.op_type.startswith("BlockSparse")]
    limits = {a.name: a.f for a in nodes[0].attribute}
    assert (limits["activation_min"], round(limits["activation_max"], 4)) == (0.0, 12.75)  # the Relu in the range
    middle = 128 if kind is np.uint8 else 0
    ranges = [[-middle * 2 / 255, (255 - middle) * 2 / 255], [0, 12.75]]
    if kind is np.int8:
        ranges[0] = [-128 * 2 / 255, 127 * 2 / 255]
    assert np.allclose(floats(result.model), ranges, rtol=1e-6)
    # But for the roundings in between, steps of 0.05 (outputs of up to 6): a wrong scale or row would be off by ones.
    feed = random_feed(model)
    expected = run(masked_dense(model, result.plan), feed)[0]
    for found in (run(result.model, feed), InferenceSession(result.model.SerializeToString()).run(None, feed)):
        assert np.abs(found[0] - expected).max() < 0.6
        assert np.abs(found[0] - expected).mean() < 0.03


def test_quantized_layers_stay_with_other_precisions() -> None:
    result = optimize(quantized().build(), config())
    assert len(result.plan) == 0
    assert {row.reason for row in result.report.layers} == {"its weight is quantized (precision int8 prunes it)"}
    assert op_counts(result.model)["DequantizeLinear"] == 7


def test_pairs_next_to_a_quantized_layer_stay() -> None:
    model = quantized().build()
    rules = (LayerRule("node_conv1", sparsity=0.0), LayerRule("*", sparsity=0.5, block_size=(8, 8)))
    result = optimize(model, Config(layers=rules, precision="int8", workers=1))
    counts = op_counts(result.model)
    assert (counts["Conv"], counts["BlockSparseConv"], counts["QuantizeLinear"], counts["Clip"]) == (1, 1, 3, 0)
    assert np.allclose(floats(result.model), [[0, 12.75]])


def test_a_pooling_between_them_works_on_floats() -> None:
    net = quantized(hidden=lambda net, value: net.op("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2]))
    result = optimize(net.build(), config(0.5, "int8"))
    counts = op_counts(result.model)
    assert (counts["BlockSparseConvMaxPool"], counts["BlockSparseConv"], counts["MaxPool"]) == (1, 1, 0)
    assert (counts["QuantizeLinear"], counts["Clip"]) == (1, 1)
    assert len(floats(result.model)) == 2


def test_refit_of_a_quantized_network() -> None:
    """A layer that stays dense keeps its bytes."""
    samples = Data({"x": np.random.default_rng(0).standard_normal((24, 16, 8, 8)).astype(np.float32)}, None, "samples")
    rules = (LayerRule("node_conv2", sparsity=0.0), LayerRule("*", sparsity=0.5, block_size=(8, 8)))
    result = optimize(quantized().build(), Config(layers=rules, precision="int8", workers=1), calibration=samples)
    counts = op_counts(result.model)
    assert (counts["BlockSparseConv"], counts["Conv"], counts["DequantizeLinear"]) == (1, 1, 4)


@pytest.mark.parametrize(
    ("zero", "wide", "expected"),
    [
        (None, False, (0, 127.5)),
        (np.uint8(4), False, (-2, 125.5)),
        (np.int8(4), False, (-66, 61.5)),
        (np.int16(0), False, None),
        (np.int16(0), True, (-16384, 16383.5)),
        (np.int32(0), True, None),
    ],
)
def test_ranges(zero: np.generic | None, wide: bool, expected: tuple[float, float] | None) -> None:
    assert value_range(np.array(0.5, np.float32), None if zero is None else np.asarray(zero), wide) == expected
    assert value_range(np.array([0.5, 1], np.float32), None) is None


def test_without_rounding_only_the_rounding_is_gone() -> None:
    net = Net()
    x = net.input("x", [64])
    scale, zero = net.constant(np.float32(0.01)), net.constant(np.uint8(30))
    q = net.op("QuantizeLinear", x, scale, zero)
    net.output(net.op("Neg", net.op("DequantizeLinear", q, scale, zero)))
    net.output(net.op("Abs", net.op("DequantizeLinear", q, scale, zero)))
    kept = net.op("QuantizeLinear", net.op("Sin", x), scale, zero)
    net.output(kept, TensorProto.UINT8)  # somebody else reads the bytes
    model = net.build()
    model.graph.value_info.append(helper.make_tensor_value_info(q, TensorProto.UINT8, [64]))
    plain = without_rounding(model)
    assert is_quantized(model) and op_counts(plain)["Clip"] == 1 and op_counts(plain)["QuantizeLinear"] == 1
    onnx.checker.check_model(plain, full_check=True)
    feed = {"x": np.linspace(-1, 3, 64, dtype=np.float32)}
    negative, _, sine = run(plain, feed)
    assert np.allclose(negative, -np.clip(feed["x"], -0.3, 2.25), atol=1e-6)
    assert np.abs(negative - run(model, feed)[0]).max() < 0.00501
    assert np.array_equal(sine, run(model, feed)[2])


def test_scales_of_blocks_are_left_alone() -> None:
    net = Net(21)
    scales = net.constant(np.full((16, 2), 0.01, np.float32))
    weight = net.constant(np.ones((16, 16), np.int8))
    w = net.op("DequantizeLinear", weight, scales, axis=1, block_size=8)
    net.output(net.op("Gemm", net.input("x", ["N", 16]), w, transB=1))
    model = net.build(ir_version=10)
    result = optimize(model, config(0.5, "int8"))
    assert len(result.plan) == 0
    assert numpy_helper.to_array(result.model.graph.initializer[0]).size
