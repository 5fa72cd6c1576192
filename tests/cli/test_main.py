"""The commands: what they print where, exit codes, and that a failure leaves no file.

Commands run in this process through `run`, which is what ``main`` passes its arguments to; what happens inside
``optimize`` is replaced by a fake except in the tests that say end to end.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import tetris_onnx.doctor
import tetris_onnx.planner
import tetris_onnx.timing.bench
from tetris_onnx.accuracy.verification import VerificationError
from tetris_onnx.cli.main import run
from tetris_onnx.config import Config
from tetris_onnx.doctor import Check, Diagnosis
from tetris_onnx.plan import LayerPlan, Plan
from tetris_onnx.reports.report import LayerReport, Report
from tetris_onnx.timing.bench import BenchResult, Machine, Timing

# "import tetris_onnx.optimize as m" would find the function of the same name in the package.
optimize_module = importlib.import_module("tetris_onnx.optimize")

ROW = LayerReport(
    layer="c1",
    node="conv1",
    op_type="Conv",
    weight_shape=(64, 64, 3, 3),
    block_size=(32, 32),
    density=0.5,
    retained=0.6,
    baseline=0.5,
    parameters=36864,
    kept_parameters=18432,
    macs=1_000_000,
    status="block-sparse",
    reason="",
)


def network(channels: int = 64) -> onnx.ModelProto:
    """Conv, Relu, Conv, Relu, pooling and three classes; random weights."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
        return numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32) * scale, name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3"], ["y"], name="fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", channels, 6, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3])],
        [
            weight("w1", channels, channels, 3, 3),
            weight("w2", channels, channels, 3, 3),
            weight("w3", 3, channels),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(network(), path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Config, dict]]:
    """Replace the pipeline by one that copies the model, and record what it is called with."""
    made: list[tuple[Path, Config, dict]] = []

    def fake(model: Path, config: Config, **options: object) -> object:
        made.append((model, config, options))
        plan = Plan((LayerPlan("c1", np.arange(64), np.arange(64), (32, 32), np.eye(2, dtype=bool)),))
        report = Report(
            model="",
            output="",
            layers=(ROW,),
            gathers=0,
            bytes_before=100,
            bytes_after=60,
            max_error=1e-7,
            seconds={"plan": 1.0},
            importance="l1",
        )
        return optimize_module.Result(network(), plan, report)

    monkeypatch.setattr(optimize_module, "optimize", fake)
    return made


def fails(args: list[object], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Run a command that has to fail; return its one line on stderr."""
    assert run([str(a) for a in args]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def succeeds(args: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that has to succeed; return its stdout."""
    assert run([str(a) for a in args]) == 0
    captured = capsys.readouterr()
    assert captured.err == "", "no progress where stderr is no terminal"
    return captured.out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["-h"], ["--help"]):
        text = succeeds(args, capsys)
        for command in ("optimize", "inspect", "compare", "bench", "doctor"):
            assert command in text
    text = succeeds(["optimize", "--help"], capsys)
    contract = (
        "--sparsity --config --plan --block-size --calibration --gathers --reorder --importance --save-plan --report"
    )
    for option in [*contract.split(), "--dump-passes", "--seed", "--json", "--data", "--bench"]:
        assert option in text
    assert succeeds(["--version"], capsys).startswith("tetris-onnx ")


def test_wrong_usage_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    assert "No such command 'optimise'" in fails(["optimise"], capsys, 2)
    assert "Missing option '-o' / '--output'" in fails(["optimize", model], capsys, 2)
    assert "No such option: --bogus" in fails(["--bogus"], capsys, 2)
    assert "Missing argument 'MODEL'" in fails(["inspect"], capsys, 2)


def test_optimize_writes_model_plan_and_report(
    model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan, report = tmp_path / "out.onnx", tmp_path / "plan.npz", tmp_path / "report.json"
    out.write_text("an older result is replaced")
    options = ["--sparsity", "0.25", "--block-size", "16x64", "--gathers", "keep", "--reorder", "greedy"]
    options += [
        "--target",
        "cuda",
        "--precision",
        "bf16",
        "--importance",
        "l2",
        "--seed",
        "5",
        "--augment",
        "3",
        "--refine",
        "7",
        "--save-plan",
        plan,
        "--report",
        report,
        "--dump-passes",
        tmp_path,
    ]
    text = succeeds(["optimize", model, "-o", out, *options], capsys)

    ((called, config, rest),) = calls
    assert called == model
    assert config == Config(
        0.25,
        (16, 64),
        importance="l2",
        reorder="greedy",
        gathers="keep",
        target="cuda",
        precision="bf16",
        augment=3,
        refine=7,
        seed=5,
    )
    assert (rest["plan"], rest["calibration"], rest["dump_passes"], rest["measure"]) == (None, None, tmp_path, False)
    onnx.checker.check_model(onnx.load(out))
    assert Plan.load(plan).get("c1") is not None
    value = json.loads(report.read_text(encoding="utf-8"))
    assert (value["model"], value["output"]) == (str(model), str(out))
    for part in ("conv1", "1 of 1 block-sparse", "1.0e-07 of max|y|", "nothing was refitted", "--data FILE.npz"):
        assert part in text


def test_optimize_json_is_all_of_stdout(
    model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = json.loads(succeeds(["optimize", model, "-o", tmp_path / "out.onnx", "--json"], capsys))
    assert value["layers"][0]["node"] == "conv1"
    assert "nothing was refitted" in value["notes"][0]


def test_optimize_measures_accuracy_and_time(
    model: Path,
    calls: list,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(1).standard_normal((12, 64, 6, 6)).astype(np.float32)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    answers = session.run(None, {"x": x})[0].argmax(axis=1)
    answers[:3] = (answers[:3] + 1) % 3
    np.savez(tmp_path / "d.npz", x=x, label=answers)

    def fake(a: object, b: object, **options: object) -> BenchResult:
        timings = (Timing("a", 3.0, 2.5, 9), Timing("b", 2.0, 1.5, 9))
        return BenchResult(Machine("cpu", 2, 0.0, "1.0.0"), "cpu", 1, 1, 9, timings, 1.5, (1.4, 1.6))

    monkeypatch.setattr(tetris_onnx.timing.bench, "bench", fake)
    args = ["optimize", model, "-o", tmp_path / "out.onnx", "--data", tmp_path / "d.npz", "--bench", "--json"]
    value = json.loads(succeeds(args, capsys))
    assert value["accuracy"] == [0.75, 0.75]  # the fake returns the same network
    assert value["labeled"] == 12
    assert value["agreement"] == 1.0
    assert value["milliseconds"] == [3.0, 2.0]
    assert value["speedup"] == [1.5, 1.4, 1.6]
    assert "--data FILE.npz" not in value["notes"][-1]

    np.savez(tmp_path / "d.npz", x=x)
    value = json.loads(succeeds([*args[:6], "--json"], capsys))
    assert value["accuracy"] is None
    assert value["labeled"] is None
    assert any("has no labels" in note for note in value["notes"])


def test_optimize_takes_its_options_from_a_file(
    model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('sparsity = 0.75\nseed = 3\n[layers."conv1"]\nskip = true\n')
    succeeds(["optimize", model, "-o", tmp_path / "out.onnx", "--config", toml, "--seed", "9"], capsys)
    config = calls[0][1]
    assert (config.sparsity, config.seed) == (0.75, 9), "the command line is on top of the file"
    assert config.for_layer("conv1").skip


def test_optimize_applies_a_plan(model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan((LayerPlan("c2", np.arange(64), np.arange(64), (32, 32), np.eye(2, dtype=bool)),))
    plan.save(tmp_path / "plan.npz")
    text = succeeds(["optimize", model, "-o", tmp_path / "out.onnx", "--plan", tmp_path / "plan.npz"], capsys)
    assert calls[0][2]["plan"].get("c2") is not None
    assert "nothing was refitted" not in text, "a plan is for a model that was"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "f.toml", "--sparsity", "0.5"], "--config and --sparsity exclude each other"),
        (["--plan", "p.npz", "--sparsity", "0.5"], "--plan and --sparsity exclude each other"),
        (["--plan", "p.npz", "--config", "f.toml"], "--plan and --config exclude each other"),
        (["--plan", "p.npz", "--block-size", "32"], "--plan and --block-size exclude each other"),
        (["--plan", "p.npz"], "p.npz: no such file"),
        (["--config", "f.toml"], "f.toml: no such file"),
        (["--sparsity", "1"], "sparsity: expected a number from 0 to below 1, found 1.0"),
        (["--block-size", "big"], "block_size: expected something like 32x32, found 'big'"),
        (["--importance", "hessian"], "importance hessian is measured on samples: give --calibration FILE.npz"),
        (["--importance", "activation"], "importance activation is measured on samples: give --calibration FILE.npz"),
        (["--reorder", "best"], "reorder: expected one of exact, greedy, none"),
        (["--gathers", "drop"], "gathers: expected one of absorb, keep"),
        (["--report", "r.pdf"], "r.pdf: a report ends in .json, .md, .html"),
        (["--report", "absent/r.html"], "--report absent/r.html: the folder absent does not exist"),
        (["--save-plan", "out.onnx"], "--save-plan out.onnx: the same file as -o"),
        (["--save-plan", "model.onnx"], "--save-plan model.onnx: the same file as MODEL"),
        (["--dump-passes", "model.onnx"], "--dump-passes model.onnx: not a folder"),
        (["--data", "absent.npz"], "absent.npz: no such file"),
        (["--calibration", "model.onnx"], "model.onnx: not an .npz or .npy file"),
    ],
)
def test_optimize_refuses_mistakes_before_it_starts(
    options: list[str],
    message: str,
    model: Path,
    calls: list,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(model.parent)
    before = model.read_bytes()
    assert message in fails(["optimize", "model.onnx", "-o", "out.onnx", *options], capsys)
    assert not calls
    assert [p.name for p in model.parent.iterdir()] == ["model.onnx"]
    assert model.read_bytes() == before


def test_optimize_refuses_outputs_that_cannot_be(
    model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hard.onnx").hardlink_to(model)
    (tmp_path / "soft.onnx").symlink_to(model)
    for output in (model, tmp_path / "hard.onnx", tmp_path / "soft.onnx", tmp_path / "." / "model.onnx"):
        assert "the same file as MODEL" in fails(["optimize", model, "-o", output], capsys)
    assert "a folder; give the name of a file" in fails(["optimize", model, "-o", tmp_path], capsys)
    assert "does not exist; create it first" in fails(["optimize", model, "-o", tmp_path / "no" / "out.onnx"], capsys)
    assert not calls


def test_optimize_needs_the_op_library_before_the_search(
    model: Path, calls: list, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", "/absent.so")
    assert "/absent.so" in fails(["optimize", model, "-o", model.parent / "out.onnx"], capsys)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = fails(["optimize", model, "-o", model.parent / "out.onnx"], capsys)
    assert "onnxruntime is not installed: pip install 'tetris-onnx[cpu]'" in line
    assert not calls


def test_optimize_checks_data_before_the_search(
    model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 6, 6, 64), np.float32))
    out = tmp_path / "out.onnx"
    for option in ("--data", "--calibration"):
        line = fails(["optimize", model, "-o", out, option, tmp_path / "d.npz"], capsys)
        assert "'x' is float32 [2, 6, 6, 64], the model input is x: float32 [N, 64, 6, 6]" in line
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 64, 6, 6), np.float32), label=[0, 1, 2, 3])
    line = fails(["optimize", model, "-o", out, "--data", tmp_path / "d.npz"], capsys)
    assert "labels from 0 to 3; the model has 3 classes" in line
    line = fails(["optimize", model, "-o", out, "--calibration", tmp_path / "d.npz", "--mean", "0.5"], capsys)
    assert "are for folders of images" in line
    assert not calls
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            VerificationError("the block-sparse model differs"),
            1,
            "error: the block-sparse model differs",
        ),
        (PermissionError(13, "Permission denied", "somewhere"), 1, "error: somewhere: Permission denied"),
        (
            KeyError("a mistake\nof ours"),
            1,
            "error: KeyError: 'a mistake\\nof ours' (unexpected: run again with --debug",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failure_leaves_no_file(
    error: BaseException,
    code: int,
    message: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(optimize_module, "optimize", fail)
    out = model.parent / "out.onnx"
    assert run(["optimize", str(model), "-o", str(out), "--save-plan", str(model.parent / "p.npz")]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert len(captured.err.strip().splitlines()) == (1 if message else 0)
    assert [p.name for p in model.parent.iterdir()] == ["model.onnx"]


def test_an_older_result_survives_a_failure(
    model: Path, calls: list, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    out = model.parent / "out.onnx"
    out.write_bytes(b"older")
    monkeypatch.setattr("os.fdopen", fail)
    assert "No space left on device" in fails(["optimize", model, "-o", out], capsys)
    assert out.read_bytes() == b"older"
    assert sorted(p.name for p in model.parent.iterdir()) == ["model.onnx", "out.onnx"]


def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for args in (["--debug", "inspect"], ["inspect", "--debug"]):
        assert run([*args, str(tmp_path / "absent.onnx")]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback")
        assert lines[-1].endswith("absent.onnx: no such file")


def test_ctrl_c_ends_without_a_traceback(tmp_path: Path) -> None:
    script = f"""
import os, signal, time
import tetris_onnx.planner
from tetris_onnx.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
tetris_onnx.planner.inspect = interrupted
import sys
sys.argv = ["tetris-onnx", "inspect", {str(tmp_path / "model.onnx")!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_python_m_runs_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "tetris_onnx", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("tetris-onnx ")


def test_help_imports_none_of_the_heavy_modules() -> None:
    script = (
        "import sys; from tetris_onnx.cli.main import run; run(['-h']); print([m for m in {heavy} if m in sys.modules])"
    )
    script = script.format(heavy=("scipy", "ot", "torch"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_measure_is_passed_on(model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    succeeds(["optimize", model, "-o", out, "--measure"], capsys)
    assert calls[0][2]["measure"] is True
    message = fails(["optimize", model, "-o", out, "--measure", "--target", "cuda"], capsys)
    assert "--measure times on the processor, but the target is cuda" in message
    assert len(calls) == 1


def test_the_shape_is_passed_on(model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[object] = ["optimize", model, "-o", tmp_path / "out.onnx"]
    value = json.loads(succeeds([*arguments, "--shape", "x=1x64x6x6", "--bench", "--json"], capsys))
    assert calls[0][2]["shapes"] == {"x": (1, 64, 6, 6)} and value["speedup"][0] > 0
    assert "shape 1x3x6x6 does not fit" in fails([*arguments, "--shape", "x=1x3x6x6", "--bench"], capsys)


def test_inspect_lists_layers_and_what_could_be_won(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prunable = replace(ROW, status="prunable", density=1.0, kept_parameters=36864, retained=None, baseline=None)
    prunable = replace(prunable, predicted_ms=(1.5, 0.75))
    dense = replace(prunable, node="fc", status="dense", reason="it is too small", predicted_ms=(0.5, 0.5))
    configs: list[Config] = []
    given: list[dict] = []

    def fake(model: Path, config: Config, shapes: dict) -> list[LayerReport]:
        configs.append(config)
        given.append(shapes)
        return [prunable, dense]

    monkeypatch.setattr(tetris_onnx.planner, "inspect", fake)
    text = succeeds(["inspect", "m.onnx"], capsys)
    for part in ("conv1", "prunable", "dense: it is too small", "1 of 2 layers can be pruned", "2 M -> 1.5 M (75.0 %)"):
        assert part in text
    assert "1.5 -> 0.75" in text, "the layer's own times"
    assert "predicted 2 ms -> 1.25 ms in these layers: 1.60x (avx512, measured on this machine, one thread)" in text
    value = json.loads(succeeds(["inspect", "m.onnx", "--json", "--sparsity", "0.8", "--block-size", "8"], capsys))
    assert [row["status"] for row in value["layers"]] == ["prunable", "dense"]
    assert (value["macs"], value["predicted_macs"]) == (2_000_000, 1_200_000)
    assert value["predicted_ms"] == [2.0, 1.25] and value["predicted_speedup"] == 1.6
    assert value["machine"] == "avx512, measured on this machine"
    assert configs[-1] == Config(sparsity=0.8, block_size=(8, 8))
    succeeds(["inspect", "m.onnx", "--shape", "x=1x3x8x9"], capsys)
    assert given == [{}, {}, {"x": (1, 3, 8, 9)}]


def test_inspect_says_which_patterns_match_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tetris_onnx.planner, "inspect", lambda model, config, shapes: [replace(ROW, macs=None)])
    toml = tmp_path / "run.toml"
    toml.write_text('[layers."conv*"]\nskip = true\n[layers."head"]\nskip = true\n')
    text = succeeds(["inspect", "m.onnx", "--config", toml], capsys)
    assert "note: no layer matches 'head'" in text
    assert "conv*" not in text
    assert "multiplications" not in text.splitlines()[-1], "no prediction where a shape is unknown"


def test_compare_exits_with_1_over_the_tolerance(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = network()
    other.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.zeros((3, 64), np.float32), "w3"))
    onnx.save(other, tmp_path / "other.onnx")
    text = succeeds(["compare", model, model, "--tolerance", "0"], capsys)
    assert "same top-1: 100.00 %" in text
    assert run(["compare", str(model), str(tmp_path / "other.onnx"), "--tolerance", "0.5", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["relative"] == 1.0  # |y - 0| / max|y|
    assert captured.err == "error: the models differ by 1.00e+00 of max|y|, more than --tolerance 0.5\n"
    value = json.loads(succeeds(["compare", model, tmp_path / "other.onnx", "--json", "--samples", "3"], capsys))
    assert value["samples"] == 3


def test_compare_takes_the_shape_of_random_inputs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = json.loads(succeeds(["compare", model, model, "--shape", "x=1x64x6x6", "--json"], capsys))
    assert value["samples"] == 8
    line = fails(["compare", model, model, "--shape", "x=1x3x6x6"], capsys)
    assert "shape 1x3x6x6 does not fit the model input x: float32 [N, 64, 6, 6]" in line
    assert "expected NAME=1x3x224x224" in fails(["compare", model, model, "--shape", "6x6"], capsys)


def test_bench_prints_or_dumps_every_number_of_threads(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = succeeds(["bench", model, model, "--rounds", "1"], capsys)
    assert "speed-up" in text
    value = json.loads(succeeds(["bench", model, "--rounds", "1", "--threads", "1,2", "--json"], capsys))
    assert [result["threads"] for result in value["results"]] == [1, 2]
    assert value["results"][0]["speedup"] is None
    assert "--threads x: expected numbers such as 1,2" in fails(["bench", model, "--threads", "x"], capsys)
    assert "no provider 'tpu'; choose one of cpu, cuda" in fails(["bench", model, "--provider", "tpu"], capsys)


def test_doctor_fails_where_something_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Diagnosis((Check("onnxruntime", "1.0", True), Check("GPU", "none")))
    monkeypatch.setattr(tetris_onnx.doctor, "diagnose", lambda measure: good)
    assert succeeds(["doctor"], capsys).splitlines()[-1] == "ready"
    bad = Diagnosis((*good.checks, Check("op library", "not found", False, "install it")))
    monkeypatch.setattr(tetris_onnx.doctor, "diagnose", lambda measure: bad)
    assert run(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL" in text
    assert "op library: install it" in text
    assert run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["usable"] is False


def test_end_to_end(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real pipeline on a small network: optimize, apply the plan again, compare, run in plain onnxruntime."""
    x = np.random.default_rng(1).standard_normal((4, 64, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, label=np.array([0, 1, 2, 0]))
    out, again, plan = tmp_path / "out.onnx", tmp_path / "again.onnx", tmp_path / "plan.npz"
    data = ["--data", tmp_path / "d.npz", "--calibration", tmp_path / "d.npz"]
    value = json.loads(succeeds(["optimize", model, "-o", out, "--save-plan", plan, *data, "--json"], capsys))
    assert [row["status"] for row in value["layers"]] == ["block-sparse", "block-sparse", "dense"]
    assert value["max_error"] <= 1e-4  # the default tolerance, which the run has checked
    assert value["kept_parameters"] < 0.51 * value["parameters"]  # half of both convolutions; the last layer has 192
    assert value["gathers"] == 0
    assert out.stat().st_size < 0.65 * model.stat().st_size
    assert [node.op_type for node in onnx.load(out).graph.node].count("BlockSparseConv") == 2

    succeeds(["optimize", model, "-o", again, "--plan", plan, "--calibration", tmp_path / "d.npz"], capsys)
    # The same plan, the same kernels, the same order of sums: the same bits.
    succeeds(["compare", out, again, "--tolerance", "0"], capsys)
    plain = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert plain.run(None, {"x": x})[0].shape == (4, 3)
    value = json.loads(succeeds(["bench", model, out, "--rounds", "1", "--per-layer", "--json"], capsys))
    rows = {row["name"]: row["op_types"] for row in value["results"][0]["layers"]}
    assert rows["conv1"][1] == rows["conv2"][1] == "BlockSparseConv"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_replaced(
    model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(out)
    else:
        out.mkdir()
    for option in ("-o", "--save-plan"):
        other = [] if option == "-o" else ["-o", tmp_path / "out.onnx"]
        line = fails(["optimize", model, option, out, *other], capsys)
        assert f"{option} {out}: " + ("a folder" if kind == "folder" else "not a regular file") in line
        assert calls == [] and not out.is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "MODEL", "--threads", "99999999999"], "--threads 99999999999: expected numbers such as 1,2"),
        (["optimize", "MODEL", "-o", "out.onnx", "--plan", os.devnull], "not a regular file"),
        (["optimize", "MODEL", "-o", "out.onnx", "--config", os.devnull], "not a regular file"),
        (["optimize", "MODEL", "-o", "out.onnx", "--calibration", "PICKLE"], "pickled objects are not read"),
        (["inspect", os.devnull], "not a regular file"),
        (["inspect", "."], "a folder, not an ONNX file"),
    ],
)
def test_odd_files_and_numbers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    names = {"MODEL": model, "PICKLE": tmp_path / "o.npy", "out.onnx": tmp_path / "out.onnx"}
    assert message in fails([names.get(arg, arg) for arg in args], capsys)
    assert not (tmp_path / "out.onnx").exists()


def test_memory_without_bounds(model: Path, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeeds(["optimize", model, "-o", tmp_path / "out.onnx", "--memory", "inf"], capsys)
    assert calls[0][1].memory >= 10**18


def test_where_onnxruntime_failed_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    future = network()
    future.ir_version = 99
    (tmp_path / "future.onnx").write_bytes(future.SerializeToString())
    line = fails(["compare", tmp_path / "future.onnx", tmp_path / "future.onnx"], capsys)
    assert "Unsupported model IR version: 99" in line and ".cc:" not in line and "[ONNXRuntimeError]" not in line


def test_paths_with_spaces_and_other_letters(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a b" / "ünï [x]"
    folder.mkdir(parents=True)
    odd = folder / "mödel %s.onnx"
    odd.write_bytes(model.read_bytes())
    succeeds(
        ["optimize", odd, "-o", folder / "öut", "--report", folder / "r.html", "--save-plan", folder / "p"], capsys
    )
    assert {"öut", "r.html"} < {path.name for path in folder.iterdir()}
    onnx.load(folder / "öut")
