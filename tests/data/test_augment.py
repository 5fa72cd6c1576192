from __future__ import annotations

import numpy as np
import pytest

from tetris_onnx.data.augment import mirrored_or_shifted, with_copies
from tetris_onnx.data.calibration import InputSpec, Samples


def specs_of(samples: Samples) -> tuple[InputSpec, ...]:
    return tuple(InputSpec(name, array.dtype, (None, *array.shape[1:])) for name, array in samples.items())


def spots(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """A smooth spot in the middle of each image, another height in every channel."""
    wide = 3 if shape[1] <= 4 else 2
    rows, columns = np.indices(shape[wide - 1 : wide + 1])
    spot = np.exp(-((rows - shape[wide - 1] / 2) ** 2 + (columns - shape[wide] / 2) ** 2) / 30)
    heights = 1 + np.arange(shape[1] if wide == 3 else shape[3])
    planes = heights[:, None, None] * spot if wide == 3 else spot[:, :, None] * heights
    return np.broadcast_to(planes, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(5, 3, 30, 40), (5, 30, 40, 3), (5, 1, 30, 40)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_copies_come_behind_their_image_in_its_type(shape: tuple[int, ...], dtype: type) -> None:
    samples = {"x": spots(shape, dtype), "token": np.arange(5)[:, None]}
    varied = with_copies(samples, specs_of(samples), 2)
    assert varied["x"].shape == (15, *shape[1:]) and varied["x"].dtype == dtype
    np.testing.assert_array_equal(varied["x"][::3], samples["x"])
    np.testing.assert_array_equal(varied["token"][:, 0], np.repeat(np.arange(5), 3))
    copies = np.delete(varied["x"], np.s_[::3], axis=0).astype(np.float64)
    # Each is another image, of which all channels are varied alike, with the spot still in sight.
    assert len(np.unique(copies.reshape(10, -1), axis=0)) == 10
    channel = 1 if shape[1] <= 4 else 3
    planes = np.moveaxis(copies, channel, 0)
    for i, plane in enumerate(planes):
        np.testing.assert_allclose(plane, planes[0] * (1 + i), atol=0.01 * (1 + i))  # half precision
    assert (planes[0].max(axis=(1, 2)) > 0.9).all() and np.abs(copies - samples["x"][:1]).max() > 0.2


def test_an_image_is_zoomed_and_turned_about_its_center_and_mirrored() -> None:
    samples = {"x": spots((200, 1, 41, 41))}
    copies = with_copies(samples, specs_of(samples), 1)["x"][1::2, 0].astype(np.float64)
    rows, columns = np.indices((41, 41))
    total = copies.sum(axis=(1, 2))
    row, column = ((copies * axis).sum(axis=(1, 2)) / total for axis in (rows, columns))
    # Shifted by up to a sixteenth of the size, in both directions; larger and smaller by up to exp(2 * .25).
    for middle in (row, column):
        assert middle.min() < 19 and middle.max() > 22 and middle.min() > 16 and middle.max() < 25
    area = total / spots((1, 1, 41, 41)).sum()
    assert 0.55 < area.min() < 0.75 and 1.4 < area.max() < 1.75
    ramp = {"x": np.broadcast_to(np.arange(41, dtype=np.float32), (200, 1, 41, 41))}
    slope = np.diff(with_copies(ramp, specs_of(ramp), 1)["x"][1::2, 0, 20, 15:26]).mean(axis=1)
    assert 60 < (slope < 0).sum() < 140


def test_inputs_that_are_no_images_have_no_copies() -> None:
    samples = {"tokens": np.arange(12.0).reshape(4, 3), "maps": np.ones((4, 16, 16, 16), np.float32)}
    assert with_copies(samples, specs_of(samples), 3) is samples
    images = {"x": spots((4, 3, 16, 16))}
    assert with_copies(images, specs_of(images), 0) is images


def test_copies_depend_on_the_seed_only() -> None:
    samples = {"x": spots((4, 3, 16, 16))}
    first, again, other = (with_copies(samples, specs_of(samples), 1, seed)["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize("shape", [(64, 1, 20, 32), (64, 20, 32, 3)])
def test_images_are_mirrored_and_shifted_by_a_little(shape: tuple[int, ...]) -> None:
    spec = InputSpec("x", np.dtype(np.float32), (None, *shape[1:]))
    wide = shape.index(32)
    ramp = np.zeros(shape, np.float32) + np.arange(32).reshape([-1 if a == wide else 1 for a in range(4)])
    found = np.moveaxis(mirrored_or_shifted({"x": ramp}, (spec,), np.random.default_rng(0))["x"], wide, -1)
    steps = np.sign(found[..., 20] - found[..., 10]).reshape(64, -1)
    assert (steps == steps[:, :1]).all() and 10 < (steps[:, 0] < 0).sum() < 54
    assert np.abs(np.where(steps[:, 0] < 0, 31 - found[:, 0, 0, 15], found[:, 0, 0, 15]) - 15.5).max() <= 2.5


def test_other_inputs_are_left_as_they_are() -> None:
    arrays = {"tokens": np.arange(12).reshape(4, 3), "maps": np.ones((4, 16, 16, 16), np.float32)}
    specs = tuple(InputSpec(name, array.dtype, (None, *array.shape[1:])) for name, array in arrays.items())
    varied = mirrored_or_shifted(arrays, specs, np.random.default_rng(0))
    assert all(varied[name] is array for name, array in arrays.items())
