"""Sessions: our ops through the op library, all others as they are, and every failure as one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from tetris_onnx import runtime
from tetris_onnx.session import SessionError, open_session, resident, run, uses_our_ops

PLAIN = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'


def plain() -> onnx.ModelProto:
    return parser.parse_model(PLAIN)


def test_a_plain_model_needs_no_op_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", "/absent.so")
    onnx.save(plain(), tmp_path / "m.onnx")
    for model in (plain(), tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        session = open_session(model, threads=1)
        (y,) = run(session, {"x": np.array([[-1, 0, 2]], np.float32)}, "m")
        assert y.tolist() == [[0, 0, 2]]
        assert session.get_session_options().intra_op_num_threads == 1


def test_a_model_with_our_ops_goes_through_the_op_library(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = plain()
    ours.opset_import.append(onnx.helper.make_opsetid("ai.tetris", 1))
    assert uses_our_ops(ours)
    assert not uses_our_ops(plain())
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", "/absent.so")
    with pytest.raises(runtime.OpLibraryMissingError, match=r"/absent\.so"):
        open_session(ours)


def test_a_profile_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    session = open_session(plain(), profile=tmp_path / "profile")
    run(session, {"x": np.zeros((1, 3), np.float32)}, "m")
    assert Path(session.end_profiling()).parent == tmp_path


@pytest.mark.filterwarnings("ignore:Specified provider")  # the fake list is not what onnxruntime checks
def test_a_provider_that_is_not_there_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SessionError, match=r"no CUDAExecutionProvider: pip install 'tetris-onnx\[gpu\]'"):
        open_session(plain(), "cuda")
    # onnxruntime falls back to the CPU without an error where the driver or a library of CUDA is missing.
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: available)
    monkeypatch.setattr("onnxruntime.InferenceSession.get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(SessionError, match="does not start on this machine"):
        open_session(plain(), "cuda")


def test_a_resident_run_uses_the_same_memory_each_time() -> None:
    session, x = open_session(plain()), np.array([[-1, 0, 2]], np.float32)
    bindings = []
    make = session.io_binding
    session.io_binding = lambda: bindings.append(make()) or bindings[-1]
    turn = resident(session, {"x": x}, "m", "cpu")
    (bound,) = bindings[0].get_outputs()
    x[0, 0] = 7  # on the processor the device's memory is that of the array
    for _ in range(2):
        turn()
    (y,) = bindings[0].get_outputs()
    assert y.data_ptr() == bound.data_ptr()
    assert bound.numpy().tolist() == [[7, 0, 2]]
    with pytest.raises(SessionError, match=r"^m: does not run on cpu \(.*\)$"):
        resident(session, {"wrong": x}, "m", "cpu")


def test_without_onnxruntime_there_is_one_line_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(runtime.RuntimeMissingError, match=r"pip install 'tetris-onnx\[cpu\]'"):
        open_session(plain())


def test_long_complaints_are_cut() -> None:
    with pytest.raises(SessionError) as caught:
        run(open_session(plain()), {"x" * 5000: np.zeros(1)}, "m")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
