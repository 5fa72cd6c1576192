"""The processor: its name, what it can do, and which of the op library's kernels run on it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

ISA_VARIABLE = "TETRIS_ONNX_ISA"
_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
# The flags that the kernels of a precision need on top, and the levels of ISA_VARIABLE that allow them.
_PRECISIONS = {
    "int8": ({"avx512_vnni"}, ("avx512_vnni", "avx512_bf16")),
    "bf16": ({"avx512_vnni", "avx512_bf16"}, ("avx512_bf16",)),
}


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(named, "") or platform.processor() or platform.machine()


def load_average() -> float | None:
    """How many processors were in use on average in the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def is_busy(load: float | None, cores: int, threads: int = 1) -> bool:
    """Whether a measurement with so many ``threads`` has to share the ``cores`` with what else is running."""
    return load is not None and load + threads > cores + 0.5


def cpu_flags() -> set[str]:
    """What the processor can do, in Linux's words where the system is another one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    except OSError:
        pass
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return {"asimd", "asimdhp"}  # every Apple processor
    try:
        text = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return set()
    listed = (line for line in text.splitlines() if "cpu.features" in line or "leaf7_features" in line)
    return {"avx" if flag == "avx1.0" else flag for line in listed for flag in line.lower().split()}


def precisions() -> tuple[str, ...]:
    """The precisions besides float32 that there are kernels for here."""
    forced, flags = os.environ.get(ISA_VARIABLE), cpu_flags()
    return tuple(
        name
        for name, (needed, levels) in _PRECISIONS.items()
        if flags >= _AVX512 | needed and (not forced or forced in levels)
    )


def instruction_set() -> str:
    """Which kernels run: "avx512", "avx2", "neon" or "scalar", as custom_ops/cpu/dispatch.cc chooses."""
    forced = os.environ.get(ISA_VARIABLE)
    if forced:
        return "avx512" if forced.startswith("avx512") else forced
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "neon"
    flags = cpu_flags()
    if flags >= _AVX512:
        return "avx512"
    # A system that does not tell is most likely one that has this.
    return "avx2" if {"avx2", "fma"} <= flags or not flags else "scalar"
