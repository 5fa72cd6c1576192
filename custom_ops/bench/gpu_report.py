"""What gpu.py has measured, as lines on a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_COLUMNS = (
    ("layer", 12),
    ("in", 13),
    ("type", 6),
    ("batch", 6),
    ("block", 6),
    ("density", 8),
    ("torch us", 10),
    ("ort us", 10),
    ("no cuDNN", 10),
    ("run us", 10),
    ("scattered", 10),
    ("alone us", 10),
    ("speed-up", 9),
    ("fraction", 9),
)


def best_dense(dense: Mapping[str, float]) -> float:
    """The fastest dense time with cuDNN."""
    return min(us for name, us in dense.items() if name != "no_cudnn")


def header() -> str:
    """The names of the columns of `line`."""
    return "".join(f"{name:>{width}}" for name, width in _COLUMNS)


def line(row: Row) -> str:
    """A row for the terminal."""
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(_cells(row), _COLUMNS, strict=True))


def markdown(results: Mapping[str, Any]) -> str:
    """All that was measured, as tables: networks first, then the layers by type, batch and block size."""
    rows: Sequence[Row] = results["rows"]
    text = [
        f"# {results['device']}",
        f"{results['versions']}; onnxruntime: {results['onnxruntime']}. {results['cases']} cases correct.",
        "Times in microseconds. torch, ort: dense with cuDNN or cuBLAS, the fastest of what each has. run: ours among "
        "layers of ours. fraction: density x speed-up, 1 is a time proportional to what is kept.",
    ]
    for title, chosen in _sections(rows):
        text += [f"## {title}", _table(chosen)]
    for row in rows:
        if row.get("elsewhere") or row.get("copies"):
            found = f"on another provider {row['elsewhere']}, copies {row['copies']}"
            text.append(f"{row['network']}, {row['type']}, batch {row['batch']}: {found}")
    if results["dropped"]:
        text.append(f"Dropped for lack of time: {len(results['dropped'])} points, the least important.")
    return "\n\n".join(text) + "\n"


def _sections(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    timed = [row for row in rows if "speedup" in row]
    networks = [row for row in timed if "network" in row]
    if networks:
        yield "Networks", networks
    keys = {(row["type"], row["batch"], row["block"]) for row in timed if "layer" in row}
    for kind, batch, block in sorted(keys):
        same = [
            row for row in timed if "layer" in row and (row["type"], row["batch"], row["block"]) == (kind, batch, block)
        ]
        title = f"{kind}, batch {batch}, blocks {block}x{block}"
        yield title, sorted(same, key=lambda row: (row["layer"], -row["density"]))


def _table(rows: Sequence[Row]) -> str:
    names = [name for name, _ in _COLUMNS]
    lines = [names, ["---"] * len(names), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(row: Row) -> list[str]:
    dense, ours = row["dense_us"], row["sparse_us"]

    def fastest(of_onnxruntime: bool) -> float:
        times = [us for name, us in dense.items() if name != "no_cudnn" and name.startswith("ort") == of_onnxruntime]
        return min(times, default=math.nan)

    numbers = [
        (row.get("density"), 2),
        (fastest(False), 1),
        (fastest(True), 1),
        (dense.get("no_cudnn"), 1),
        (ours["run"], 1),
        (ours.get("scattered"), 1),
        (ours.get("alone"), 1),
        (row["speedup"], 2),
        (row.get("fraction"), 2),
    ]
    head = [row.get("layer") or row["network"], row.get("in", ""), row["type"], str(row["batch"]), str(row["block"])]
    return head + ["" if n is None or math.isnan(n) else f"{n:.{digits}f}" for n, digits in numbers]
