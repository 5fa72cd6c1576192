"""The table of samples/accuracy_table/retained_table.py: no layer retains less than without the search."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

FOLDER = Path(__file__).parents[2] / "samples" / "accuracy_table"
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 16, 8, 8] x) => (float[N, 32, 8, 8] y)
{
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, wa)
  y = Conv <kernel_shape = [1, 1]> (a, wb)
}
"""


def test_no_layer_retains_less_than_without_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in {"wa": (32, 16, 3, 3), "wb": (32, 32, 1, 1)}.items():
        values = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "rates.toml").write_text('block_size = "8x8"\n[layers."*"]\nsparsity = 0.5\n')
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["retained_table.py", str(tmp_path / "model.onnx"), "--sparse"])
    main = runpy.run_path(str(FOLDER / "retained_table.py"))["main"]
    main(tmp_path / "model.onnx", tmp_path / "table.csv", tmp_path / "rates.toml", "l1,l2", 0)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[1] == "# python retained_table.py model.onnx --sparse", "folders are nobody's business"
    rows = list(csv.DictReader(lines[2:]))
    assert [(r["out"], r["in"], r["importance"]) for r in rows] == [
        (out, in_, kind) for out, in_ in (("32", "16"), ("32", "32")) for kind in ("l1", "l2")
    ]
    for row in rows:
        none, greedy, exact = (float(row[name]) for name in ("none", "greedy", "exact"))
        assert 0.5 < none < greedy <= exact < 1
