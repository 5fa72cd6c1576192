"""A folder of images as a model's input: decoded, resized, cropped, scaled and laid out as the model expects.

How pixels become numbers is not in an ONNX file, and a wrong guess ruins a calibration silently. So it has to be said:

    x = (pixel * scale - mean) / std          pixel: 0 to 255; scale: 1/255 unless given

with ``mean`` and ``std`` per channel. An image is scaled so that it covers the model's height and width, and what
sticks out is cut off evenly. Images in subfolders are labeled: the subfolders in alphabetical order are the classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tetris_onnx.data.calibration import (
    CalibrationError,
    Data,
    InputSpec,
    Source,
    count,
    load_labels,
    load_samples,
    source_name,
)
from tetris_onnx.data.image_options import CHANNELS, LAYOUTS, ImageOptions

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
# More decoded pixels than this go to a temporary file.
_IN_MEMORY = 2 * 10**9


def load_data(source: Source, inputs: Sequence[InputSpec], options: ImageOptions | None = None) -> Data:
    """Samples and labels for the model's ``inputs``: a folder of images, or arrays (see `calibration.load_samples`).

    Raises `CalibrationError` for data that does not fit.
    """
    if isinstance(source, (str, Path)) and is_image_folder(source):
        return load_images(source, inputs, options or ImageOptions())
    samples, labels = load_samples(source, inputs), load_labels(source, inputs)
    if labels is not None and len(labels) != count(samples, inputs):
        raise CalibrationError(f"{source_name(source)}: {len(labels)} labels for {count(samples, inputs)} samples")
    return Data(source_name(source), samples, labels)


def is_image_folder(path: str | Path) -> bool:
    """Whether a path is a folder with images in it or in its subfolders, and no .npz or .npy file."""
    path = Path(path)
    if not path.is_dir() or any(p.suffix.lower() in (".npz", ".npy") for p in path.iterdir()):
        return False
    return any(_is_image(p) for p in path.iterdir()) or any(_is_image(p) for p in path.glob("*/*"))


def load_images(path: str | Path, inputs: Sequence[InputSpec], options: ImageOptions) -> Data:
    """Read the images of a folder (and of its subfolders, which are classes) for a model with one input.

    Files that cannot be decoded are left out and named in the notes. Raises `CalibrationError` for a model that takes
    no images, for options that are missing or do not fit, and where no image can be read.
    """
    path = Path(path)
    spec = _image_input(path, inputs)
    layout, channels, size = _geometry(path, spec, options)
    mean, std = _normalization(path, spec, channels, options)
    files, labels, classes = _list(path)
    shape = (len(files), channels, *size) if layout == "NCHW" else (len(files), *size, channels)
    array = _allocate(shape, spec.dtype)
    read, broken = 0, []
    kept: list[int] = []
    for file, label in zip(files, labels, strict=True):
        try:
            pixels = _decode(file, channels, size)
        except CalibrationError:
            raise
        except Exception as error:  # pillow raises many types for files that are damaged, no image, or far too large
            broken.append(f"{file.name} ({' '.join(str(error).split())[:80]})")
            continue
        if options.bgr:
            pixels = pixels[..., ::-1]
        values = pixels if mean is None or std is None else (pixels * np.float32(options.scale) - mean) / std
        array[read] = values.transpose(2, 0, 1) if layout == "NCHW" else values
        kept.append(label)
        read += 1
    if not read:
        raise CalibrationError(f"{path}: none of {len(files)} images can be read, the first: {broken[0]}")
    notes = [_preview(path, array[:read], spec, layout)]
    if classes:
        listing = ", ".join(f"{i} = {name}" for i, name in enumerate(classes[:10])) + ", ..." * (len(classes) > 10)
        notes.append(f"{path}: classes are its subfolders: {listing}")
    if broken:
        notes.append(f"{path}: {len(broken)} of {len(files)} files cannot be read: " + ", ".join(broken[:10]))
    found = np.array(kept, np.int64) if classes else None
    return Data(str(path), {spec.name: array[:read]}, found, tuple(notes))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")


def _list(path: Path) -> tuple[list[Path], list[int], list[str]]:
    """Image files, the class of each, and the names of the classes (none where the images are not in subfolders)."""
    own = sorted(p for p in path.iterdir() if _is_image(p))
    folders = {p: sorted(f for f in p.iterdir() if _is_image(f)) for p in sorted(path.iterdir()) if p.is_dir()}
    folders = {p: files for p, files in folders.items() if files}
    if own and folders:
        raise CalibrationError(f"{path}: has images and subfolders with images; labeled images are all in subfolders")
    if own or not folders:
        return own, [0] * len(own), []
    files = [(f, i) for i, listing in enumerate(folders.values()) for f in listing]
    return [f for f, _ in files], [i for _, i in files], [p.name for p in folders]


def _image_input(path: Path, inputs: Sequence[InputSpec]) -> InputSpec:
    listing = "; ".join(map(str, inputs))
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise CalibrationError(f"{path}: images need a model with one input of four axes, this one has {listing}")
    if inputs[0].dtype not in (np.float32, np.float16, np.float64, np.uint8):
        raise CalibrationError(f"{path}: images cannot become the input {listing}")
    return inputs[0]


def _geometry(path: Path, spec: InputSpec, options: ImageOptions) -> tuple[str, int, tuple[int, int]]:
    """Layout, number of channels and (height, width) of the model's input."""
    fitting = [name for name, axis in zip(LAYOUTS, (1, 3), strict=True) if spec.shape[axis] in CHANNELS]
    layout = options.layout
    if layout is None:
        if len(fitting) != 1:
            raise CalibrationError(f"{path}: the input {spec} does not tell its layout; give --layout NCHW or NHWC")
        layout = fitting[0]
    axes = (2, 3) if layout == "NCHW" else (1, 2)
    channels = spec.shape[1 if layout == "NCHW" else 3]
    if not isinstance(channels, int):
        channels = 3
    if channels not in CHANNELS:
        raise CalibrationError(f"{path}: with layout {layout} the input {spec} has {channels} channels, images 1 or 3")
    found = [spec.shape[axis] for axis in axes]
    if options.size is not None:
        if any(isinstance(n, int) and n != given for n, given in zip(found, options.size, strict=True)):
            raise CalibrationError(f"--image-size {'x'.join(map(str, options.size))} does not fit the input {spec}")
        return layout, channels, options.size
    height, width = found
    if not isinstance(height, int) or not isinstance(width, int):
        raise CalibrationError(f"{path}: the input {spec} leaves the size open; give --image-size, e.g. 224x224")
    return layout, channels, (height, width)


def _normalization(
    path: Path, spec: InputSpec, channels: int, options: ImageOptions
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Mean and standard deviation of each channel; None for an input of bytes, which takes pixels as they are."""
    if spec.dtype == np.uint8:
        return None, None
    missing = [name for name, value in (("--mean", options.mean), ("--std", options.std)) if value is None]
    if missing:
        raise CalibrationError(
            f"{path}: how were images scaled in training? Give {' and '.join(missing)}: the input is "
            "(pixel * scale - mean) / std with pixels from 0 to 255 and --scale 1/255 unless given; "
            "e.g. --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225, or --mean 0 --std 1 for plain 0 to 1"
        )
    values = []
    for name, given in (("--mean", options.mean), ("--std", options.std)):
        assert given is not None
        if len(given) not in (1, channels):
            raise CalibrationError(f"{name} has {len(given)} numbers, the input {spec} has {channels} channel(s)")
        values.append(np.array(given, np.float32))
    if not (values[1] > 0).all():
        raise CalibrationError("--std: expected numbers above 0")
    return values[0], values[1]


def _decode(file: Path, channels: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """The pixels of an image, [height, width, channels] from 0 to 255."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I") or image.mode == "F":
            raise ValueError(f"pixels of type {image.mode}, not 8 bit")
        image = image.convert("L" if channels == 1 else "RGB")
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).reshape(*size, channels)


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    if np.prod(shape, dtype=np.float64) * dtype.itemsize <= _IN_MEMORY:
        return np.empty(shape, dtype)
    # The file has no name any more: it goes with the array.
    with tempfile.TemporaryFile(prefix="tetris_onnx_") as file:
        return np.memmap(file, dtype, "w+", shape=shape)


def _preview(path: Path, array: NDArray, spec: InputSpec, layout: str) -> str:
    """The ranges per channel: a scaling that is off shows here."""
    axis = 1 if layout == "NCHW" else 3
    some = np.moveaxis(np.asarray(array[:: max(1, len(array) // 64)], np.float32), axis, 0)
    ranges = ", ".join(f"{c.min():.3g} to {c.max():.3g} (mean {c.mean():.3g})" for c in some)
    return f"{path}: {len(array)} images for {spec}, {layout}; values by channel: {ranges}"
