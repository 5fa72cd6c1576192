"""Two models on the same inputs: how far their outputs are apart, and what that does to their answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tetris_onnx.data.calibration import (
    Data,
    InputSpec,
    Samples,
    Shapes,
    batches,
    count,
    fixed_batch,
    runnable_samples,
    select,
    session_inputs,
)
from tetris_onnx.data.image_options import ImageOptions
from tetris_onnx.data.images import load_data
from tetris_onnx.errors import TetrisError
from tetris_onnx.session import ModelSource, SessionError, model_name, open_session, run, take_turns

RANDOM_SAMPLES = 8
# Samples at a time. Memory is that of a batch, whatever the number of samples.
_BATCH = 8


class CompareError(TetrisError, ValueError):
    """Two models, or a model and labels, that cannot be compared."""


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of two models is apart, over all samples."""

    name: str
    max_abs: float
    mean_abs: float
    relative: (
        float  # max_abs / largest magnitude in the first model's output; inf where only one of two values is finite
    )


@dataclass(frozen=True)
class Comparison:
    """What two models make of the same inputs.

    Top-1 figures belong to the first output of shape [samples, classes] (at least two classes) and are None where there
    is none; the accuracies are None without labels.
    """

    a: str
    b: str
    data: str  # the file, or "random"
    samples: int
    outputs: tuple[OutputDifference, ...]
    agreement: float | None  # share of samples with the same top-1
    accuracy_a: float | None
    accuracy_b: float | None

    @property
    def mean_relative(self) -> float:
        """The mean difference relative to max|y|, of the output whose largest one is the largest."""
        worst = max(self.outputs, key=lambda output: output.relative)
        return worst.mean_abs * worst.relative / worst.max_abs if worst.max_abs else 0.0

    @property
    def relative(self) -> float:
        """The largest relative difference of all outputs."""
        return max((output.relative for output in self.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; an infinite difference is null."""
        values = asdict(self) | {"relative": self.relative}
        for row in (values, *values["outputs"]):
            row |= {key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        return values


def compare(
    a: ModelSource,
    b: ModelSource,
    data: str | Path | Samples | Data | None = None,
    samples: int = RANDOM_SAMPLES,
    seed: int = 0,
    shapes: Shapes | None = None,
    provider: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    images: ImageOptions | None = None,
    apart: bool = False,
) -> Comparison:
    """Run both models on every sample of ``data`` (see `images.load_data`), or on ``samples`` random ones.

    ``shapes`` are those of `random_samples`; ``progress`` is called with (done, all) samples. ``apart``: have only one
    of the models in memory at a time.
    Raises `CompareError` for models with different inputs or outputs, `CalibrationError` for data that does not fit,
    `SessionError` where a model does not run.
    """
    sources = (a, b)
    names = [model_name(model) for model in sources]
    sessions = take_turns(sources, provider) if apart else [open_session(model, provider) for model in sources]
    inputs = _common_inputs(names, [session_inputs(session) for session in sessions])
    outputs = _common_outputs(sessions, names)
    labels = None
    if isinstance(data, (str, Path)):
        data = load_data(data, inputs, images)
    if isinstance(data, Data):
        feed, labels = data.samples, data.labels
    elif data is not None:
        feed = data
    else:
        feed = runnable_samples(lambda one: run(sessions[0], one, names[0]), inputs, samples, seed, shapes)
    n = count(feed, inputs)
    source = data.source if isinstance(data, Data) else "random" if data is None else "samples"

    differences = [_Difference() for _ in outputs]
    top1: list[tuple[NDArray, NDArray]] = []
    classes = 0
    classifier: int | None = None
    for part, results in _run_both(sessions, names, feed, inputs):
        ours, theirs = ([np.asarray(value) for value in values] for values in results)
        for name, difference, y, z in zip(outputs, differences, ours, theirs, strict=True):
            difference.add(name, y, z)
        if part.start == 0:
            classifier = next((i for i, y in enumerate(ours) if _is_classes(y, part)), None)
        if classifier is not None:
            classes = ours[classifier].shape[1]
            top1.append((ours[classifier].argmax(axis=1), theirs[classifier].argmax(axis=1)))
        if progress is not None:
            progress(part.stop, n)

    agreement = accuracy_a = accuracy_b = None
    if top1:
        answers_a, answers_b = (np.concatenate(answers) for answers in zip(*top1, strict=True))
        agreement = float(np.mean(answers_a == answers_b))
        if labels is not None:
            if labels.min() < 0 or labels.max() >= classes:
                raise CompareError(
                    f"{source}: labels from {labels.min()} to {labels.max()}; the model has {classes} classes"
                )
            accuracy_a, accuracy_b = (float(np.mean(answers == labels)) for answers in (answers_a, answers_b))
    elif labels is not None:
        raise CompareError(f"{source} has labels, but no output has the shape [samples, classes]")
    return Comparison(
        a=names[0],
        b=names[1],
        data=source,
        samples=n,
        outputs=tuple(d.result(name) for name, d in zip(outputs, differences, strict=True)),
        agreement=agreement,
        accuracy_a=accuracy_a,
        accuracy_b=accuracy_b,
    )


def check_labels(model: ModelSource, data: Data) -> None:
    """Raise what `compare` would for labels that do not fit the model, from two samples: told before a search."""
    if data.labels is None:
        return
    inputs = session_inputs(take_turns([model])[0])
    ends = np.array([data.labels.argmin(), data.labels.argmax()])
    some = np.resize(ends, max(ends.size, fixed_batch(inputs) or 0))
    compare(model, model, Data(data.source, select(data.samples, inputs, some), data.labels[some]), apart=True)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a comparison as a table."""
    title = f"{comparison.a} | {comparison.b}: {comparison.samples} samples ({comparison.data})"
    console.print(title, markup=False, highlight=False)
    table = Table()
    table.add_column("output", overflow="fold")
    for header in ("max error", "mean error", "max error / max|y|"):
        table.add_column(header, justify="right")
    for row in comparison.outputs:
        table.add_row(escape(row.name), *(f"{value:.2e}" for value in (row.max_abs, row.mean_abs, row.relative)))
    console.print(table)
    if comparison.agreement is not None:
        console.print(f"same top-1: {100 * comparison.agreement:.2f} %", highlight=False)
    if comparison.accuracy_a is not None and comparison.accuracy_b is not None:
        before, after = 100 * comparison.accuracy_a, 100 * comparison.accuracy_b
        console.print(f"accuracy: {before:.2f} % | {after:.2f} % ({after - before:+.2f} points)", highlight=False)


class _Difference:
    """Running maximum and mean of |y - z| over batches."""

    def __init__(self) -> None:
        self._max = self._sum = self._largest = 0.0
        self._size = 0

    def add(self, name: str, y: NDArray, z: NDArray) -> None:
        if y.shape != z.shape:
            raise CompareError(f"output {name!r}: the shapes differ, {list(y.shape)} and {list(z.shape)}")
        if y.dtype.kind not in "fiub" or z.dtype.kind not in "fiub":
            raise CompareError(f"output {name!r} is no tensor of numbers")
        if y.size == 0:
            return
        wide_y, wide_z = y.astype(np.float64), z.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.abs(wide_y - wide_z)
        same = (wide_y == wide_z) | (np.isnan(wide_y) & np.isnan(wide_z))  # inf - inf is NaN, but no difference
        error = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
        self._max = max(self._max, float(error.max()))
        self._sum += float(error.sum())
        self._size += error.size
        finite = np.abs(wide_y[np.isfinite(wide_y)])
        self._largest = max(self._largest, float(finite.max(initial=0.0)))

    def result(self, name: str) -> OutputDifference:
        largest = self._largest if self._max else 1.0  # no difference: 0, even where every output is 0
        relative = self._max / largest if largest else math.inf
        return OutputDifference(name, self._max, self._sum / max(self._size, 1), relative)


def _run_both(
    sessions: Sequence[Any], names: Sequence[str], feed: Samples, inputs: Sequence[InputSpec]
) -> Iterator[tuple[slice, list[Sequence[NDArray]]]]:
    """Yield (which samples, outputs of a and b), in batches that the models take."""
    size, started = _BATCH, False
    while True:
        try:
            for part, batch in batches(feed, inputs, size):
                results = [run(session, batch, name) for session, name in zip(sessions, names, strict=True)]
                started = True
                yield part, results
            return
        except SessionError:
            if started or size == 1:
                raise
            size = 1  # an open batch axis, but a batch of 1 written into the graph, is common


def _common_inputs(names: Sequence[str], specs: Sequence[Sequence[InputSpec]]) -> tuple[InputSpec, ...]:
    """The inputs of both models, with an axis as open as the more particular of the two leaves it."""
    listings = [
        f"{name} takes {'; '.join(map(str, spec)) or 'nothing'}" for name, spec in zip(names, specs, strict=True)
    ]
    different = CompareError(f"the models have different inputs: {', '.join(listings)}")
    others = {spec.name: spec for spec in specs[1]}
    if len(specs[0]) != len(specs[1]):
        raise different
    common = []
    for ours in specs[0]:
        theirs = others.get(ours.name)
        if theirs is None or theirs.dtype != ours.dtype or len(theirs.shape) != len(ours.shape):
            raise different
        shape = tuple(d if isinstance(d, int) else e for d, e in zip(ours.shape, theirs.shape, strict=True))
        if any(isinstance(e, int) and d != e for d, e in zip(shape, theirs.shape, strict=True)):
            raise different
        common.append(InputSpec(ours.name, ours.dtype, shape, ours.unbatched or theirs.unbatched))
    return tuple(common)


def _common_outputs(sessions: Sequence[Any], names: Sequence[str]) -> list[str]:
    ours, theirs = ([value.name for value in session.get_outputs()] for session in sessions)
    if ours != theirs:
        listings = (f"{name} gives {', '.join(values)}" for name, values in zip(names, (ours, theirs), strict=True))
        raise CompareError(f"the models have different outputs: {'; '.join(listings)}")
    return ours


def _is_classes(y: NDArray, part: slice) -> bool:
    return y.dtype.kind == "f" and y.ndim == 2 and len(y) == part.stop - part.start and y.shape[1] >= 2
