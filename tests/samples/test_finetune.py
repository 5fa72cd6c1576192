"""samples/finetune: reads the network, trains with the dropped blocks at zero, and its export fits the plan."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tetris_onnx import Config, optimize  # noqa: E402
from tetris_onnx.compare import compare  # noqa: E402
from tetris_onnx.torch import apply_masks, remove_masks  # noqa: E402

SAMPLES = Path(__file__).parents[2] / "samples"
MODEL = SAMPLES / "fashion_mnist" / "fashion_mnist.onnx"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", SAMPLES / "finetune" / "finetune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_network_is_the_one_in_the_file(script: ModuleType, tmp_path: Path) -> None:
    script.export(script.load_network(MODEL), tmp_path / "again.onnx")
    assert compare(MODEL, tmp_path / "again.onnx", samples=2).relative < 1e-5


@pytest.mark.parametrize("distill", [False, True])
def test_training_lowers_the_loss_and_the_export_fits_the_plan(
    script: ModuleType, tmp_path: Path, distill: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    plan = optimize(MODEL, Config(sparsity=0.7)).plan
    with np.load(SAMPLES / "fashion_mnist" / "test.npz") as arrays:
        images, labels = torch.from_numpy(arrays["image"][:256]), torch.from_numpy(arrays["label"][:256])
    network = script.load_network(MODEL)
    matches = apply_masks(network, plan)
    assert matches["/features/features.2/Conv_output_0"] == "features.2"
    teacher = script.load_network(MODEL).eval() if distill else None
    script.fine_tune(network, teacher, images, labels, epochs=3, learning_rate=0.01, batch_size=32)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    remove_masks(network)
    script.export(network, tmp_path / "tuned.onnx")
    result = optimize(tmp_path / "tuned.onnx", plan=plan)
    found = compare(tmp_path / "tuned.onnx", result.model, samples=2)
    assert found.relative < 1e-4, "the plan prunes nothing that is not zero already"
