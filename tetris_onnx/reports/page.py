"""The report as one HTML page that loads nothing: figures, charts, a table to sort, pictures of every layer's weight.

The page works without JavaScript, but for the sorting. Its look is in ``templates/report.html``; what is shown, and in
which words, is decided here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jinja2
from numpy.typing import NDArray
from PIL import Image

from tetris_onnx.algorithms.heatmap import Heatmap
from tetris_onnx.reports.report import (
    COLUMNS,
    LayerReport,
    Report,
    cells,
    count,
    file_size,
    percent,
    sort_keys,
    summary,
    threads_text,
    total_ms,
)

# From the lightest to the darkest color of a picture: single-hued, so that it is read without color vision.
_LIGHTEST, _DARKEST = (226, 235, 247), (8, 38, 88)
# Beyond so many layers a chart's labels are left out: each bar still names its layer.
_MOST_LABELS = 40


@dataclass(frozen=True)
class _Card:
    label: str
    figure: str
    detail: str


@dataclass(frozen=True)
class _Bar:
    """One layer in a chart: heights as shares of the chart's, before (or the whole) and after."""

    label: str
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class _Chart:
    title: str
    note: str
    top: str  # the value at the upper edge
    bars: tuple[_Bar, ...]
    labels: bool


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    pictures: tuple[tuple[str, str, int, int], ...]  # (what it is, data URL, width, height)


def to_html(report: Report, maps: Mapping[str, Heatmap] | None = None) -> str:
    """The page of ``report``; ``maps`` are the pictures by layer (`heatmaps.weight_maps`), if there are any."""
    table = [(row, list(zip(cells(row), sort_keys(row), strict=True))) for row in report.layers]
    known = [i for i in range(len(COLUMNS)) if not table or any(values[i][0] for _, values in table)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tetris_onnx.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html").render(
        report=report,
        cards=_cards(report),
        summary=summary(report),
        columns=[COLUMNS[i] for i in known],
        rows=[(row, [values[i] for i in known]) for row, values in table],
        charts=_charts(report.layers, report.threads),
        figures=_figures(report.layers, maps or {}),
    )


def _cards(report: Report) -> list[_Card]:
    """What a run brings, the most important figures first."""
    cards = []
    predicted = total_ms(report.layers)
    if report.milliseconds and report.speedup:
        cards.append(
            _Card("measured speed-up", f"{report.speedup[0]:.2f}x", "{:.3g} → {:.3g} ms".format(*report.milliseconds))
        )
    elif predicted and predicted[1] < predicted[0]:
        cards.append(
            _Card("predicted speed-up", f"{predicted[0] / predicted[1]:.2f}x", "{:.3g} → {:.3g} ms".format(*predicted))
        )
    if report.accuracy:
        before, after = report.accuracy
        cards.append(_Card("accuracy", percent(after), f"{100 * (after - before):+.1f} points"))
    elif report.agreement is not None:
        cards.append(_Card("same top-1", percent(report.agreement), "before and after"))
    if report.macs:
        before_macs, after_macs = report.macs
        share = after_macs / max(before_macs, 1)
        cards.append(_Card("multiplications left", percent(share), f"{count(before_macs)} → {count(after_macs)}"))
    ratio = report.bytes_after / max(report.bytes_before, 1)
    sizes = f"{file_size(report.bytes_before)} → {file_size(report.bytes_after)}"
    cards.append(_Card("file size left", percent(ratio), sizes))
    pruned = sum(row.status == "block-sparse" for row in report.layers)
    cards.append(_Card("layers", f"{pruned} of {len(report.layers)}", "block-sparse"))
    cards.append(_Card("error", f"{report.max_error:.1e}", "of max|y|, block-sparse against zeroed dense"))
    return cards


def _charts(layers: Sequence[LayerReport], threads: int) -> list[_Chart]:
    times = f"ms of a run on {threads_text(threads)}: dense, and as it is now"
    charts = [
        _chart("Density", "share of the weights that is kept", layers, lambda row: (1.0, row.density), percent, 1.0),
        _chart(
            "Error of the outputs",
            "squared error over the variance, on the calibration samples",
            layers,
            lambda row: None if row.output_error is None else (0.0, row.output_error),
            "{:.2g}".format,
        ),
        _chart("Measured time", times, layers, lambda row: row.measured_ms, "{:.3g} ms".format),
        _chart("Predicted time", times, layers, lambda row: row.predicted_ms, "{:.3g} ms".format),
    ]
    return [chart for chart in charts if chart.bars]


def _chart(
    title: str,
    note: str,
    layers: Sequence[LayerReport],
    value: Callable[[LayerReport], tuple[float, float] | None],
    form: Callable[[float], str],
    top: float | None = None,
) -> _Chart:
    """Bars of (before, after) for the layers that have a ``value``."""
    known = [(row, pair) for row in layers if (pair := value(row)) is not None]
    top = top or max((max(pair) for _, pair in known), default=0.0) or 1.0
    bars = tuple(
        _Bar(row.node, f"{form(before)} → {form(after)}" if before else form(after), before / top, after / top)
        for row, (before, after) in known
    )
    return _Chart(title, note, form(top), bars, len(bars) <= _MOST_LABELS)


def _figures(layers: Sequence[LayerReport], maps: Mapping[str, Heatmap]) -> list[_Figure]:
    figures = []
    for row in layers:
        found = maps.get(row.layer)
        if found is None:
            continue
        pictures = [("original", found.original), ("reordered", found.reordered), ("pruned", found.pruned)]
        figures.append(
            _Figure(
                row.node,
                row.reason or f"{percent(row.density)} kept",
                tuple((name, _png(p), p.shape[1], p.shape[0]) for name, p in pictures if p is not None),
            )
        )
    return figures


def _png(levels: NDArray) -> str:
    """A picture of 0 (transparent: dropped) and 1 to 255 as a data URL."""
    image = Image.fromarray(levels, "P")
    shades = [[round(a + (b - a) * i / 254) for a, b in zip(_LIGHTEST, _DARKEST, strict=True)] for i in range(255)]
    image.putpalette([0, 0, 0, *(part for shade in shades for part in shade)])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0, optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
