"""How strongly the outputs of a network depend on each layer's output: which channels and positions matter.

A pruned layer makes errors, and the network's answers suffer from some of them far more than from others (a trained
VGG16: a fifth of the channels and of the positions carry half). To first order, errors ``e`` of a layer's output ``y``
that are independent of each other change the outputs ``z`` by

    E |z' - z|^2 = sum_i (sum_k (dz_k / dy_i)^2) e_i^2

the diagonal of the Gauss-Newton matrix (Fisher's, for a network that gives log-probabilities). Its expectation over
random signs r is ``(d(r z) / dy_i)^2``: one backward pass per draw instead of one per output. Errors of one layer are
not independent of each other, though: of the channels, the products of their gradients are measured in pairs, too (the
output's factor of K-FAC, see `algorithms.coupling`). Of the inputs of a Softmax, only what it tells apart counts. The
backward pass is a part of the ONNX graph that runs it (`graph.backward`): no training framework is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tetris_onnx.data.calibration import Samples, batches, count, model_inputs
from tetris_onnx.graph.backward import Backward, UnknownDerivativeError
from tetris_onnx.graph.layers import DOMAIN
from tetris_onnx.graph.tensors import in_files
from tetris_onnx.passes.lower_block_sparse import whole_conv
from tetris_onnx.session import SessionError, open_session, run

_BATCH = 8
_MOST_CHANNELS = 2048  # of a layer whose gradients are looked at in pairs of channels
_MOST_BYTES = 10**9  # of a model: it is held several times


@dataclass(frozen=True, eq=False)
class Influence:
    """Mean squares of a layer's gradients: per output channel [out], and per sample and position [samples, ...].

    ``metric`` [out, out]: the mean products of the gradients of two channels, with ``channels`` on its diagonal; None
    where there are very many.
    """

    channels: NDArray[np.float64]
    positions: NDArray[np.float32] | None  # None where they are not known
    metric: NDArray[np.float64] | None = None


def measure_influence(
    model: onnx.ModelProto,
    layers: Sequence[tuple[str, int]],
    samples: Samples,
    draws: int = 1,
    seed: int = 0,
    whole: Collection[str] = (),
) -> dict[str, Influence]:
    """The influence of ``layers``, (name of the output, axis of its channels), of a prepared ``model`` by their names.

    ``draws``: random signs per sample. Layers whose way to the outputs has an operator without a known derivative
    are left out, and all of a model above 1 GB or with its weights in files, which cannot be held several times.
    ``whole``: convolutions that our operator runs faster (see `Activations`). Deterministic for a seed.
    """
    if in_files(model) or model.ByteSize() > _MOST_BYTES:
        return {}
    inputs = model_inputs(model)
    try:
        backward = Backward(model)
        directions = [(f"direction {i}", *target) for i, target in enumerate(backward.targets())]
        normalized = _normalized_axes(model)
    except UnknownDerivativeError:
        return {}
    for name, target, _ in directions:
        backward.seed(target, name)
    found = backward.gradients([name for name, _ in layers])
    known = [(name, axis) for name, axis in layers if name in found]
    if not known:
        return {}
    outputs = [(_products(backward, name, axis), _square_sums(backward, name, axis)) for name, axis in known]
    rng = np.random.default_rng(seed)
    total = count(samples, inputs)
    metrics: dict[str, NDArray[np.float64]] = {}
    positions: dict[str, NDArray[np.float32]] = {}
    try:
        given = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, *shape]) for name, _, shape in directions
        ]
        both_ways = backward.model([o for pair in outputs for o in pair], given)
        session = open_session(_by_our_operator(both_ways, whole, backward.convolutions))
        for part, feed in batches(samples, inputs, _BATCH):
            n = part.stop - part.start
            for _ in range(draws):
                signs = {
                    name: _directions(rng, (n, *shape), normalized.get(target)) for name, target, shape in directions
                }
                values = iter(run(session, feed | signs, "the model"))
                for (name, _), products, by_position in zip(known, values, values, strict=False):
                    metrics[name] = metrics.get(name, np.float64(0)) + products.astype(np.float64) / (total * draws)
                    whole = positions.setdefault(name, np.zeros((total, *by_position.shape[1:]), np.float32))
                    whole[part] += by_position / draws
    except SessionError:
        return {}
    return {name: _influence(metrics[name], positions[name]) for name, _ in known}


def _by_our_operator(
    model: onnx.ModelProto, whole: Collection[str], backward: Mapping[str, tuple[str, str]]
) -> onnx.ModelProto:
    """The ``model`` with the convolutions ``whole`` by our operator, and what goes back through them.

    ``backward``: see `Backward.convolutions`.
    """
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    made: list[onnx.TensorProto] = []
    for node in graph.node:
        result, weight = backward.get(node.output[0], (node.output[0], node.input[1] if len(node.input) > 1 else ""))
        if node.op_type != "Conv" or result not in whole or weight not in constants:
            continue
        values = numpy_helper.to_array(constants[weight])
        if node.output[0] in backward:
            values = np.flip(values.swapaxes(0, 1), tuple(range(2, values.ndim)))
        bias = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 and node.input[2] else None
        found = whole_conv(node, values, bias)
        if found is not None and not any(t.name in constants for t in found[1]):
            node.CopyFrom(found[0])
            made += found[1]
    if made:
        graph.initializer.extend(made)
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


def _normalized_axes(model: onnx.ModelProto) -> dict[str, int]:
    """By the values that a Softmax or LogSoftmax reads, its axis."""
    axes = {}
    for node in model.graph.node:
        if node.op_type in ("Softmax", "LogSoftmax") and node.domain in ("", "ai.onnx"):
            axes[node.input[0]] = next((a.i for a in node.attribute if a.name == "axis"), -1)
    return axes


def _directions(rng: np.random.Generator, shape: tuple[int, ...], axis: int | None) -> NDArray[np.float32]:
    """Random signs; without their mean along the ``axis`` that a Softmax normalizes: it does not see what all share."""
    signs = rng.choice(np.array([-1, 1], np.float32), shape)
    return signs if axis is None or shape[axis] < 2 else signs - signs.mean(axis=axis, keepdims=True)


def _influence(products: NDArray[np.float64], positions: NDArray[np.float32]) -> Influence:
    if products.ndim == 1:
        return Influence(products, positions)
    return Influence(np.diag(products).copy(), positions, products)


def _products(backward: Backward, value: str, axis: int) -> str:
    """Name of the products of a value's gradients, summed over all but its channels: [channels, channels].

    Of very many channels their squares only, [channels].
    """
    gradient, rank = backward.gradient(value), len(backward.shape(value))
    others = [a for a in range(rank) if a != axis]
    channels = backward.shape(value)[axis]
    if channels is None or channels > _MOST_CHANNELS:
        square = backward.node("Mul", [gradient] * 2)
        return backward.node("ReduceSum", [square, backward.constant(np.array(others, np.int64))], keepdims=0)
    first = backward.node("Transpose", [gradient], perm=[axis, *others])
    rows = backward.node("Reshape", [first, backward.constant(np.array([channels, -1], np.int64))])
    return backward.node("MatMul", [rows, backward.node("Transpose", [rows], perm=[1, 0])])


def _square_sums(backward: Backward, value: str, axis: int) -> str:
    """Name of the sums of a value's squared gradients over its channels: [samples, ...]."""
    square = backward.node("Mul", [backward.gradient(value)] * 2)
    return backward.node("ReduceSum", [square, backward.constant(np.array([axis], np.int64))], keepdims=0)
