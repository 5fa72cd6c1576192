"""Every kernel test runs once for each instruction set that this machine has."""

from __future__ import annotations

import platform

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
