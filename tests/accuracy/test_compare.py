"""Two models on the same inputs: figures against hand-made differences."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from tetris_onnx.accuracy.compare import CompareError, compare
from tetris_onnx.data.calibration import CalibrationError
from tetris_onnx.session import SessionError

# Three classes: the logits are the input plus a constant.
CLASSIFIER = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[{batch}, 3] x) => (float[{batch}, 3] y)
<float[3] c = {{{c}}}>
{{ y = Add(x, c) }}
"""


def classifier(*c: float, batch: str = "N") -> onnx.ModelProto:
    return parser.parse_model(CLASSIFIER.format(batch=batch, c=", ".join(str(float(v)) for v in c)))


def one_op(op: str, shape: str = "N, 3") -> onnx.ModelProto:
    return parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[{shape}] y) {{ y = {op}(x) }}'
    )


def test_equal_models_do_not_differ() -> None:
    result = compare(classifier(0, 0, 0), classifier(0, 0, 0), samples=20)
    assert result.samples == 20
    assert result.relative == 0.0
    assert result.agreement == 1.0
    assert result.accuracy_a is None


def test_figures_are_those_of_the_data(tmp_path: Path) -> None:
    # 11 samples: more than one batch, the last one not full.
    x = np.eye(3, dtype=np.float32)[np.arange(11) % 3] * 4
    np.savez(tmp_path / "d.npz", x=x, label=np.array([0] * 10 + [1]))
    path = tmp_path / "b.onnx"
    onnx.save(classifier(5, 0, 0), path)
    done = []
    result = compare(classifier(0, 0, 0), path, tmp_path / "d.npz", progress=lambda n, total: done.append((n, total)))
    (output,) = result.outputs
    assert output.name == "y"
    assert output.max_abs == 5.0
    assert output.mean_abs == pytest.approx(5 / 3, rel=1e-12)  # float64 sums of exact values
    assert output.relative == 5 / 4
    assert result.agreement == pytest.approx(4 / 11)  # b always answers 0, as a does for samples 0, 3, 6 and 9
    assert result.accuracy_a == pytest.approx(5 / 11)  # and sample 10, of class 1
    assert result.accuracy_b == pytest.approx(10 / 11)
    assert done == [(8, 11), (11, 11)]
    assert (result.a, result.b, result.data) == ("the model", str(path), str(tmp_path / "d.npz"))
    assert json.loads(json.dumps(result.to_dict()))["outputs"][0]["max_abs"] == 5.0


def test_a_value_that_only_one_model_has_is_an_infinite_difference(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([[-1.0, 1.0, 4.0]], np.float32))
    result = compare(one_op("Abs"), one_op("Sqrt"), tmp_path / "d.npz")  # sqrt(-1) is NaN
    assert math.isinf(result.relative)
    assert result.to_dict()["relative"] is None
    assert compare(one_op("Sqrt"), one_op("Sqrt"), tmp_path / "d.npz").relative == 0.0, (
        "NaN against NaN is no difference"
    )


def test_an_output_of_zeros_has_a_relative_difference_of_infinity_or_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((1, 3), np.float32))
    assert compare(one_op("Abs"), one_op("Neg"), tmp_path / "d.npz").relative == 0.0
    assert math.isinf(compare(one_op("Abs"), one_op("Exp"), tmp_path / "d.npz").relative)


def test_outputs_that_are_no_classes_have_no_top1() -> None:
    result = compare(one_op("Abs", "N, 3, 4, 4"), one_op("Abs", "N, 3, 4, 4"))
    assert result.agreement is None


def test_a_batch_written_into_the_graph_is_respected() -> None:
    fixed = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y)
        <int64[2] s = {1, 4}> { y = Reshape(x, s) }"""
    )
    assert compare(fixed, fixed, samples=3).samples == 3
    assert compare(classifier(0, 0, 0, batch="2"), classifier(0, 0, 0), samples=3).samples == 4


def test_models_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(CompareError, match=r"different inputs: the model takes x: float32 \[N, 3\]"):
        compare(one_op("Abs"), one_op("Abs", "N, 4"))
    with pytest.raises(CompareError, match="different inputs"):
        compare(classifier(0, 0, 0, batch="2"), classifier(0, 0, 0, batch="3"))
    other = one_op("Abs")
    other.graph.output[0].name = other.graph.node[0].output[0] = "z"
    with pytest.raises(CompareError, match="different outputs: the model gives y; the model gives z"):
        compare(one_op("Abs"), other)
    longer = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3] x) => (float[N, M] y)
        { y = Concat<axis = 1>(x, x) }"""
    )
    with pytest.raises(CompareError, match=r"output 'y': the shapes differ, \[8, 3\] and \[8, 6\]"):
        compare(one_op("Abs"), longer)


def test_labels_have_to_fit(tmp_path: Path) -> None:
    x = np.zeros((4, 3), np.float32)
    path = tmp_path / "d.npz"
    model = classifier(0, 0, 0)
    np.savez(path, x=x, label=np.array([0, 1, 2, 3]))
    with pytest.raises(CompareError, match="labels from 0 to 3; the model has 3 classes"):
        compare(model, model, path)
    np.savez(path, x=x, label=np.array([0, 1]))
    with pytest.raises(CalibrationError, match="2 labels for 4 samples"):
        compare(model, model, path)
    images = one_op("Abs", "N, 3, 4, 4")
    np.savez(path, x=np.zeros((1, 3, 4, 4), np.float32), label=np.array([0]))
    with pytest.raises(CompareError, match="no output has the shape"):
        compare(images, images, path)
    np.savez(path, image=x)
    with pytest.raises(CalibrationError, match="no array 'x'"):
        compare(model, model, path)


def test_models_that_do_not_load_or_run_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(SessionError, match=r"broken\.onnx: cannot be loaded"):
        compare(path, path)
    with pytest.raises(SessionError, match=r"absent\.onnx: no such file"):
        compare(tmp_path / "absent.onnx", path)
    picky = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3] x) => (float[N, M] y)
        <int64[2] s = {7, 11}> { y = Reshape(x, s) }"""
    )
    with pytest.raises(SessionError, match="the model: does not run") as caught:
        compare(picky, picky)
    assert "\n" not in str(caught.value)
    with pytest.raises(SessionError, match="no provider 'tpu'; choose one of cpu, cuda"):
        compare(picky, picky, provider="tpu")
    assert capfd.readouterr().err == "", "what onnxruntime says is in the exception, not on the screen as well"
