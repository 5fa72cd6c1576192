"""Improve all weights of a pruned network together, so that its outputs follow the dense network's on samples.

The recovery fits one layer at a time, each to its own outputs. What is left of the errors adds up, and no layer knows
what the others could make up for. Here the kept weights and the biases of all fitted layers take gradient steps at once
on the squared error of the network's outputs (before a Softmax or the like) over their variance: distillation from the
dense network (Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015), without labels. It is a few passes
of training on the calibration samples, with Adam (Kingma & Ba, 2015), whose steps are measured in each tensor's own
size. Images are mirrored and shifted a little, as the dense network answers for those too. The backward pass is an
ONNX graph (`graph.backward`) that onnxruntime runs: no training framework is needed.

One in eight samples is held out, of the recovery too: the weights are taken that do best on those, which are the
recovery's own where no step helps. A pass that does much harm is undone, and the next ones take smaller steps: how
large they may be differs from network to network by more than ten times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tetris_onnx.accuracy.recovery import Recovery, recover
from tetris_onnx.algorithms.error_search import support
from tetris_onnx.config import Config
from tetris_onnx.data.augment import mirrored_or_shifted
from tetris_onnx.data.calibration import Samples, batches, count, fixed_batch, model_inputs, select
from tetris_onnx.graph import io
from tetris_onnx.graph.backward import Backward, UnknownDerivativeError
from tetris_onnx.graph.layers import Layer
from tetris_onnx.graph.outputs import with_outputs
from tetris_onnx.graph.tensors import in_files
from tetris_onnx.passes.pipeline import Pass, run_passes
from tetris_onnx.passes.set_weights import NewWeights, set_weights
from tetris_onnx.plan import Plan
from tetris_onnx.planner import Candidate, Progress
from tetris_onnx.session import SessionError, open_session, run

_HELD_OUT = 8  # one in so many samples is held out
_LEAST_SAMPLES = 16
_ENOUGH_SAMPLES = 256  # fewer are refined with only where that is asked for: of few, each one held out is missed
_ROUND = 8  # samples are fitted in batches of a divisor of their number
# Updates of a run where nobody says how many passes, passes at most, and multiplications at most.
_UPDATES = 400
_MOST_PASSES = 60
_MOST_WORK = 10**13
_TIMES_FORWARD = 4  # the dense network, the pruned one, its gradients by values and by weights
_BATCHES = (4, 32)  # samples of an update
_UPDATES_OF_A_PASS = 28
_MOST_BYTES = 10**9  # of a model: it is held several times
_VALUES = 3  # what a pass holds for each value: it, its gradient, and what is made on the way
# Steps relative to a tensor's root mean square: 3e-3 is where ResNet-20 gains most in 10 and in 30 passes.
_RATE = 3e-3
_WARM_UP = 0.1  # share of the updates in which the steps grow to their full size; then they shrink by a cosine
_DECAY = (0.9, 0.999)
# A pass that raises the error by more than this is undone. What steps add to it grows as they do: the next ones are as
# much smaller as it was too large, and by this at least.
_HARM = 2.0
_LEAST_SLOWER, _MOST_SLOWER = 0.25, 0.01


@dataclass(frozen=True, eq=False)
class _Parameter:
    """A weight or bias that is refined, and where the graph keeps it."""

    name: str  # of the initializer
    values: NDArray[np.float32]
    keep: NDArray[np.bool_] | None  # None: all

    def rate(self) -> float:
        """The size of a step: a share of the root mean square of what is kept."""
        kept = self.values if self.keep is None else self.values[self.keep]
        return _RATE * float(np.sqrt(np.square(kept, dtype=np.float64).mean())) if kept.size else 0.0


def recover_and_refine(
    graph: gs.Graph,
    candidates: Sequence[Candidate],
    model: onnx.ModelProto,
    config: Config,
    samples: Samples,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> tuple[Recovery, tuple[str, ...]]:
    """Prune as `recovery.recover` does, with some samples held out, then refine all weights together on the others.

    Returns the recovery with the better of the weights before and after, on the held-out samples, and what to tell the
    user. ``config.refine``: passes over the samples; 0: all samples go to the recovery and nothing is refined. Weights
    that the plan drops stay exactly zero. Deterministic for a seed. Memory is bounded by ``config.memory``.
    """
    inputs = model_inputs(model)
    arguments = graph, candidates, model, config
    n = count(samples, inputs)
    unit = fixed_batch(inputs) or _ROUND
    fitted = (n - n // _HELD_OUT) // unit * unit
    layers = [c.layer for c in candidates if not c.layer.why_dense and not c.options.skip]
    passes = _default_passes(layers, n, fitted) if config.refine is None else config.refine
    if passes == 0 or not any(not c.why_dense for c in candidates):
        return recover(*arguments, samples, plan, progress), ()
    if why_not := _why_not(layers, model, config, n, fitted):
        notes = () if config.refine is None else (f"not refined: {why_not}",)
        return recover(*arguments, samples, plan, progress), notes
    held_out = np.zeros(n, bool)
    held_out[np.linspace(0, n - 1, n - fitted).round().astype(np.int64)] = True
    fit, test = select(samples, inputs, ~held_out), select(samples, inputs, held_out)
    recovery = recover(*arguments, fit, plan, progress)
    try:
        weights, note = _refine(graph, candidates, model, config, (fit, test), recovery, passes, progress)
    except (SessionError, UnknownDerivativeError) as error:
        return recovery, (f"not refined: {error}",)
    return replace(recovery, weights=weights), (note,)


def _default_passes(layers: Sequence[Layer], n: int, fitted: int) -> int:
    """How many passes over the samples to make where nobody says: as many as take a minute or two, if any do."""
    if n < _ENOUGH_SAMPLES or not fitted:
        return 0
    work = _TIMES_FORWARD * fitted * sum(x.multiplications or 0 for x in layers)
    updates = -(-fitted // _batch(fitted))
    return min(_MOST_PASSES, -(-_UPDATES // updates), _MOST_WORK // max(work, 1))


def _why_not(layers: Sequence[Layer], model: onnx.ModelProto, config: Config, n: int, fitted: int) -> str:
    """Why the ``layers`` cannot be refined; nothing if they can."""
    if n < _LEAST_SAMPLES or not fitted:
        return f"{n} samples are too few to hold some out"
    if in_files(model) or model.ByteSize() > _MOST_BYTES:
        return "the model is too large to be held several times"
    try:
        backward = Backward(model)
        for value, _ in backward.targets():
            backward.seed(value, value)
    except UnknownDerivativeError as error:
        return str(error)
    if not backward.gradients([x.name for x in layers]):
        return "no gradients are known by the layers: an operator behind them has no known derivative"
    if _bytes_of_sample(backward.model([], [])) * (fixed_batch(model_inputs(model)) or 1) > config.memory:
        return "a single sample takes more than the memory allowed"
    return ""


def _batch(fitted: int) -> int:
    least, most = _BATCHES
    return min(max(fitted // _UPDATES_OF_A_PASS, least), most)


def _bytes_of_sample(model: onnx.ModelProto) -> int:
    """What a forward and backward pass of one sample takes."""
    total = 0
    for value in model.graph.value_info:
        sizes = [d.dim_value if d.HasField("dim_value") else 1 for d in value.type.tensor_type.shape.dim]
        total += math.prod(sizes[1:])
    return total * np.dtype(np.float32).itemsize * _VALUES


def _refine(
    graph: gs.Graph,
    candidates: Sequence[Candidate],
    model: onnx.ModelProto,
    config: Config,
    samples: tuple[Samples, Samples],
    recovery: Recovery,
    passes: int,
    progress: Progress | None,
) -> tuple[dict[str, NewWeights], str]:
    """The refined weights by layer, and a line that says what came of it. ``samples``: to fit and to judge by."""
    fit, test = samples
    pruned = run_passes(graph, [Pass("set_weights", partial(set_weights, weights=recovery.weights))])
    student = _Student(model, io.to_proto(pruned, model), candidates, recovery, config)
    rng = np.random.default_rng(config.seed)
    values = [p.values.copy() for p in student.parameters]
    optimizer = _Adam(student.parameters)
    n = count(fit, student.inputs)
    batch = min(_batch(n), max(config.memory // max(_bytes_of_sample(student.model), 1), 1))
    batch = fixed_batch(student.inputs) or batch
    scale = student.variances(fit, batch)
    first = best = student.error(test, values, scale, batch)
    found, best_pass = [v.copy() for v in values], 0
    updates = passes * (n // batch)
    update, size = 0, 1.0
    for done in range(passes):
        if progress is not None:
            progress("refine", done, passes)
        order = rng.permutation(n)
        for start in range(0, n - batch + 1, batch):
            feed = select(fit, student.inputs, np.sort(order[start : start + batch]))
            feed = mirrored_or_shifted(feed, student.inputs, rng)
            gradients = student.gradients(feed, values, scale, batch)
            optimizer.step(values, gradients, size * _pace(update, updates))
            update += 1
        error = student.error(test, values, scale, batch)
        if error < best:
            best, best_pass, found = error, done + 1, [v.copy() for v in values]
        elif not error <= _HARM * best:  # no number, too
            size *= min(max(best / error, _MOST_SLOWER), _LEAST_SLOWER) if math.isfinite(error) else _MOST_SLOWER
            values = [v.copy() for v in found]
            optimizer = _Adam(student.parameters)
    if progress is not None:
        progress("refine", passes, passes)
    if not best_pass:
        return (
            recovery.weights,
            f"refined in vain: {passes} passes did not lower the error of the outputs ({first:.3g})",
        )
    note = (
        f"refined in {best_pass} of {passes} passes over {n} samples: squared error of the outputs over their variance "
        f"{first:.3g} -> {best:.3g} on {count(test, student.inputs)} others (errors of single layers: before that)"
    )
    return student.weights(found), note


class _Student:
    """The pruned network with its weights as inputs, its gradients, and the dense network that says what is right."""

    def __init__(
        self,
        dense: onnx.ModelProto,
        pruned: onnx.ModelProto,
        candidates: Sequence[Candidate],
        recovery: Recovery,
        config: Config,
    ) -> None:
        self.inputs = model_inputs(pruned)
        self._layers: list[tuple[Layer, NewWeights]] = []
        self.parameters: list[_Parameter] = []
        backward = Backward(pruned)
        self._targets = list(dict(backward.targets()).items())
        given = []
        errors = []
        for i, (value, shape) in enumerate(self._targets):
            given.append(helper.make_tensor_value_info(f"dense {i}", onnx.TensorProto.FLOAT, [None, *shape]))
            given.append(helper.make_tensor_value_info(f"scale {i}", onnx.TensorProto.FLOAT, []))
            difference = backward.node("Sub", [value, f"dense {i}"])
            backward.seed(value, backward.node("Mul", [difference, f"scale {i}"]))
            errors.append(backward.node("ReduceSum", [backward.node("Mul", [difference] * 2)], keepdims=0))
        constants = {t.name: t for t in pruned.graph.initializer}
        nodes = {node.input[1]: node for node in pruned.graph.node if len(node.input) > 1}
        # Layers come in node order; those whose names have a weight of the recovery.
        fitted = [c.layer for c in candidates if f"{c.layer.name}/weight_refit" in nodes]
        known = backward.gradients([nodes[f"{x.name}/weight_refit"].output[0] for x in fitted])
        results = []
        for layer in fitted:
            names = f"{layer.name}/weight_refit", f"{layer.name}/bias_refit"
            node = nodes[names[0]]
            if node.output[0] not in known or any(constants[m].data_type != onnx.TensorProto.FLOAT for m in names):
                continue
            try:
                by_weight = backward.weight_gradient(node)
            except UnknownDerivativeError:
                continue
            axis = 1 if layer.is_conv else len(backward.shape(node.output[0])) - 1
            results += [by_weight, backward.bias_gradient(node.output[0], axis)]
            weight, bias = (numpy_helper.to_array(constants[m]) for m in names)
            self.parameters += [
                _Parameter(names[0], weight, _kept(layer, recovery.plan)),
                _Parameter(names[1], bias, None),
            ]
            self._layers.append((layer, recovery.weights[layer.name]))
        if not results:
            raise UnknownDerivativeError("no gradients are known by the weights that were fitted")
        self._start = recovery.weights
        free = [p.name for p in self.parameters]
        self.model = backward.model(results, given, free)
        self._gradients = open_session(self.model, threads=config.workers)
        self._errors = open_session(backward.model(errors, given, free), threads=config.workers)
        self._dense = open_session(with_outputs(dense, (value for value, _ in self._targets)), threads=config.workers)

    def variances(self, samples: Samples, batch: int) -> list[float]:
        """Of each target of the dense network the sum of its values' variances over the samples."""
        n = count(samples, self.inputs)
        sums = [np.zeros(shape) for _, shape in self._targets]
        squares = [0.0] * len(sums)
        for _, feed in batches(samples, self.inputs, batch):
            for i, value in enumerate(run(self._dense, feed, "the model")):
                sums[i] += value.sum(axis=0, dtype=np.float64)
                squares[i] += float(np.square(value, dtype=np.float64).sum())
        spreads = [s / n - float(np.square(m / n).sum()) for s, m in zip(squares, sums, strict=True)]
        return [v if v > 1e-9 * s / n else max(s / n, 1e-30) for v, s in zip(spreads, squares, strict=True)]

    def gradients(
        self, feed: Samples, values: Sequence[NDArray], scale: Sequence[float], batch: int
    ) -> Sequence[NDArray]:
        """Of the mean relative squared error of the outputs, by each parameter."""
        factors = [2 / (batch * len(scale) * s) for s in scale]
        return run(self._gradients, self._feed(feed, values, factors), "the model")

    def error(self, samples: Samples, values: Sequence[NDArray], scale: Sequence[float], batch: int) -> float:
        """The squared error of the outputs over their variance, the mean over the outputs."""
        total = 0.0
        for _, feed in batches(samples, self.inputs, batch):
            errors = run(self._errors, self._feed(feed, values, [1.0] * len(scale)), "the model")
            total += sum(float(e) / s for e, s in zip(errors, scale, strict=True))
        return total / len(scale) / count(samples, self.inputs)

    def weights(self, values: Sequence[NDArray]) -> dict[str, NewWeights]:
        """The weights of all layers, those of ``values`` in the place of the ones before."""
        found = dict(self._start)
        for i, (layer, old) in enumerate(self._layers):
            weight, bias = values[2 * i : 2 * i + 2]
            weight = weight.T if layer.stored_transposed else weight
            found[layer.name] = NewWeights(
                np.ascontiguousarray(weight, old.weight.dtype), bias.astype(old.bias.dtype, copy=False)
            )
        return found

    def _feed(self, feed: Samples, values: Sequence[NDArray], scale: Sequence[float]) -> dict[str, Any]:
        dense = run(self._dense, feed, "the model")
        given: dict[str, Any] = dict(feed)
        for i, value in enumerate(dense):
            given |= {f"dense {i}": value, f"scale {i}": np.array(scale[i], np.float32)}
        return given | {p.name: value for p, value in zip(self.parameters, values, strict=True)}


class _Adam:
    """Adam, with steps relative to the size of each parameter; what a plan drops does not move."""

    def __init__(self, parameters: Sequence[_Parameter]) -> None:
        self._keep = [p.keep for p in parameters]
        self._rates = [p.rate() for p in parameters]
        self._moments = [(np.zeros_like(p.values), np.zeros_like(p.values)) for p in parameters]
        self._count = 0

    def step(self, values: Sequence[NDArray], gradients: Sequence[NDArray], pace: float) -> None:
        """Change ``values`` in place."""
        self._count += 1
        a, b = _DECAY
        for value, gradient, keep, rate, (mean, power) in zip(
            values, gradients, self._keep, self._rates, self._moments, strict=True
        ):
            kept = gradient if keep is None else np.where(keep, gradient, np.float32(0))
            mean += (1 - a) * (kept - mean)
            power += (1 - b) * (np.square(kept) - power)
            size = np.sqrt(power / (1 - b**self._count)) + np.finfo(np.float32).tiny
            value -= np.float32(pace * rate / (1 - a**self._count)) * mean / size


def _pace(update: int, updates: int) -> float:
    """The share of the full step: a linear start, then half a cosine to zero."""
    done = update / max(updates, 1)
    return min((update + 1) / max(_WARM_UP * updates, 1), (1 + math.cos(math.pi * done)) / 2)


def _kept(layer: Layer, plan: Plan) -> NDArray[np.bool_] | None:
    """Which weights stay, in the form that the layer's node stores; None for all."""
    decision = plan.get(layer.name)
    if decision is None:
        return None
    taps = math.prod(layer.weight_shape[2:])
    keep = support((decision.out_perm, decision.in_perm), decision.block_size, decision.keep, taps)
    return layer.stored(keep.reshape(layer.weight_shape))
