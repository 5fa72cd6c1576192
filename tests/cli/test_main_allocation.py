"""``optimize --allocation`` and ``--speedup`` from the command line to the written report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession
from PIL import Image

from models import Net
from tetris_onnx.cli.main import run
from tetris_onnx.config import Config, ConfigError, load_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three convolutions and a classifier, and samples for them."""
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 32, 14, 14]), (32, 64)))
    a = net.op("Relu", net.conv(a, (64, 64)))
    a = net.op("Relu", net.conv(a, (64, 64)))
    a = net.op("Flatten", net.op("GlobalAveragePool", a))
    net.output(net.gemm(a, (64, 4)))
    onnx.save(net.build(), tmp_path / "model.onnx")
    rng = np.random.default_rng(3)
    x = rng.standard_normal((24, 32, 14, 14)) + rng.standard_normal((24, 32, 1, 1))
    np.savez(tmp_path / "calibration.npz", x=x.astype(np.float32))
    return tmp_path / "model.onnx"


def optimize(model: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> dict:
    args = ["optimize", str(model), "-o", str(model.with_name("out.onnx")), "--block-size", "16x16", "--json", *options]
    assert run(args) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("calibrated", [True, False])
def test_global_spreads_one_budget(model: Path, calibrated: bool, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sparsity", "0.6", "--allocation", "global"]
    if calibrated:
        options += ["--calibration", str(model.with_name("calibration.npz"))]
    report = optimize(model, *options, capsys=capsys)
    rows = [row for row in report["layers"] if row["op_type"] == "Conv"]
    macs, kept = (sum(row[key] for row in rows) for key in ("macs", "kept_macs"))
    assert 0.95 * 0.4 * macs < kept <= 0.4 * macs
    assert all(row["sensitivity"] > 0 and row["predicted_loss"] >= 0 for row in rows)
    assert len({row["density"] for row in rows}) > 1  # not the same everywhere


def test_speedup_prunes_as_much_as_it_takes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # On the tests' made-up machine, a block-sparse layer takes about a tenth of the time.
    kept = [optimize(model, "--speedup", x, capsys=capsys)["kept_macs"] for x in ("8", "13", "20")]
    assert kept[0] > kept[1] > kept[2]


def test_the_table_shows_sensitivities(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["optimize", str(model), "-o", str(model.with_name("out.onnx")), "--block-size", "8x8"]
    assert run([*args, "--allocation", "global"]) == 0
    assert "sensitivity" in capsys.readouterr().out
    assert run(args) == 0
    assert "sensitivity" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speedup", "2", "--sparsity", "0.5"], "--speedup and --sparsity exclude each other"),
        (["--speedup", "0.5"], "speedup: expected a number above 1"),
        (["--speedup", "2", "--allocation", "global"], "latency and a speedup belong together"),
        (["--allocation", "latency"], "latency and a speedup belong together"),
        (["--allocation", "even"], "allocation: expected one of uniform, global, latency"),
        (["--speedup", "100"], "a speed-up of 100 is out of reach"),
    ],
)
def test_mistakes_are_one_line(
    model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["optimize", str(model), "-o", str(model.with_name("out.onnx")), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not model.with_name("out.onnx").exists()


def test_a_config_file_sets_both(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('allocation = "latency"\nspeedup = 2.5\n')
    assert load_config(tmp_path / "c.toml") == Config(allocation="latency", speedup=2.5)
    with pytest.raises(ConfigError, match="belong together"):
        Config(speedup=2.0)


def labels(model: Path) -> Path:
    """Samples with the labels that the dense model gives them."""
    x = np.load(model.with_name("calibration.npz"))["x"]
    y = InferenceSession(str(model)).run(None, {"x": x})[0]
    np.savez(model.with_name("labeled.npz"), x=x, label=y.argmax(axis=1))
    return model.with_name("labeled.npz")


def test_max_drop_needs_labels_and_no_sparsity(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["optimize", str(model), "-o", str(model.with_name("out.onnx")), "--max-drop", "1"]
    assert run(args) == 1
    assert "--max-drop needs labels: --data FILE.npz" in capsys.readouterr().err
    assert run([*args, "--sparsity", "0.5"]) == 1
    assert "--max-drop and --sparsity exclude each other" in capsys.readouterr().err


def test_max_drop_searches_on_data_or_on_labeled_calibration(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labeled = str(labels(model))
    report = optimize(model, "--max-drop", "5", "--data", labeled, capsys=capsys)
    assert report["accuracy"][1] >= 0.95 and any("was searched on" in note for note in report["notes"])
    report = optimize(model, "--max-drop", "5", "--calibration", labeled, "--data", labeled, capsys=capsys)
    assert report["labeled"] == 24 and not any("was searched on" in note for note in report["notes"])
    assert any("points of accuracy" in note for note in report["notes"])


def test_images_for_calibration_and_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), (3, 32)))
    a = net.op("Relu", net.conv(a, (32, 32)))
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", a)), (32, 2)))
    onnx.save(net.build(), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    for i in range(8):
        (tmp_path / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"class{i % 2}" / f"{i}.png")
    args = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), "--block-size", "8x8"]
    args += ["--calibration", str(tmp_path / "images")]
    assert run(args) == 1
    assert "Give --mean and --std" in capsys.readouterr().err
    assert run([*args, "--mean", "0.5", "--std", "0.25", "--json"]) == 0
    assert "8 images for x" in capsys.readouterr().err
    compared = ["compare", str(tmp_path / "m.onnx"), str(tmp_path / "o.onnx"), "--data", str(tmp_path / "images")]
    assert run([*compared, "--mean", "0.5", "--std", "0.25", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 8 and result["accuracy_a"] is not None
