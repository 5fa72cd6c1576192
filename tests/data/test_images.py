"""Folders of images: pixels arrive where and how the model expects them, and what is missing is asked for by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tetris_onnx.data import images
from tetris_onnx.data.calibration import CalibrationError, InputSpec
from tetris_onnx.data.image_options import ImageOptionError, ImageOptions, parse_image_options
from tetris_onnx.data.images import is_image_folder, load_data, load_images

NCHW = (InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 12)),)
NHWC = (InputSpec("x", np.dtype(np.float32), ("N", 8, 12, 3)),)
GRAY = (InputSpec("x", np.dtype(np.float32), ("N", 1, 8, 12)),)
PLAIN = ImageOptions(mean=(0.0,), std=(1.0,))


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of the model's size, saved without loss."""
    rng = np.random.default_rng(0)
    for name in ("b.png", "a.png"):
        save(tmp_path / "images" / name, rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def test_pixels_are_scaled_and_laid_out(folder: Path) -> None:
    options = ImageOptions(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0), scale=1 / 255)
    expected = (pixels(folder / "a.png") / 255 - [0.1, 0.2, 0.3]) / [0.5, 1, 2]
    data = load_images(folder, NCHW, options)
    assert data.samples["x"].dtype == np.float32 and data.labels is None
    # float32 of values up to 2
    np.testing.assert_allclose(data.samples["x"][0], expected.transpose(2, 0, 1), atol=1e-6)
    np.testing.assert_allclose(load_images(folder, NHWC, options).samples["x"][0], expected, atol=1e-6)
    reverse = load_images(folder, NHWC, ImageOptions((0.0,), (1.0,), 1.0, bgr=True)).samples["x"][1]
    np.testing.assert_array_equal(reverse, pixels(folder / "b.png")[..., ::-1])


def test_bytes_are_given_as_they_are(folder: Path) -> None:
    spec = (InputSpec("x", np.dtype(np.uint8), ("N", 8, 12, 3)),)
    data = load_images(folder, spec, ImageOptions())
    assert data.samples["x"].dtype == np.uint8
    np.testing.assert_array_equal(data.samples["x"][0], pixels(folder / "a.png"))


def test_images_cover_the_input_and_are_cropped_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 8:32] = 200  # the middle 24 of 40 columns: all that a 2 : 3 crop shows
    save(tmp_path / "i" / "wide.png", wide)
    values = load_images(tmp_path / "i", NHWC, ImageOptions((0.0,), (1.0,), 1.0)).samples["x"][0]
    np.testing.assert_allclose(values[:, 1:-1], 200, atol=1)


def test_gray_and_color_become_what_the_model_takes(tmp_path: Path) -> None:
    save(tmp_path / "i" / "gray.png", np.full((8, 12), 100, np.uint8))
    save(tmp_path / "i" / "rgba.png", np.full((8, 12, 4), 100, np.uint8))
    assert (load_images(tmp_path / "i", NHWC, ImageOptions((0.0,), (1.0,), 1.0)).samples["x"] == 100).all()
    assert load_images(tmp_path / "i", GRAY, PLAIN).samples["x"].shape == (2, 1, 8, 12)


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for name, value in (("cat/1.png", 10), ("cat/2.png", 20), ("ant/1.png", 30)):
        save(tmp_path / "i" / name, np.full((8, 12, 3), value, np.uint8))
    data = load_data(tmp_path / "i", NHWC, ImageOptions((0.0,), (1.0,), 1.0))
    assert data.labels is not None and data.labels.tolist() == [0, 1, 1]
    assert data.samples["x"][:, 0, 0, 0].tolist() == [30, 10, 20]
    assert any("0 = ant, 1 = cat" in note for note in data.notes)
    save(tmp_path / "i" / "own.png", np.zeros((8, 12, 3), np.uint8))
    with pytest.raises(CalibrationError, match="labeled images are all in subfolders"):
        load_data(tmp_path / "i", NHWC, PLAIN)


def test_the_preview_shows_the_ranges(folder: Path) -> None:
    note = load_images(folder, NCHW, ImageOptions((0.5,), (0.5,))).notes[0]
    assert "2 images for x: float32 [N, 3, 8, 12], NCHW" in note
    assert note.count("(mean") == 3 and " to 1 (" in note


def test_unreadable_files_are_named_and_left_out(folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    data = load_images(folder, NCHW, PLAIN)
    assert len(data.samples["x"]) == 2
    assert any("1 of 3 files cannot be read: broken.jpg" in note for note in data.notes)
    for name in ("a.png", "b.png"):
        (folder / name).unlink()
    with pytest.raises(CalibrationError, match=r"none of 1 images can be read, the first: broken\.jpg"):
        load_images(folder, NCHW, PLAIN)


def test_many_images_go_to_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_images(folder, NCHW, PLAIN).samples["x"]
    monkeypatch.setattr(images, "_IN_MEMORY", 100)
    found = load_images(folder, NCHW, PLAIN).samples["x"]
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, expected)


def test_arrays_are_read_as_before(tmp_path: Path) -> None:
    assert not is_image_folder(tmp_path) and not is_image_folder(tmp_path / "absent")
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 8, 12, 3), np.float32), label=np.array([1, 0]))
    data = load_data(tmp_path / "d.npz", NHWC)
    assert data.labels is not None and data.labels.tolist() == [1, 0] and data.samples["x"].shape == (2, 8, 12, 3)
    assert load_data(tmp_path, NHWC).samples["x"].shape == (2, 8, 12, 3)
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 8, 12, 3), np.float32), label=np.array([1]))
    with pytest.raises(CalibrationError, match="1 labels for 2 samples"):
        load_data(tmp_path / "d.npz", NHWC)
    np.save(tmp_path / "e.npy", np.zeros((2, 8, 12, 3), np.float32))
    assert load_data(tmp_path / "e.npy", NHWC).labels is None


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (("N", 3, 8, 12), ImageOptions(), "Give --mean and --std: the input is"),
        (("N", 3, 8, 12), ImageOptions(mean=(0.0,)), "Give --std: the input is"),
        (("N", 3, 8, 12), ImageOptions((0.0,), (0.0,)), "--std: expected numbers above 0"),
        (("N", 1, 8, 12), ImageOptions((0.0,) * 3, (1.0,)), "--mean has 3 numbers, the input x"),
        (("N", 3, None, None), PLAIN, "leaves the size open; give --image-size"),
        (("N", 3, 8, 3), PLAIN, "does not tell its layout; give --layout"),
        (("N", "C", "H", "W"), PLAIN, "does not tell its layout; give --layout"),
        (("N", 4, 8, 12), ImageOptions((0.0,), (1.0,), layout="NCHW"), "has 4 channels, images 1 or 3"),
        (("N", 3, 8, 12), ImageOptions((0.0,), (1.0,), size=(9, 12)), "--image-size 9x12 does not fit"),
        (("N", 3, 8), PLAIN, "images need a model with one input of four axes"),
    ],
)
def test_what_is_missing_is_asked_for(folder: Path, shape: tuple, options: ImageOptions, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_images(folder, (InputSpec("x", np.dtype(np.float32), shape),), options)
    assert message in str(caught.value)


def test_an_open_size_is_given(folder: Path) -> None:
    spec = (InputSpec("x", np.dtype(np.float32), ("N", "C", "H", "W")),)
    options = ImageOptions((0.0,), (1.0,), layout="NCHW", size=(4, 6))
    assert load_images(folder, spec, options).samples["x"].shape == (2, 3, 4, 6)


def test_options_as_they_are_written() -> None:
    found = parse_image_options("0.485,0.456,0.406", "0.5", "1/127.5", "nhwc", "224x192", True)
    assert found == ImageOptions((0.485, 0.456, 0.406), (0.5,), 1 / 127.5, "NHWC", (224, 192), True)
    assert parse_image_options(None, None, "1/255", None, None, False) == ImageOptions()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("1,2", None, "1", None, None), "--mean 1,2: expected one number or three"),
        ((None, "a", "1", None, None), "--std a: expected one number or three"),
        ((None, None, "1/0", None, None), "--scale 1/0: expected one number"),
        ((None, None, "1,2,3", None, None), "--scale 1,2,3: expected one number"),
        ((None, None, "1", "CHW", None), "--layout CHW: expected NCHW or NHWC"),
        ((None, None, "1", None, "224"), "--image-size 224: expected height x width"),
    ],
)
def test_options_that_make_no_sense(values: tuple, message: str) -> None:
    with pytest.raises(ImageOptionError, match=message):
        parse_image_options(*values, bgr=False)
