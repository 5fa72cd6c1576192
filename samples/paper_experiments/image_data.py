"""Labeled images from the files that data sets come in: IDX (MNIST and its kin), CIFAR-10's binary batches, or .npz.

What is read is one `Images` to train on and one to test with; where there is a single set, its first half trains and
its second half tests. Pixels are scaled to [0, 1].
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SAMPLE = Path(__file__).resolve().parents[1] / "fashion_mnist"
_IDX = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
_CIFAR = "data_batch_*.bin", "test_batch.bin"
_CIFAR_SHAPE = 3, 32, 32
# What images and labels are called in an .npz file; the last of each are Keras' names.
_SPLITS = {
    "train": (("train_images", "x_train"), ("train_labels", "y_train")),
    "test": (("test_images", "x_test"), ("test_labels", "y_test")),
    "": (("images", "image", "x"), ("labels", "label", "y")),
}


class ImageDataError(ValueError):
    """Files that are missing, or hold something else."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images [N, C, H, W] float32 and their labels [N] int64."""

    pixels: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice | NDArray) -> Images:
        return Images(self.pixels[part], self.labels[part])

    def fitted(self, shape: tuple[int, int, int]) -> Images:
        """The images with ``shape`` (C, H, W): a gray one as color, a smaller one in the middle of zeros."""
        channels, *size = self.pixels.shape[1:]
        if channels not in (1, shape[0]) or any(n > m for n, m in zip(size, shape[1:], strict=True)):
            raise ImageDataError(f"images of {channels}x{size[0]}x{size[1]} do not fit a network for {shape}")
        margins = [((m - n) // 2, m - n - (m - n) // 2) for n, m in zip(size, shape[1:], strict=True)]
        pixels = np.pad(self.pixels, [(0, 0), (0, 0), *margins])
        return replace(self, pixels=np.repeat(pixels, shape[0] // channels, axis=1))

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> Images:
        """The images as (pixel - mean) / std, channel by channel."""
        shift, scale = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (mean, std))
        return replace(self, pixels=(self.pixels - shift) / scale)


def load_images(path: Path) -> tuple[Images, Images]:
    """(images to train on, images to test with) of a folder or an .npz file. Raises `ImageDataError`."""
    if not path.exists():
        raise ImageDataError(f"{path}: no such file or folder")
    if path.is_file():
        return _from_npz([path])
    if all(_idx_file(path, name) for name in _IDX):
        train, test = ([read_idx(_idx_file(path, name)) for name in names] for names in (_IDX[:2], _IDX[2:]))
        return _images(path, *train), _images(path, *test)
    if files := [sorted(path.glob(pattern)) for pattern in _CIFAR if list(path.glob(pattern))]:
        if len(files) < len(_CIFAR):
            raise ImageDataError(f"{path} has only one of {' and '.join(_CIFAR)}")
        return _from_cifar(files[0]), _from_cifar(files[1])
    if arrays := sorted(path.glob("*.npz")):
        return _from_npz(arrays)
    raise ImageDataError(
        f"{path} holds no images: expected the IDX files {', '.join(_IDX)} (plain or .gz), CIFAR-10's "
        f"{' and '.join(_CIFAR)}, or .npz files"
    )


def load_sample() -> tuple[Images, Images, NDArray[np.float32]]:
    """Fashion-MNIST images of this repository: 500 to train on, 500 to test with, and 256 without labels."""
    train, test = _from_npz([SAMPLE / "test.npz"])
    with np.load(SAMPLE / "calibration.npz") as arrays:
        return train, test, arrays["image"]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes (the MNIST format), gzipped or not, in the shape that its header gives."""
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError) as error:
        raise ImageDataError(f"{path} is damaged: {error}") from None
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ImageDataError(f"{path} is not an IDX file of unsigned bytes")
    order = content[3]
    shape = tuple(np.frombuffer(content, dtype=">i4", count=order, offset=4))
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * order)
    if min(shape, default=0) < 0 or values.size != np.prod(shape, dtype=object):
        raise ImageDataError(f"{path} is damaged: {values.size} bytes, its header says {'x'.join(map(str, shape))}")
    return values.reshape(shape)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _from_cifar(files: Sequence[Path]) -> Images:
    """CIFAR-10's binary batches: per image a byte of label, then the pixels plane by plane."""
    size = 1 + int(np.prod(_CIFAR_SHAPE))
    parts = []
    for file in files:
        values = np.frombuffer(file.read_bytes(), np.uint8)
        if values.size == 0 or values.size % size:
            raise ImageDataError(f"{file} is no CIFAR-10 batch: {values.size} bytes are no multiple of {size}")
        parts.append(values.reshape(-1, size))
    rows = np.concatenate(parts)
    return _images(files[0], rows[:, 1:].reshape(-1, *_CIFAR_SHAPE), rows[:, 0])


def _from_npz(files: Sequence[Path]) -> tuple[Images, Images]:
    found: dict[str, Images] = {}
    for file in files:
        try:
            with np.load(file) as arrays:
                held = {name: arrays[name] for name in arrays.files if arrays[name].dtype.kind in "fiu"}
        except (OSError, ValueError) as error:
            raise ImageDataError(f"{file} is no .npz file of arrays: {error}") from None
        for split, names in _SPLITS.items():
            pair = [next((held[name] for name in some if name in held), None) for some in names]
            if pair[0] is not None and pair[1] is not None:
                kind = split or next((kind for kind in ("train", "test") if kind in file.stem and len(files) > 1), "")
                found[kind] = _images(file, pair[0], pair[1])
    if {"train", "test"} <= found.keys():
        return found["train"], found["test"]
    if len(found) != 1:
        raise ImageDataError(
            f"{files[0]}: expected arrays of images and labels (images and labels, or train_images, train_labels, "
            "test_images and test_labels; x and y for Keras' names)"
        )
    (only,) = found.values()
    half = len(only) // 2
    return only[slice(half)], only[slice(half, None)]


def _images(source: Path, pixels: NDArray, labels: NDArray) -> Images:
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ImageDataError(
            f"{source}: images {list(pixels.shape)} and labels {labels.dtype} {list(labels.shape)}; expected "
            "[N, H, W], [N, H, W, C] or [N, C, H, W], and one integer per image"
        )
    if len(pixels) != len(labels):
        raise ImageDataError(f"{source}: {len(pixels)} images, but {len(labels)} labels")
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / np.float32(255)
    elif pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ImageDataError(f"{source}: pixels have to be bytes, or numbers from 0 to 1")
    return Images(np.ascontiguousarray(pixels, np.float32), labels.astype(np.int64))
