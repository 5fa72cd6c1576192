"""The table of samples/accuracy_table: its rows, and what they have to say about each other."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

SCRIPT = Path(__file__).parents[2] / "samples" / "accuracy_table" / "accuracy_table.py"
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


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
    script.main(
        tmp_path / "model.onnx",
        tmp_path / "table.csv",
        tmp_path / "calibration.npz",
        tmp_path / "test.npz",
        sparsity="0.5",
        block_sizes="1,4",
        recovery="none,refit",
        skip=None,
    )
    with (tmp_path / "table.csv").open() as file:
        lines = file.readlines()
    assert lines[0].startswith("# seed 0; ") and lines[1].startswith("# python ")
    rows = list(csv.DictReader(lines[2:]))
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
