"""The tables of `experiments` as plots. Needs matplotlib."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, str]
_STYLES = {"exact": "-o", "none": "--x"}
_RECOVERIES = {"none": "one-shot", "refit": "refitted to unlabeled samples", "retrain": "retrained with labels"}


def draw(folder: Path, name: str) -> list[Path]:
    """Draw the tables of a folder; the files that were written. Says so where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        print("no plots: they take matplotlib (pip install matplotlib, then the same command with --steps plots)")
        return []
    accuracy, speed, gathers = (read(folder / f"{table}.csv") for table in ("accuracy", "speed", "gathers"))
    written = []
    if accuracy:
        written.append(_accuracy(accuracy, folder / "accuracy.png", name))
    if speed:
        written.append(_speed(speed, folder / "speed.png", name))
    if accuracy and speed:
        written.append(_tradeoff(accuracy, speed, folder / "speed_accuracy.png", name))
    if gathers:
        written.append(_gathers(gathers, folder / "gathers.png", name))
    return written


def read(path: Path) -> list[Row]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def _accuracy(rows: Sequence[Row], path: Path, name: str) -> Path:
    """Accuracy over sparsity."""
    sparsities = [float(row["sparsity"]) for row in rows]
    return _by_recovery(rows, sparsities, f"{name}: {{}} over sparsity", "sparsity of the pruned layers", path)


def _speed(rows: Sequence[Row], path: Path, name: str) -> Path:
    """Speed-up over block size, a panel for each provider and number of threads."""
    places = sorted({(row["provider"], row["threads"]) for row in rows})
    figure, panels = _panels(len(places), f"{name}: speed-up of the whole network over block size")
    for axes, place in zip(panels, places, strict=True):
        own = [row for row in rows if (row["provider"], row["threads"]) == place]
        for i, (sparsity, pair) in enumerate(_lines(own, "sparsity")):
            for (reorder,), line in _lines(pair, "reorder"):
                points = [(float(row["block_size"]), float(row["speedup"])) for row in line]
                ordered = "reordered" if reorder != "none" else "not reordered"
                axes.plot(
                    *_columns(points), _STYLES[reorder], color=f"C{i}", label=f"sparsity {sparsity[0]}, {ordered}"
                )
        axes.axhline(1, color="0.6", linestyle=":")
        axes.set(title=_place(*place), xlabel="block size")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("speed-up over the dense model")
    return _save(figure, panels, path)


def _tradeoff(accuracy: Sequence[Row], speed: Sequence[Row], path: Path, name: str) -> Path:
    """Accuracy over speed-up, of the first provider and number of threads."""
    key = ("sparsity", "block_size", "reorder")
    place = min((row["provider"], row["threads"]) for row in speed)
    found = {tuple(row[k] for k in key): row for row in speed if (row["provider"], row["threads"]) == place}
    rows = [row for row in accuracy if tuple(row[k] for k in key) in found]
    speedups = [float(found[tuple(row[k] for k in key)]["speedup"]) for row in rows]
    title = f"{name}: {{}} over speed-up, {_place(*place)}"
    return _by_recovery(rows, speedups, title, "speed-up over the dense model", path)


def _by_recovery(rows: Sequence[Row], x: Sequence[float], title: str, label: str, path: Path) -> Path:
    """Accuracy (or what stands for it) over ``x``, a panel for each recovery, a line for each block size and order."""
    column, quality = _quality(rows)
    kinds = [kind for kind in _RECOVERIES if any(row["recovery"] == kind for row in rows)]
    figure, panels = _panels(max(1, len(kinds)), title.format(quality))
    place = {id(row): value for row, value in zip(rows, x, strict=True)}
    for axes, kind in zip(panels, kinds, strict=False):
        own = [row for row in rows if row["recovery"] == kind]
        for (block, reorder), line in _lines(own, "block_size", "reorder"):
            _plot(axes, [(place[id(row)], 100 * float(row[column])) for row in line], block, reorder)
        if column == "accuracy":
            axes.axhline(100 * float(rows[0]["dense_accuracy"]), color="0.6", linestyle=":", label="dense")
        axes.set(title=_RECOVERIES[kind], xlabel=label)
    panels[0].set_ylabel(quality)
    return _save(figure, panels, path)


def _gathers(rows: Sequence[Row], path: Path, name: str) -> Path:
    """What Gathers cost over block size."""
    figure, panels = _panels(1, f"{name}: time that Gathers add")
    for place, line in _lines(rows, "provider", "threads", "sparsity"):
        points = [(float(row["block_size"]), 100 * float(row["cost"])) for row in line]
        panels[0].plot(*_columns(points), "-o", label=f"{_place(*place[:2])}, sparsity {place[2]}")
    panels[0].axhline(4, color="0.6", linestyle=":", label="the paper: 4 %")
    panels[0].axhline(0, color="0.6")
    panels[0].set(xlabel="block size", ylabel="% of the time without Gathers")
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter("{x:g}")
    return _save(figure, panels, path)


def _quality(rows: Iterable[Row]) -> tuple[str, str]:
    """What to judge a model by: the column, and its name."""
    labeled = all(row["accuracy"] for row in rows)
    return ("accuracy", "accuracy, %") if labeled else ("mean_error", "mean output error / max|y|, %")


def _place(provider: str, threads: str) -> str:
    return f"{provider}, {threads} thread{'s' if threads != '1' else ''}"


def _lines(rows: Iterable[Row], *columns: str) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Rows by the values of some columns, in the order in which these appear."""
    rows = list(rows)
    seen = list(dict.fromkeys(tuple(row[c] for c in columns) for row in rows))
    ordered = sorted(rows, key=lambda row: seen.index(tuple(row[c] for c in columns)))
    return [(key, list(group)) for key, group in groupby(ordered, lambda row: tuple(row[c] for c in columns))]


def _plot(axes: Axes, points: Sequence[tuple[float, float]], block: str, reorder: str) -> None:
    """A line of one block size: solid where reordered (or where that means nothing), dashed where not."""
    if block in ("weights", "1"):
        label = "single weights" if block == "weights" else "kernels"
        axes.plot(*_columns(points), "-s", color="black" if block == "weights" else "0.5", label=label, markersize=4)
        return
    label = f"{block}x{block}, {'reordered' if reorder != 'none' else 'not reordered'}"
    axes.plot(
        *_columns(points), _STYLES[reorder], color=f"C{(int(block).bit_length() - 4) % 10}", label=label, markersize=4
    )


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    points = sorted(points)
    return [x for x, _ in points], [y for _, y in points]


def _panels(count: int, title: str) -> tuple[Any, list[Axes]]:
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    figure = Figure(figsize=(2 + 3.6 * count, 4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _save(figure: Any, panels: Sequence[Axes], path: Path) -> Path:
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    return path
