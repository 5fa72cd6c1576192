"""The report: totals, every form of it, and names from a hostile model."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tetris_onnx.reports.report import (
    LayerReport,
    Report,
    ReportError,
    count,
    file_size,
    print_report,
    summary,
    to_json,
    to_markdown,
    total_macs,
    total_ms,
    write_report,
)

CONV = LayerReport(
    layer="conv_out",
    node="features.3",
    op_type="Conv",
    weight_shape=(64, 32, 3, 3),
    block_size=(32, 32),
    density=0.5,
    retained=0.75,
    baseline=0.625,
    parameters=18432,
    kept_parameters=9216,
    macs=1_000_000,
    status="block-sparse",
    reason="",
)
FC = LayerReport(
    layer="y",
    node="classifier",
    op_type="Gemm",
    weight_shape=(10, 64),
    block_size=None,
    density=1.0,
    retained=None,
    baseline=None,
    parameters=640,
    kept_parameters=640,
    macs=640,
    status="dense",
    reason="the final classifier is too small",
)
REPORT = Report(
    model="in.onnx",
    output="out.onnx",
    layers=(CONV, FC),
    gathers=1,
    bytes_before=80_000,
    bytes_after=44_000,
    max_error=2.5e-7,
    seconds={"plan": 1.25, "verify": 0.5},
    importance="l1",
    notes=("accuracy will drop",),
    fused=(16, 1),
)


def test_totals_add_up() -> None:
    assert REPORT.parameters == (19072, 9856)
    assert REPORT.macs == (1_000_640, 500_640)
    assert CONV.kept_macs == 500_000
    assert total_macs([CONV, replace(FC, macs=None)]) is None


def test_the_summary_states_before_and_after() -> None:
    lines = dict(summary(REPORT))
    assert lines["layers"] == "1 of 2 block-sparse"
    assert lines["weights"] == "19.1 k -> 9.86 k (51.7 % kept)"
    assert lines["multiplications"] == "1 M -> 501 k (50.0 %)"
    assert lines["file"] == "80.0 kB -> 44.0 kB (55.0 %)"
    assert lines["max error"].startswith("2.5e-07 of max|y|")
    assert lines["took"] == "1.8 s (plan 1.2 s, verify 0.5 s)"
    assert "accuracy" not in lines
    assert "time" not in lines


def test_the_error_of_a_precision_joins_the_summary() -> None:
    assert "precision" not in dict(summary(REPORT))
    lines = dict(summary(replace(REPORT, precision="bf16", rounding_error=(0.004, 0.0015))))
    assert lines["precision"] == "bf16: error 4.0e-03 of max|y|, mean 1.5e-03, against float32"


def test_measured_accuracy_and_time_join_the_summary() -> None:
    measured = replace(
        REPORT,
        labeled=1000,
        accuracy=(0.925, 0.9),
        agreement=0.95,
        milliseconds=(2.0, 1.25),
        speedup=(1.6, 1.5, 1.7),
    )
    lines = dict(summary(measured))
    assert lines["accuracy"] == "92.5 % -> 90.0 % (-2.5 points) on 1000 samples"
    assert lines["same top-1"] == "95.0 %"
    assert lines["time"] == "2 ms -> 1.25 ms: 1.60x faster (95 % interval 1.50 to 1.70), batch 1, one thread"
    slower = dict(summary(replace(measured, milliseconds=(1.0, 1.25), speedup=(0.8, 0.75, 0.85))))
    assert slower["time"].startswith("1 ms -> 1.25 ms: 0.80x, slower (95 % interval 0.75 to 0.85)")


def test_times_are_shown_before_and_after() -> None:
    report = replace(
        REPORT, layers=(replace(CONV, predicted_ms=(1.5, 0.75)), replace(FC, predicted_ms=(0.5, 0.5))), machine="zen"
    )
    assert total_ms(report.layers) == (2.0, 1.25)
    assert dict(summary(report))["predicted"] == "2 -> 1.25 ms in these layers: 1.60x (zen, one thread)"
    assert total_ms(REPORT.layers) is None and "predicted" not in dict(summary(REPORT))

    def table(shown: Report) -> str:
        console = Console(file=io.StringIO(), width=120)
        print_report(shown, console)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    assert "predicted ms" in table(report) and "1.5 -> 0.75" in table(report)
    measured = replace(report, layers=(replace(report.layers[0], measured_ms=(1.25, 0.625)), report.layers[1]))
    assert "measured ms" in table(measured) and "1.25 -> 0.625" in table(measured)
    assert all(t in to_markdown(measured) for t in ("1.5 -&gt; 0.75", "1.25 -&gt; 0.625"))
    row = json.loads(to_json(measured))["layers"][0]
    assert row["predicted_ms"] == [1.5, 0.75] and row["measured_ms"] == [1.25, 0.625]


def test_an_empty_model_has_a_report() -> None:
    empty = replace(REPORT, layers=(), bytes_before=0)
    assert dict(summary(empty))["layers"] == "0 of 0 block-sparse"
    assert json.loads(to_json(empty))["layers"] == []


def test_json_holds_every_figure() -> None:
    value = json.loads(to_json(REPORT))
    assert value["parameters"] == 19072
    assert value["kept_parameters"] == 9856
    assert value["kept_macs"] == 500_640
    assert value["seconds"] == {"plan": 1.25, "verify": 0.5}
    assert value["layers"][0]["weight_shape"] == [64, 32, 3, 3]
    assert value["layers"][0]["kept_macs"] == 500_000
    assert value["layers"][1]["block_size"] is None
    assert value["layers"][1]["reason"] == FC.reason


def test_json_stays_json_where_an_error_is_infinite() -> None:
    assert json.loads(to_json(replace(REPORT, max_error=float("inf"))))["max_error"] is None


def test_the_terminal_table_names_layers_reasons_and_notes() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_report(REPORT, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("features.3", "64x32x3x3", "62.5 -> 75.0 %", FC.reason, "note: accuracy will drop", "Gathers left"):
        assert part in text


def test_nothing_is_cut_off_where_the_terminal_is_narrow() -> None:
    row = replace(CONV, node="/features/features.12/Conv", weight_shape=(128, 128, 3, 3), predicted_ms=(0.0647, 0.0448))
    report = replace(REPORT, layers=(row, replace(row, status="dense", reason="it is incomprehensibly slow")))

    def letters(width: int, report: Report) -> list[str]:
        console = Console(file=io.StringIO(), width=width)
        print_report(report, console)
        return sorted(re.sub(r"[\s─]", "", console.file.getvalue()))  # type: ignore[attr-defined]

    without = replace(report, layers=tuple(replace(row, baseline=None) for row in report.layers))
    assert letters(80, report) == letters(400, without) != letters(400, report)


def test_the_terminal_table_fits_80_columns() -> None:
    long = replace(CONV, node="/features/features.12/Conv", weight_shape=(512, 512, 3, 3))
    console = Console(file=io.StringIO(), width=80)
    print_report(replace(REPORT, layers=(long, FC)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for part in ("512x512x3x3", "32x32", "50.0 %", "75.0 %"):
        assert part in text, "figures are not cut or wrapped"


HOSTILE = "<script>alert(1)</script>|[bold]x[/bold]\n`a`\"'&"


def test_names_from_a_model_cannot_become_markup() -> None:
    hostile = replace(
        REPORT, model=HOSTILE, layers=(replace(CONV, node=HOSTILE, op_type=HOSTILE, reason=HOSTILE),), notes=(HOSTILE,)
    )
    markdown = to_markdown(hostile)
    assert "<script" not in markdown
    row = next(line for line in markdown.splitlines() if "64x32x3x3" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 15, "fourteen cells"

    console = Console(file=io.StringIO(), width=400)
    print_report(hostile, console)
    assert "[bold]x[/bold]" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("suffix", "start"), [(".json", "{"), (".md", "# in.onnx"), (".HTML", "<!DOCTYPE html>")])
def test_the_suffix_chooses_the_form(tmp_path: Path, suffix: str, start: str) -> None:
    pytest.importorskip("tetris_onnx.graph.io")
    path = tmp_path / f"report{suffix}"
    write_report(REPORT, path)
    assert path.read_text(encoding="utf-8").startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_unknown_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"report\.pdf: a report ends in \.json, \.md, \.html"):
        write_report(REPORT, tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (999_999, "1 M"), (15_466_175_744, "15.5 G"), (2 * 10**12, "2 T")],
)
def test_counts_are_short(n: int, text: str) -> None:
    assert count(n) == text


def test_file_sizes_are_decimal() -> None:
    assert [file_size(n) for n in (12, 4_200, 65_011_712)] == ["12 B", "4.2 kB", "65.0 MB"]
