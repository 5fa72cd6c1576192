"""A whole model for the CUDA target on the stand-in GPU: what runs between its layers, and that it is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from models import Net, random_feed, random_plan, rewrite, run  # of tests/
from tests.custom_ops.cuda.placement import copies, placement
from tests.custom_ops.cuda.stand_in import StandIn
from tetris_onnx import runtime
from tetris_onnx.optimize import masked_dense
from tetris_onnx.plan import Plan


def residual_model() -> tuple[onnx.ModelProto, Plan]:
    """A dense first layer, two residual blocks with a MaxPool between them, a dense last one; in blocks of 64."""
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", [2, 3, 10, 8]), (3, 64)))
    for _ in range(2):
        b = net.conv(net.op("Relu", net.conv(a, (64, 128), kernel=1)), (128, 64))
        a = net.op("Relu", net.op("Add", b, a))
        a = net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    a = net.op("Flatten", net.op("GlobalAveragePool", net.op("Relu", net.conv(a, (64, 128)))))
    net.output(net.gemm(a, (128, 10)))
    model = net.build()
    return model, random_plan(model, (64, 64), skip=["conv1", "gemm1"])


@pytest.mark.usefixtures("shared_library")
def test_values_stay_channels_last(driver: StandIn, tmp_path: Path) -> None:
    model, plan = residual_model()
    result = rewrite(model, plan, target="cuda")
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = runtime.InferenceSession(result.SerializeToString(), options)
    feed = random_feed(model)
    (y,) = session.run(None, feed)
    assert driver.errors == []
    (expected,) = run(masked_dense(model, plan), feed)
    # Four layers of sums of 11-bit products.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    placed = placement(session)
    ours = [op for op, _ in placed.values() if op.startswith(("BlockSparse", "ChannelsLast"))]
    assert sorted(ours) == ["BlockSparseConv"] * 3 + ["BlockSparseConvAdd"] * 2 + ["ChannelsLastMaxPool"] * 2
    assert copies(placed) == []
    # One value comes from a dense layer, NCHW: it is brought channels-last once, as a Transpose, for its two readers.
    # Every other input of a layer is read as it is, but for the readers of a value that has another reader's order.
    kernels = [launch.variant.kernel for launch in driver.launches]
    conversions = [launch for launch in driver.launches if launch.variant.kernel == "channels_last"]
    assert kernels.count("max_pool") == 2
    assert kernels.count("block_sparse_conv") == 5
    assert all(launch.variant.layout == "nhwc" for launch in conversions[1:])
    assert len(conversions) <= 2


@pytest.mark.gpu
def test_no_copies_between_cpu_and_gpu(tmp_path: Path) -> None:
    """On a GPU: every node is the CUDA provider's, by onnxruntime's own account, and nothing is copied in between."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime is not onnxruntime-gpu")
    model, plan = residual_model()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    content = rewrite(model, plan, target="cuda").SerializeToString()
    try:
        session = runtime.InferenceSession(content, options, providers=["CUDAExecutionProvider"])
    except Exception as error:
        pytest.skip(f"no usable GPU: {str(error).splitlines()[0]}")
    if "CUDAExecutionProvider" not in session.get_providers():
        pytest.skip("onnxruntime's CUDA provider does not start here")
    feed = random_feed(model)
    (y,) = session.run(None, feed)
    (expected,) = run(masked_dense(model, plan), feed)
    np.testing.assert_allclose(y, expected, rtol=0, atol=5e-3 * np.abs(expected).max())
    placed = placement(session)
    assert {provider for _, provider in placed.values()} == {"CUDAExecutionProvider"}
    assert copies(placed) == []
