"""The program that is run on a GPU machine (custom_ops/bench/gpu.py), on the stand-in: all of it but the times."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.custom_ops import models
from tests.custom_ops.cuda import test_gpu
from tests.custom_ops.cuda.stand_in import OPS, ROOT, StandIn


@pytest.mark.usefixtures("shared_library")
@pytest.mark.parametrize("kind", ["tf32", "bf16"])
def test_the_tests_for_a_gpu(
    driver: StandIn, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Those of test_gpu.py, so that on a GPU they fail for what is wrong there only."""
    monkeypatch.setattr(test_gpu, "cuda_session", lambda model, **_: models.session(model))
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    for kernel in ((), (3, 3)):
        test_gpu.test_against_the_oracle(None, rng, monkeypatch, kernel, kind)
    for last in ((True, True), (False, True)):
        for add in (False, True):
            test_gpu.test_layouts_and_addends(None, rng, last, add, kind)
    test_gpu.test_max_pool(None, rng, kind)
    test_gpu.test_cuda_graph(None, rng)
    assert driver.errors == []
    assert {launch.variant.type for launch in driver.launches} >= {kind}


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are for Linux")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="gpu.py needs PyTorch")
def test_rehearsal(tmp_path: Path) -> None:
    output, markdown = tmp_path / "gpu.json", tmp_path / "gpu.md"
    points = ["--types", "f16", "--batch", "8", "--density", "0.27", "--block-size", "64", "--seconds", "0.001"]
    command = [
        sys.executable,
        OPS / "bench" / "gpu.py",
        "--rehearse",
        *points,
        "--output",
        output,
        "--markdown",
        markdown,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert results["cases"] > 8 and results["dropped"] == []
    layers = {row["layer"]: row for row in results["rows"] if "layer" in row}
    assert len(layers) == 3
    for row in layers.values():
        assert {"ort"} < set(row["dense_us"]) and {"run", "alone", "scattered"} == set(row["sparse_us"])
        assert row["fraction"] == pytest.approx(row["density"] * row["speedup"])
    networks = {(row["network"], row["in"]): row for row in results["rows"] if "network" in row}
    assert set(networks) == {(n, where) for n in ("vgg16", "resnet50") for where in ("PyTorch", "onnxruntime")}
    for (_, where), row in networks.items():
        assert row["error"] < 2e-2
        assert where == "PyTorch" or row["elsewhere"] == row["copies"] == []
    table = [line for line in markdown.read_text().splitlines() if line.startswith("|")]
    assert len(table) == len(results["rows"]) + 2 * 2  # two tables with a head of two lines
    assert all(line.count("|") == table[0].count("|") for line in table)
