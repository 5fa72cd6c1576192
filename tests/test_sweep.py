"""A sweep: what it finds is what `optimize` finds, it goes on after an interruption, and a cluster changes nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from models import Net, random_feed
from tetris_onnx import Config, optimize
from tetris_onnx import sweep as module
from tetris_onnx.accuracy.compare import compare
from tetris_onnx.cli.main import run
from tetris_onnx.config import ConfigError
from tetris_onnx.data.calibration import CalibrationError, Data
from tetris_onnx.sweep import (
    Outcome,
    Setting,
    Sweep,
    SweepError,
    Timing,
    from_json,
    grid,
    pareto_front,
    parse_block_sizes,
    parse_sparsities,
    sweep,
    to_json,
)
from tetris_onnx.timing.bench import BenchResult, Machine
from tetris_onnx.timing.bench import Timing as ModelTiming

QUICK = Config(reorder="none")
GRID = grid((0.25, 0.5, 0.75), ((4, 4), (8, 8)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 8, 6, 6]), (8, 16)))
    a = net.op("Relu", net.conv(a, (16, 16)))
    a = net.op("Flatten", net.op("GlobalAveragePool", a))
    net.output(net.gemm(a, (16, 4)))
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(net.build(), path)
    return path


@pytest.fixture(scope="module")
def data(model: Path) -> Data:
    proto = onnx.load(model)
    samples = random_feed(proto, 24, seed=1)
    return Data("test.npz", samples, np.random.default_rng(0).integers(0, 4, 24))


@pytest.fixture
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Timing takes no time; a smaller file is faster. Returns the files that were timed."""
    timed: list[Path] = []

    def bench(a: Path, b: Path, threads: int, batch: int, seconds: float, data: object, shapes: object) -> BenchResult:
        timed.append(b)
        sparse = float(b.stat().st_size)
        timings = (ModelTiming(str(a), 1e5, 1e5, 1), ModelTiming(str(b), sparse, sparse, 1))
        ratio = 1e5 / sparse
        return BenchResult(Machine("", 1, 0.0, ""), "cpu", threads, batch, 1, timings, ratio, (ratio, ratio))

    monkeypatch.setattr(module, "bench", bench)
    return timed


def found(result: Sweep) -> dict[str, Outcome]:
    """What does not depend on the time that things take."""
    return {o.setting.name: replace(o, seconds=0.0, timing=None) for o in result.outcomes}


def test_grids() -> None:
    assert parse_sparsities("0.3:0.9:0.1") == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert parse_sparsities("0.5:0.5:0.1") == (0.5,)
    assert parse_sparsities("0.7,0.2,0.7") == (0.2, 0.7)
    assert parse_block_sizes("32,16x64") == ((16, 64), (32, 32))
    assert [s.name for s in grid((0.25, 0.5), ((16, 64),))] == ["sparsity0.25_blocks16x64", "sparsity0.5_blocks16x64"]


@pytest.mark.parametrize(
    "text", ["", "0.3:0.9", "0.9:0.3:0.1", "0:1:0.1", "0.3:0.9:0", "half", "nan", "1", "0:0.5:nan"]
)
def test_what_is_no_grid_is_refused(text: str) -> None:
    with pytest.raises(SweepError, match=r"0\.3:0\.9:0\.1"):
        parse_sparsities(text)


def test_a_grid_has_an_end() -> None:
    with pytest.raises(SweepError, match="1001 settings"):
        grid(parse_sparsities("0:0.9:0.000001"), ((4, 4),))
    with pytest.raises(ConfigError, match="block_size"):
        parse_block_sizes("16,big")


def outcome(accuracy: float | None, speedup: float | None, dense: float = 0.9, error: float = 0.0) -> Outcome:
    timing = None if speedup is None else Timing(1.0, 1 / speedup, speedup, (speedup, speedup), "m")
    return Outcome(Setting((4, 4), 0.5), dense_accuracy=dense, accuracy=accuracy, error=error, timing=timing)


def test_the_front_is_what_nothing_beats_in_both() -> None:
    rows = [outcome(0.9, 1.5), outcome(0.8, 1.4), outcome(0.7, 2.0), outcome(0.7, 2.0), outcome(0.6, 1.9)]
    assert pareto_front(rows, "accuracy") == (True, False, True, True, False)
    # The dense model is a rival too: as accurate, and not slower.
    assert pareto_front([outcome(0.9, 0.99), outcome(0.95, 0.5)], "accuracy") == (False, True)
    assert pareto_front([outcome(None, 2.0, error=0.1), outcome(None, 2.0, error=0.2)], "error") == (True, False)
    assert pareto_front([outcome(None, None), outcome(0.1, 1.1)], "accuracy") == (False, True)


def test_outcomes_survive_their_files() -> None:
    for row in (outcome(0.5, 2.0), outcome(None, None, error=float("inf")), replace(outcome(0.5, 2.0), macs=0.25)):
        assert from_json(json.loads(json.dumps(to_json(row), allow_nan=False))) == row


def test_a_sweep_finds_what_optimize_finds(model: Path, data: Data, tmp_path: Path, made_up_times: list[Path]) -> None:
    settings = grid((0.5, 0.75), ((8, 8),))
    config = Config(sweeps=1, reorder="none", workers=1)
    result = sweep(model, settings, tmp_path / "s", config, calibration=data, data=data, jobs=1)
    assert result.searched == len(result.outcomes) == 2
    assert [o.setting for o in result.outcomes] == sorted(settings)
    assert result.measure == "accuracy" and any(result.front)
    assert len(made_up_times) == 2
    one = result.outcomes[1]
    alone = optimize(model, replace(config, sparsity=0.75, block_size=(8, 8)), calibration=data)
    assert (tmp_path / "s" / f"{one.setting.name}.onnx").read_bytes() == alone.model.SerializeToString()
    expected = compare(model, alone.model, data)
    assert (one.dense_accuracy, one.accuracy) == (expected.accuracy_a, expected.accuracy_b)
    assert one.agreement == expected.agreement and one.error == expected.mean_relative
    assert one.density == alone.report.parameters[1] / alone.report.parameters[0]
    assert one.timing is not None and one.timing.speedup == 1e5 / one.file_size


def test_without_samples_it_is_the_error(model: Path, tmp_path: Path, made_up_times: list[Path]) -> None:
    result = sweep(model, GRID[:1], tmp_path, QUICK, jobs=1)
    assert (result.measure, result.data) == ("error", "random samples")
    assert result.outcomes[0].accuracy is None


def test_calibration_labels_are_not_used(model: Path, data: Data, tmp_path: Path, made_up_times: list[Path]) -> None:
    result = sweep(
        model,
        GRID[3:4],
        tmp_path,
        Config(sweeps=1, workers=1, reorder="none", importance="l1"),
        calibration=data,
        jobs=1,
    )
    assert (result.measure, result.data) == ("agreement", "test.npz")


def test_only_what_is_missing_is_searched_and_timed(
    model: Path, data: Data, tmp_path: Path, made_up_times: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(model, GRID[:2], tmp_path, QUICK, data=data, jobs=1)
    made_up_times.clear()
    searched: list[Setting] = []
    original = module._search
    monkeypatch.setattr(module, "_search", lambda w, s: (searched.append(s), original(w, s))[1])

    second = sweep(model, GRID[:3], tmp_path, QUICK, data=data, jobs=1)
    assert searched == [GRID[2]] and second.searched == 1
    assert made_up_times == [tmp_path / f"{GRID[2].name}.onnx"]
    assert second.outcomes[:2] == first.outcomes

    # What is damaged, lacks its model, or was found with other versions is searched again.
    (tmp_path / f"{GRID[0].name}.json").write_text('{"key": 1')
    (tmp_path / f"{GRID[1].name}.onnx").unlink()
    searched.clear()
    assert found(sweep(model, GRID[:3], tmp_path, QUICK, data=data, jobs=1)) == found(second)
    assert searched == [GRID[0], GRID[1]]
    monkeypatch.setattr(module, "__version__", "0.0.0")
    searched.clear()
    sweep(model, GRID[:1], tmp_path, QUICK, data=data, jobs=1)
    assert searched == [GRID[0]]

    # On another processor: timed again, not searched again.
    searched.clear()
    made_up_times.clear()
    monkeypatch.setattr(module, "cpu_name", lambda: "another one")
    sweep(model, GRID[:1], tmp_path, QUICK, data=data, jobs=1)
    assert not searched and len(made_up_times) == 1


def test_a_folder_belongs_to_one_model_and_its_options(
    model: Path, data: Data, tmp_path: Path, made_up_times: list[Path]
) -> None:
    folder = tmp_path / "s"
    sweep(model, GRID[:1], folder, QUICK, data=data, jobs=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = tmp_path / "other.onnx"
    net = Net()
    net.output(net.gemm(net.input("x", ["N", 8]), (8, 8)))
    onnx.save(net.build(), other)
    for arguments, message in (
        ({"model": other}, "holds a sweep of another model; give another folder"),
        ({"config": replace(QUICK, seed=1)}, r"holds a sweep with another value of seed \(0 there, 1 here\)"),
        ({"config": Config()}, "another value of reorder"),
        ({"config": replace(QUICK, threads=2)}, r"another value of threads \(1 there, 2 here\)"),
        ({"data": replace(data, labels=None)}, "with other data;"),
        ({"calibration": data}, "with other calibration samples;"),
        ({"shapes": {"x": (1, 8, 6, 6)}}, r"another value of shapes \(None there, .* here\)"),
    ):
        values: dict = {"model": model, "config": QUICK, "data": data} | arguments
        with pytest.raises(SweepError, match=message):
            sweep(values.pop("model"), GRID[:1], folder, jobs=1, **values)
    # More memory or another number of processes finds the same.
    assert sweep(model, GRID[:1], folder, replace(QUICK, memory=10**6, workers=1), data=data, jobs=1).searched == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_open_sizes_may_be_given(tmp_path: Path, made_up_times: list[Path]) -> None:
    net = Net()
    net.output(net.conv(net.conv(net.input("x", ["N", 8, "H", "W"]), (8, 16)), (16, 16)))
    onnx.save(net.build(), tmp_path / "open.onnx")
    setting = GRID[:1]
    plain = found(sweep(tmp_path / "open.onnx", setting, tmp_path / "a", QUICK, jobs=1))
    sized = found(sweep(tmp_path / "open.onnx", setting, tmp_path / "b", QUICK, jobs=1, shapes={"x": (1, 8, 6, 6)}))
    assert plain[setting[0].name].macs is None and 0.7 < (sized[setting[0].name].macs or 0) < 0.9
    with pytest.raises(CalibrationError, match="shape 1x3x6x6 does not fit"):
        sweep(tmp_path / "open.onnx", setting, tmp_path / "c", QUICK, jobs=1, shapes={"x": (1, 3, 6, 6)})
    assert not (tmp_path / "c").exists()


def test_a_folder_of_other_files_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SweepError, match="holds other files and no sweep"):
        sweep(model, GRID[:1], tmp_path, jobs=1)
    with pytest.raises(SweepError, match=r"thesis\.tex: .*give a folder"):
        sweep(model, GRID[:1], tmp_path / "thesis.tex", jobs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("config", [Config(target="cuda"), Config(allocation="latency", speedup=2.0)])
def test_what_cannot_be_swept_is_refused(model: Path, tmp_path: Path, config: Config) -> None:
    with pytest.raises(SweepError, match="leave out target cuda and speedup"):
        sweep(model, GRID[:1], tmp_path, config, jobs=1)


def test_a_budget_out_of_reach_is_what_became_of_its_setting(
    model: Path, tmp_path: Path, made_up_times: list[Path]
) -> None:
    result = sweep(model, grid((0.5, 0.99), ((8, 8),)), tmp_path, Config(allocation="global"), jobs=1)
    assert [bool(row.failure) for row in result.outcomes] == [False, True]
    assert "out of reach" in result.outcomes[1].failure and result.front[1] is False
    assert len(made_up_times) == 1
    again = sweep(model, grid((0.5, 0.99), ((8, 8),)), tmp_path, Config(allocation="global"), jobs=1)
    assert again.searched == 0 and again.outcomes == result.outcomes


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.onnx"))}


def command(model: Path, folder: Path) -> list[str]:
    options = [
        "--sparsity",
        "0.5:0.75:0.25",
        "--block-size",
        "4,8",
        "--jobs",
        "1",
        "--reorder",
        "none",
        "--seconds",
        "0.001",
    ]
    return ["sweep", str(model), *options, "-o", str(folder)]


def test_a_killed_sweep_goes_on_where_it_was(
    model: Path, tmp_path: Path, made_up_times: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    words = [sys.executable, "-m", "tetris_onnx", *command(model, folder)]
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    limit = time.monotonic() + 120
    while not list(folder.glob("sparsity*.json")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.stem for path in folder.glob("sparsity*.json")}
    assert 1 <= len(done) < 4
    stamps = {stem: (folder / f"{stem}.onnx").stat().st_mtime_ns for stem in done}

    assert run([*command(model, folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["searched"] == 4 - len(done)
    assert {stem: (folder / f"{stem}.onnx").stat().st_mtime_ns for stem in done} == stamps

    # Nothing is different from a sweep that was not killed.
    whole = tmp_path / "whole"
    assert run([*command(model, whole), "--json"]) == 0
    assert files(folder) == files(whole)
    assert len(files(whole)) == 4


def test_the_command_times_prints_and_plots(
    model: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "test.npz", label=data.labels, **data.samples)
    arguments = command(model, tmp_path / "s")
    arguments[3] = "0.5,0.75"
    arguments[5] = "8"
    assert run([*arguments, "--data", str(tmp_path / "test.npz")]) == 0
    shown = capsys.readouterr()
    assert "sparsity" in shown.out and "on the Pareto front" in shown.out and "8x8" in shown.out
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").open()))
    assert [(row["sparsity"], row["block_size"]) for row in rows] == [("0.5", "8x8"), ("0.75", "8x8")]
    for row in rows:
        values = json.loads((tmp_path / "s" / f"{row['name']}.json").read_text())
        assert float(row["speedup"]) == pytest.approx(values["timing"]["speedup"], rel=1e-5)  # 6 digits are written
        assert float(row["speedup"]) == pytest.approx(float(row["dense_ms"]) / float(row["sparse_ms"]), rel=1e-4)
        assert float(row["dense_ms"]) > 0 and row["front"] in "01" and float(row["accuracy"]) <= 1
    plot = tmp_path / "s" / "sweep.png"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "pip install 'tetris-onnx[plot]'" in shown.err and not plot.exists()
    else:
        assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 5000

    assert run([*arguments, "--data", str(tmp_path / "test.npz"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (
        result["searched"] == 0 and len(result["outcomes"]) == 2 and set(result["front"]) <= {r["name"] for r in rows}
    )


def test_without_matplotlib_there_is_a_note(
    model: Path,
    tmp_path: Path,
    made_up_times: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["sweep", str(model), "--sparsity", "0.5", "--block-size", "8", "--jobs", "1", "-o", str(tmp_path)]) == 0
    assert "pip install 'tetris-onnx[plot]'" in capsys.readouterr().err
    assert (tmp_path / "sweep.csv").exists() and not (tmp_path / "sweep.png").exists()


def test_without_dask_it_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    arguments = ["sweep", str(model), "--sparsity", "0.5", "-o", str(tmp_path / "s")]
    assert run([*arguments, "--scheduler", "tcp://127.0.0.1:9"]) == 1
    assert "pip install 'tetris-onnx[dask]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a scheduler with two workers, processes of their own."""
    distributed = pytest.importorskip("dask.distributed", reason="Dask is not installed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as local,
    ):
        yield local.scheduler_address


def test_a_cluster_finds_the_same(
    cluster: str, model: Path, data: Data, tmp_path: Path, made_up_times: list[Path]
) -> None:
    settings = grid((0.5,), ((4, 4), (8, 8), (16, 16)))
    config = Config(sweeps=1, reorder="greedy", importance="l1")
    calibration = replace(data, samples={name: x[:8] for name, x in data.samples.items()})
    here = sweep(model, settings, tmp_path / "here", config, calibration, data, jobs=2)
    there = sweep(model, settings, tmp_path / "there", config, calibration, data, scheduler=cluster)
    assert there.searched == 3
    assert found(here) == found(there)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert here.front == there.front
    # One goes on with what the other one found.
    shutil.copytree(tmp_path / "here", tmp_path / "both")
    assert sweep(model, settings, tmp_path / "both", config, calibration, data, scheduler=cluster).searched == 0


def test_workers_with_other_versions_are_refused(
    cluster: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "__version__", "0.0")
    with pytest.raises(SweepError, match="install the same everywhere"):
        sweep(model, GRID[:1], tmp_path, scheduler=cluster)


def test_a_scheduler_that_is_not_there(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask.distributed", reason="Dask is not installed")
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 0.3)
    with pytest.raises(SweepError, match="no Dask scheduler answers"):
        sweep(model, GRID[:1], tmp_path, scheduler="tcp://127.0.0.1:9")
