"""A whole model for the CUDA target on the stand-in GPU: what runs between its layers, and that it is right."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnxruntime
import pytest
from rich.console import Console

from models import Net, random_feed, random_plan, rewrite, run  # of tests/
from tests.custom_ops.cuda.stand_in import StandIn
from tetris_onnx import runtime
from tetris_onnx.optimize import masked_dense
from tetris_onnx.plan import Plan
from tetris_onnx.session import DEVICES, PROVIDERS, SessionError, open_session
from tetris_onnx.timing.bench import BenchResult, Machine, Timing, bench, print_bench
from tetris_onnx.timing.profiling import Placement, placement, placements


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
def test_values_stay_channels_last(driver: StandIn) -> None:
    model, plan = residual_model()
    result = rewrite(model, plan, target="cuda")
    session = runtime.InferenceSession(result.SerializeToString())
    feed = random_feed(model)
    (y,) = session.run(None, feed)
    assert driver.errors == []
    (expected,) = run(masked_dense(model, plan), feed)
    # Four layers of sums of 11-bit products.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    ours = [node.op_type for node in result.graph.node if node.domain == "ai.tetris"]
    assert sorted(ours) == ["BlockSparseConv"] * 3 + ["BlockSparseConvAdd"] * 2 + ["ChannelsLastMaxPool"] * 2
    # One value comes from a dense layer, NCHW: it is brought channels-last once, as a Transpose, for its two readers.
    # Every other input of a layer is read as it is, but for the readers of a value that has another reader's order.
    kernels = [launch.variant.kernel for launch in driver.launches]
    conversions = [launch for launch in driver.launches if launch.variant.kernel == "channels_last"]
    assert kernels.count("max_pool") == 2
    assert kernels.count("block_sparse_conv") == 5
    assert all(launch.variant.layout == "nhwc" for launch in conversions[1:])
    assert len(conversions) <= 2


@pytest.mark.usefixtures("shared_library")
def test_bench_on_the_gpu(driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tetris-onnx bench --provider cuda` but for the GPU: values stay in the device's memory between runs."""
    monkeypatch.setitem(PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setitem(DEVICES, "cuda", "cpu")
    copied: list[str] = []
    make = onnxruntime.OrtValue.ortvalue_from_numpy

    def copy(values: np.ndarray, device: str, number: int) -> onnxruntime.OrtValue:
        copied.append(device)
        return make(values, device, number)

    monkeypatch.setattr("onnxruntime.OrtValue.ortvalue_from_numpy", copy)
    model, plan = residual_model()
    sparse = rewrite(model, plan, target="cuda")
    result = bench(model, sparse, provider="cuda", batch=2, rounds=3, per_layer=True)
    assert driver.errors == []
    launches = [launch for launch in driver.launches if launch.variant.kernel == "block_sparse_conv"]
    assert len(launches) > 5 * 3  # layers, rounds
    assert copied == ["cpu"] * 2  # one input, once for each model
    assert result.speedup is not None and result.provider == "cuda" and len(result.layers) > 5
    assert [(p.nodes > 5, p.elsewhere, p.copies) for p in result.placements] == [(True, (), ())] * 2


def test_a_node_elsewhere_and_a_copy_are_seen_and_said() -> None:
    ran = [("conv", "BlockSparseConv", "CUDA"), ("shape", "Shape", "CPU"), ("Memcpy_1", "MemcpyToHost", "CUDA")]
    events = [
        {
            "cat": "Node",
            "name": f"{name}_kernel_time",
            "args": {"op_name": op_type, "provider": f"{where}ExecutionProvider"},
        }
        for name, op_type, where in ran
    ]
    placed = placement([*events, {"cat": "Session", "name": "model_run"}], "m.onnx", "CUDAExecutionProvider")
    assert placed == Placement("m.onnx", 3, ("shape",), ("Memcpy_1",))
    text = io.StringIO()
    timing = Timing("m.onnx", 1.0, 1.0, 1)
    machine = Machine("a processor", 1, None, "1.31.1")
    result = BenchResult(machine, "cuda", 1, 1, 5, (timing,), None, None, placements=(placed,))
    print_bench(result, Console(file=text, width=500))
    assert "of 3 nodes of m.onnx, onnxruntime ran 1 on another provider (shape) and copied 1 values" in text.getvalue()


@pytest.mark.gpu
def test_no_copies_between_cpu_and_gpu() -> None:
    """On a GPU: every node is the CUDA provider's, by onnxruntime's own account, and nothing is copied in between."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime is not onnxruntime-gpu")
    model, plan = residual_model()
    sparse, feed = rewrite(model, plan, target="cuda"), random_feed(model)
    try:
        session = open_session(sparse, "cuda")
    except SessionError as error:
        pytest.skip(f"no usable GPU: {error}")
    (y,) = session.run(None, feed)
    (expected,) = run(masked_dense(model, plan), feed)
    np.testing.assert_allclose(y, expected, rtol=0, atol=5e-3 * np.abs(expected).max())
    (placed,) = placements([sparse], [feed], ["the model"], "cuda")
    assert placed.nodes > 5
    assert placed.elsewhere == () and placed.copies == ()
