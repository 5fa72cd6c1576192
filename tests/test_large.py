"""Models above 2 GB, made small: the whole way from weights in a file to weights in a file, with little in memory.

The real thing is too slow for this: ``python tests/large_model.py large.onnx --gigabytes 3``, then
``/usr/bin/time -v tetris-onnx optimize large.onnx -o out.onnx``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from large_model import write_large_model

import tetris_onnx
from models import relative_error
from tetris_onnx.cli import main as cli
from tetris_onnx.graph import io, tensors

WIDTH = 128


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four layers, 64 kB each, where 100 kB count as 2 GB."""
    monkeypatch.setattr(io, "_MAX_PROTO_BYTES", 100_000)
    monkeypatch.setattr(io, "IN_MEMORY", 50_000)
    monkeypatch.setattr(tensors, "IN_MEMORY", 50_000)
    path = tmp_path / "large.onnx"
    write_large_model(path, 4, WIDTH)
    return path


@pytest.fixture
def most_values(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights were read from files at once, at most: one entry for each time."""
    read: list[int] = []
    original = tensors.read_tensor

    def counted(tensor: onnx.TensorProto) -> np.ndarray:
        values = original(tensor)
        read.append(values.size)
        return values

    monkeypatch.setattr(tensors, "read_tensor", counted)
    return read


@pytest.mark.parametrize("options", [["--gathers", "keep"], ["--precision", "bf16"], ["--sparsity", "0.9"]])
def test_from_file_to_file(large: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out, config = tmp_path / "out.onnx", tmp_path / "c.toml"
    config.write_text('block_size = "16x16"\n[layers."*"]\n' + ("sparsity = 0.9" if "0.9" in options else ""))
    options = [] if "0.9" in options else options
    code = cli.run(["optimize", str(large), "-o", str(out), "--config", str(config), "--json", *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = json.loads(captured.out)
    assert [row["status"] for row in report["layers"]] == ["block-sparse"] * 4
    assert report["max_error"] < 1e-4
    assert report["bytes_before"] > 4 * 4 * WIDTH**2 > report["bytes_after"]
    sparse = "sparsity = 0.9" in config.read_text()
    names = {path.name for path in tmp_path.iterdir()} - before.keys() - {"c.toml"}
    assert names == ({"out.onnx"} if sparse else {"out.onnx", "out.onnx.data"}), "a small result is one file"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before

    # Plain onnxruntime, from the files as they are, computes what the op library does.
    assert cli.run(["compare", str(out), str(out), "--tolerance", "0"]) == 0
    x = {"x": np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)}
    plain = ort.InferenceSession(out, providers=["CPUExecutionProvider"]).run(None, x)
    # Products of bfloat16 keep two digits, and plain onnxruntime computes in float32.
    assert relative_error(plain, tetris_onnx.InferenceSession(out).run(None, x)) < (0.05 if "bf16" in options else 1e-5)


def test_with_samples(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "c.npz", x=rng.standard_normal((64, WIDTH), np.float32))
    out = tmp_path / "out.onnx"
    args = ["optimize", str(large), "-o", str(out), "--calibration", str(tmp_path / "c.npz"), "--block-size", "16"]
    code = cli.run([*args, "--reorder", "greedy", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert json.loads(captured.out)["max_error"] < 1e-4


def test_inspect_reads_a_weight_at_a_time(
    large: Path, most_values: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect", str(large)]) == 0
    assert "4 of 4 layers can be pruned" in capsys.readouterr().out
    assert most_values and max(most_values) == WIDTH**2


def test_weights_that_are_cut_off(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = large.with_name("large.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])
    assert cli.run(["inspect", str(large)]) == 1
    assert "the file is damaged, or of another model" in capsys.readouterr().err
