"""The doctor: it says what is there, and each thing that is missing is named with what to do."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tetris_onnx import doctor
from tetris_onnx.doctor import Check, Diagnosis, diagnose, print_diagnosis
from tetris_onnx.timing.cost import AVX512
from tetris_onnx.timing.measure import Measurement
from tetris_onnx.timing.processor import cpu_flags


def found() -> dict[str, Check]:
    return {check.name: check for check in diagnose().checks}


def test_this_machine_is_usable() -> None:
    diagnosis = diagnose()
    checks = {check.name: check for check in diagnosis.checks}
    for name in ("python", "numpy", "scipy", "onnx", "onnx-graphsurgeon", "onnxruntime", "op library"):
        assert checks[name].ok, f"{name}: {checks[name].value}"
    assert checks["op library"].value.endswith(", runs")
    assert "CPUExecutionProvider" in checks["providers"].value
    assert diagnosis.usable
    assert json.loads(json.dumps(diagnosis.to_dict()))["usable"] is True


def test_a_missing_library_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", "/absent/library.so")
    check = found()["op library"]
    assert check.ok is False
    assert "/absent/library.so" in check.value
    assert "pip install" in check.advice


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"no library")
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", str(path))
    check = found()["op library"]
    assert check.ok is False
    assert check.value.startswith(f"{path}: ")
    assert "\n" not in check.value


def test_the_precisions_that_have_kernels_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = found()["precisions"].value.split(", ")
    assert listed[0] == "float32"
    assert set(listed) <= {"float32", "bf16", "int8"}
    monkeypatch.setenv("TETRIS_ONNX_ISA", "scalar")
    assert found()["precisions"].value == "float32"


def test_wrong_results_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run", lambda session, feed, name: [np.zeros((2, 4), np.float32)])
    check = found()["op library"]
    assert check.ok is False
    assert "wrong result" in check.value


def test_without_onnxruntime_the_doctor_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    checks = found()
    assert checks["onnxruntime"].ok is False
    assert "tetris-onnx[cpu]" in checks["onnxruntime"].advice
    assert "not tried without onnxruntime" in checks["op library"].value
    assert "GPU" in checks


def test_versions_that_do_not_do_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": "1.17.3", "onnxruntime-gpu": "1.17.3", "tetris-onnx": "0.1.0", "onnx": "1.20.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr("onnxruntime.__version__", "1.17.3")
    checks = diagnose().checks
    runtimes = [check for check in checks if check.name == "onnxruntime"]
    assert [check.ok for check in runtimes] == [False, False]
    assert "both installed" in runtimes[0].value
    assert "onnxruntime>=1.18" in runtimes[1].advice
    missing = next(check for check in checks if check.name == "scipy")
    assert (missing.ok, missing.advice) == (False, "pip install scipy")


def test_a_forced_instruction_set_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(doctor.ISA_VARIABLE, raising=False)
    assert doctor.ISA_VARIABLE not in found()
    monkeypatch.setenv(doctor.ISA_VARIABLE, "scalar")
    check = found()[doctor.ISA_VARIABLE]
    assert check.value == "scalar"
    assert "unset it" in check.advice


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\nbugs : none\n", {"avx2", "avx512f"}),
        ("Features\t: fp asimd sve\n", {"asimd", "sve"}),
    ],
)
def test_flags_are_those_of_cpuinfo(text: str, flags: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert flags <= cpu_flags()
    assert "none" not in cpu_flags()


def test_a_gpu_is_listed_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    listing = subprocess.CompletedProcess([], 0, stdout="Test GPU, 550.1, 81559 MiB\n")
    monkeypatch.setattr("subprocess.run", lambda *args, **options: listing)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    (check,) = doctor._gpu()
    assert check.value == "Test GPU, 550.1, 81559 MiB"
    assert "tetris-onnx[gpu]" in check.advice
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    (check,) = doctor._gpu()
    assert check.advice == ""

    def fail(*args: object, **options: object) -> None:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr("subprocess.run", fail)
    (check,) = doctor._gpu()
    assert check.value.startswith("nvidia-smi fails")
    assert check.ok is None, "the CPU still does"


def test_the_table_ends_with_what_to_do() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_diagnosis(Diagnosis((Check("a", "[1]", True), Check("b", "gone", False, "get [b]"))), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split() for line in lines[:2]] == [["ok", "a", "[1]"], ["FAIL", "b", "gone"]]
    assert lines[-2:] == ["b: get [b]", "not ready: see above"]


@pytest.mark.parametrize("load", [0.0, 1000.0])
def test_the_cost_model_can_be_measured(load: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check = found()["cost model"]
    assert check.value.startswith("built in for ") and "doctor --measure" in check.advice
    measured = Measurement(replace(AVX512, name="avx512"), 80, 0.034)
    monkeypatch.setattr("tetris_onnx.timing.measure.measure_machine", lambda: measured)
    monkeypatch.setattr("tetris_onnx.timing.processor.os.getloadavg", lambda: (load, 0.0, 0.0))
    check = {c.name: c for c in diagnose(measure=True).checks}["cost model"]
    path = tmp_path / "tetris-onnx" / "machine.json"
    assert ("busy" in check.advice) == (load > 0)
    assert check.value == f"avx512: 80 timings, off by 3.4% (median), kept in {path}" and check.ok is None
    assert found()["cost model"].value == f"avx512, measured on this machine ({path})"
    path.unlink()
    path.mkdir()
    check = {c.name: c for c in diagnose(measure=True).checks}["cost model"]
    assert "cannot be measured: cannot write" in check.value and check.ok is None
