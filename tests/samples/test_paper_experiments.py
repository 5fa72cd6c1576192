"""samples/paper_experiments: tables of a small network, what they say, and that an interrupted run goes on."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from tetris_onnx.data.calibration import Data

SAMPLES = Path(__file__).parents[2] / "samples"
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 16, 5, 5] x) => (float[N, 5] y)
{
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, first_weight)
  ar = Relu (a)
  b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (ar, second_weight)
  br = Relu (b)
  g = GlobalAveragePool (br)
  f = Flatten (g)
  y = Gemm <transB = 1> (f, head_weight)
}
"""
SHAPES = {"first_weight": (32, 16, 3, 3), "second_weight": (32, 32, 3, 3), "head_weight": (5, 32)}


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("finetune", "fashion_mnist", "accuracy_table", "paper_experiments"):
        monkeypatch.syspath_prepend(str(SAMPLES / name))
    return importlib.import_module("experiments")


def network() -> Any:
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in SHAPES.items():
                layer = nn.Conv2d(shape[1], shape[0], 3, padding=1, bias=False) if len(shape) == 4 else None
                setattr(self, name.removesuffix("_weight"), layer or nn.Linear(shape[1], shape[0], bias=False))

        def forward(self, x: Any) -> Any:
            return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {name.replace(".", "_"): value for name, value in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state: Any, strict: bool = True) -> Any:
            return super().load_state_dict({k.replace("_", "."): v for k, v in state.items()}, strict=strict)

    return Net()


@pytest.fixture
def subject(experiments: ModuleType) -> Any:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        # Channels of different norms: something for the reordering to find.
        values = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:2], *[1] * (len(shape) - 2)))) / 8
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    x = rng.standard_normal((120, 16, 5, 5)).astype(np.float32)
    import onnxruntime

    labels = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0].argmax(axis=1)
    image_data = importlib.import_module("image_data")
    return experiments.Subject(
        "small",
        model,
        {"x": x[:40]},
        Data("test", {"x": x[40:80]}, labels[40:80]),
        image_data.Images(x[80:], labels[80:]),
        network,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_tables_of_a_small_network(
    experiments: ModuleType, subject: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = experiments.Settings((0.5,), (1, 8), ("none", "refit", "retrain"), 3, (8,), (0.5,), 0.01)
    experiments.run(subject, settings, tmp_path)
    said = capsys.readouterr().out
    rows = rows_of(tmp_path / "accuracy.csv")
    torch = find_spec("torch") is not None
    recoveries = ("none", "refit", "retrain") if torch else ("none", "refit")
    assert ("no retraining: PyTorch is not installed" in said) == (not torch)
    assert [(r["recovery"], r["block_size"], r["reorder"]) for r in rows] == [
        (recovery, size, reorder)
        for recovery in recoveries
        for size, reorder in (("weights", "none"), ("1", "none"), ("8", "none"), ("8", "exact"))
    ]
    assert [float(r["density"]) for r in rows] == pytest.approx([0.5] * len(rows), abs=0.02)
    assert all(float(r["dense_accuracy"]) == 1 for r in rows), "the labels are its own answers"
    retained = {(r["block_size"], r["reorder"]): float(r["retained"]) for r in rows if r["recovery"] == "none"}
    assert retained["weights", "none"] > retained["1", "none"] > retained["8", "exact"] > retained["8", "none"]
    error = {(r["recovery"], r["block_size"], r["reorder"]): float(r["mean_error"]) for r in rows}
    assert error["refit", "8", "exact"] < 0.7 * error["none", "8", "exact"]
    if torch:
        assert error["retrain", "8", "none"] != error["none", "8", "none"]

    speed, gathers = rows_of(tmp_path / "speed.csv"), rows_of(tmp_path / "gathers.csv")
    assert [(r["threads"], r["reorder"]) for r in speed] == [(t, r) for r in ("none", "exact") for t in ("1", "2")]
    for row in speed:
        ratio = float(row["dense_ms"]) / float(row["sparse_ms"])
        assert float(row["speedup"]) == pytest.approx(ratio, rel=2e-3), "four figures"
    assert [(r["threads"], r["reorder"]) for r in gathers] == [("1", "exact"), ("2", "exact")]
    assert all(int(r["gathers"]) >= 1 for r in gathers)
    plots = {path.name for path in tmp_path.glob("*.png")}
    if find_spec("matplotlib") is None:
        assert not plots and "no plots: they take matplotlib" in said
    else:
        assert plots == {"accuracy.png", "speed.png", "speed_accuracy.png", "gathers.png"}

    # Again: everything is there already, in tables that nobody touches.
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    experiments.run(subject, settings, tmp_path, ["accuracy", "models", "speed"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == before
    assert capsys.readouterr().out == ("" if torch else said.partition("\n")[0] + "\n")

    other = onnx.ModelProto()
    other.CopyFrom(subject.model)
    other.producer_name = "another"
    with pytest.raises(experiments.at.TableError, match="holds other results"):
        experiments.run(replace(subject, model=other), settings, tmp_path, ["accuracy"])


def test_retrained_weights_stay_zero_where_they_are_pruned(
    experiments: ModuleType, subject: Any, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    settings = experiments.Settings((0.5,), (8,), ("retrain",), 2, (8,), (0.5,), 0.01)
    base = experiments.at.prunable(subject.model, 8)
    experiment = experiments._Experiment(subject, settings, tmp_path, base)
    for size in (None, 8):
        variant = experiments.at.Variant(0.5, size, "none", "retrain")
        pruned, _ = experiments.at.prune(subject.model, base, replace(variant, recovery="none"), None)
        tuned = experiment.retrained(variant, pruned)
        wanted, found, dense = (
            next(numpy_helper.to_array(t) for t in model.graph.initializer if tuple(t.dims) == SHAPES["second_weight"])
            for model in (pruned, tuned, subject.model)
        )
        assert np.count_nonzero(wanted) == wanted.size // 2
        np.testing.assert_array_equal(found != 0, wanted != 0)
        assert np.abs(found - dense)[wanted != 0].max() > 1e-4, "trained"


def test_why_there_is_no_retraining(
    experiments: ModuleType, subject: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = experiments.Settings((0.5,), (8,), ("retrain",), 1, (8,), (0.5,), 0.01)

    def reason(**changes: Any) -> str:
        changed = replace(subject, **changes)
        return experiments._Experiment(changed, settings, tmp_path, None).why_no_training()

    assert "no PyTorch definition of this network" in reason(module=None)
    assert "labeled images" in reason(training=None)
    monkeypatch.setattr(experiments, "find_spec", lambda name: None)
    assert "PyTorch is not installed" in reason()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lenet_mnist/lenet_mnist.py", "--data", "nowhere"], "error: nowhere: no such file or folder"),
        (["lenet_mnist/lenet_mnist.py", "--quick", "--steps", "speed"], "it is made by the step models"),
        (["vgg16/vgg16.py", "--model", "nowhere.onnx"], "error: nowhere.onnx"),
    ],
)
def test_what_is_missing_is_said_in_a_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    script, *options = arguments
    done = subprocess.run(
        [sys.executable, str(SAMPLES / script), *options, "-o", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_the_carried_lenet_is_the_network_of_the_sample(
    experiments: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lenet_mnist", "vgg14_cifar10"):
        monkeypatch.syspath_prepend(str(SAMPLES / name))
    sample, vgg14 = (importlib.import_module(name) for name in ("lenet_mnist", "vgg14_cifar10"))
    model = onnx.load(sample.RECIPE.carried)
    assert sample.RECIPE.carried.stat().st_size < 2_000_000
    _, test, _ = importlib.import_module("image_data").load_sample()
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    answers = session.run(None, {session.get_inputs()[0].name: test.pixels})[0].argmax(axis=1)
    assert (answers == test.labels).mean() > 0.88, "90.6 % of all test images"
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from finetune import load_weights

    load_weights(sample.lenet(), model)
    assert sum(1 for layer in vgg14.vgg14().modules() if type(layer).__name__ in ("Conv2d", "Linear")) == 14
