"""Tables of measurements (.csv) that grow run by run: a head with the machine, the versions and the command."""

from __future__ import annotations

import csv
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from tetris_onnx.timing.processor import cpu_name


def add_to_table(path: Path, columns: Sequence[str], keys: int, rows: Sequence[dict[str, str]]) -> None:
    """Write the rows to the table, in place of those that have the same values in the first `keys` columns."""

    def key(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[column] for column in columns[:keys])

    old: list[dict[str, str]] = []
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        old = list(csv.DictReader(lines))
    new = {key(row) for row in rows}
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# {cpu_name()}, {os.cpu_count()} cores; onnxruntime {onnxruntime.__version__}\n")
        file.write(f"# {shlex.join(['python', f'custom_ops/bench/{Path(sys.argv[0]).name}', *sys.argv[1:]])}\n")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*(row for row in old if key(row) not in new), *rows])
