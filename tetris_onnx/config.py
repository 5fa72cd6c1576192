"""The options of a run: frozen values with one default each, and the TOML file that sets them.

A layer's options come from the first rule whose glob matches its name, in the order of the file, then from the
top-level values::

    block_size = "32x32"
    sparsity = 0.5

    [layers."features.0"]
    skip = true

    [layers."classifier.*"]
    sparsity = 0.9
    block_size = "64x64"

``skip`` leaves a layer alone: it is neither pruned nor refitted, and onnxruntime runs it. With a sparsity of 0 it is
not pruned, but our operator may run it (see `operators`).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tetris_onnx.errors import TetrisError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

IMPORTANCES = ("auto", "l1", "l2", "activation", "hessian")  # auto: hessian with calibration samples, else l1
MEASURED_IMPORTANCES = ("activation", "hessian")  # need calibration samples
REORDERS = ("exact", "greedy", "none")
GATHERS = ("absorb", "keep")
# The provider that the result is for, and the blocks that suit its kernels: CUDA's tensor cores take 64 rows at a time
# (and 128 where `cuda_cost.block_height` reckons that a layer gains by it).
TARGETS = {"cpu": (32, 32), "cuda": (64, 64)}
PRECISIONS = ("float32", "bf16", "int8")
# How much to prune where: the same sparsity everywhere, one budget of multiplications, or one of time.
ALLOCATIONS = ("uniform", "global", "latency")
MAX_BLOCK_SIZE = 1024
_MOST_BYTES = 2**20  # of a config file

_TOP_KEYS = (
    "sparsity",
    "allocation",
    "speedup",
    "block_size",
    "importance",
    "reorder",
    "gathers",
    "target",
    "precision",
    "threads",
    "sweeps",
    "augment",
    "refine",
    "seed",
    "layers",
)
_LAYER_KEYS = ("skip", "sparsity", "block_size")


class ConfigError(TetrisError, ValueError):
    """An option or a config file with a value that makes no sense."""


@dataclass(frozen=True)
class LayerRule:
    """The options of the layers whose name matches ``pattern``; None leaves an option at the top-level value."""

    pattern: str  # glob of fnmatch: * ? [seq], case matters
    skip: bool | None = None
    sparsity: float | None = None
    block_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ConfigError("layers: an empty pattern matches no layer; use '*' for all")
        where = f'layers."{self.pattern}".'
        if self.skip is not None and not isinstance(self.skip, bool):
            raise ConfigError(f"{where}skip: expected true or false, found {self.skip!r}")
        if self.sparsity is not None:
            _check_sparsity(f"{where}sparsity", self.sparsity)
        if self.block_size is not None:
            _check_block_size(f"{where}block_size", self.block_size)


@dataclass(frozen=True)
class LayerConfig:
    """The options that hold for one layer."""

    sparsity: float
    block_size: tuple[int, int]
    skip: bool
    explicit: bool  # a rule names this layer, so it is what the user wants, not a default
    default_block: bool = False  # nobody has set the block size: the target's default, which may depend on the layer
    own_sparsity: bool = False  # the rule gives this layer a sparsity of its own: no allocation changes it


@dataclass(frozen=True)
class Config:
    """The options of `tetris_onnx.optimize`.

    Raises `ConfigError` naming the option when a value makes no sense.
    """

    sparsity: float = 0.5  # share of the weights to prune, in [0, 1)
    block_size: tuple[int, int] | None = None  # (out channels, in channels) of a block; None: that of the target
    layers: tuple[LayerRule, ...] = ()
    allocation: str = "uniform"  # one of ALLOCATIONS
    speedup: float | None = None  # of the whole network, above 1; with allocation "latency" and instead of a sparsity
    importance: str = "auto"  # one of IMPORTANCES
    reorder: str = "exact"  # one of REORDERS
    gathers: str = "absorb"  # one of GATHERS
    target: str = "cpu"  # one of TARGETS: the provider that the result is made for (it is right on any)
    precision: str = "float32"  # one of PRECISIONS: what the products of the block-sparse layers are computed in
    threads: int = 1  # of the sessions that will run the result: which layers gain depends on it
    sweeps: int | None = None  # how often to prune with calibration samples; None = twice where that takes little
    augment: int | None = None  # varied copies of each image to recover with; None = one of each of few images
    # Passes of gradient steps over the calibration samples, on all layers together; None = where they take little
    refine: int | None = None
    seed: int = 0
    workers: int | None = None  # processes; None = one per core
    memory: int = 4 * 10**9  # bytes for the activations of calibration samples; what is more goes to a temporary file
    tolerance: float = 1e-4  # largest error of the verification, relative to max|y|

    def __post_init__(self) -> None:
        _check_sparsity("sparsity", self.sparsity)
        if self.block_size is not None:
            _check_block_size("block_size", self.block_size)
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        if self.speedup is not None and (not _is_number(self.speedup) or self.speedup <= 1):
            raise ConfigError(f"speedup: expected a number above 1, found {self.speedup!r}")
        if (self.allocation == "latency") != (self.speedup is not None):
            raise ConfigError("allocation latency and a speedup belong together: give both or none")
        _check_choice("importance", self.importance, IMPORTANCES)
        _check_choice("reorder", self.reorder, REORDERS)
        _check_choice("gathers", self.gathers, GATHERS)
        _check_choice("target", self.target, tuple(TARGETS))
        if self.target == "cuda" and self.speedup is not None:
            raise ConfigError("speedup is predicted for the processor, but the target is cuda: give a sparsity instead")
        _check_choice("precision", self.precision, PRECISIONS)
        if not _is_int(self.seed) or self.seed < 0:
            raise ConfigError(f"seed: expected an integer from 0, found {self.seed!r}")
        if self.sweeps is not None and (not _is_int(self.sweeps) or self.sweeps < 1):
            raise ConfigError(f"sweeps: expected an integer from 1, found {self.sweeps!r}")
        if self.augment is not None and (not _is_int(self.augment) or self.augment < 0):
            raise ConfigError(f"augment: expected an integer from 0, found {self.augment!r}")
        if self.refine is not None and (not _is_int(self.refine) or self.refine < 0):
            raise ConfigError(f"refine: expected an integer from 0, found {self.refine!r}")
        if not _is_int(self.threads) or self.threads < 1:
            raise ConfigError(f"threads: expected an integer from 1, found {self.threads!r}")
        if self.workers is not None and (not _is_int(self.workers) or self.workers < 1):
            raise ConfigError(f"workers: expected an integer from 1, found {self.workers!r}")
        if not _is_int(self.memory) or self.memory < 0:
            raise ConfigError(f"memory: expected a number of bytes, found {self.memory!r}")
        if not _is_number(self.tolerance) or not 0 < self.tolerance < math.inf:
            raise ConfigError(f"tolerance: expected a number above 0, found {self.tolerance!r}")

    def for_layer(self, name: str) -> LayerConfig:
        """The options of the layer ``name``: its node's name, or its output's name where the node has none."""
        rule = next((r for r in self.layers if fnmatchcase(name, r.pattern)), None)
        if rule is None:
            default = self.block_size is None
            block_size = self.block_size or TARGETS[self.target]
            return LayerConfig(self.sparsity, block_size, skip=False, explicit=False, default_block=default)
        return LayerConfig(
            self.sparsity if rule.sparsity is None else rule.sparsity,
            rule.block_size or self.block_size or TARGETS[self.target],
            skip=bool(rule.skip),
            explicit=True,
            default_block=not (rule.block_size or self.block_size),
            own_sparsity=rule.sparsity is not None,
        )

    def unused_patterns(self, names: Iterable[str]) -> tuple[str, ...]:
        """The patterns that match none of the layers ``names``: most likely misspelled."""
        names = tuple(names)
        return tuple(r.pattern for r in self.layers if not any(fnmatchcase(name, r.pattern) for name in names))


def parse_block_size(text: str) -> tuple[int, int]:
    """``"32x64"`` -> (32, 64), out channels x in channels; ``"32"`` -> (32, 32). Raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX×]\s*(\d{1,9})\s*)?", text)
    if match is None:
        raise ConfigError(f"block_size: expected something like 32x32, found {text!r}")
    size = int(match[1]), int(match[2] or match[1])
    _check_block_size("block_size", size)
    return size


def load_config_with(path: Path | None, values: Mapping[str, Any]) -> Config:
    """The options of a file, or the defaults, with those of ``values`` that are not None on top. As `load_config`."""
    base = Config() if path is None else load_config(path)
    return replace(base, **{name: value for name, value in values.items() if value is not None})


def load_config(path: str | Path) -> Config:
    """Read a TOML file (keys: see the module's docstring). Raises `ConfigError` naming the file and the key."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ConfigError("not a regular file")
        if path.is_file() and path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"more than {_MOST_BYTES} bytes: not a config file")
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
        return _parse(table)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a config file: nested too deeply") from None
    except ValueError as error:  # of bytes that are no text, of text that is no TOML, of numbers too long
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def _parse(table: Mapping[str, Any]) -> Config:
    _check_keys("", table, _TOP_KEYS)
    layers = table.get("layers", {})
    if not isinstance(layers, dict):
        raise ConfigError('layers: expected tables such as [layers."features.*"]')
    values = {key: value for key, value in table.items() if key != "layers"}
    if "block_size" in values:
        values["block_size"] = _parse_toml_block_size("block_size", values["block_size"])
    return Config(layers=tuple(_parse_rule(pattern, rule) for pattern, rule in layers.items()), **values)


def _parse_rule(pattern: str, table: object) -> LayerRule:
    where = f'layers."{pattern}"'
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table with the keys {', '.join(_LAYER_KEYS)}")
    for key, value in table.items():
        if isinstance(value, dict):  # [layers.features.0] is a table in a table
            raise ConfigError(f'{where}: a name with a dot needs quotes: [layers."{pattern}.{key}"]')
    _check_keys(f"{where}.", table, _LAYER_KEYS)
    values = dict(table)
    if "block_size" in values:
        values["block_size"] = _parse_toml_block_size(f"{where}.block_size", values["block_size"])
    return LayerRule(pattern, **values)


def _parse_toml_block_size(where: str, value: object) -> tuple[int, int]:
    if not isinstance(value, str):
        raise ConfigError(f'{where}: expected a string such as "32x32", found {value!r}')
    try:
        return parse_block_size(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('block_size: ')}") from None


def _check_keys(where: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}{key}: unknown key; {hint}")


def _check_sparsity(where: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{where}: expected a number from 0 to below 1, found {value!r}")


def _check_block_size(where: str, value: object) -> None:
    if (
        not isinstance(value, tuple)
        or len(value) != 2
        or not all(_is_int(n) and 1 <= n <= MAX_BLOCK_SIZE for n in value)
    ):
        found = "x".join(map(str, value)) if isinstance(value, tuple) else repr(value)
        raise ConfigError(f"{where}: expected two integers from 1 to {MAX_BLOCK_SIZE}, found {found}")


def _check_choice(where: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{where}: expected one of {', '.join(choices)}, found {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
