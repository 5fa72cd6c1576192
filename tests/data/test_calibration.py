"""Data files and random inputs: what is accepted, and what every refusal says."""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser

from tetris_onnx.data.calibration import (
    CalibrationError,
    InputSpec,
    Samples,
    batches,
    check_shapes,
    count,
    fixed_batch,
    is_open,
    load_labels,
    load_samples,
    model_inputs,
    parse_shapes,
    random_samples,
    runnable_samples,
    session_inputs,
)
from tetris_onnx.data.images import load_data

IMAGE = InputSpec("x", np.dtype(np.float32), ("N", 3, 4, 4))
TOKENS = InputSpec("tokens", np.dtype(np.int64), (None, "length"))
FLAG = InputSpec("flag", np.dtype(np.bool_), ())

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3, 4, 4] x, int64[M, length] tokens, float[3] c) => (float[N, 3, 4, 4] y, int64[M, length] z)
<float[3] c = {1.0, 2.0, 3.0}>
{ y = Relu(x)  z = Identity(tokens) }
"""


def images(n: int = 5) -> np.ndarray:
    return np.arange(n * 48, dtype=np.float32).reshape(n, 3, 4, 4)


def write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_inputs_are_the_same_from_a_model_and_its_session() -> None:
    model = parser.parse_model(MODEL)
    specs = model_inputs(model)
    assert [str(s) for s in specs] == ["x: float32 [N, 3, 4, 4]", "tokens: int64 [M, length]"]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session_inputs(session) == specs


def test_an_npz_gives_one_array_per_input(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", tokens=np.ones((5, 7), np.int64), x=images(), extra=np.zeros(3))
    samples = load_samples(path, [IMAGE, TOKENS])
    assert list(samples) == ["x", "tokens"]
    np.testing.assert_array_equal(samples["x"], images())
    assert count(samples, [IMAGE, TOKENS]) == 5


@pytest.mark.parametrize("name", ["x", "label"])
def test_a_member_that_is_no_array_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "d.npz", **({} if name == "x" else {"x": images()}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", b"no header")
    with pytest.raises(CalibrationError, match=f"d.npz: not an .npz .*'{name}' is no array"):
        load_samples(path, [IMAGE])
        load_labels(path, [IMAGE])


def test_arrays_stand_for_files() -> None:
    by_name = load_data({"x": images(), "label": np.full(5, 3), "other": np.zeros(1)}, [IMAGE])
    np.testing.assert_array_equal(by_name.samples["x"], images())
    assert by_name.source == "the arrays" and by_name.labels is not None and set(by_name.labels) == {3}
    alone = load_data(images(), [IMAGE])
    np.testing.assert_array_equal(alone.samples["x"], images())
    assert alone.labels is None
    with pytest.raises(CalibrationError, match=r"the arrays: 'x' is float32 .*; the first axis counts the samples"):
        load_data({"x": images()[:, :2]}, [IMAGE])
    with pytest.raises(CalibrationError, match="the arrays: 2 labels for"):
        load_data({"x": images(), "label": np.arange(2)}, [IMAGE])


def test_an_npy_is_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", images())
    np.testing.assert_array_equal(load_samples(tmp_path / "d.npy", [IMAGE])["x"], images())
    with pytest.raises(CalibrationError, match="a single array, but the model has the inputs"):
        load_samples(tmp_path / "d.npy", [IMAGE, TOKENS])


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "b.npz", x=images(2) + 1, y=np.array([1, 2]))
    write(tmp_path / "a.npz", x=images(1), y=np.array([0]))
    (tmp_path / "readme.txt").write_text("not data")
    samples = load_samples(tmp_path, [IMAGE])
    np.testing.assert_array_equal(samples["x"], np.concatenate([images(1), images(2) + 1]))
    labels = load_labels(tmp_path, [IMAGE])
    assert labels is not None
    assert labels.tolist() == [0, 1, 2]
    write(tmp_path / "c.npz", x=images(1))
    with pytest.raises(CalibrationError, match="1 of 3 files have no labels"):
        load_labels(tmp_path, [IMAGE])


def test_floats_and_integers_change_width_but_never_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", x=images().astype(np.float64), tokens=np.full((5, 7), 9, np.int32))
    samples = load_samples(path, [IMAGE, TOKENS])
    assert samples["x"].dtype == np.float32
    assert samples["tokens"].dtype == np.int64
    np.testing.assert_array_equal(samples["x"], images())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": images()}, "no array 'x'; found image; the model has the input x: float32 [N, 3, 4, 4]"),
        ({}, "no array 'x'; found nothing"),
        (
            {"x": images().astype(np.uint8)},
            "'x' is uint8 [5, 3, 4, 4], the model input is x: float32 [N, 3, 4, 4]; convert",
        ),
        ({"x": images()[0]}, "'x' is float32 [3, 4, 4]"),
        ({"x": images().reshape(5, 4, 4, 3)}, "the others have to match"),
        ({"x": images()[:0]}, "there are no samples in it"),
        ({"x": images() * np.nan}, "it has NaN or infinite values"),
        ({"x": images().astype(np.float64) * 1e300}, "it has NaN or infinite values"),
        ({"x": images().astype(np.complex64)}, "convert it"),
        ({"x": np.array([None, 1])}, "not an .npz or .npy file of numbers"),
    ],
)
def test_refused_data_says_what_was_found_and_expected(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = write(tmp_path / "d.npz", **arrays)
    with pytest.raises(CalibrationError) as caught:
        load_samples(path, [IMAGE])
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_integers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", t=np.array([[300]]))
    with pytest.raises(CalibrationError, match="values that uint8 cannot hold"):
        load_samples(path, [InputSpec("t", np.dtype(np.uint8), (None, 1))])


def test_sample_counts_have_to_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", x=images(5), tokens=np.ones((4, 7), np.int64))
    with pytest.raises(CalibrationError, match="x has 5, tokens has 4"):
        load_samples(path, [IMAGE, TOKENS])


def test_files_that_are_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(CalibrationError, match="not an "):
        load_samples(tmp_path / "d.npz", [IMAGE])
    with pytest.raises(CalibrationError, match="no such file"):
        load_samples(tmp_path / "absent.npz", [IMAGE])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="file in this folder"):
        load_samples(tmp_path / "empty", [IMAGE])


def test_labels_are_an_array_that_is_no_input(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz", x=images(2), y=np.array([[3], [4]], np.uint8))
    labels = load_labels(path, [IMAGE])
    assert labels is not None
    assert labels.tolist() == [3, 4]
    assert load_labels(path, [IMAGE, InputSpec("y", np.dtype(np.uint8), (None, 1))]) is None
    assert load_labels(write(tmp_path / "plain.npz", x=images(2)), [IMAGE]) is None
    with pytest.raises(CalibrationError, match="expected one integer per sample"):
        load_labels(write(tmp_path / "f.npz", label=np.array([0.5])), [IMAGE])


def test_random_samples_are_reproducible_and_fit_the_model() -> None:
    a = random_samples([IMAGE, TOKENS, FLAG], 4, seed=3)
    b = random_samples([IMAGE, TOKENS, FLAG], 4, seed=3)
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name])
    assert {name: (array.dtype.name, array.shape) for name, array in a.items()} == {
        "x": ("float32", (4, 3, 4, 4)),
        "tokens": ("int64", (4, 224)),
        "flag": ("bool", ()),
    }
    assert set(np.unique(a["tokens"])) == {0, 1}
    assert not np.array_equal(a["x"], random_samples([IMAGE], 4, seed=4)["x"])


def test_random_shapes_can_be_given() -> None:
    open_image = InputSpec("x", np.dtype(np.float16), ("N", None, "H", "W"))
    assert random_samples([open_image], 2)["x"].shape == (2, 3, 224, 224)
    given = random_samples([open_image], 2, shapes={"x": (1, 1, 48, 320)})["x"]
    assert given.shape == (2, 1, 48, 320)
    assert given.dtype == np.float16
    with pytest.raises(CalibrationError, match="shape 1x4x4x4 does not fit the model input x"):
        random_samples([IMAGE], 1, shapes={"x": (1, 4, 4, 4)})
    with pytest.raises(CalibrationError, match="no input 'image'; the model has the input x"):
        random_samples([IMAGE], 1, shapes={"image": (1, 3, 4, 4)})


def test_a_fixed_batch_is_filled() -> None:
    spec = InputSpec("x", np.dtype(np.float32), (4, 2))
    samples = random_samples([spec], 6)
    assert samples["x"].shape == (8, 2)
    assert [part for part, _ in batches(samples, [spec], batch=3)] == [slice(0, 4), slice(4, 8)]
    with pytest.raises(CalibrationError, match="runs 4 samples at a time; 6 samples"):
        list(batches({"x": samples["x"][:6]}, [spec], batch=3))


def test_batches_cover_every_sample_once() -> None:
    samples = random_samples([IMAGE, FLAG], 7)
    parts = [feed for _, feed in batches(samples, [IMAGE, FLAG], batch=3)]
    assert [len(part["x"]) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([part["x"] for part in parts]), samples["x"])
    assert all(part["flag"].shape == () for part in parts)


def test_an_open_size_is_searched_for_by_running() -> None:
    spec = InputSpec("x", np.dtype(np.float32), ("N", 3, None, None))
    tried = []

    def run(samples: Samples) -> None:
        tried.append(samples["x"].shape)
        if samples["x"].shape[2] != 48:
            raise RuntimeError("the height has to be 48\nsecond line")

    assert runnable_samples(run, [spec], 2)["x"].shape == (2, 3, 48, 48)
    assert tried == [(1, 3, 224, 224), (1, 3, 32, 32), (1, 3, 48, 48)]

    def never(samples: Samples) -> None:
        raise RuntimeError("no\nway")

    with pytest.raises(CalibrationError, match=r"give a data file, or the shape \(.*\); it said: no way$"):
        runnable_samples(never, [spec], 2)
    assert runnable_samples(never, [IMAGE], 2)["x"].shape == (2, 3, 4, 4), "nothing to search for"


def inputs_of(**shapes: tuple[int | str | None, ...]) -> tuple[InputSpec, ...]:
    """As they are read off a model."""
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims) for name, dims in shapes.items()]
    return model_inputs(onnx.helper.make_model(onnx.helper.make_graph([], "g", tensors, [])))


@pytest.mark.parametrize(
    ("shapes", "whole", "batch"),
    [
        ({"x": ("N", 4), "y": ("N", 2)}, set(), None),
        ({"x": (1, 4), "y": (1, 2)}, set(), 1),
        ({"x": ("N", 4), "flag": ()}, {"flag"}, None),
        ({"flag": (), "x": (3, 4), "y": ("N", 2)}, {"flag"}, 3),
        # A state of two layers.
        ({"x": (1, 4), "state": (2, 1, 8)}, {"state"}, 1),
        ({"x": ("N", "T", 4), "state": (2, "N", 8)}, {"state"}, 1),
        ({"x": ("N", 4), "state": ("layers", "N", 8)}, {"state"}, 1),
        # Time first: the first axis is still the one that counts.
        ({"x": ("T", "N", 4), "length": ("N",)}, set(), None),
        ({"x": (None, 4), "y": (2, None)}, {"y"}, 1),
        ({"x": ("N", 4), "state": (2, "another name", 8), "y": (None, 3)}, {"state"}, 1),
        # One of something, or nothing left open, says that the model takes so many samples at a time.
        ({"x": ("N", 4), "scale": (1, 2)}, set(), 1),
        ({"x": ("N", 4), "scale": (2, 2)}, set(), 2),
    ],
)
def test_which_inputs_have_samples_in_front(shapes: dict, whole: set[str], batch: int | None) -> None:
    inputs = inputs_of(**shapes)
    assert {spec.name for spec in inputs if spec.whole} == whole
    assert fixed_batch(inputs) == batch


def test_a_state_is_taken_whole() -> None:
    inputs = inputs_of(x=("N", 3), state=(2, "N", 4))
    samples = random_samples(inputs, 5)
    assert {name: array.shape for name, array in samples.items()} == {"x": (5, 3), "state": (2, 1, 4)}
    assert count(samples, inputs) == 5
    runs = [feed for _, feed in batches(samples, inputs, batch=4)]
    assert [feed["x"].shape for feed in runs] == [(1, 3)] * 5
    assert all(feed["state"] is samples["state"] for feed in runs)
    loaded = load_samples(samples, inputs)
    np.testing.assert_array_equal(loaded["state"], samples["state"])
    with pytest.raises(CalibrationError, match=r"'state' is float32 \[5, 1, 4\].*; all axes have to match"):
        load_samples(samples | {"state": np.zeros((5, 1, 4), np.float32)}, inputs)


def test_shapes_that_the_inputs_cannot_have_are_refused() -> None:
    open_image = InputSpec("x", np.dtype("float32"), ("N", 3, None, None))
    assert is_open(open_image) and not is_open(replace(open_image, shape=("N", 3, 4, 4)))
    check_shapes({"x": (7, 3, 5, 6)}, [open_image])
    for shapes, message in (
        ({"x": (1, 1, 5, 6)}, "shape 1x1x5x6 does not fit the model input x: float32"),
        ({"x": (1, 3, 5)}, "shape 1x3x5 does not fit"),
        ({"x": (1, 3, 0, 6)}, "shape 1x3x0x6 does not fit"),
        ({"x": (1, 3, 5, -6)}, "shape 1x3x5x-6 does not fit"),
        ({"y": (1, 3, 5, 6)}, "no input 'y'; the model has the input x: float32"),
    ):
        with pytest.raises(CalibrationError, match=re.escape(message)):
            check_shapes(shapes, [open_image])


def test_shapes_are_parsed() -> None:
    assert parse_shapes(["x=1x3x224X224", "a=b=2"]) == {"x": (1, 3, 224, 224), "a=b": (2,)}
    for wrong in ("x", "x=", "=1x2", "x=1xx2", "x=0x2", "x=-1"):
        with pytest.raises(CalibrationError, match="expected NAME=1x3x224x224"):
            parse_shapes([wrong])


def test_inputs_that_are_no_tensors_are_refused() -> None:
    sequence = onnx.helper.make_tensor_sequence_value_info("s", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([], "g", [sequence], [])
    with pytest.raises(CalibrationError, match="model input 's' is not a tensor"):
        model_inputs(onnx.helper.make_model(graph))
    text = InputSpec("t", np.dtype(object), (None,))
    with pytest.raises(CalibrationError, match="no random values"):
        random_samples([text], 1)
