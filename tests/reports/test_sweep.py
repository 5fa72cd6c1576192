"""A sweep on the terminal, as CSV and as a plot, for each thing that can count as good."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from tetris_onnx.reports.sweep import print_sweep, write_csv, write_plot
from tetris_onnx.sweep import MEASURES, Outcome, Setting, Sweep, Timing, pareto_front


def outcome(block: int, sparsity: float, quality: float, speedup: float) -> Outcome:
    timing = Timing(1.0, 1 / speedup, speedup, (speedup - 0.1, speedup + 0.1), "m")
    values = {"dense_accuracy": 0.9, "accuracy": quality, "agreement": quality, "error": 1 - quality}
    return Outcome(Setting((block, block), sparsity), density=1 - sparsity, file_size=2000, timing=timing, **values)


ROWS = (
    outcome(16, 0.3, 0.88, 1.5),
    outcome(16, 0.5, 0.7, 1.6),
    outcome(32, 0.5, 0.8, 2.0),
    Outcome(Setting((32, 32), 0.9), failure="sparsity 0.9 is out of reach"),
)


def made_of(measure: str) -> Sweep:
    return Sweep("m.onnx", "folder", measure, "test.npz", ROWS, pareto_front(ROWS, measure), 3)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_table_has_every_setting_the_fastest_first(measure: str) -> None:
    text = io.StringIO()
    print_sweep(made_of(measure), Console(file=text, width=160))
    shown = text.getvalue()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["*", "", "*", ""]
    assert [row[6] for row in rows] == ["2.00x", "1.60x", "1.50x", ""]
    assert rows[0][4] == ("2.00e-01" if measure == "error" else "80.0 %")
    assert rows[3][3] == "failed"
    assert "note: sparsity0.9_blocks32x32: sparsity 0.9 is out of reach" in shown
    assert "dense: 1 ms, 90.0 %" in shown and "2 on the Pareto front" in shown
    assert "1 of 4 settings were there before" in shown


def test_the_csv_has_every_setting_in_the_order_of_the_grid(tmp_path: Path) -> None:
    write_csv(made_of("accuracy"), tmp_path / "s.csv")
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["name"] for row in rows] == [o.setting.name for o in ROWS]
    assert [row["front"] for row in rows] == ["1", "0", "1", "0"]
    assert rows[0]["speedup_low"] == "1.4" and rows[0]["sparse_ms"] == "0.666667"
    assert rows[3]["speedup"] == "" and rows[3]["failure"] == "sparsity 0.9 is out of reach"


@pytest.mark.parametrize("measure", MEASURES)
def test_the_plot_is_a_picture(measure: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write_plot(made_of(measure), tmp_path / "s.png")
    content = (tmp_path / "s.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
