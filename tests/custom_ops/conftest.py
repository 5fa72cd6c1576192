"""Every kernel test runs once for each instruction set that this machine has."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from tests.custom_ops import models

ISAS = ("scalar", "neon") if platform.machine() in ("aarch64", "arm64") else ("scalar", "avx2", "avx512")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20181203)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> str:
    """Forces an instruction set; skips the test where the processor lacks it."""
    monkeypatch.setenv("TETRIS_ONNX_ISA", request.param)
    try:
        models.session(models.make_model(models.random_op(rng, (1, 1), (1, 1)), [1, 1]))
    except Exception as error:
        if request.param == "scalar" or "this build and processor support" not in str(error):
            raise
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def amx(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulator of AMX, for the op library to find; skips the test where it cannot be built."""
    library = tmp_path_factory.mktemp("amx") / "libamx_emulator.so"
    flags = ["-std=c++17", "-O3", "-march=x86-64-v3", "-shared", "-fPIC"]
    flags += os.environ.get("TETRIS_ONNX_TEST_CXXFLAGS", "").split()  # run_sanitizers.sh
    source = Path(__file__).with_name("amx_emulator.cc")
    compiler = os.environ.get("CXX", "c++")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or shutil.which(compiler) is None:
        pytest.skip("the emulator of AMX needs a C++ compiler and 64-bit x86 Linux")
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    emulator = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    emulator.tetris_onnx_amx_executed.restype = ctypes.c_int64
    return emulator
