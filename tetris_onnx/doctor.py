"""Look at everything that a block-sparse model needs on this machine, and say what to do about what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tetris_onnx import runtime
from tetris_onnx.graph.io import ModelError
from tetris_onnx.graph.layers import DOMAIN, GEMM
from tetris_onnx.passes.set_precision import PRECISION_ATTRIBUTES
from tetris_onnx.runtime import import_onnxruntime
from tetris_onnx.session import SessionError, open_session, run
from tetris_onnx.timing.machine import cache_path, load_machine, measured, save_machine
from tetris_onnx.timing.processor import ISA_VARIABLE, cpu_flags, cpu_name, is_busy, load_average

_MIN_ONNXRUNTIME = (1, 18)
_PACKAGES = ("tetris-onnx", "numpy", "scipy", "onnx", "onnx-graphsurgeon")
# The instruction sets that kernels exist for or may come to exist for, as /proc/cpuinfo and sysctl call them.
_INSTRUCTION_SETS = (
    "avx",
    "fma",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "sve",
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``ok`` is None for what is worth knowing but decides nothing."""

    name: str
    value: str
    ok: bool | None = None
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in reading order."""

    checks: tuple[Check, ...]

    @property
    def usable(self) -> bool:
        """Whether block-sparse models run here."""
        return all(check.ok is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {"usable": self.usable, "checks": [asdict(check) for check in self.checks]}


def diagnose(measure: bool = False) -> Diagnosis:
    """Look at packages, onnxruntime, the op library, the processor and the GPU. Raises nothing.

    ``measure``: also time layers on this machine, some seconds, and keep what predictions are made with.
    """
    checks = (*_packages(), *_onnxruntime(), *_library(), *_processor(), *_gpu())
    model = _measured() if measure and all(check.ok is not False for check in checks) else _cost_model()
    return Diagnosis((*checks, model))


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print the checks as a table, then what to do."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for check in diagnosis.checks:
        mark = {True: "[green]ok[/green]", False: "[red]FAIL[/red]", None: ""}[check.ok]
        table.add_row(mark, escape(check.name), escape(check.value))
    console.print(table)
    for check in diagnosis.checks:
        if check.advice:
            console.print(f"{check.name}: {check.advice}", markup=False, highlight=False)
    console.print("ready" if diagnosis.usable else "not ready: see above", highlight=False)


def _packages() -> Iterable[Check]:
    yield Check("python", f"{platform.python_version()} ({sys.executable})", True)
    for name in _PACKAGES:
        version = _version(name)
        if version is not None:
            yield Check(name, version, True)
        elif name == "tetris-onnx":
            yield Check(name, f"not installed, running from {Path(__file__).parent}")
        else:
            yield Check(name, "missing", False, f"pip install {name}")


def _onnxruntime() -> Iterable[Check]:
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name) is not None]
    if len(installed) == 2:
        yield Check(
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu are both installed, over each other",
            False,
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
        )
    try:
        ort = import_onnxruntime()
    except ImportError as error:  # ours where it is missing, its own where it does not load
        yield Check("onnxruntime", "missing", False, _one_line(error))
        return
    version = tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:2])
    new_enough = version >= _MIN_ONNXRUNTIME
    needed = ".".join(map(str, _MIN_ONNXRUNTIME))
    advice = "" if new_enough else f"pip install --upgrade 'onnxruntime>={needed}'"
    yield Check("onnxruntime", ort.__version__, new_enough, advice)
    yield Check("providers", ", ".join(ort.get_available_providers()))


def _library() -> Iterable[Check]:
    advice = "pip install --force-reinstall tetris-onnx, or, in a clone, pip install -e ."
    try:
        path = runtime.get_library_path()
    except Exception as error:  # a broken installation fails in many ways, and all of them belong in the table
        yield Check("op library", _one_line(error), False, advice)
        return
    try:
        difference = _run_one_node()
    except ImportError:
        yield Check("op library", f"{path}, not tried without onnxruntime")
        return
    except Exception as error:
        yield Check("op library", f"{path}: {_one_line(error)}", False, advice)
        return
    if difference > 1e-5:  # eight products of numbers below 10 in float32
        yield Check("op library", f"{path}: wrong result (off by {difference:.1e})", False, "please report this")
        return
    yield Check("op library", f"{path}, runs", True)
    # Kernels of a precision round; without them, the result is float32's.
    found = [
        name for name, attribute in PRECISION_ATTRIBUTES.items() if name == "float32" or _run_one_node(attribute) > 1e-5
    ]
    yield Check("precisions", ", ".join(found))


def _processor() -> Iterable[Check]:
    yield Check("processor", f"{cpu_name()}, {os.cpu_count()} cores, {platform.machine()}")
    flags = cpu_flags()
    yield Check("instruction sets", " ".join(name for name in _INSTRUCTION_SETS if name in flags) or "none known")
    forced = os.environ.get(ISA_VARIABLE)
    if forced:
        yield Check(ISA_VARIABLE, forced, None, f"the kernels are forced to {forced}; unset it for full speed")


def _cost_model() -> Check:
    machine = load_machine()
    if measured(machine):
        return Check("cost model", f"{machine.name} ({cache_path()})")
    return Check(
        "cost model", f"built in for {machine.name}", None, "tetris-onnx doctor --measure fits it to this machine"
    )


def _measured() -> Check:
    from tetris_onnx.timing.measure import measure_machine

    try:
        load = load_average()
        found = measure_machine()
        path = save_machine(found.machine)
    except (ModelError, SessionError) as error:
        return Check("cost model", f"cannot be measured: {_one_line(error)}", None, "the built-in one is used")
    text = f"{found.machine.name}: {found.layers} timings, off by {found.error:.1%} (median), kept in {path}"
    busy = is_busy(load, os.cpu_count() or 1)
    return Check("cost model", text, None, "the machine was busy: run this again when it is not" if busy else "")


def _gpu() -> Iterable[Check]:
    command = shutil.which("nvidia-smi")
    if command is None:
        yield Check("GPU", "none found (no nvidia-smi)")
        return
    try:
        output = subprocess.run(
            [command, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        yield Check("GPU", f"nvidia-smi fails: {_one_line(error)}")
        return
    try:
        has_provider = "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    except ImportError:
        has_provider = False
    advice = "" if has_provider else "to use it: pip uninstall onnxruntime, then pip install 'tetris-onnx[gpu]'"
    for line in output.strip().splitlines():
        yield Check("GPU", line.strip(), None, advice)


def _run_one_node(precision: str = "float32") -> float:
    """The largest error of a block-sparse matrix product that only the op library can run."""
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((2, 2, 2), dtype=np.float32)
    block_index = np.array([[0, 1], [1, 0]])
    input_perm, output_perm = np.array([2, 0, 3, 1]), np.array([1, 3, 0, 2])
    bias = rng.standard_normal(4, dtype=np.float32)
    constants = {
        "blocks": blocks,
        "block_index": block_index,
        "input_perm": input_perm,
        "output_perm": output_perm,
        "bias": bias,
    }
    node = helper.make_node(
        GEMM,
        ["x", *constants],
        ["y"],
        name="doctor",
        domain=DOMAIN,
        weight_shape=[4, 4],
        block_size=[2, 2],
        activation_min=0.0,
        activation_max=float("inf"),
        precision=precision,
    )
    graph = helper.make_graph(
        [node],
        "doctor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    x = rng.standard_normal((2, 4), dtype=np.float32)
    (y,) = run(open_session(model, threads=1), {"x": x}, "the test model")

    reordered = np.zeros((4, 4), np.float32)
    for (row, column), block in zip(block_index, blocks, strict=True):
        reordered[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = block
    weight = np.zeros((4, 4), np.float32)
    weight[np.ix_(output_perm, input_perm)] = reordered
    return float(np.abs(y - np.maximum(x @ weight.T + bias, 0)).max())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
