"""Tables of results: CSV files that are written row by row, so that an interrupted program can go on where it was."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tetris_onnx.graph.io import write_atomically
from tetris_onnx.timing.processor import cpu_name


class TableError(ValueError):
    """A file that holds other results."""


def provenance(seed: int) -> str:
    """What a table was made with, as its first lines."""
    libraries = f"numpy {np.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"
    return f"# seed {seed}; {cpu_name()}, {os.cpu_count()} cores; {libraries}\n# {_command()}\n"


def _command() -> str:
    """The command line, without folders."""
    return " ".join(["python", *(path.name if (path := Path(word)).parent.exists() else word for word in sys.argv)])


def fingerprint(model: onnx.ModelProto) -> str:
    """A short hash of a model."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()[:12]


class Table:
    """The rows of a CSV file, found by the columns ``key``; those that the file holds need not be made again.

    ``subject`` says in one line what the rows are about; a file about something else raises `TableError`.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str], subject: str, seed: int = 0) -> None:
        self.path, self.columns, self.key = path, list(columns), list(key)
        self.rows: list[dict[str, str]] = []
        self._head = f"{provenance(seed)}# {subject}\n"
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        comments = [line for line in lines if line.startswith("#")]
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        if f"# {subject}\n" not in comments or rows.fieldnames != self.columns:
            raise TableError(f"{path} holds other results than those of {subject}: remove it, or write to another file")
        if (command := f"# {_command()}\n") not in comments:
            comments.append(command)  # rows to come are its
        self._head, self.rows = "".join(comments), list(rows)

    def __contains__(self, values: Mapping[str, Any]) -> bool:
        return any(all(row[name] == str(values[name]) for name in self.key) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, and write the file: whole or not at all."""
        self.rows.append({name: "" if row[name] is None else str(row[name]) for name in self.columns})
        text = io.StringIO()
        text.write(self._head)
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        with write_atomically(self.path) as file:
            file.write(text.getvalue().encode())
