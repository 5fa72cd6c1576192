"""What to do with each layer of a model: the decisions of a run, saved and loaded as one ``.npz`` file.

A plan is everything that the search decided and nothing else: permutations, block size and keep mask per layer. It
holds no weights, so a plan made for one export of a model can be applied to another one (a fine-tuned one, say).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.algorithms.permutation import is_permutation
from tetris_onnx.errors import TetrisError

_FORMAT = "tetris-onnx plan 1"
_FIELDS = ("out_perm", "in_perm", "block_size", "keep")
# A model of a hundred billion weights has a plan of some hundred megabytes; a file that claims more is an attack.
_MAX_BYTES = 2**30


class PlanError(TetrisError, ValueError):
    """A plan file that cannot be read, or a plan that does not fit the model."""


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """How one weight matrix ``W`` [out, in, ...] is reordered and pruned.

    The reordered weight is ``W[out_perm][:, in_perm]``; its block ``(i, j)`` of ``block_size`` rows and columns (cut
    off at the edges) survives where ``keep[i, j]``.

    Raises `PlanError` when the arrays do not fit together.
    """

    layer: str  # name of the layer's output value in the original model
    out_perm: NDArray[np.int64]  # [out]
    in_perm: NDArray[np.int64]  # [in]
    block_size: tuple[int, int]  # (out channels, in channels) of a block
    keep: NDArray[np.bool_]  # [ceil(out / block_size[0]), ceil(in / block_size[1])]

    def __post_init__(self) -> None:
        for name, perm in (("out_perm", self.out_perm), ("in_perm", self.in_perm)):
            if perm.dtype != np.int64 or perm.size == 0 or not is_permutation(perm):
                raise PlanError(f"layer {self.layer!r}: {name} is no permutation")
        sizes = self.block_size
        if len(sizes) != 2 or not all(
            isinstance(b, int) and 1 <= b <= n for n, b in zip(self.shape, sizes, strict=True)
        ):
            raise PlanError(f"layer {self.layer!r}: block size {sizes} is not two numbers from 1 to {self.shape}")
        grid = tuple(-(-n // b) for n, b in zip(self.shape, self.block_size, strict=True))
        if self.keep.dtype != np.bool_ or self.keep.shape != grid:
            found = f"{self.keep.dtype} {self.keep.shape}"
            raise PlanError(f"layer {self.layer!r}: the keep mask is {found}, its blocks make bool {grid}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) channels of the layer."""
        return self.out_perm.size, self.in_perm.size

    @property
    def density(self) -> float:
        """Share of the weights that are in kept blocks (blocks at the edges count with their true size)."""
        rows, columns = (
            np.minimum(b, n - b * np.arange(-(-n // b))) for n, b in zip(self.shape, self.block_size, strict=True)
        )
        return float(rows @ self.keep @ columns) / (self.shape[0] * self.shape[1])

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density


@dataclass(frozen=True, eq=False)
class Plan:
    """The layers to prune; every layer of the model that is not in it stays as it is."""

    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        names = [layer.layer for layer in self.layers]
        if len(set(names)) != len(names):
            raise PlanError("a plan names the same layer twice")

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def get(self, layer: str) -> LayerPlan | None:
        """The plan of ``layer``, or None where the layer stays dense."""
        return next((p for p in self.layers if p.layer == layer), None)

    def save(self, path: str | Path) -> None:
        """Write the plan as ``.npz`` (numpy arrays only, no pickle), whole or not at all."""
        from tetris_onnx.graph.io import write_atomically

        arrays: dict[str, NDArray] = {
            "format": np.array(_FORMAT),
            "layers": np.array([p.layer for p in self.layers], dtype=np.str_),
        }
        for i, p in enumerate(self.layers):
            arrays |= {
                f"{i}.out_perm": p.out_perm,
                f"{i}.in_perm": p.in_perm,
                f"{i}.block_size": np.array(p.block_size, np.int64),
                f"{i}.keep": p.keep,
            }
        with write_atomically(Path(path)) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote. Raises `PlanError` for any other content."""
        try:
            if Path(path).exists() and not Path(path).is_file():
                raise PlanError("not a regular file")
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > _MAX_BYTES:
                raise PlanError(f"its content takes {size} bytes, more than any plan does")
            with np.load(Path(path), allow_pickle=False) as file:
                if "format" not in file or str(file["format"]) != _FORMAT:
                    raise PlanError("not a plan of tetris-onnx")
                layers = []
                for i, name in enumerate(file["layers"]):
                    out_perm, in_perm, block_size, keep = (file[f"{i}.{field}"] for field in _FIELDS)
                    rows, columns = block_size.tolist()
                    layers.append(LayerPlan(str(name), out_perm, in_perm, (rows, columns), keep))
                return Plan(tuple(layers))
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None
        except OSError as error:
            raise PlanError(f"{path}: {(error.strerror or str(error)).lower()}") from None
        except Exception:  # zipfile and np.load raise many types for broken or hostile files
            raise PlanError(f"{path}: not a plan of tetris-onnx, or damaged") from None
