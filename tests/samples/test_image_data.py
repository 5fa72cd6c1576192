"""samples/paper_experiments/image_data.py: the same images out of every kind of file; a line about what is wrong."""

from __future__ import annotations

import gzip
import importlib
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "samples" / "paper_experiments"
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 28, 28), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9])


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("image_data")


def write_idx(folder: Path, suffix: str = "") -> None:
    parts = {"train": slice(4), "t10k": slice(4, 6)}
    for split, part in parts.items():
        for kind, values in (("images-idx3", GRAY[part]), ("labels-idx1", LABELS[part].astype(np.uint8))):
            header = struct.pack(f">BBBB{values.ndim}i", 0, 0, 8, values.ndim, *values.shape)
            content = header + values.tobytes()
            file = folder / f"{split}-{kind}-ubyte{suffix}"
            file.write_bytes(gzip.compress(content) if suffix else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(images: ModuleType, tmp_path: Path, suffix: str) -> None:
    write_idx(tmp_path, suffix)
    train, test = images.load_images(tmp_path)
    np.testing.assert_array_equal(train.pixels, GRAY[:4, None].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(test.labels, LABELS[4:])


def test_cifar_batches(images: ModuleType, tmp_path: Path) -> None:
    rows = np.concatenate([LABELS[:, None].astype(np.uint8), COLOR.transpose(0, 3, 1, 2).reshape(6, -1)], axis=1)
    for name, part in {"data_batch_1": slice(2), "data_batch_2": slice(2, 4), "test_batch": slice(4, 6)}.items():
        (tmp_path / f"{name}.bin").write_bytes(rows[part].tobytes())
    train, test = images.load_images(tmp_path)
    expected = COLOR.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(train.pixels, expected[:4])
    np.testing.assert_array_equal(test.pixels, expected[4:])
    assert train.labels.tolist() == [3, 1, 4, 1]


def test_npz(images: ModuleType, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", images=COLOR, labels=LABELS)
    train, test = images.load_images(tmp_path / "one.npz")
    assert (train.labels.tolist(), test.labels.tolist()) == ([3, 1, 4], [1, 5, 9]), "halves"
    assert train.pixels.shape == (3, 3, 32, 32)
    np.savez(tmp_path / "keras.npz", x_train=GRAY[:5], y_train=LABELS[:5], x_test=GRAY[5:], y_test=LABELS[5:])
    train, test = images.load_images(tmp_path / "keras.npz")
    assert (len(train), len(test)) == (5, 1)
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "train_4.npz", images=COLOR[:4], labels=LABELS[:4])
    np.savez(folder / "test_2.npz", images=COLOR[4:], labels=LABELS[4:])
    train, test = images.load_images(folder)
    assert (len(train), len(test)) == (4, 2)


def test_images_are_made_to_fit(images: ModuleType) -> None:
    train, test, unlabeled = images.load_sample()
    assert (len(train), len(test), len(unlabeled)) == (500, 500, 256)
    found = train[slice(2)].fitted((3, 32, 32)).normalized((0.5, 0.0, 0.0), (0.5, 1.0, 2.0)).pixels
    assert found.shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(found[:, 1, 2:30, 2:30], train.pixels[:2, 0])
    np.testing.assert_allclose(found[:, 0], 2 * found[:, 1] - 1, atol=1e-6)  # a rounding
    np.testing.assert_allclose(found[:, 2], found[:, 1] / 2, atol=1e-6)
    assert not found[:, 1, :2].any()
    with pytest.raises(images.ImageDataError, match="1x28x28 do not fit"):
        train.fitted((3, 16, 16))


def test_what_is_wrong_is_said(images: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(images.ImageDataError, match=r"nowhere: no such file or folder$"):
        images.load_images(tmp_path / "nowhere")
    with pytest.raises(images.ImageDataError, match=r"holds no images: expected the IDX files train-images.*\.npz"):
        images.load_images(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(b"abc")
    with pytest.raises(images.ImageDataError, match="only one of"):
        images.load_images(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"abc")
    with pytest.raises(images.ImageDataError, match="no CIFAR-10 batch: 3 bytes"):
        images.load_images(tmp_path)
    np.savez(tmp_path / "a.npz", images=COLOR)
    with pytest.raises(images.ImageDataError, match="expected arrays of images and labels"):
        images.load_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=COLOR, labels=LABELS[:3])
    with pytest.raises(images.ImageDataError, match="6 images, but 3 labels"):
        images.load_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=COLOR.astype(np.float32), labels=LABELS)
    with pytest.raises(images.ImageDataError, match="numbers from 0 to 1"):
        images.load_images(tmp_path / "a.npz")
    for content in (b"", b"\x00\x00\x08\x01\x00\x00\x00\x09ab", b"\x1f\x8bjunk"):
        (tmp_path / "labels").write_bytes(content)
        with pytest.raises(images.ImageDataError, match=r"not an IDX file|is damaged"):
            images.read_idx(tmp_path / "labels")
