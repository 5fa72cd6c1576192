"""The measurement: who runs when, what the figures are made of, and how layers of two models are put side by side.

Nothing here asserts a time.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser
from rich.console import Console

from tetris_onnx.data.calibration import CalibrationError
from tetris_onnx.timing.bench import (
    BenchError,
    BenchResult,
    Machine,
    Timing,
    _ratio_interval,
    bench,
    interleave,
    parse_threads,
    print_bench,
)
from tetris_onnx.timing.profiling import CONVERSION, LAYER, OTHER, LayerTiming

NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 8, 8] x) => (float[N, 4] y)
<float[4, 3, 3, 3] w, float[64, 4] v, float[4] b>
{
   c = Conv<pads = [1, 1, 1, 1]>(x, w)
   r = Relu(c)
   p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
   f = Flatten(p)
   m = MatMul(f, v)
   y = Add(m, b)
}
"""


def parse(text: str, *names: str) -> onnx.ModelProto:
    """The model, its first nodes named (before onnx 1.17 its text has no names)."""
    model = parser.parse_model(text)
    for node, name in zip(model.graph.node, names, strict=False):
        node.name = name
    return model


def net() -> onnx.ModelProto:
    model = parse(NET, "conv", "act", "pool")
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "v": (64, 4), "b": (4,)}
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32), name)
        for name, shape in shapes.items()
    )
    return model


def test_models_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    times, runs = interleave(
        [lambda: calls.append("a"), lambda: calls.append("b")], 4, 1.0, settle=False, progress=None
    )
    assert times.shape == (4, 2, 2)
    assert (times >= 0).all()
    # Warm-up ab, then ab ba ab ba, with neighbors that are the same merged.
    assert "".join(call for call, _ in groupby(calls)) == "abababa"
    assert all(n % 4 == 0 and n >= 4 for n in runs)


def test_there_are_at_least_five_rounds() -> None:
    shares: list[float] = []
    times, _ = interleave([lambda: None], None, 1e-9, settle=False, progress=shares.append)
    assert len(times) == 5
    assert shares[-1] >= 1.0


def test_the_interval_is_that_of_paired_ratios() -> None:
    slow = np.array([1.0, 2.0, 3.0, 4.0])
    # Rounds are drawn in pairs, so noise that slows both models alike cancels.
    assert _ratio_interval(2 * slow, slow, seed=0) == (2.0, 2.0)
    low, high = _ratio_interval(slow, np.ones(4), seed=0)
    assert 1.0 <= low < 2.5 < high <= 4.0


def test_two_models_are_measured() -> None:
    shares: list[float] = []
    result = bench(net(), net(), threads=2, batch=3, rounds=2, per_layer=True, progress=shares.append)
    assert (result.rounds, result.threads, result.batch, result.provider) == (2, 2, 3, "cpu")
    first, second = result.timings
    assert 0 < first.min_ms <= first.median_ms
    assert result.speedup == pytest.approx(first.median_ms / second.median_ms, rel=1e-12)  # the same two floats
    assert result.interval is not None
    assert result.interval[0] <= result.interval[1]
    assert shares == [0.5, 1.0]
    assert result.machine.cpu
    assert result.machine.onnxruntime.count(".") == 2

    rows = {layer.name: layer for layer in result.layers}
    assert {"conv", "pool", "f"} <= set(rows)
    assert not {"act", "r", "y"} & set(rows), "activation and bias are in the row of their layer"
    assert rows["conv"].op_types == ("Conv", "Conv")
    product = rows.get("m") or rows["gemm"]  # what onnxruntime before 1.20 calls MatMul and Add in one
    assert product.op_types == ("Gemm", "Gemm")
    # (The profile counts whole microseconds: what is next to nothing may be 0.)
    assert all(ms is not None and ms > 0 for layer in result.layers for ms in layer.median_ms if layer.kind == LAYER)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["timings"][0]["runs"] >= 2
    found = {row["name"]: row for row in values["layers"]}
    assert found["conv"]["density"] == 1.0 and found["conv"]["kind"] == "layer"
    assert found["conv"]["ideal_ms"] == found["conv"]["median_ms"][0]
    assert found["conv"]["fraction_of_ideal"] == pytest.approx(
        found["conv"]["median_ms"][0] / found["conv"]["median_ms"][1], rel=1e-12
    )
    sums = {row["name"]: row for row in values["totals"]}
    assert sums["sum"]["median_ms"][1] == pytest.approx(sum(row["median_ms"][1] or 0 for row in values["layers"]))


def test_arrays_that_are_no_inputs_are_not_fed(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "a.onnx")
    samples = {"x": np.ones((2, 3, 8, 8), np.float32), "label": np.zeros(2, np.int64)}
    assert len(bench(tmp_path / "a.onnx", rounds=1, batch=2, data=samples).timings) == 1


def test_one_model_has_no_ratio(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "a.onnx")
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3, 8, 8), np.float32))
    result = bench(tmp_path / "a.onnx", rounds=1, batch=2, data=tmp_path / "d.npz")
    assert result.speedup is None
    assert result.interval is None
    assert [t.model for t in result.timings] == [str(tmp_path / "a.onnx")]
    with pytest.raises(BenchError, match="batch 3: there are only 2 samples"):
        bench(tmp_path / "a.onnx", rounds=1, batch=3, data=tmp_path / "d.npz")
    np.savez(tmp_path / "d.npz", z=np.ones(1))
    with pytest.raises(CalibrationError, match="no array 'x'"):
        bench(tmp_path / "a.onnx", rounds=1, data=tmp_path / "d.npz")


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(BenchError, match="have to be positive"):
        bench(net(), rounds=0)
    with pytest.raises(BenchError, match="a CUDA graph needs the provider cuda"):
        bench(net(), cuda_graph=True)
    fixed = net()
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    fixed.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(BenchError, match="batch 1: the model takes batches of 2 only"):
        bench(fixed, rounds=1)
    other = net()
    other.graph.input[0].name = other.graph.node[0].input[0] = "image"
    with pytest.raises(BenchError, match="have different inputs"):
        bench(net(), other, rounds=1)


def test_thread_lists_are_parsed() -> None:
    assert parse_threads("1, 2") == (1, 2)
    for wrong in ("", "0", "a", "1,,2"):
        with pytest.raises(BenchError, match="expected numbers such as 1,2"):
            parse_threads(wrong)


def test_the_table_shows_every_figure() -> None:
    result = BenchResult(
        machine=Machine("Test CPU", 2, 1.9, "1.2.3"),
        provider="cpu",
        threads=1,
        batch=4,
        rounds=7,
        timings=(Timing("a.onnx", 2.0, 1.5, 70), Timing("[b].onnx", 1.0, 0.75, 140)),
        speedup=2.0,
        interval=(1.9, 2.1),
        layers=(
            LayerTiming("conv", LAYER, ("Conv", "BlockSparseConv"), (1.5, 0.5), (0.0, 0.0), 0.25),
            LayerTiming("z", OTHER, ("Add", ""), (0.1, None), (0.0, 0.0)),
            LayerTiming("ReorderInput", CONVERSION, ("", "ReorderInput"), (None, 0.125), (0.0, 0.0)),
        ),
    )
    console = Console(file=io.StringIO(), width=120)
    print_bench(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "[b].onnx",
        "2.000",
        "0.750",
        "speed-up 2.00x (95 % interval 1.90 to 2.10)",
        "3.00x",
        "0.375",  # ideal
        "0.75",  # of it
        "weight layers",
        "layout conversions",
        "everything else",
        "1.600",  # the first model's sum
        "1.2.3 on Test CPU",
    ):
        assert part in text
    assert "the machine is busy (load 1.9 on 2 cores)" in text
    quiet = Console(file=io.StringIO(), width=120)
    print_bench(replace(result, machine=replace(result.machine, load=0.2)), quiet)
    assert "busy" not in quiet.file.getvalue()  # type: ignore[attr-defined]
