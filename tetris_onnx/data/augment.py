"""Varied images: more for layers to be fitted to, where few samples are at hand.

Recovery and refinement follow the dense network, which answers for any image: no label has to stay right. Only images
are varied, that is four-dimensional inputs of floats with one to four channels first or last.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tetris_onnx.data.calibration import InputSpec, Samples, count, select

_MOST_CHANNELS = 4
_SHIFT = 16  # by up to an image's size over this
_TURN = np.deg2rad(25.0)
_ZOOM, _STRETCH = 0.25, 0.1  # logarithms: of the size, and of half the ratio of height to width


def with_copies(samples: Samples, inputs: tuple[InputSpec, ...], copies: int, seed: int = 0) -> Samples:
    """Every sample, and ``copies`` of it behind it: turned, zoomed, stretched, shifted and mirrored at random.

    The images of one copy are varied alike; its other inputs are those of the sample. Unlike shifts by a few pixels,
    which a convolution does not tell apart, this shows layers other patches. Samples without an image come back as
    they are. Deterministic for a ``seed``.
    """
    images = image_inputs(samples, inputs)
    if not images or not copies:
        return samples
    rng = np.random.default_rng(seed)
    total = (1 + copies) * count(samples, inputs)
    varied = select(samples, inputs, np.arange(total) // (1 + copies))
    for i in range(total):
        if i % (1 + copies):
            matrix, shift = _matrix(rng), rng.uniform(-1, 1, 2) / _SHIFT
            for name in images:
                varied[name][i] = _transformed(varied[name][i : i + 1], matrix, shift)[0]
    return varied


def image_inputs(samples: Samples, inputs: tuple[InputSpec, ...]) -> list[str]:
    """The names of the inputs that are images."""
    return [spec.name for spec in inputs if not spec.whole and _is_image(samples[spec.name])]


def mirrored_or_shifted(samples: Samples, inputs: tuple[InputSpec, ...], rng: np.random.Generator) -> Samples:
    """Images mirrored at random and shifted by a few pixels, edges repeated; other inputs as they are."""
    varied = dict(samples)
    for name in image_inputs(samples, inputs):
        array = samples[name]
        height, width = _axes(array)
        mirrored = rng.random(len(array)) < 0.5
        array = array.copy()
        array[mirrored] = np.flip(array[mirrored], width)
        for axis in (height, width):
            size = array.shape[axis]
            shift = int(rng.integers(-(size // _SHIFT), size // _SHIFT + 1))
            array = np.take(array, np.clip(np.arange(size) + shift, 0, size - 1), axis)
        varied[name] = array
    return varied


def _is_image(array: NDArray) -> bool:
    return array.ndim == 4 and array.dtype.kind == "f" and min(array.shape[1], array.shape[3]) <= _MOST_CHANNELS


def _axes(array: NDArray) -> tuple[int, int]:
    """The axes of height and width."""
    return (2, 3) if array.shape[1] <= array.shape[3] else (1, 2)


def _matrix(rng: np.random.Generator) -> NDArray[np.float64]:
    """Where the pixels of a varied image come from, about its center."""
    turn, zoom, stretch = rng.uniform(-1, 1, 3) * (_TURN, _ZOOM, _STRETCH)
    mirror = rng.choice((-1, 1))
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return turned @ np.diag(np.exp([zoom + stretch, zoom - stretch]) * (1, mirror))


def _transformed(image: NDArray, matrix: NDArray[np.float64], shift: NDArray[np.float64]) -> NDArray:
    """One image, [1, channels, height, width] or [1, height, width, channels], edges repeated."""
    axes = _axes(image)
    planes = np.moveaxis(image, axes, (2, 3))
    size = np.array(planes.shape[2:])
    center = (size - 1) / 2
    offset = center + shift * size - matrix @ center
    # In single precision at least: half precision is none of ndimage's types.
    kind = np.result_type(image.dtype, np.float32)
    result = np.empty_like(planes)
    for channel, plane in enumerate(planes[0]):
        result[0, channel] = ndimage.affine_transform(plane.astype(kind), matrix, offset, order=1, mode="nearest")
    return np.moveaxis(result, (2, 3), axes)
