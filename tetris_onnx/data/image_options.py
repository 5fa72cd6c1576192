"""How the pixels of an image become a model's input: options and their spelling on the command line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tetris_onnx.errors import TetrisError

LAYOUTS = ("NCHW", "NHWC")
CHANNELS = (1, 3)  # of an image: gray, or red, green and blue


class ImageOptionError(TetrisError, ValueError):
    """An option for images that makes no sense."""


@dataclass(frozen=True)
class ImageOptions:
    """``input = (pixel * scale - mean) / std`` with pixels from 0 to 255; None where it was not said."""

    mean: tuple[float, ...] | None = None  # one number, or one per channel
    std: tuple[float, ...] | None = None
    scale: float = 1 / 255
    layout: str | None = None  # one of LAYOUTS; None: as the shape of the input tells
    size: tuple[int, int] | None = None  # (height, width) where the model leaves them open
    bgr: bool = False  # channels in the order blue, green, red


def parse_image_options(
    mean: str | None, std: str | None, scale: str, layout: str | None, size: str | None, bgr: bool
) -> ImageOptions:
    """The options as they are written: numbers separated by commas, fractions as 1/255, sizes as 224x224.

    Raises `ImageOptionError`.
    """
    if layout is not None and layout.upper() not in LAYOUTS:
        raise ImageOptionError(f"--layout {layout}: expected {' or '.join(LAYOUTS)}")
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size or "1x1")
    if match is None:
        raise ImageOptionError(f"--image-size {size}: expected height x width, such as 224x224")
    return ImageOptions(
        None if mean is None else _numbers("--mean", mean, CHANNELS),
        None if std is None else _numbers("--std", std, CHANNELS),
        _numbers("--scale", scale, (1,))[0],
        None if layout is None else layout.upper(),
        None if size is None else (int(match[1]), int(match[2])),
        bgr,
    )


def _numbers(option: str, text: str, counts: tuple[int, ...]) -> tuple[float, ...]:
    try:
        numbers = tuple(_number(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        numbers = ()
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        wanted = "one number, such as 1/255" if counts == (1,) else "one number or three, such as 0.485,0.456,0.406"
        raise ImageOptionError(f"{option} {text}: expected {wanted}")
    return numbers


def _number(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)
