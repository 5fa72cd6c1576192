"""What the user asked for, checked before any work is done: options that exclude each other, files, labels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetris_onnx.data.image_options import ImageOptions
from tetris_onnx.errors import TetrisError

if TYPE_CHECKING:
    from tetris_onnx.data.calibration import Data


class UsageError(TetrisError, ValueError):
    """Options that do not go together, or files that cannot be written where they are asked for."""


def refuse_together(option: str, others: dict[str, Any]) -> None:
    """Raise `UsageError` where one of the ``others`` (value by option) is given along with ``option``."""
    for other, value in others.items():
        if value is not None:
            raise UsageError(f"{option} and {other} exclude each other: leave one out")


def check_outputs(model: Path, outputs: dict[str, Path | None]) -> None:
    """Refuse what could not be written, or would overwrite the input, before any work is done."""
    taken = {"MODEL": model}
    for option, path in outputs.items():
        if path is None:
            continue
        for other, file in taken.items():
            linked = path.exists() and file.exists() and path.samefile(file)
            if linked or path.resolve() == file.resolve():
                raise UsageError(f"{option} {path}: the same file as {other}; give another name")
        taken[option] = path
        if path.is_dir():
            raise UsageError(f"{option} {path}: a folder; give the name of a file")
        if path.exists() and not path.is_file():
            raise UsageError(f"{option} {path}: not a regular file; give another name")
        if not path.parent.is_dir():
            raise UsageError(f"{option} {path}: the folder {path.parent} does not exist; create it first")


def read_data(model: Path, path: Path | None, images: ImageOptions) -> Data | None:
    """Samples and labels of a file or folder; what there is to say about them goes to stderr."""
    if path is None:
        return None
    from tetris_onnx.data.calibration import model_inputs
    from tetris_onnx.data.images import load_data
    from tetris_onnx.graph import io

    data = load_data(path, model_inputs(io.load(model)), images)
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    return data


def read_both(
    model: Path, calibration: Path | None, data: Path | None, images: ImageOptions
) -> tuple[Data | None, Data | None]:
    """The samples to calibrate with and the labeled ones, checked as far as they can be before a search."""
    samples, labeled = read_data(model, calibration, images), read_data(model, data, images)
    check_image_options(images, calibration, data)
    if labeled is not None:
        from tetris_onnx.accuracy.compare import check_labels

        check_labels(model, labeled)
    return samples, labeled


def check_image_options(images: ImageOptions, *paths: Path | None) -> None:
    """Refuse options for images where there are none: left unused, they would be taken for a scaling of the arrays."""
    if images == ImageOptions():
        return
    from tetris_onnx.data.images import is_image_folder

    if not any(path is not None and is_image_folder(path) for path in paths):
        raise UsageError(
            "--mean, --std, --scale, --layout, --image-size and --bgr are for folders of images: there is none here, "
            "and arrays have to be as the model takes them"
        )


def accuracy_data(max_drop: float | None, calibration: Data | None, data: Data | None) -> Data | None:
    """The samples that --max-drop measures the accuracy on; None where these are a part of the calibration samples."""
    if max_drop is None or (calibration is not None and calibration.labels is not None):
        return None
    if data is None or data.labels is None:
        raise UsageError(
            "--max-drop needs labels: --data FILE.npz with an array 'label', or a folder of images by class"
        )
    return data
