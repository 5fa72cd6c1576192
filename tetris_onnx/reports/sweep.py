"""A sweep as a table on the terminal, as CSV and as a plot: accuracy against time, the front marked."""

from __future__ import annotations

import csv
import io as text_io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tetris_onnx.graph.io import write_atomically
from tetris_onnx.reports.report import file_size, percent
from tetris_onnx.sweep import Outcome, Sweep, to_json

_COLUMNS = (
    *("sparsity", "block_size", "density", "macs", "file_size", "block_sparse", "layers", "dense_accuracy", "accuracy"),
    *("agreement", "error", "dense_ms", "sparse_ms", "speedup", "speedup_low", "speedup_high", "seconds", "front"),
    *("failure", "name"),
)
_TITLES = {"accuracy": "accuracy", "agreement": "same top-1", "error": "mean error / max|y|"}
NO_MATPLOTLIB = "there is no plot: it takes matplotlib (pip install 'tetris-onnx[plot]', then the same command again)"


def has_matplotlib() -> bool:
    """Whether `write_plot` can work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def print_sweep(sweep: Sweep, console: Console) -> None:
    """Print all settings, the fastest first, those of the front marked."""
    table = Table(title=f"{sweep.model}: {_TITLES[sweep.measure]} on {sweep.data}", title_justify="left")
    table.add_column("front", justify="center")
    for header in ("sparsity", "blocks", "weights left", _TITLES[sweep.measure], "ms", "speed-up", "95 %", "size"):
        table.add_column(header, justify="right", no_wrap=True)
    rows = list(zip(sweep.outcomes, sweep.front, strict=True))
    rows.sort(key=lambda row: -row[0].timing.speedup if row[0].timing else 0.0)
    for outcome, front in rows:
        table.add_row(*_cells(outcome, front, sweep.measure), style="bold" if front else None)
    console.print(table)
    dense = next((o for o in sweep.outcomes if o.timing is not None), None)
    if dense is not None and dense.timing is not None:
        accuracy = "" if dense.dense_accuracy is None else f", {percent(dense.dense_accuracy)}"
        console.print(f"dense: {dense.timing.dense_ms:.3g} ms{accuracy}", highlight=False)
    for outcome in sweep.outcomes:
        if outcome.failure:
            text = f"note: {outcome.setting.name}: {outcome.failure}"
            console.print(text, style="yellow", markup=False, highlight=False)
    left = len(sweep.outcomes) - sweep.searched
    was = f"; {left} of {len(sweep.outcomes)} settings were there before" if left else ""
    console.print(
        f"{sum(sweep.front)} on the Pareto front (*); models and tables in {sweep.folder}{was}", highlight=False
    )


def write_csv(sweep: Sweep, path: Path) -> None:
    """Write one row per setting."""
    text = text_io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for outcome, front in zip(sweep.outcomes, sweep.front, strict=True):
        values = to_json(outcome) | {"block_size": _blocks(outcome), "front": int(front)}
        if outcome.timing is not None:
            times = outcome.timing
            low, high = times.interval
            values |= {"dense_ms": times.dense_ms, "sparse_ms": times.sparse_ms, "speedup": times.speedup}
            values |= {"speedup_low": low, "speedup_high": high}
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
    with write_atomically(path) as file:
        file.write(text.getvalue().encode("utf-8"))


def write_plot(sweep: Sweep, path: Path) -> None:
    """Draw accuracy (or what stands for it) over time: a color for each block size, the front as a line."""
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    sign = -1.0 if sweep.measure == "error" else 1.0
    scale = 100.0 if sweep.measure != "error" else 1.0
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    points = [(o, front) for o, front in zip(sweep.outcomes, sweep.front, strict=True) if o.timing is not None]

    def place(outcome: Outcome) -> tuple[float, float]:
        assert outcome.timing is not None
        return outcome.timing.speedup, sign * scale * (outcome.quality(sweep.measure) or 0.0)

    for block in sorted({o.setting.block_size for o, _ in points}):
        own = [o for o, _ in points if o.setting.block_size == block]
        axes.plot(*_axes([place(o) for o in own]), "o", label=f"blocks {_blocks(own[0])}")
        for outcome in own:
            label = f"{outcome.setting.sparsity:g}"
            axes.annotate(label, place(outcome), textcoords="offset points", xytext=(4, 4), fontsize=7)
    accuracy = next((o.dense_accuracy for o, _ in points), None)
    dense = 1.0, {"accuracy": 100 * (accuracy or 0.0), "agreement": 100.0, "error": 0.0}[sweep.measure]
    front = sorted(place(o) for o, best in points if best)
    if not any(x >= dense[0] and sign * y >= sign * dense[1] for x, y in front):
        front = sorted([dense, *front])
    axes.plot(*_axes(front), "-", color="gray", zorder=0, label="Pareto front")
    axes.plot(*_axes([dense]), "D", color="black", label="dense")
    if sweep.measure == "error" and points and min(place(o)[1] for o, _ in points) > 0:
        axes.set_yscale("symlog", linthresh=min(place(o)[1] for o, _ in points))
        axes.invert_yaxis()
    axes.set_xlabel("speed-up over the dense model, measured")
    axes.set_ylabel(_TITLES[sweep.measure] + (", %" if sweep.measure != "error" else ""))
    axes.set_title(f"{Path(sweep.model).name}: sparsity beside each point", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _axes(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _cells(outcome: Outcome, front: bool, measure: str) -> list[str]:
    cells = ["*" if front else "", f"{outcome.setting.sparsity:g}", _blocks(outcome)]
    if outcome.failure:
        return [*cells, "failed"]
    value = getattr(outcome, measure)
    cells += [percent(outcome.density), f"{value:.2e}" if measure == "error" else percent(value)]
    if outcome.timing is not None:
        low, high = outcome.timing.interval
        cells += [f"{outcome.timing.sparse_ms:.3g}", f"{outcome.timing.speedup:.2f}x", f"{low:.2f} to {high:.2f}"]
    return [*cells, file_size(outcome.file_size)]


def _blocks(outcome: Outcome) -> str:
    return "x".join(map(str, outcome.setting.block_size))
