"""The table of samples/accuracy_table: its rows, and what they have to say about each other."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx.parser
import pytest
import typer
from onnx import numpy_helper

FOLDER = Path(__file__).parents[2] / "samples" / "accuracy_table"
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 8, 8] x) => (float[N, 5] y)
{
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, wa)
  ar = Relu (a)
  b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (ar, wb)
  br = Relu (b)
  g = GlobalAveragePool (br)
  f = Flatten (g)
  y = MatMul (f, wy)
}
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("accuracy_table")


def test_the_table_of_a_small_network(script: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in {"wa": (16, 3, 3, 3), "wb": (32, 16, 3, 3), "wy": (32, 5)}.items():
        values = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "calibration.npz", x=rng.standard_normal((64, 3, 8, 8)).astype(np.float32))
    x = rng.standard_normal((100, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "test.npz", x=x, label=rng.integers(0, 5, 100))
    table = tmp_path / "table.csv"

    def run(sizes: str) -> None:
        files = tmp_path / "model.onnx", table, tmp_path / "calibration.npz", tmp_path / "test.npz"
        script.main(*files, sparsity="0.5", block_sizes=sizes, recovery="none,refit", skip=None)

    run("1,4")
    with table.open() as file:
        lines = file.readlines()
    assert lines[0].startswith("# seed 0; ") and lines[1].startswith("# python ")
    assert lines[2].startswith("# model.onnx (") and lines[2].endswith("), 64 samples to calibrate, 100 to test\n")
    rows = list(csv.DictReader(lines[3:]))
    assert [(r["recovery"], r["block_size"], r["reorder"]) for r in rows] == [
        (recovery, size, reorder)
        for recovery in ("none", "refit")
        for size, reorder in (("weights", "none"), ("1", "none"), ("4", "none"), ("4", "exact"))
    ]
    # b is pruned by half in every row, 4608 of 5200 weights; y, 160 more, in blocks of which some are cut off.
    assert [float(r["density"]) for r in rows] == pytest.approx([1 - (2304 + 80) / 5200] * len(rows), abs=0.02)
    by_magnitude = [float(r["retained"]) for r in rows[:4]]
    assert by_magnitude[0] > by_magnitude[1] > by_magnitude[3] > by_magnitude[2], "weights, kernels, reordered, plain"
    error = [float(r["max_error"]) for r in rows]
    assert sum(error[4:]) < 0.7 * sum(error[:4]), "refitting brings the outputs back"
    assert all(0 <= float(r["accuracy"]) <= 1 and 0 <= float(r["agreement"]) <= 1 for r in rows)

    # What is there is not made again: a row that was changed stays, one that is missing is added.
    table.write_text("".join([*lines[:4], lines[4].replace(",0.", ",7.")]))
    run("4")
    with table.open() as file:
        again = file.readlines()
    assert again[4] == lines[4].replace(",0.", ",7.") != lines[4]
    assert sorted(again[5:]) == sorted(line for line in lines[5:] if ",4," in line or ",weights," in line)

    model.producer_name = "another"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(typer.BadParameter, match="holds other results"):
        run("4")
