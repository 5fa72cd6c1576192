"""Whether a block-sparse model computes what it should: run against the dense model with the same blocks zeroed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from tetris_onnx.accuracy.compare import compare
from tetris_onnx.data.calibration import CalibrationError, InputSpec, Samples, Shapes, count, fixed_batch, select
from tetris_onnx.errors import TetrisError
from tetris_onnx.graph import io
from tetris_onnx.graph.outputs import before_squashing
from tetris_onnx.graph.quantized import is_quantized, without_rounding
from tetris_onnx.graph.widen import rounding, widen
from tetris_onnx.session import open_session

# Samples of the verification: few are enough, the check is of every value that the models give.
_RANDOM_SAMPLES = 2
# Largest error of a precision relative to max|y| that can still be rounding. A product of bfloat16 is off by up to
# 2^-8, a byte by 1/510 of its layer's range; what is left of that after a network's sums is a percent or so, and a few
# percent for bytes. The bounds are ten times that: beyond, the answers are not the network's any more.
_MOST_ROUNDING = {"bf16": 0.1, "int8": 0.5}
REAL_SAMPLES = 16
# Errors of a float16 weight's rounding are random and shrink in the sums: half of one, in a network of three layers.
_WEIGHT_ROUNDINGS = 8


class VerificationError(TetrisError, RuntimeError):
    """The block-sparse model does not compute what it should; it must not be used."""


def check_loads(model: onnx.ModelProto, name: str) -> None:
    """Raise `SessionError` for a model that onnxruntime does not load: better told before a search than behind it.

    Of large models and those of float16 or bfloat16 another form is run (`comparable`), and told of then.
    """
    if not io.is_large(model) and not rounding(model):
        open_session(model, name=name)


def first_samples(samples: Samples, inputs: Sequence[InputSpec]) -> Samples:
    """As many of the samples as the verification runs: whole batches where the model fixes their size."""
    batch = fixed_batch(inputs) or 1
    n = min(count(samples, inputs), -(-REAL_SAMPLES // batch) * batch)
    return select(samples, inputs, slice(n))


def verify(
    model: onnx.ModelProto,
    reference: onnx.ModelProto,
    tolerance: float,
    data: Samples | None = None,
    shapes: Shapes | None = None,
) -> float:
    """The largest error of ``model`` relative to max|y| of ``reference``, on random inputs and on ``data``.

    ``shapes``: of the random inputs, by name, where the model leaves them open.

    Models of float16 or bfloat16 are compared in float32 (see graph.widen), where only what the passes put into such a
    weight is rounded (a BatchNormalization, a refit): 8 roundings of a weight are allowed for. Raises
    `VerificationError` when the error is above ``tolerance`` (or not a number).
    """
    pair, data = comparable(reference, model, data)
    if rounding(model):
        tolerance = max(tolerance, _WEIGHT_ROUNDINGS * rounding(model))
    apart = any(io.is_large(each) for each in pair)
    runs = [] if data is None else [compare(*pair, data, apart=apart)]
    try:
        runs.append(compare(*pair, samples=_RANDOM_SAMPLES, shapes=shapes, apart=apart))
    except CalibrationError:  # no random input of a usual size suits the model: the user's data has to do
        if data is None:
            raise
    shown = {output.name for output in pair[0].graph.output}
    # A Sigmoid that gives next to nothing everywhere has no size to compare with: what is before it counts.
    squashed = {name for name, values in before_squashing(pair[0]).items() if not shown.isdisjoint(values)}
    error = max(
        min(output.relative, output.max_abs) if output.name in squashed else output.relative
        for run in runs
        for output in run.outputs
    )
    if not error <= tolerance:
        raise VerificationError(
            f"the block-sparse model differs from the dense one with the same blocks zeroed by {error:.1e} of max|y| "
            f"(at most {tolerance:.1e} is right); nothing was written. Please report this with the model"
        )
    return error


def verify_precision(
    model: onnx.ModelProto,
    exact: onnx.ModelProto,
    precision: str,
    data: Samples | None = None,
    shapes: Shapes | None = None,
) -> tuple[float, float]:
    """Largest and mean error of ``model``, in ``precision``, relative to max|y| of ``exact``, the same in float32.

    On ``data``, or on random inputs (of ``shapes``) where there is none. Raises `VerificationError` when the largest
    error is beyond what rounding alone can do (see ``_MOST_ROUNDING``).
    """
    most, mean, worst = rounding_error(model, exact, data, shapes)
    if not most <= _MOST_ROUNDING[precision]:
        raise VerificationError(
            f"precision {precision} changes the output {worst!r} by {most:.1e} of max|y|, too much "
            "to be of use; nothing was written. Use another precision"
        )
    return most, mean


def rounding_error(
    model: onnx.ModelProto, exact: onnx.ModelProto, data: Samples | None, shapes: Shapes | None = None
) -> tuple[float, float, str]:
    """Largest and mean error of ``model`` relative to max|y| of ``exact``, and the name of the output that has them."""
    pair, data = comparable(exact, model, data)
    found = compare(*pair, data, _RANDOM_SAMPLES, shapes=shapes, apart=any(io.is_large(each) for each in pair))
    worst = max(found.outputs, key=lambda output: output.relative)
    return worst.relative, found.mean_relative, worst.name


def comparable(
    reference: onnx.ModelProto, model: onnx.ModelProto, data: Samples | None
) -> tuple[tuple[onnx.ModelProto, onnx.ModelProto], Samples | None]:
    """Both models and the samples in float32, with the values before a squashing function as further outputs.

    Quantized values are not rounded (see graph.quantized).
    """
    shown = _before_squashing(reference, model)
    pair = _with_outputs(reference, shown), _with_outputs(model, shown)
    if is_quantized(reference):
        pair = without_rounding(pair[0]), without_rounding(pair[1])
    if not rounding(model):
        return pair, data
    halves = ("float16", "bfloat16")
    data = data and {name: x.astype(np.float32) if x.dtype.name in halves else x for name, x in data.items()}
    weight_file = io.open_weights() if any(io.is_large(each) for each in pair) else None
    return (widen(pair[0], weight_file), widen(pair[1], weight_file)), data


def _before_squashing(reference: onnx.ModelProto, model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Values of both models that end in a Softmax or the like, whose saturation would hide an error in them."""
    types = {value.name: value for value in reference.graph.value_info}
    common = {output for node in model.graph.node for output in node.output} & types.keys()
    shown = {name: types[name] for names in before_squashing(reference).values() for name in names if name in common}
    return list(shown.values())


def _with_outputs(model: onnx.ModelProto, values: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    if not values:
        return model
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(values)
    return extended
