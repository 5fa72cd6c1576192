"""The sparsest plan within a drop of accuracy: what bisection finds, and on which samples it looks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import tetris_onnx
from models import Net
from tetris_onnx.accuracy.compare import compare
from tetris_onnx.config import Config, ConfigError
from tetris_onnx.data.calibration import CalibrationError, Data, model_inputs
from tetris_onnx.decision import Decision, DropError, Problem, split
from tetris_onnx.graph import io
from tetris_onnx.planner import prepare

CONFIG = Config(block_size=(8, 8), allocation="global", workers=1)


def network() -> onnx.ModelProto:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 16, 8, 8]), (16, 32)))
    a = net.op("Relu", net.conv(a, (32, 32)))
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", a)), (32, 4)))
    return net.build()


def labeled(n: int = 64, batch: int | None = None) -> Data:
    """Samples that the dense network classifies as their labels say."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((n, 16, 8, 8)) + 2 * rng.standard_normal((n, 16, 1, 1))).astype(np.float32)
    y = tetris_onnx.InferenceSession(network().SerializeToString()).run(None, {"x": x})[0]
    return Data("d.npz", {"x": x}, y.argmax(axis=1).astype(np.int64))


def problem(data: Data | None = None) -> Problem:
    graph = prepare(io.to_graph(network()))
    return Problem(graph, io.to_proto(graph, network()), samples=None if data is None else data.samples)


def density(decision: Decision) -> float:
    before, after = (sum(getattr(row, name) or 0 for row in decision.rows) for name in ("macs", "kept_macs"))
    return after / before


@pytest.mark.parametrize("allowed", [0.3, 0.55, 0.8])
def test_bisection_ends_at_the_sparsest_plan_that_is_good_enough(allowed: float) -> None:
    # A drop that only depends on what is left: the optimum is known.
    found = problem().sparsest(CONFIG, 1.0, lambda d: 0.5 if density(d) >= allowed else 7.0)
    assert allowed <= density(found) < allowed + 0.06  # the last step (1/64), and a block (1/24)
    assert "loses 0.5 points of accuracy, at most 1 were allowed (tried 0.500: " in found.notes[0]


def test_copies_that_were_asked_for_and_cannot_be_made_are_told() -> None:
    data = labeled(8)  # maps of 16 channels: no images
    notes = problem(data).decide(replace(CONFIG, augment=1)).notes
    assert notes == ("no varied copies: no input is an image (four axes, one to four channels, floats)",)
    assert problem(data).decide(CONFIG).notes == ()


def test_sensitivities_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tetris_onnx.accuracy import sensitivity

    calls = []
    measure = sensitivity.measure
    monkeypatch.setattr(sensitivity, "measure", lambda *args: calls.append(1) or measure(*args))
    problem(labeled(24)).sparsest(CONFIG, 1.0, lambda d: 0.0 if density(d) > 0.5 else 5.0)
    assert len(calls) == 1


def test_nothing_good_enough_is_an_error() -> None:
    with pytest.raises(DropError, match=r"loses more than 1 points .* 0\.500: \+9\.0, .* allow more"):
        problem().sparsest(CONFIG, 1.0, lambda d: 9.0)


def test_the_result_is_within_the_drop(tmp_path: Path) -> None:
    data = labeled(96)
    result = tetris_onnx.optimize(network(), CONFIG, calibration=data, max_drop=5.0)
    _, searched = split(data, model_inputs(network()))
    found = compare(network(), result.model, searched)
    assert found.accuracy_a is not None and found.accuracy_b is not None
    assert found.accuracy_a == 1 and found.accuracy_b >= 0.95
    assert result.report.parameters[1] < result.report.parameters[0]
    assert "points of accuracy" in result.report.notes[0]


def test_labeled_samples_of_their_own_are_searched_on() -> None:
    data = labeled(48)
    result = tetris_onnx.optimize(network(), CONFIG, labeled=data, max_drop=30.0)  # without calibration
    accuracy = compare(network(), result.model, data).accuracy_b
    assert accuracy is not None and accuracy >= 0.7


def test_what_max_drop_needs() -> None:
    with pytest.raises(CalibrationError, match="needs labeled samples"):
        tetris_onnx.optimize(network(), CONFIG, max_drop=1.0)
    with pytest.raises(ConfigError, match="give no plan and no speedup"):
        tetris_onnx.optimize(network(), Config(allocation="latency", speedup=2.0), max_drop=1.0)


def test_the_split_keeps_samples_apart_and_batches_whole() -> None:
    data = labeled(50)
    fitted, searched = split(data, model_inputs(network()))
    assert (len(fitted.samples["x"]), len(searched.samples["x"])) == (38, 12)
    together = np.concatenate([fitted.samples["x"], searched.samples["x"]])
    assert len(np.unique(together.reshape(50, -1), axis=0)) == 50
    fixed = network()
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    fitted, searched = split(data, model_inputs(fixed))
    assert (len(fitted.samples["x"]), len(searched.samples["x"])) == (40, 8)
    assert fitted.labels is not None and len(fitted.labels) == 40
    with pytest.raises(CalibrationError, match="3 labeled samples are too few"):
        split(labeled(3), model_inputs(network()))
