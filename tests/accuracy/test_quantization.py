"""The ranges of what block-sparse layers read: of the channels that count, with and without the outermost values."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from models import Net, random_plan, rewrite
from tests.custom_ops.models import make_model, random_op, transposes
from tetris_onnx.accuracy.quantization import CUT_SHARES, input_ranges
from tetris_onnx.data.calibration import CalibrationError, Samples
from tetris_onnx.graph.layers import DOMAIN


def range_of(model: onnx.ModelProto, samples: Samples, share: float = 0.0) -> tuple[float, float]:
    ((name, found),) = input_ranges(model, samples)[share].items()
    assert name == "the_node"
    return found


@pytest.mark.parametrize("layout", ["first", "last", "gemm"])
def test_channels_that_no_block_reads_do_not_count(layout: str) -> None:
    rng = np.random.default_rng(0)
    kernel = () if layout == "gemm" else (3, 3)
    attributes = transposes(2, True, True) if layout == "last" else {}
    op = random_op(rng, (8, 24, *kernel), (8, 8), "one", **attributes)
    (column,) = op.block_index[:, 1]
    used = op.input_perm[8 * column : 8 * column + 8]
    x = rng.standard_normal((5, 24, *([6, 5] if kernel else []))).astype(np.float32)
    x[:, np.setdiff1d(np.arange(24), used)] *= 100
    seen = x[:, used]
    model = make_model(op, ["N", *x.shape[1:]])
    assert range_of(model, {"x": np.moveaxis(x, 1, -1) if layout == "last" else x}) == (seen.min(), seen.max())


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_has_a_byte_and_nan_and_inf_have_none(sign: int) -> None:
    x = sign * np.arange(1, 17, dtype=np.float32)[:, None].repeat(8, axis=1)
    x[3], x[4] = np.nan, np.inf
    model = make_model(random_op(np.random.default_rng(0), (8, 8), (8, 8), 1.0), ["N", 8])
    assert range_of(model, {"x": x}) == tuple(sorted((0, 16 * sign)))


@pytest.mark.parametrize("share", CUT_SHARES)
def test_the_outermost_values_are_cut_off(share: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 8, 100, 100)).astype(np.float32)
    low, high = range_of(make_model(random_op(rng, (8, 8, 1, 1), (8, 8), 1.0), x.shape), {"x": x}, share)
    # Estimated from a part of the values: the shares beyond are near, within 4 standard deviations.
    for beyond in (np.mean(x < low), np.mean(x > high)):
        assert abs(beyond - share) <= 4 * np.sqrt(share / (1 << 18))


def test_every_layer_of_a_network_has_one() -> None:
    net = Net()
    y = net.op("Relu", net.conv(net.input("x", [2, 8, 6, 6]), (8, 8)))
    y = net.op("Flatten", net.op("GlobalAveragePool", net.conv(y, (8, 8))))
    net.output(net.gemm(y, (8, 10)), shape=[2, 10])
    dense = net.build()
    model = rewrite(dense, random_plan(dense))
    ours = [node.name for node in model.graph.node if node.domain == DOMAIN]
    samples = {"x": np.random.default_rng(0).standard_normal((4, 8, 6, 6)).astype(np.float32)}
    before = model.SerializeToString(deterministic=True)
    found = input_ranges(model, samples)
    assert model.SerializeToString(deterministic=True) == before
    assert list(found) == list(CUT_SHARES)
    for ranges in found.values():
        assert list(ranges) == ours
        lows, highs = zip(*ranges.values(), strict=True)
        assert lows[1] == 0  # behind a Relu
        assert min(highs) > 0
    with pytest.raises(CalibrationError, match="2 samples at a time"):
        input_ranges(model, {"x": samples["x"][:3]})


def test_without_our_operators_there_is_none() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "relu", values[:1], values[1:]))
    assert input_ranges(model, {"x": np.zeros((1, 2), np.float32)}) == {share: {} for share in CUT_SHARES}
