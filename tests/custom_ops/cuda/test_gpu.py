"""The whole ops on a GPU: onnxruntime's CUDA provider against the oracle. Skipped where there is none.

    python -m pytest tests/custom_ops/cuda/test_gpu.py -m gpu

custom_ops/bench/gpu.py checks the kernels without onnxruntime, on any GPU machine with PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.custom_ops import models
from tests.custom_ops.cuda.test_ops import TOLERANCES, in_type, model_of, op_of, random_input
from tests.custom_ops.test_channels_last_max_pool import max_pool, pool_model
from tetris_onnx import runtime

pytestmark = pytest.mark.gpu

# The oracle is float64; cuDNN is not involved. TF32 sums on the tensor cores round a little differently from numpy's.
DEVICE = "cuda"
GPU_TOLERANCES = {kind: 4 * tolerance for kind, tolerance in TOLERANCES.items()} | {"tf32": 1e-4}


@pytest.fixture(scope="module")
def gpu() -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime is not onnxruntime-gpu")
    x = np.ones((1, 8), np.float32)
    op = models.random_op(np.random.default_rng(0), (8, 8), (8, 8))
    try:
        session = cuda_session(models.make_model(op, x.shape))
    except Exception as error:
        pytest.skip(f"no usable GPU: {str(error).splitlines()[0]}")
    if "CUDAExecutionProvider" not in session.get_providers():
        pytest.skip("onnxruntime's CUDA provider does not start here")


def cuda_session(model: models.onnx.ModelProto, **provider_options: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Nothing may fall back to the CPU: that would be a copy to it and back.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return runtime.InferenceSession(
        model.SerializeToString(), options, providers=[("CUDAExecutionProvider", provider_options)]
    )


@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (2, 5)])
def test_against_the_oracle(
    gpu: None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kernel: tuple[int, ...], kind: str
) -> None:
    monkeypatch.setenv("TETRIS_ONNX_TF32", "0" if kind == "f32" else "1")
    attributes = {"pads": [k // 2 for k in kernel] * 2} if kernel else {}
    op = op_of(rng, (150, 136, *kernel), (64, 64), activation_min=0.0, **attributes)
    x = random_input(rng, 3, 136, *(13 for _ in kernel))
    session = cuda_session(model_of(op, x.shape, kind))
    expected = op.expected(x)
    for _ in range(3):
        y = session.run(None, {"x": x})[0]
        atol = GPU_TOLERANCES[kind] * np.abs(expected).max()
        np.testing.assert_allclose(y, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["tf32", "f16", "bf16"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("last", [(True, True), (True, False), (False, True), (False, False)])
def test_layouts_and_addends(
    gpu: None, rng: np.random.Generator, last: tuple[bool, bool], add: bool, kind: str
) -> None:
    op = op_of(rng, (150, 136, 3, 3), (64, 64), pads=[1, 1, 1, 1], activation_min=0.0, **models.transposes(2, *last))
    feed = {"x": random_input(rng, 2, *((13, 11, 136) if last[0] else (136, 13, 11)))}
    shape = op.expected(feed["x"]).shape
    if add:
        op, feed["addend"] = models.fused(op, "Add"), random_input(rng, *shape)
    model = in_type(models.make_model(op, feed["x"].shape, **({"addend_shape": shape} if add else {})), kind)
    expected = op.expected(*feed.values())
    y = cuda_session(model).run(None, feed)[0]
    np.testing.assert_allclose(y, expected, rtol=0, atol=GPU_TOLERANCES[kind] * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["tf32", "f16", "bf16"])
def test_max_pool(gpu: None, rng: np.random.Generator, kind: str) -> None:
    x = random_input(rng, 2, 13, 11, 70)
    model = pool_model(x.shape, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    y = cuda_session(in_type(model, kind)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, max_pool(x, (3, 3), (2, 2), (1, 1, 1, 1)))


def test_cuda_graph(gpu: None, rng: np.random.Generator) -> None:
    """A captured graph gives right results for new inputs, whatever ran on the GPU in between."""
    op = op_of(rng, (128, 128, 3, 3), (64, 64), pads=[1, 1, 1, 1])
    shape = (1, 128, 14, 14)
    session = cuda_session(models.make_model(op, shape), enable_cuda_graph="1")
    other = cuda_session(models.make_model(op, (8, 128, 28, 28)))
    x = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), DEVICE, 0)
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32), DEVICE, 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y", y)
    for _ in range(4):
        values = random_input(rng, *shape)
        x.update_inplace(values)
        session.run_with_iobinding(binding)
        expected = op.expected(values)
        np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        other.run(None, {"x": random_input(rng, 8, 128, 28, 28)})
