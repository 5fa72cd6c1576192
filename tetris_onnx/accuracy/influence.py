"""How strongly the outputs of a network depend on each layer's output: which channels and positions matter.

A pruned layer makes errors, and the network's answers suffer from some of them far more than from others (a trained
VGG16: a fifth of the channels and of the positions carry half). To first order, errors ``e`` of a layer's output ``y``
that are independent of each other change the outputs ``z`` by

    E |z' - z|^2 = sum_i (sum_k (dz_k / dy_i)^2) e_i^2

the diagonal of the Gauss-Newton matrix (Fisher's, for a network that gives log-probabilities). Its expectation over
random signs r is ``(d(r z) / dy_i)^2``: one backward pass per draw instead of one per output. The backward pass is
a part of the ONNX graph that runs it (`graph.backward`): no training framework is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from tetris_onnx.data.calibration import Samples, batches, count, model_inputs
from tetris_onnx.graph.backward import Backward, UnknownDerivativeError
from tetris_onnx.graph.tensors import in_files
from tetris_onnx.session import SessionError, open_session, run

_BATCH = 8
_MOST_BYTES = 10**9  # of a model: it is held several times


@dataclass(frozen=True, eq=False)
class Influence:
    """Mean squares of a layer's gradients: per output channel [out], and per sample and position [samples, ...]."""

    channels: NDArray[np.float64]
    positions: NDArray[np.float32] | None  # None where they are not known


def measure_influence(
    model: onnx.ModelProto, layers: Sequence[tuple[str, int]], samples: Samples, draws: int = 1, seed: int = 0
) -> dict[str, Influence]:
    """The influence of ``layers``, (name of the output, axis of its channels), of a prepared ``model`` by their names.

    ``draws``: random signs per sample. Layers whose way to the outputs has an operator without a known derivative
    are left out, and all of a model above 1 GB or with its weights in files, which cannot be held several times.
    Deterministic for a seed.
    """
    if in_files(model) or model.ByteSize() > _MOST_BYTES:
        return {}
    inputs = model_inputs(model)
    try:
        backward = Backward(model)
        directions = [(f"direction {i}", *target) for i, target in enumerate(backward.targets())]
    except UnknownDerivativeError:
        return {}
    for name, target, _ in directions:
        backward.seed(target, name)
    found = backward.gradients([name for name, _ in layers])
    known = [(name, axis) for name, axis in layers if name in found]
    if not known:
        return {}
    outputs = [_square_sums(backward, name, axis) for name, axis in known]
    rng = np.random.default_rng(seed)
    total = count(samples, inputs)
    channels: dict[str, NDArray[np.float64]] = {}
    positions: dict[str, NDArray[np.float32]] = {}
    try:
        given = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, *shape]) for name, _, shape in directions
        ]
        session = open_session(backward.model([o for pair in outputs for o in pair], given))
        for part, feed in batches(samples, inputs, _BATCH):
            n = part.stop - part.start
            for _ in range(draws):
                signs = {name: rng.choice(np.array([-1, 1], np.float32), (n, *shape)) for name, _, shape in directions}
                values = iter(run(session, feed | signs, "the model"))
                for (name, _), by_channel, by_position in zip(known, values, values, strict=False):
                    channels[name] = channels.get(name, np.float64(0)) + by_channel.astype(np.float64) / (total * draws)
                    whole = positions.setdefault(name, np.zeros((total, *by_position.shape[1:]), np.float32))
                    whole[part] += by_position / draws
    except SessionError:
        return {}
    return {name: Influence(channels[name], positions[name]) for name, _ in known}


def _square_sums(backward: Backward, value: str, axis: int) -> tuple[str, str]:
    """Names of the sums of a value's squared gradients: [channels], and [samples, ...] without its channels."""
    square = backward.node("Mul", [backward.gradient(value)] * 2)
    others = [a for a in range(len(backward.shape(value))) if a != axis]
    by_channel = backward.node("ReduceSum", [square, backward.constant(np.array(others, np.int64))], keepdims=0)
    return by_channel, backward.node("ReduceSum", [square, backward.constant(np.array([axis], np.int64))], keepdims=0)
