"""What the op library asks of the driver: which image, with which arguments, and what it says when that goes wrong."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.custom_ops import models
from tests.custom_ops.cuda import stand_in
from tests.custom_ops.cuda.stand_in import StandIn


@pytest.fixture
def op(rng: np.random.Generator) -> models.Op:
    return models.random_op(rng, (128, 64, 3, 3), (64, 64), 1.0, pads=[1, 1, 1, 1], activation_min=0.0)


def loads(driver: StandIn) -> list[str]:
    return [call.removeprefix("cuModuleLoadDataEx ") for call in driver.log if call.startswith("cuModuleLoadDataEx")]


def create_error(op: models.Op) -> str:
    with pytest.raises(Exception) as error:  # onnxruntime's exception classes differ between its versions
        models.session(models.make_model(op, [1, 64, 8, 8]))
    message = str(error.value)
    assert "BlockSparseConv node 'the_node': " in message
    return message


@pytest.mark.parametrize(
    ("capability", "image"),
    [
        (80, "cubin sm_80"),
        (86, "cubin sm_80"),
        (87, "cubin sm_80"),
        (89, "cubin sm_80"),
        (90, "cubin sm_90"),
        (100, "cubin sm_100"),
        (120, "cubin sm_120"),
        (103, "PTX sm_80"),
        (110, "PTX sm_80"),
        (121, "PTX sm_80"),
        (130, "PTX sm_80"),
    ],
)
def test_image_for_each_gpu(op: models.Op, driver: StandIn, library: Path, capability: int, image: str) -> None:
    driver.device(capability)
    x = np.ones((1, 64, 8, 8), np.float32)
    y = models.run(op, x)
    np.testing.assert_allclose(y, op.expected(x), atol=0.02)
    assert set(loads(driver)) == {image}


@pytest.mark.parametrize("capability", [52, 70, 75])
def test_gpu_too_old(op: models.Op, driver: StandIn, library: Path, capability: int) -> None:
    driver.device(capability)
    message = create_error(op)
    assert f"GPU 0 (compute capability {capability // 10}.{capability % 10}) is too old" in message
    assert "needs 8.0 or newer: run on the CPU provider" in message or "need 8.0 or newer" in message


def test_no_driver(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    """In a process of its own: in this one the stand-in is loaded."""
    script = """
        import sys
        import numpy as np
        from tests.custom_ops import models
        op = models.random_op(np.random.default_rng(0), (8, 8), (8, 8))
        try:
            models.session(models.make_model(op, [1, 8]))
        except Exception as error:
            print(error)
    """
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    if "libcuda.so.1" in found:
        pytest.skip("this machine has a driver")
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "TETRIS_ONNX_LIBRARY": str(compiled[0]), "PYTHONPATH": str(stand_in.ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "BlockSparseGemm node 'the_node': no NVIDIA driver (libcuda.so.1)" in output


def test_driver_too_old(op: models.Op, driver: StandIn, library: Path) -> None:
    driver.device(90, version=11080)
    assert "the NVIDIA driver is for CUDA 11.8: update it (CUDA 12 or newer)" in create_error(op)


def test_driver_too_old_for_the_machine_code(op: models.Op, driver: StandIn, library: Path) -> None:
    driver.fail("cuModuleLoadDataEx cubin", 200)
    try:
        models.session(models.make_model(op, [1, 64, 8, 8]))
    finally:
        driver.fail("cuModuleLoadDataEx cubin", 0)
    assert loads(driver)[:2] == ["cubin sm_90", "PTX sm_80"]


def test_no_image_loads(op: models.Op, driver: StandIn, library: Path) -> None:
    driver.fail("cuModuleLoadDataEx cubin", 200)
    driver.fail("cuModuleLoadDataEx PTX", 218)
    try:
        message = create_error(op)
    finally:
        driver.fail("cuModuleLoadDataEx cubin", 0)
        driver.fail("cuModuleLoadDataEx PTX", 0)
    assert "on GPU 0 (compute capability 9.0): cuModuleLoadDataEx" in message
    assert "ptxas: the log" in message
    assert "(218)" in message


def test_too_little_shared_memory(op: models.Op, driver: StandIn, library: Path) -> None:
    driver.device(90, shared=16384)
    assert "the op library holds no image for this GPU" in create_error(op)


def test_other_parameters(op: models.Op, driver: StandIn, library: Path) -> None:
    driver.parameters(23)
    assert "has 23 parameters, expected 38: rebuild the op library" in create_error(op)


@pytest.mark.parametrize(
    "function",
    [
        "cuInit",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuMemAlloc",
        "cuMemcpyHtoD",
        "cuCtxSynchronize",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
    ],
)
def test_failures_at_creation(op: models.Op, driver: StandIn, library: Path, function: str) -> None:
    driver.fail(function, 999)
    before = driver.bytes_in_use
    try:
        message = create_error(op)
    finally:
        driver.fail(function, 0)
    assert f"CUDA: {function}" in message
    assert "the stand-in was told to fail (999)" in message
    assert driver.bytes_in_use == before
    models.session(models.make_model(op, [1, 64, 8, 8]))  # and it can go on


@pytest.mark.parametrize("function", ["cuLaunchKernel", "cuMemAlloc"])
def test_failures_at_run_time(op: models.Op, driver: StandIn, library: Path, function: str) -> None:
    session = models.session(models.make_model(op, [1, 64, 8, 8]))
    x = np.ones((1, 64, 8, 8), np.float32)
    driver.fail(function, 999)
    try:
        with pytest.raises(Exception, match=rf"BlockSparseConv node 'the_node': CUDA: {function}.*\(999\)"):
            session.run(None, {"x": x})
    finally:
        driver.fail(function, 0)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], op.expected(x), atol=0.02)


@pytest.mark.parametrize("value", ["8", "64x64", "64x64x1x", "-1x64x1", "axbxc"])
def test_bad_tile(op: models.Op, driver: StandIn, library: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TETRIS_ONNX_CUDA_TILE", value)
    assert f"TETRIS_ONNX_CUDA_TILE is '{value}', expected ROWSxPIXELSxSPLITS" in create_error(op)


def test_bad_tf32(op: models.Op, driver: StandIn, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRIS_ONNX_TF32", "yes")
    assert "TETRIS_ONNX_TF32 is 'yes', expected 1 (fast, the default) or 0 (full float32)" in create_error(op)


def test_malformed_node(op: models.Op, driver: StandIn, shared_library: Path) -> None:
    bad = {"block_index": op.block_index + 7}
    with pytest.raises(Exception, match=r"BlockSparseConv node 'the_node': input 'block_index' entry 0 is .* outside"):
        models.session(models.make_model(op, [1, 64, 8, 8], replace=bad))
    with pytest.raises(Exception, match="must be a constant initializer"):
        models.session(models.make_model(op, [1, 64, 8, 8], as_inputs=["blocks"]))
    session = models.session(models.make_model(op, ["N", "C", 8, 8]))
    with pytest.raises(Exception, match="expected 64 channels"):
        session.run(None, {"x": np.ones((1, 63, 8, 8), np.float32)})


def test_arguments(op: models.Op, driver: StandIn, shared_library: Path) -> None:
    models.run(op, np.ones((3, 64, 9, 5), np.float32))
    to_last, conv = driver.launches[:2]
    assert to_last.variant.name == "channels_last_tf32_nchw"
    assert {k: v for k, v in to_last.arguments.items() if not k.endswith("_ptr")} == {
        "C": 64,
        "volume": 45,
        "P": 135,
        "packed": 64,
    }
    sizes: dict[str, Any] = {k: v for k, v in conv.arguments.items() if not k.endswith("_ptr")}
    splits = sizes.pop("splits")
    assert sizes == {
        **{"C": 64, "D": 1, "H": 9, "W": 5, "OC": 128, "OD": 1, "OH": 9, "OW": 5, "P": 135},
        **{f"{name}_{d}": 1 for name in ("stride", "dilation") for d in "dhw"},
        **{"pad_d": 0, "pad_h": 1, "pad_w": 1, "taps": 9, "kernel_h": 3, "kernel_w": 3},
        **{"w_tap": 64 * 32, "parts": 1, "has_addend": 0, "low": 0.0, "high": math.inf},
    }
    # 2 x 3 programs would leave most of 132 multiprocessors idle: their 18 steps are split.
    assert (splits, conv.grid, conv.variant.layout) == (12, (3, 2, 12), "split")
    assert conv.threads == 32 * conv.variant.warps
    assert driver.launches[2].variant.kernel == "sum_splits"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (8, (64, 64)),  # few pixels: the sums are split
        (32, (64, 128)),  # 16 programs of 64 x 128, but only 8 of 64 x 256
        (45, (64, 256)),
    ],
)
def test_tile_by_size(op: models.Op, driver: StandIn, library: Path, size: int, expected: tuple[int, int]) -> None:
    driver.device(90, processors=16)
    driver.execute = None
    models.run(op, np.ones((1, 64, size, size), np.float32))
    conv = next(launch for launch in driver.launches if launch.variant.kernel == "block_sparse_conv")
    assert (conv.variant.bm, conv.variant.bn) == expected
    assert (conv.variant.layout == "split") == (size == 8)


def test_loads_without_cuda(driver: StandIn, library: Path) -> None:
    """Registering the library asks the driver nothing."""
    onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    assert driver.log == []


def test_driver_declarations() -> None:
    """Against cuda.h, of a CUDA toolkit or of Triton's package."""
    roots = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *sys.path]
    includes = ("include", "triton/backends/nvidia/include", "nvidia/cu13/include")
    found = [
        Path(root) / include for root in roots for include in includes if (Path(root) / include / "cuda.h").is_file()
    ]
    if not found:
        pytest.skip("no cuda.h on this machine")
    source = Path(__file__).with_name("check_driver_abi.cc")
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-fsyntax-only",
        f"-I{found[0]}",
        f"-I{stand_in.CUDA}",
        source,
    ]
    subprocess.run(command, check=True)
