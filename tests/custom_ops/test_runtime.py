"""tetris_onnx.runtime: finding and registering the op library, and what it says when something is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.custom_ops import models
from tetris_onnx import runtime


@pytest.fixture
def model_and_input(rng: np.random.Generator) -> tuple[bytes, models.Array, models.Array]:
    op = models.random_op(rng, (6, 4, 3, 3), (4, 4))
    x = rng.standard_normal((1, 4, 5, 5)).astype(np.float32)
    return models.make_model(op, x.shape).SerializeToString(), x, op.expected(x)


def test_session_from_bytes_and_path(tmp_path: Path, model_and_input: tuple[bytes, models.Array, models.Array]) -> None:
    model, x, expected = model_and_input
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    for source in (model, path, str(path), onnx.ModelProto.FromString(model)):
        session = runtime.InferenceSession(source, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)


def test_register(model_and_input: tuple[bytes, models.Array, models.Array]) -> None:
    model, x, expected = model_and_input
    with pytest.raises(Exception, match="BlockSparseConv"):
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    ours, theirs = onnxruntime.SessionOptions(), onnxruntime.SessionOptions()
    runtime.register(ours)
    theirs.register_custom_ops_library(runtime.get_library_path())
    for options in (ours, theirs):
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)


def test_session_options_are_used(tmp_path: Path, model_and_input: tuple[bytes, models.Array, models.Array]) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    runtime.InferenceSession(model_and_input[0], options)
    assert (tmp_path / "optimized.onnx").is_file()


def test_options_serve_more_than_one_session(model_and_input: tuple[bytes, models.Array, models.Array]) -> None:
    model, x, expected = model_and_input
    options = onnxruntime.SessionOptions()
    for _ in range(2):
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)


def test_library_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "other.so"
    shutil.copy(runtime.get_library_path(), copy)
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", str(copy))
    assert runtime.get_library_path() == str(copy)
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(runtime.OpLibraryMissingError, match=r"nothing\.so, which is not a file"):
        runtime.get_library_path()


def test_library_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TETRIS_ONNX_LIBRARY", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    with pytest.raises(runtime.OpLibraryMissingError, match="install the package"):
        runtime.get_library_path()


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what an import of a missing module does
    with pytest.raises(runtime.RuntimeMissingError) as error:
        runtime.InferenceSession(b"")
    assert "pip install 'tetris-onnx[cpu]'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm")
def test_library_exports_nothing_else() -> None:
    symbols = subprocess.run(
        ["nm", "-D", runtime.get_library_path()], check=True, capture_output=True, text=True
    ).stdout
    if "__asan" in symbols:
        pytest.skip("built with the sanitizers, which export symbols of their own")
    defined = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2] not in ("U", "w")]
    assert defined == ["RegisterCustomOps"]
