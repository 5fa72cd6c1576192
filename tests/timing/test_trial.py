"""Layers that measured slower than dense: how they are found, and what becomes of them. The times are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models import Net, block_sparse_nodes, op_counts
from tetris_onnx import Config, optimize
from tetris_onnx.config import LayerRule
from tetris_onnx.graph.layers import DOMAIN
from tetris_onnx.timing import trial
from tetris_onnx.timing.bench import BenchResult, Machine, Timing
from tetris_onnx.timing.machine import load_machine
from tetris_onnx.timing.measure import Measurement
from tetris_onnx.timing.profiling import LAYER, LayerTiming
from tetris_onnx.timing.trial import try_out

CONFIG = Config(block_size=(8, 8), workers=1)


def network() -> onnx.ModelProto:
    """Three convolutions of 16 channels."""
    net = Net()
    a = net.input("x", ["N", 16, 8, 8])
    for _ in range(3):
        a = net.op("Relu", net.conv(a, (16, 16)))
    net.output(a)
    return net.build()


def stub(milliseconds: Callable[[int, str], float], whole: float = 0.5) -> tuple[Any, list[dict]]:
    """A `bench` that says: dense layers take 1 ms, block-sparse ones what ``milliseconds(call, node)`` says."""
    calls: list[dict] = []

    def bench(a: onnx.ModelProto, b: onnx.ModelProto, **options: Any) -> BenchResult:
        number = len(calls)
        calls.append({"sparse": [n.name for n in b.graph.node if n.domain == DOMAIN], **options})
        layers = []
        for node in (n for n in a.graph.node if n.op_type == "Conv"):
            sparse = node.name in calls[-1]["sparse"]
            times = 1.0, milliseconds(number, node.name) if sparse else 1.0
            ops = "Conv", "BlockSparseConv" if sparse else "Conv"
            layers.append(LayerTiming(node.name, LAYER, ops, times, (0.0, 0.0), 0.5))
        timings = Timing("a", 3.0, 3.0, 1), Timing("b", 3.0 * whole, 3.0, 1)
        interval = 0.9 / whole, 0.95 / whole
        return BenchResult(Machine("", 1, None, ""), "cpu", 1, 1, 5, timings, 1 / whole, interval, tuple(layers))

    return bench, calls


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    def install(milliseconds: Callable[[int, str], float], whole: float = 0.5) -> list[dict]:
        bench, calls = stub(milliseconds, whole)
        monkeypatch.setattr(trial, "bench", bench)
        return calls

    return install


def test_layers_that_lose_are_dense_again(measured: Callable[..., list[dict]]) -> None:
    calls = measured(lambda call, name: 1.5 if name == "node_conv2" else 0.5)
    result = optimize(network(), CONFIG, measure=True)
    assert [c["sparse"] for c in calls] == [["node_conv1", "node_conv2", "node_conv3"]] * 2 + [
        ["node_conv1", "node_conv3"]
    ]
    assert [p.layer for p in result.plan] == ["conv1", "conv3"]
    assert op_counts(result.model)["BlockSparseConv"] == 2 and op_counts(result.model)["Conv"] == 1
    first, second, third = result.report.layers
    assert (first.status, first.measured_ms) == ("block-sparse", (1.0, 0.5)) == (third.status, third.measured_ms)
    assert second.status == "dense" and second.reason == "measured 1.5 ms by our operator against 1 ms dense"
    assert (second.density, second.kept_parameters, second.block_size) == (1.0, second.parameters, None)
    assert second.measured_ms == (1.0, 1.0), "as it is now"
    assert result.report.milliseconds == (3.0, 1.5) and result.report.speedup == (2.0, 1.8, 1.9)
    # Nothing else changed: the dense layer has all its weights.
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in result.model.graph.initializer}
    assert any(w.shape == (16, 16, 3, 3) and (w != 0).all() for w in weights.values())
    assert result.report.max_error < 1e-4


def test_a_layer_kept_whole_that_loses_is_dense_again(measured: Callable[..., list[dict]]) -> None:
    calls = measured(lambda call, name: 1.5 if name == "node_conv2" else 0.5)
    config = Config(sparsity=0.0, threads=2, layers=(LayerRule("node_conv2", sparsity=0.0),))
    result = optimize(network(), config, measure=True)
    assert calls[0]["sparse"] == ["node_conv1", "node_conv2", "node_conv3"] and calls[0]["threads"] == 2
    assert [row.status for row in result.report.layers] == ["whole", "dense", "whole"]
    assert result.report.layers[1].reason == "measured 1.5 ms by our operator against 1 ms dense"
    assert op_counts(result.model)["Conv"] == 1


def test_what_is_slow_only_once_is_noise(measured: Callable[..., list[dict]]) -> None:
    calls = measured(lambda call, name: 1.5 if call == 0 and name == "node_conv2" else 0.5)
    result = optimize(network(), CONFIG, measure=True)
    assert len(calls) == 2 and len(result.plan) == 3


def test_a_layer_that_the_config_names_stays_pruned(measured: Callable[..., list[dict]]) -> None:
    measured(lambda call, name: 1.5)
    config = Config(block_size=(8, 8), workers=1, layers=(LayerRule("node_conv1"),))
    result = optimize(network(), config, measure=True)
    assert [p.layer for p in result.plan] == ["conv1"]
    assert result.report.notes[-1] == "block-sparse although measured slower than dense: 'node_conv1'"


def test_it_ends(measured: Callable[..., list[dict]]) -> None:
    """A machine on which another layer loses every time."""
    calls = measured(lambda call, name: 2.0 if name == f"node_conv{1 + call // 2}" else 0.5)
    result = optimize(network(), CONFIG, measure=True)
    assert len(result.plan) == 0 and len(block_sparse_nodes(result.model)) == 0
    assert len(calls) == 7
    assert "no layer was pruned" in result.report.notes[0]


def test_a_network_that_got_slower_is_said_to_be(measured: Callable[..., list[dict]]) -> None:
    measured(lambda call, name: 0.5, whole=1.25)
    notes = optimize(network(), CONFIG, measure=True).report.notes
    assert any("the whole network measured slower" in note for note in notes)


def test_it_is_measured_on_the_samples(measured: Callable[..., list[dict]], tmp_path: Path) -> None:
    calls = measured(lambda call, name: 0.5)
    x = np.random.default_rng(0).standard_normal((20, 16, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "c.npz", x=x)
    optimize(network(), CONFIG, calibration=tmp_path / "c.npz", measure=True)
    np.testing.assert_array_equal(calls[0]["data"]["x"][0], x[0])
    assert calls[0]["threads"] == calls[0]["batch"] == 1


def test_without_measure_nothing_is_timed(measured: Callable[..., list[dict]]) -> None:
    calls = measured(lambda call, name: 0.5)
    report = optimize(network(), CONFIG).report
    assert calls == [] and report.milliseconds is None
    assert all(row.measured_ms is None for row in report.layers)


def test_the_machine_is_fitted_the_first_time(
    measured: Callable[..., list[dict]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured(lambda call, name: 0.5)
    fits: list[int] = []

    def fit() -> Measurement:
        fits.append(1)
        return Measurement(known, 1, 0.0)

    known = replace(load_machine(), name="avx512")  # (of the tests: every layer gains)
    monkeypatch.setattr("tetris_onnx.timing.measure.measure_machine", fit)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # What a busy machine gives counts for this run only.
    monkeypatch.setattr("tetris_onnx.timing.processor.os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert optimize(network(), CONFIG, measure=True).report.machine.endswith("measured on this machine")
    assert fits.pop() and not list(tmp_path.iterdir())
    monkeypatch.setattr("tetris_onnx.timing.processor.os.getloadavg", lambda: (0.0, 0.0, 0.0))
    first = optimize(network(), CONFIG, measure=True).report
    assert fits == [1] and first.machine.endswith("measured on this machine")
    assert optimize(network(), CONFIG, measure=True).report.machine == first.machine
    assert fits == [1]
    # A folder that cannot be written does not stop the run.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "tetris-onnx" / "machine.json"))
    assert optimize(network(), CONFIG, measure=True).report.machine == first.machine
    assert fits == [1, 1]


def test_a_real_trial() -> None:
    """With onnxruntime: each layer is found under the name of its output."""
    model = network()
    result = optimize(model, CONFIG)
    names: Sequence[str] = [row.layer for row in result.report.layers]
    found = try_out(model, result.model, names, None)
    assert set(found.layers) == {"conv1", "conv2", "conv3"}
    assert all(before > 0 and after > 0 for before, after in found.layers.values())
    assert found.slower <= set(names)
    assert found.network.speedup is not None


def test_a_trial_of_a_given_shape(measured: Callable[..., list[dict]]) -> None:
    calls = measured(lambda call, node: 0.5)
    net = Net()
    net.output(net.conv(net.input("x", ["N", 16, "H", "W"]), (16, 16)))
    optimize(net.build(), CONFIG, measure=True, shapes={"x": (1, 16, 9, 7)})
    assert [call["shapes"] for call in calls] == [{"x": (1, 16, 9, 7)}]
