"""What a run did: one row per layer, the totals, and what they look like as a table, JSON or Markdown.

`tetris_onnx.reports.page` makes a page of them.

Sizes count weights only (no biases). Multiplications are those of one sample; the share of them that a layer keeps is
the share of its weights that it keeps, since a dropped block drops every product it takes part in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from tetris_onnx.errors import TetrisError

if TYPE_CHECKING:
    from tetris_onnx.algorithms.heatmap import Heatmap


COLUMNS = (
    *("layer", "op", "weight", "block", "density", "retained", "not reordered", "multiplications"),
    *("loss at half", "loss", "output error", "predicted ms", "measured ms", "status"),
)
_SUFFIXES = ".json", ".md", ".html"
# Columns of a terminal that has room for the whole table.
_WIDE = 100


class ReportError(TetrisError, ValueError):
    """A report file of a kind that does not exist."""


@dataclass(frozen=True)
class LayerReport:
    """What became, or can become, of one Conv, Gemm or MatMul with a constant weight."""

    layer: str  # name of the output value in the original model
    node: str  # name of the node, or the layer's name where it has none
    op_type: str
    weight_shape: tuple[int, ...]
    block_size: tuple[int, int] | None  # (out channels, in channels); None = dense
    density: float  # kept / all weights; 1 = dense
    retained: float | None  # share of the importance in the kept blocks
    baseline: float | None  # the same without reordering
    parameters: int  # weights
    kept_parameters: int
    macs: int | None  # multiplications per sample of the dense layer; None = shape unknown
    status: str  # "block-sparse", "whole" (not pruned, run by our operator), "dense"; from an inspection "prunable"
    reason: str  # why it stays dense; "" otherwise
    output_error: float | None = None  # squared error of its output over the variance, on the calibration samples
    # Predicted loss of the network's outputs if only this layer is pruned: to half of its blocks; as it is here.
    sensitivity: float | None = None
    predicted_loss: float | None = None
    # Milliseconds of a run (dense, as it is now); a layer that stays dense has the same twice.
    predicted_ms: tuple[float, float] | None = None  # None = shape unknown
    measured_ms: tuple[float, float] | None = None

    @property
    def kept_macs(self) -> int | None:
        """Multiplications per sample with the kept blocks only."""
        return None if self.macs is None else round(self.macs * self.kept_parameters / max(self.parameters, 1))


@dataclass(frozen=True)
class Report:
    """What one run did to a model."""

    model: str
    output: str
    layers: tuple[LayerReport, ...]
    gathers: int  # Gather nodes that the reordering left in the graph
    bytes_before: int
    bytes_after: int
    max_error: float  # block-sparse against dense with the same blocks zeroed, relative to max|y|
    seconds: dict[str, float]  # by stage
    importance: str
    machine: str = ""  # whose times are predicted
    threads: int = 1  # that times are predicted and measured for
    notes: tuple[str, ...] = ()
    fused: tuple[int, int] = (0, 0)  # residual Adds and MaxPools that went into the convolutions before them
    precision: str = "float32"  # of the block-sparse layers' products
    rounding_error: tuple[float, float] | None = None  # of that precision: (max, mean), relative to max|y| in float32
    labeled: int | None = None  # samples behind accuracy
    accuracy: tuple[float, float] | None = None  # (before, after), top-1
    agreement: float | None = None  # share of samples with the same top-1 before and after
    milliseconds: tuple[float, float] | None = None  # (before, after), median of one run: batch 1
    speedup: tuple[float, float, float] | None = None  # (before / after, low and high end of its 95 % interval)

    @property
    def parameters(self) -> tuple[int, int]:
        """Weights (before, after) of the listed layers."""
        return sum(r.parameters for r in self.layers), sum(r.kept_parameters for r in self.layers)

    @property
    def macs(self) -> tuple[int, int] | None:
        """Multiplications per sample (before, after), or None where a layer's shape is unknown."""
        return total_macs(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types: totals, then a list of layers."""
        macs = self.macs
        values = asdict(self)
        layers = values.pop("layers")
        for row, layer in zip(layers, self.layers, strict=True):
            row["kept_macs"] = layer.kept_macs
        values |= {
            "parameters": self.parameters[0],
            "kept_parameters": self.parameters[1],
            "macs": macs and macs[0],
            "kept_macs": macs and macs[1],
            "layers": layers,
        }
        return values


def total_macs(layers: Sequence[LayerReport]) -> tuple[int, int] | None:
    """Multiplications per sample (dense, kept) of ``layers``, or None where one of them has an unknown shape."""
    before = after = 0
    for layer in layers:
        if layer.macs is None or layer.kept_macs is None:
            return None
        before += layer.macs
        after += layer.kept_macs
    return before, after


def total_ms(layers: Sequence[LayerReport]) -> tuple[float, float] | None:
    """Predicted milliseconds (dense, as they are now) of all ``layers`` whose time can be predicted; None for none."""
    known = [layer.predicted_ms for layer in layers if layer.predicted_ms is not None]
    return (sum(dense for dense, _ in known), sum(now for _, now in known)) if known else None


def summary(report: Report) -> list[tuple[str, str]]:
    """The totals as (label, text), in reading order."""
    pruned, whole = (sum(layer.status == s for layer in report.layers) for s in ("block-sparse", "whole"))
    before, after = report.parameters
    lines = [
        ("layers", f"{pruned} of {len(report.layers)} block-sparse" + (f", {whole} kept whole" if whole else "")),
        ("weights", f"{count(before)} -> {count(after)} ({percent(after / max(before, 1))} kept)"),
    ]
    macs = report.macs
    if macs:
        lines.append(
            ("multiplications", f"{count(macs[0])} -> {count(macs[1])} ({percent(macs[1] / max(macs[0], 1))})")
        )
    predicted = total_ms(report.layers)
    if predicted and predicted[1] < predicted[0]:
        text = f"{_ms(predicted)} ms in these layers: {predicted[0] / predicted[1]:.2f}x"
        lines.append(("predicted", f"{text} ({report.machine}, {threads_text(report.threads)})"))
    ratio = report.bytes_after / max(report.bytes_before, 1)
    lines += [
        ("file", f"{file_size(report.bytes_before)} -> {file_size(report.bytes_after)} ({percent(ratio)})"),
        ("Gathers left", str(report.gathers)),
        ("fused", "{} residual Adds, {} MaxPools".format(*report.fused)),
        ("importance", report.importance),
        ("max error", f"{report.max_error:.1e} of max|y|, against the dense model with the same blocks zeroed"),
    ]
    if report.rounding_error:
        most, mean = report.rounding_error
        lines.append(("precision", f"{report.precision}: error {most:.1e} of max|y|, mean {mean:.1e}, against float32"))
    if report.accuracy:
        old, new = report.accuracy
        text = f"{percent(old)} -> {percent(new)} ({100 * (new - old):+.1f} points)"
        lines.append(("accuracy", f"{text} on {report.labeled} samples"))
    if report.agreement is not None:
        lines.append(("same top-1", percent(report.agreement)))
    if report.milliseconds and report.speedup:
        old, new = report.milliseconds
        ratio, low, high = report.speedup
        change = f"{ratio:.2f}x faster" if ratio >= 1 else f"{ratio:.2f}x, slower"
        text = f"{old:.3g} ms -> {new:.3g} ms: {change} (95 % interval {low:.2f} to {high:.2f})"
        lines.append(("time", f"{text}, batch 1, {threads_text(report.threads)}"))
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    lines.append(("took", f"{sum(report.seconds.values()):.1f} s" + (f" ({stages})" if stages else "")))
    return lines


def threads_text(threads: int) -> str:
    """``1`` -> ``"one thread"``."""
    return "one thread" if threads == 1 else f"{threads} threads"


def layer_table(layers: Sequence[LayerReport], width: int) -> Table:
    """The layers as a table for a terminal of ``width`` columns: "retained" is without -> with reordering.

    Where the terminal is narrow, only with; what does not fit goes on in the next line, and nothing is left out.
    "sensitivity" is the predicted loss of the outputs with half of the layer's blocks. Times are milliseconds dense ->
    as it is now, measured where they have been.
    """
    planned = any(row.status == "block-sparse" for row in layers)
    allocated = any(row.sensitivity is not None for row in layers)
    measured = any(row.measured_ms for row in layers)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("layer", overflow="fold")
    columns = ["weight", "block", *(["density", "retained"] if planned else ["MACs"]), *["sensitivity"] * allocated]
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("measured ms" if measured else "predicted ms", justify="right", overflow="fold")
    table.add_column("status", min_width=len("block-sparse"), overflow="fold")
    for row in layers:
        cells = [row.node, _dims(row.weight_shape), _dims(row.block_size or ())]
        if planned:
            shares = "" if row.retained is None else percent(row.retained)
            if row.baseline is not None and width >= _WIDE:
                shares = f"{100 * row.baseline:.1f} -> {shares}"
            cells += [percent(row.density), shares]
        else:
            cells.append("?" if row.macs is None else count(row.macs))
        if allocated:
            cells.append("" if row.sensitivity is None else f"{row.sensitivity:.2g}")
        cells.append(_ms(row.measured_ms if measured else row.predicted_ms))
        table.add_row(*map(escape_markup, (*cells, _status(row))), style="dim" if row.status == "dense" else "")
    return table


def print_report(report: Report, console: Console) -> None:
    """Print the layers and the totals."""
    console.print(f"{report.model} -> {report.output}", markup=False, highlight=False)
    console.print(layer_table(report.layers, console.width))
    totals = Table.grid(padding=(0, 2))
    for label, text in summary(report):
        totals.add_row(label, escape_markup(text))
    console.print(totals)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def to_json(report: Report) -> str:
    """The report for machines; numbers that JSON cannot hold (inf, NaN) become null."""
    return json.dumps(_finite(report.to_dict()), indent=2, allow_nan=False) + "\n"


def to_markdown(report: Report) -> str:
    """The report as Markdown tables."""
    lines = [f"# {_md(report.model)} -> {_md(report.output)}", "", "| | |", "|---|---|"]
    lines += [f"| {_md(label)} | {_md(text)} |" for label, text in summary(report)]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(map(_md, cells(row))) + " |" for row in report.layers]
    if report.notes:
        lines += ["", *(f"- {_md(note)}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def check_report_path(path: Path) -> None:
    """Raise `ReportError` unless `write_report` knows the suffix of ``path``."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ReportError(f"{path}: a report ends in {', '.join(_SUFFIXES)}")


def write_report(report: Report, path: str | Path, maps: Mapping[str, Heatmap] | None = None) -> None:
    """Write the report in the form that the suffix names (.json, .md, .html), whole or not at all.

    ``maps``: pictures of the weights by layer, which a page shows. Raises `ReportError` for any other suffix.
    """
    from tetris_onnx.graph.io import write_atomically
    from tetris_onnx.reports.page import to_html

    path = Path(path)
    check_report_path(path)
    form = path.suffix.lower()
    text = to_html(report, maps) if form == ".html" else to_json(report) if form == ".json" else to_markdown(report)
    with write_atomically(path) as file:
        file.write(text.encode("utf-8"))


def cells(row: LayerReport) -> tuple[str, ...]:
    """A layer's row: one text for each of `COLUMNS`."""
    return (
        row.node,
        row.op_type,
        _dims(row.weight_shape),
        _dims(row.block_size or ()),
        percent(row.density),
        "" if row.retained is None else percent(row.retained),
        "" if row.baseline is None else percent(row.baseline),
        "?" if row.macs is None else count(row.macs),
        "" if row.sensitivity is None else f"{row.sensitivity:.2g}",
        "" if row.predicted_loss is None else f"{row.predicted_loss:.2g}",
        "" if row.output_error is None else f"{row.output_error:.2g}",
        _ms(row.predicted_ms),
        _ms(row.measured_ms),
        _status(row),
    )


def sort_keys(row: LayerReport) -> tuple[str | float, ...]:
    """What the cells of a row are sorted by: a number where it is one, "" where it is not known."""
    numbers = (
        row.parameters,
        0 if row.block_size is None else math.prod(row.block_size),
        *(row.density, row.retained, row.baseline, row.macs),
        *(row.sensitivity, row.predicted_loss, row.output_error),
        *(None if times is None else times[1] for times in (row.predicted_ms, row.measured_ms)),
    )
    return row.node, row.op_type, *("" if n is None else n for n in numbers), _status(row)


def _ms(times: tuple[float, float] | None) -> str:
    """``"1.2 -> 0.6"``, or one number where nothing changes."""
    if times is None:
        return ""
    before, after = (f"{ms:.3g}" for ms in times)
    return before if times[0] == times[1] else f"{before} -> {after}"


def _status(row: LayerReport) -> str:
    return f"{row.status}: {row.reason}" if row.reason else row.status


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def percent(share: float) -> str:
    """``0.5`` -> ``"50.0 %"``."""
    return f"{100 * share:.1f} %"


def count(n: int) -> str:
    """``15466175744`` -> ``"15.5 G"``."""
    value = float(n)
    for unit in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def file_size(n: int) -> str:
    """``65011712`` -> ``"65.0 MB"``: decimal units, as download pages show them."""
    if n < 1000:
        return f"{n} B"
    return f"{n / 1e3:.1f} kB" if n < 1e6 else f"{n / 1e6:.1f} MB"


def _md(text: str) -> str:
    text = escape(" ".join(text.split()), quote=False)
    return "".join("\\" + c if c in "\\|*_`[]" else c for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
