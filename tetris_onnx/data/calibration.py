"""Inputs to run a model on: the user's, from a file or as arrays, or random.

A file is an ``.npz`` with one array per model input, by the input's name, or an ``.npy`` for a model with one input; a
mapping of arrays and a single array stand for the same.
The first axis counts the samples, but for inputs that every run takes whole (`InputSpec.whole`). Values are what the
model expects, already scaled: nothing here rescales, and integers for an input of floats are an error, since they are
most likely an image that still has to be scaled. Labels (`load_labels`) may be in the same file.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from tetris_onnx.errors import TetrisError

Samples: TypeAlias = dict[str, NDArray]  # one array per model input, first axis = samples unless taken whole
Shapes: TypeAlias = Mapping[str, Sequence[int]]
Source: TypeAlias = str | Path | Mapping[str, NDArray] | NDArray  # a file or folder, arrays by name, or a single one

LABEL_NAMES = ("label", "labels", "y")
# What to try for a height, width or length that the model leaves open: most vision models take 224, the others cover
# models that need a certain height or allow a certain length.
SIZES = (224, 32, 48, 64, 128, 640, 16, 8, 4, 1)
_CHANNELS = 3  # for an open channel axis of an image
# An .npz of more bytes than this, and of so many times what it takes, is not let in.
_MOST_UNPACKED, _MOST_RATIO = 2**31, 100
_MOST_RANDOM = 2**31  # values of one input


@dataclass(frozen=True, eq=False)
class Data:
    """Samples, and what came with them."""

    source: str  # the file or folder
    samples: Samples
    labels: NDArray[np.int64] | None = None  # the class of each sample
    notes: tuple[str, ...] = ()  # what the user should know about them


class CalibrationError(TetrisError, ValueError):
    """Data that does not fit the model's inputs."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]  # a name or None where the model leaves the size open
    unbatched: bool = False  # the first axis does not count samples

    @property
    def whole(self) -> bool:
        """Whether each run takes all of it: a scalar, or a state that does not belong to single samples."""
        return self.unbatched or not self.shape

    def __str__(self) -> str:
        """``x: float32 [N, 3, 224, 224]``."""
        return f"{self.name}: {self.dtype} [{', '.join('?' if d is None else str(d) for d in self.shape)}]"


def session_inputs(session: Any) -> tuple[InputSpec, ...]:
    """The inputs of an onnxruntime session. Raises `CalibrationError` for one that is no tensor of numbers."""
    return _told_apart(
        InputSpec(value.name, _session_dtype(value.name, value.type), _shape(value.shape))
        for value in session.get_inputs()
    )


def model_inputs(model: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The inputs of a model, without those that an initializer sets. Raises `CalibrationError` as `session_inputs`."""
    constants = {tensor.name for tensor in model.graph.initializer}
    specs = []
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or tensor.elem_type == onnx.TensorProto.UNDEFINED:
            raise CalibrationError(f"model input {value.name!r} is not a tensor")
        dims: list[int | str | None] = [
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim
        ]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        specs.append(InputSpec(value.name, np.dtype(dtype), _shape(dims)))
    return _told_apart(specs)


def _told_apart(specs: Iterable[InputSpec]) -> tuple[InputSpec, ...]:
    """Mark the inputs without an axis of samples in front, such as the state [layers, batch, ...] of recurrent layers.

    The first axis of the first array counts the samples. Another array has none where the model fixes its first axis at
    another size. Where the number of samples is open, it has none if the samples' axis, by its name, comes later, or if
    there are several of something in front and a later axis is open; samples run one at a time then.
    """
    specs = tuple(specs)
    batch = next((spec.shape[0] for spec in specs if spec.shape), None)

    def unbatched(spec: InputSpec) -> bool:
        if not spec.shape:
            return False
        first, *rest = spec.shape
        if isinstance(batch, int):
            return isinstance(first, int) and first != batch
        several = isinstance(first, int) and first > 1
        return (several and not all(isinstance(size, int) for size in rest)) or (first != batch and batch in rest)

    def one_sample(spec: InputSpec) -> tuple[int | str | None, ...]:
        shape = [1 if isinstance(size, str) and size == batch else size for size in spec.shape]
        if shape and not spec.unbatched and not isinstance(shape[0], int):
            shape[0] = 1
        return tuple(shape)

    told = [replace(spec, unbatched=unbatched(spec)) for spec in specs]
    if not isinstance(batch, int) and any(spec.unbatched for spec in told):
        told = [replace(spec, shape=one_sample(spec)) for spec in told]
    return tuple(told)


def load_samples(source: Source, inputs: Sequence[InputSpec]) -> Samples:
    """The arrays of the model's ``inputs`` from an .npz or .npy file, every such file of a folder in turn, or as given.

    Floats become the input's float type and integers its integer type where no value changes by more than rounding.
    Raises `CalibrationError` saying what was found and what was expected.
    """
    parts = [_select(file, found, arrays, inputs) for file, found, arrays in _read(source, _names(inputs))]
    samples = {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in inputs if not spec.whole}
    counts = {name: len(array) for name, array in samples.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {n}" for name, n in counts.items())
        raise CalibrationError(f"{source_name(source)}: every input needs the same number of samples, but {found}")
    return samples | {spec.name: parts[0][spec.name] for spec in inputs if spec.whole}


def load_labels(source: Source, inputs: Sequence[InputSpec]) -> NDArray[np.int64] | None:
    """The class of each sample: the array ``label``, ``labels`` or ``y`` that is no model input; None if there is none.

    Raises `CalibrationError` where it is not a list of integers, or only some files of a folder have it.
    """
    names = tuple(name for name in LABEL_NAMES if name not in _names(inputs))
    parts, unlabeled = [], 0
    for file, found, arrays in _read(source, names):
        if found == [""]:  # an .npy holds an input
            arrays = {}
        if not arrays:
            unlabeled += 1
            continue
        name, labels = next(iter(arrays.items()))
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise CalibrationError(
                f"{file}: labels {name!r} are {labels.dtype} {list(labels.shape)}; expected one integer per sample"
            )
        parts.append(labels.astype(np.int64))
    if not parts:
        return None
    if unlabeled:
        raise CalibrationError(f"{source_name(source)}: {unlabeled} of {unlabeled + len(parts)} files have no labels")
    return np.concatenate(parts)


def random_samples(
    inputs: Sequence[InputSpec], n: int, seed: int = 0, shapes: Shapes | None = None, size: int = SIZES[0]
) -> Samples:
    """At least ``n`` random samples (a whole number of batches where the model fixes the batch), the same for a seed.

    Floats are standard normal, uint8 is 0 to 255, other integers are 0 or 1 (valid as an index, a token or a mask).
    ``shapes`` gives whole shapes by input name; their first entry, the batch, is not used. Otherwise an open axis is 3
    where it holds the channels of an image, else ``size``.
    Raises `CalibrationError` for a shape that does not fit the model.
    """
    shapes = shapes or {}
    _check_names(shapes, inputs)
    rng = np.random.default_rng(seed)
    samples = {}
    for spec in inputs:
        shape = _concrete_shape(spec, n, shapes.get(spec.name), size)
        if math.prod(shape) > _MOST_RANDOM:
            raise CalibrationError(f"input {spec}: {math.prod(shape)} random values are too many; give other sizes")
        values: NDArray
        if spec.dtype.kind in "biu":
            values = rng.integers(0, 256 if spec.dtype == np.uint8 else 2, shape)
        elif spec.dtype.kind == "f":
            values = rng.standard_normal(shape, dtype=np.float32)
        else:
            raise CalibrationError(f"input {spec}: no random values for this type; give a data file")
        samples[spec.name] = values.astype(spec.dtype)
    return samples


def runnable_samples(
    run: Callable[[Samples], object],
    inputs: Sequence[InputSpec],
    n: int,
    seed: int = 0,
    shapes: Shapes | None = None,
) -> Samples:
    """`random_samples` of the first size in `SIZES` that ``run`` (one sample, raises where it fails) accepts.

    Raises `CalibrationError` where none is accepted, with what the run said.
    """
    given = shapes or {}
    _check_names(given, inputs)
    still_open = [spec for spec in inputs if spec.name not in given and is_open(spec)]
    if not still_open:
        return random_samples(inputs, n, seed, given)
    first = ""
    for size in SIZES:
        try:
            run(random_samples(inputs, 1, seed, given, size))
        except Exception as error:  # onnxruntime raises its own types, with no common base
            first = first or " ".join(str(error).split())
            continue
        return random_samples(inputs, n, seed, given, size)
    raise CalibrationError(
        f"the model runs on random inputs of no size tried ({_listing(still_open)}); "
        f"give a data file, or the shape (--shape NAME=1x3x224x224); it said: {first[:300]}"
    )


def batches(samples: Samples, inputs: Sequence[InputSpec], batch: int) -> Iterator[tuple[slice, Samples]]:
    """Cut samples into runs of at most ``batch``, or of the model's own batch where it fixes one: (which, feed).

    Raises `CalibrationError` where the samples do not fill the batches that a model fixes.
    """
    n = count(samples, inputs)
    step = fixed_batch(inputs) or batch
    if fixed_batch(inputs) and n % step:
        raise CalibrationError(f"the model runs {step} samples at a time; {n} samples do not fill its batches")
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        yield part, select(samples, inputs, part)


def select(samples: Samples, inputs: Sequence[InputSpec], which: slice | NDArray) -> Samples:
    """Some of the samples, by a slice, their numbers or a mask; inputs that runs take whole stay as they are."""
    whole = {spec.name for spec in inputs if spec.whole}
    return {name: array if name in whole else array[which] for name, array in samples.items()}


def fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    """The number of samples that the model takes at a time, or None where it is open."""
    return next((spec.shape[0] for spec in inputs if not spec.whole and isinstance(spec.shape[0], int)), None)


def count(samples: Samples, inputs: Sequence[InputSpec]) -> int:
    """The number of samples (1 for a model whose inputs are all scalars)."""
    return next((len(samples[spec.name]) for spec in inputs if not spec.whole), 1)


def is_open(spec: InputSpec) -> bool:
    """Whether the model leaves a size of the input open, other than the batch."""
    return any(not isinstance(size, int) for size in spec.shape[0 if spec.whole else 1 :])


def check_shapes(shapes: Shapes, inputs: Sequence[InputSpec]) -> None:
    """Raise `CalibrationError` for shapes, by input name, that the model's inputs cannot have."""
    _check_names(shapes, inputs)
    for spec in inputs:
        _concrete_shape(spec, 1, shapes.get(spec.name), SIZES[0])


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``["x=1x3x224x224"]`` -> {"x": (1, 3, 224, 224)}. Raises `CalibrationError`."""
    shapes = {}
    for text in texts:
        name, separator, sizes = text.rpartition("=")
        try:
            shape = tuple(int(size) for size in sizes.lower().split("x"))
        except ValueError:
            shape = ()
        if not separator or not name or not shape or min(shape) < 1:
            raise CalibrationError(f"--shape {text}: expected NAME=1x3x224x224")
        shapes[name] = shape
    return shapes


def source_name(source: Source) -> str:
    """What to call samples in a message."""
    return str(source) if isinstance(source, (str, Path)) else "the arrays"


def _names(inputs: Sequence[InputSpec]) -> tuple[str, ...]:
    return tuple(spec.name for spec in inputs)


def _read(source: Source, wanted: Sequence[str]) -> Iterator[tuple[str, list[str], Samples]]:
    """Per file: its path, the names in it and the arrays that are wanted; an .npy has one array, named ""."""
    if isinstance(source, np.ndarray):
        yield source_name(source), [""], {"": source}
        return
    if isinstance(source, Mapping):
        given = {name: np.asarray(source[name]) for name in wanted if name in source}
        yield source_name(source), list(source), given
        return
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".npz", ".npy"))
        if not files:
            raise CalibrationError(f"{path}: no .npz or .npy file in this folder, nor an image")
    elif path.is_file():
        files = [path]
    else:
        raise CalibrationError(f"{path}: no such file")
    for file in files:
        _refuse_bomb(file)
        try:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                found, arrays = [""], {"": content}
            else:
                with content:
                    found = list(content)
                    arrays = {name: content[name] for name in wanted if name in found}
                    for name, array in arrays.items():
                        if not isinstance(array, np.ndarray):  # np.load gives the bytes of a member without a header
                            raise ValueError(f"{name!r} is no array")
        except Exception as error:  # np.load raises many types for broken or hostile files
            why = "pickled objects are not read, if it has any" if "pickle" in str(error) else error
            raise CalibrationError(f"{file}: not an .npz or .npy file of numbers ({why})") from None
        yield str(file), found, arrays


def _refuse_bomb(file: Path) -> None:
    """Raise `CalibrationError` for an .npz that unpacks to vastly more than it takes: zeros without end."""
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_UNPACKED and size > _MOST_RATIO * file.stat().st_size:
            raise CalibrationError(f"{file}: {file.stat().st_size} bytes that unpack to {size}: no samples of numbers")


def _select(file: str, found: Sequence[str], arrays: Samples, inputs: Sequence[InputSpec]) -> Samples:
    if "" in arrays:
        if len(inputs) != 1:
            raise CalibrationError(
                f"{file}: a single array, but the model has {_listing(inputs)}: give them by name, in an .npz"
            )
        return {inputs[0].name: _fit(file, arrays[""], inputs[0])}
    missing = [spec for spec in inputs if spec.name not in arrays]
    if missing:
        raise CalibrationError(
            f"{file}: no array {missing[0].name!r}; found {', '.join(found) or 'nothing'}; "
            f"the model has {_listing(inputs)}"
        )
    return {spec.name: _fit(file, arrays[spec.name], spec) for spec in inputs}


def _fit(file: str, array: NDArray, spec: InputSpec) -> NDArray:
    """The array in the type of the input, or a `CalibrationError`."""
    found = f"{file}: {spec.name!r} is {array.dtype} {list(array.shape)}, the model input is {spec}"
    first = 0 if spec.whole else 1
    fits = array.ndim == len(spec.shape) and all(
        not isinstance(wanted, int) or wanted == n
        for wanted, n in zip(spec.shape[first:], array.shape[first:], strict=True)
    )
    if not fits:
        rule = "all axes have" if spec.whole else "the first axis counts the samples, the others have"
        raise CalibrationError(f"{found}; {rule} to match")
    if array.size == 0:
        raise CalibrationError(f"{found}; there are no samples in it")
    if array.dtype == spec.dtype:
        converted = array
    elif array.dtype.kind in "iu" and spec.dtype.kind == "f":
        raise CalibrationError(f"{found}; convert and scale it as the model expects, e.g. x.astype('float32') / 255")
    elif array.dtype.kind == spec.dtype.kind == "f":
        with np.errstate(over="ignore"):
            converted = array.astype(spec.dtype)
    elif array.dtype.kind in "iu" and spec.dtype.kind in "iu":
        converted = array.astype(spec.dtype)
        if not np.array_equal(converted, array):
            raise CalibrationError(f"{found}; it has values that {spec.dtype} cannot hold")
    else:
        raise CalibrationError(f"{found}; convert it")
    if converted.dtype.kind == "f" and not np.isfinite(converted).all():
        raise CalibrationError(f"{found}; it has NaN or infinite values")
    return converted


def _check_names(shapes: Shapes, inputs: Sequence[InputSpec]) -> None:
    unknown = set(shapes) - set(_names(inputs))
    if unknown:
        raise CalibrationError(f"no input {sorted(unknown)[0]!r}; the model has {_listing(inputs)}")


def _concrete_shape(spec: InputSpec, n: int, given: Sequence[int] | None, size: int) -> tuple[int, ...]:
    if given is not None:
        fits = len(given) == len(spec.shape) and all(
            g > 0 and (not isinstance(wanted, int) or wanted == g) for wanted, g in zip(spec.shape, given, strict=True)
        )
        if not fits:
            raise CalibrationError(f"shape {'x'.join(map(str, given))} does not fit the model input {spec}")
    shape: list[int] = []
    for axis, wanted in enumerate(spec.shape):
        if axis == 0 and not spec.whole:
            step = wanted if isinstance(wanted, int) else 1
            shape.append(-(-n // step) * step)
        elif isinstance(wanted, int):
            shape.append(wanted)
        elif given is not None:
            shape.append(given[axis])
        else:
            shape.append(_CHANNELS if axis == 1 and len(spec.shape) >= 4 else size)
    return tuple(shape)


def _shape(dims: Sequence[int | str | None]) -> tuple[int | str | None, ...]:
    """Sizes of 0 and less are how some exporters write an open axis."""
    return tuple(None if isinstance(d, int) and d < 1 else d for d in dims)


def _session_dtype(name: str, text: str) -> np.dtype:
    kinds = {"float": "float32", "double": "float64"}
    inner = text.removeprefix("tensor(").removesuffix(")")
    try:
        dtype = np.dtype(kinds.get(inner, inner))
    except TypeError:
        raise CalibrationError(f"model input {name!r} is {text}, not a tensor of numbers") from None
    if dtype.kind not in "fiub":
        raise CalibrationError(f"model input {name!r} is {text}, not a tensor of numbers")
    return dtype


def _listing(inputs: Sequence[InputSpec]) -> str:
    return f"the input{'s' * (len(inputs) > 1)} {'; '.join(map(str, inputs))}" if inputs else "no inputs"
