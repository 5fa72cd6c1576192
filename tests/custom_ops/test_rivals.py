"""custom_ops/bench/rivals.py: who runs computes the same network, who does not is named, rows are replaced."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

ROOT = Path(__file__).parents[2]
# Every operator that the translation to torch knows; uneven sizes, a stride, a residual sum.
NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 9, 8] x) => (float[N, 5] y)
<float[6, 3, 3, 3] w1, float[6] b1, float[6, 6, 1, 1] w2, float[6] b2, float[5, 6] w3, float[5] b3>
{
   c1 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 1]>(x, w1, b1)
   r1 = Relu(c1)
   p = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(r1)
   c2 = Conv<kernel_shape = [1, 1]>(p, w2, b2)
   s = Add(c2, p)
   g = GlobalAveragePool(s)
   f = Flatten(g)
   y = Gemm<transB = 1>(f, w3, b3)
}
"""


@pytest.fixture
def dense(tmp_path: Path, rng: np.random.Generator) -> Path:
    model = parser.parse_model(NET)
    shapes = [(v.name, [d.dim_value for d in v.type.tensor_type.shape.dim]) for v in model.graph.value_info]
    del model.graph.value_info[:]
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32), name) for name, shape in shapes
    )
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def rivals(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "custom_ops" / "bench" / "rivals.py", *arguments, "--seconds", "0.01"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def rows(table: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    lines = [line for line in table.read_text().splitlines() if not line.startswith("#")]
    return {(row["runtime"], row["precision"], row["threads"]): row for row in csv.DictReader(lines)}


def test_int8_and_its_row_are_replaced_in_place(dense: Path, tmp_path: Path) -> None:
    arguments = (dense, "--only", "onnxruntime int8", "-o", tmp_path / "table.csv", "--int8", tmp_path / "q.onnx")
    for threads in ("1", "2", "1"):
        result = rivals(*arguments, "--threads", threads)
        assert result.returncode == 0, result.stderr
    table = rows(tmp_path / "table.csv")
    assert set(table) == {("onnxruntime", p, t) for p in ("float32", "int8") for t in ("1", "2")}
    assert float(table["onnxruntime", "float32", "1"]["error"]) == 0
    assert 0 < float(table["onnxruntime", "int8", "1"]["error"]) < 0.1, "8 bits in, 8 bits out"
    assert {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node} >= {
        "QuantizeLinear",
        "DequantizeLinear",
    }
    assert "| onnxruntime | int8 |" in result.stdout


def test_torch_computes_the_same_network(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = rivals(dense, "--only", "torch float32", "-o", tmp_path / "table.csv")
    assert result.returncode == 0, result.stderr
    # float32 sums in another order.
    assert float(rows(tmp_path / "table.csv")["torch", "float32", "1"]["error"]) < 1e-5


def test_who_cannot_run_is_named_and_the_others_run(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = onnx.load(dense)
    model.graph.node[1].op_type = "Softplus"
    onnx.save(model, dense)
    result = rivals(dense, "--only", "torch float32", "-o", tmp_path / "table.csv")
    assert result.returncode == 0, result.stderr
    assert "left out: torch float32: no translation of Softplus" in result.stderr
    assert set(rows(tmp_path / "table.csv")) == {("onnxruntime", "float32", "1")}


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = rivals(tmp_path / "none.onnx")
    assert result.returncode == 2
    assert "none.onnx: no such file" in result.stderr
