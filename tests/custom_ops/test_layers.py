"""custom_ops/bench/layers.py --network: the table of layers inside networks."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DENSE = ROOT / "samples" / "fashion_mnist" / "fashion_mnist.onnx"


def test_rows_of_a_network_are_replaced_and_others_stay(tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    shutil.copy(DENSE, other)
    table = tmp_path / "table.csv"
    for form in (DENSE, other, other):
        command = [sys.executable, ROOT / "custom_ops" / "bench" / "layers.py", "--network", DENSE, form, "-o", table]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, "--seconds", "0.05"], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
    lines = table.read_text().splitlines()
    assert "onnxruntime" in lines[0]
    assert "layers.py --network" in lines[1]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert len({(row["network"], row["layer"]) for row in rows}) == len(rows) == 2 * 9  # 8 layers and the whole
    for row in rows:
        dense, sparse = float(row["dense_ms"]), float(row["sparse_ms"])
        assert float(row["speedup"]) == pytest.approx(dense / sparse, rel=0.02)  # times are written to 1 ns
        whole = row["layer"] == "network"
        assert row["density"] == ("" if whole else "1.0000")  # both are dense
        assert row["fraction"] == ("" if whole else row["speedup"])
