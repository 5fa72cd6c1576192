"""The cost model's coefficients for this machine: measured once and kept in the user's cache folder, else built in.

What has been measured counts for the same processor, kernels and versions of onnxruntime and of this package. A file
that cannot be read or holds nonsense counts as none: predictions then come from the built-in coefficients.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from tetris_onnx.config import PRECISIONS
from tetris_onnx.timing.cost import BUILT_IN, DENSE_WORK, PRECISION_SHARES, SPARSE_WORK, Machine
from tetris_onnx.timing.processor import cpu_name, instruction_set, precisions

# Ends the name of coefficients that were.
MEASURED = ", measured on this machine"
_MAX_BYTES = 2**20
_WORK = (("dense", DENSE_WORK), ("sparse", SPARSE_WORK))


def load_machine() -> Machine:
    """The coefficients to predict times with: those measured on this machine where there are any, else built in."""
    try:
        return _parse(_read()[machine_key()])
    except (AttributeError, KeyError, TypeError, ValueError):
        return built_in()


def built_in() -> Machine:
    """The coefficients that come with the package for this machine's instruction set."""
    machine = BUILT_IN.get(instruction_set(), BUILT_IN["avx2"])
    return replace(machine, precisions={name: PRECISION_SHARES[name] for name in precisions()})


def measured(machine: Machine) -> bool:
    """Whether the coefficients were measured on this machine."""
    return machine.name.endswith(MEASURED)


def save_machine(machine: Machine) -> Path:
    """Keep measured coefficients for later runs. Returns the file; raises `ModelError` where it cannot be written."""
    from tetris_onnx.graph.io import ModelError, write_atomically

    path = cache_path()
    known = _read()
    base = machine.name.removesuffix(MEASURED)
    known[machine_key()] = asdict(replace(machine, name=base + MEASURED))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from None
    with write_atomically(path) as file:
        file.write(json.dumps(known, indent=1).encode("utf-8"))
    return path


def cache_path() -> Path:
    """The file of measured coefficients: in XDG_CACHE_HOME, or ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME")
    base = Path(folder) if folder and Path(folder).is_absolute() else Path.home() / ".cache"
    return base / "tetris-onnx" / "machine.json"


def machine_key() -> str:
    """What the coefficients belong to."""
    versions = (f"{name} {_version(name)}" for name in ("onnxruntime", "onnxruntime-gpu", "tetris-onnx"))
    return "; ".join((cpu_name(), instruction_set(), *precisions(), *versions))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _read() -> dict[str, Any]:
    try:
        path = cache_path()
        if path.stat().st_size > _MAX_BYTES:
            return {}
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, RecursionError):  # RuntimeError: there is no home
        return {}
    return known if isinstance(known, dict) else {}


def _parse(values: Any) -> Machine:
    """A machine from what `save_machine` wrote. Raises KeyError, TypeError, ... for anything else."""
    lanes = values["lanes"]
    if not isinstance(lanes, int) or not 1 <= lanes <= 1024:
        raise ValueError("lanes")
    dense, sparse = ({name: _number(values[which][name]) for name in names} for which, names in _WORK)
    fork, serial, reorder = (_pair(values[name]) for name in ("fork", "serial", "reorder"))
    shares = {str(name): _number(share) for name, share in values["precisions"].items() if name in PRECISIONS}
    return Machine(
        name=str(values["name"]),
        lanes=lanes,
        dense=dense,
        sparse=sparse,
        fork=fork,
        serial=(min(1.0, serial[0]), min(1.0, serial[1])),
        reorder=reorder,
        precisions=shares,
    )


def _pair(values: Any) -> tuple[float, float]:
    first, second = values
    return _number(first), _number(second)


def _number(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number >= 0) or isinstance(value, (bool, str)):
        raise ValueError("not a coefficient")
    return number
