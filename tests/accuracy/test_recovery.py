"""Pruning with calibration samples: features are what a layer multiplies; the result is closer to the dense model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from tetris_onnx import Config, optimize, planner
from tetris_onnx.accuracy import recovery
from tetris_onnx.accuracy.activations import Activations, Seen
from tetris_onnx.accuracy.recovery import Recovery, layer_samples, output_worth, patches, recover
from tetris_onnx.algorithms.coupling import Coupling
from tetris_onnx.config import ConfigError, LayerRule
from tetris_onnx.data.calibration import CalibrationError, Data
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import find_layers
from tetris_onnx.optimize import masked_dense
from tetris_onnx.passes import NewWeights
from tetris_onnx.planner import prepare, survey
from tetris_onnx.timing.machine import load_machine

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 12, 12] x) => (float[N, T, 24] y)
{
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
  ar = Relu (a)
  b = Conv <kernel_shape = [3, 2], strides = [2, 1], pads = [0, 1, 2, 0], dilations = [1, 2]> (ar, w2)
  br = Clip (b, low, high)
  c = Conv <kernel_shape = [1, 1]> (br, w3, b3)
  shape = Constant <value_ints = [0, 32, -1]> ()
  flat = Reshape (c, shape)
  t = Transpose <perm = [0, 2, 1]> (flat)
  m = MatMul (t, w4)
  y = Add (m, b4)
}
"""
SHAPES = {"w1": (32, 3, 3, 3), "b1": (32,), "w2": (32, 32, 3, 2), "w3": (32, 32, 1, 1), "b3": (32,), "w4": (32, 24)}


def network() -> onnx.ModelProto:
    """Convolutions with uneven windows, a clip, and a matrix product over [N, T, 32]; channels of very uneven size."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    constants = {name: rng.standard_normal(shape) / 8 for name, shape in SHAPES.items()}
    for name in ("w1", "w2", "w3"):
        constants[name] *= np.exp(rng.standard_normal((SHAPES[name][0], 1, 1, 1)))
    constants |= {"b4": rng.standard_normal(24), "low": np.array(0.0), "high": np.array(6.0)}
    for name, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return model


def inputs(n: int, seed: int) -> NDArray[np.float32]:
    """Smooth images, so that features are correlated as they are in practice."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 3, 14, 14))
    return (x[..., :-2, :-2] + x[..., 1:-1, :-2] + x[..., :-2, 1:-1] + x[..., 2:, 2:]).astype(np.float32)


CONFIG = Config(sparsity=0.5, block_size=(8, 8))


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    np.savez(tmp_path / "calibration.npz", x=inputs(48, seed=1))
    return tmp_path / "calibration.npz"


def run(model: onnx.ModelProto, x: NDArray) -> NDArray:
    """In plain onnxruntime: the definitions in the model have to say the same as the op library."""
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("name", ["a", "b", "c", "m"])
def test_samples_are_what_the_layer_multiplies(name: str) -> None:
    model = network()
    layer = next(item for item in find_layers(prepare(io.to_graph(model))) if item.name == name)
    x = inputs(5, seed=2)
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(n) for n in (layer.data.name, name) if n != "x"
    )
    session = ort.InferenceSession(extended.SerializeToString(), providers=["CPUExecutionProvider"])
    values = {"x": x} | dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True))
    data, output = values[layer.data.name], values[name]
    samples, bounds = layer_samples(layer, Seen(data, output, None), seed=0)
    assert [float(bound) for bound in bounds] == {"a": [0, np.inf], "b": [0, 6]}.get(name, [-np.inf, np.inf])
    assert samples.features == np.prod(layer.weight_shape[1:])
    # y = W u + b at every position, so nothing is left but rounding (relative to the outputs' variance).
    assert samples.error(layer.weight.reshape(len(layer.weight), -1)) < 1e-9
    if layer.is_conv:
        positions = np.array([0, 7, output[0, 0].size - 1])
        u = patches(layer, data[3], output.shape[2:], positions)
        bias = 0 if layer.bias is None else layer.bias
        expected = output[3].reshape(len(layer.weight), -1)[:, positions].T
        np.testing.assert_allclose(
            u @ layer.weight.reshape(len(layer.weight), -1).T + bias, expected, rtol=1e-4, atol=1e-4
        )


def test_calibration_brings_the_outputs_back(calibration: Path) -> None:
    model = network()
    unseen = inputs(32, seed=3)
    dense = run(model, unseen)
    results = {
        "magnitude": optimize(model, CONFIG),
        "recovered": optimize(model, CONFIG, calibration=calibration),
    }
    error = {k: float(((run(r.model, unseen) - dense) ** 2).mean() / dense.var()) for k, r in results.items()}
    assert error["recovered"] < 0.3 * error["magnitude"], error
    report = results["recovered"].report
    assert report.importance == "hessian" and report.gathers == 0
    pruned = [row for row in report.layers if row.status == "block-sparse"]
    assert [row.layer for row in pruned] == ["b", "c", "m"] or [row.layer for row in pruned] == ["b", "c"]
    assert all(row.output_error is not None and 0 <= row.output_error < 1 for row in pruned)
    assert all(row.density == pytest.approx(0.5, abs=0.1) for row in pruned)


def test_a_plan_is_kept_and_its_weights_fitted(calibration: Path) -> None:
    model = network()
    plan = optimize(model, CONFIG).plan
    unseen = inputs(32, seed=3)
    dense = run(model, unseen)
    plain, fitted = (optimize(model, CONFIG, plan=plan, calibration=c) for c in (None, calibration))
    assert [p.layer for p in fitted.plan] == [p.layer for p in plan]
    for ours, theirs in zip(fitted.plan, plan, strict=True):
        np.testing.assert_array_equal(ours.keep, theirs.keep)
        np.testing.assert_array_equal(ours.in_perm, theirs.in_perm)
    assert ((run(fitted.model, unseen) - dense) ** 2).mean() < 0.5 * ((run(plain.model, unseen) - dense) ** 2).mean()


def test_recovery_is_deterministic_and_leaves_its_inputs_alone(calibration: Path) -> None:
    model = network()
    before = model.SerializeToString()
    one, two = (
        optimize(model, Config(sparsity=0.5, block_size=(8, 8), workers=n), calibration=calibration) for n in (1, 2)
    )
    assert model.SerializeToString() == before
    assert one.model.SerializeToString() == two.model.SerializeToString()


def test_magnitude_importance_still_refits(calibration: Path) -> None:
    model = network()
    config = Config(sparsity=0.5, block_size=(8, 8), importance="l1")
    unseen = inputs(32, seed=3)
    dense = run(model, unseen)
    errors = [
        ((run(optimize(model, config, calibration=c).model, unseen) - dense) ** 2).mean() for c in (None, calibration)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_activation_importance_looks_at_the_inputs(calibration: Path) -> None:
    """Inputs of very uneven size: pruning by what reaches the outputs beats pruning by the weights alone."""
    model = network()
    unseen = inputs(32, seed=3)
    dense = run(model, unseen)
    error = {}
    for importance in ("l1", "activation", "hessian"):
        config = Config(sparsity=0.5, block_size=(8, 8), importance=importance)
        result = optimize(model, config, calibration=calibration)
        assert result.report.importance == importance
        error[importance] = float(((run(result.model, unseen) - dense) ** 2).mean())
    assert error["hessian"] < error["activation"] < error["l1"], error


@pytest.mark.parametrize("importance", ["activation", "hessian"])
def test_importance_that_is_measured_needs_samples(importance: str) -> None:
    with pytest.raises(ConfigError, match=f"importance {importance} is measured on samples"):
        optimize(network(), Config(importance=importance))


def test_calibration_that_does_not_fit_is_one_clear_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", image=inputs(4, seed=1))
    with pytest.raises(CalibrationError, match="no array 'x'; found image"):
        optimize(network(), CONFIG, calibration=tmp_path / "wrong.npz")


def test_samples_too_large_to_compute_with_are_one_clear_line() -> None:
    x = np.full_like(inputs(8, 0), 1e30)
    with pytest.raises(CalibrationError, match="too large to compute with"):
        optimize(network(), Config(sparsity=0.5, block_size=(8, 8)), calibration=Data("samples", {"x": x}))


def test_progress_counts_the_layers(calibration: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    optimize(network(), CONFIG, calibration=calibration, progress=lambda *call: calls.append(call))
    steps = [(done, total) for stage, done, total in calls if stage == "recover"]
    once = [(i, steps[0][1]) for i in range(steps[0][1] + 1)]
    assert steps == 2 * once


TWO_BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 12, 12] x) => (float[N, 10] y)
{
  s0 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, ws)
  s = Relu (s0)
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (s, wa)
  b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (s, wb)
  t0 = Add (b, a)
  t = Relu (t0)
  c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (t, wc)
  u = Relu (c)
  g = GlobalAveragePool (u)
  f = Flatten (g)
  y = MatMul (f, wy)
}
"""


def two_branches() -> onnx.ModelProto:
    rng = np.random.default_rng(4)
    model = onnx.parser.parse_model(TWO_BRANCHES)
    shapes = {"ws": (16, 3, 3, 3), **{name: (16, 16, 3, 3) for name in ("wa", "wb", "wc")}, "wy": (16, 10)}
    for name, shape in shapes.items():
        scale = np.exp(rng.standard_normal(shape[:2] + (1,) * (len(shape) - 2))) / 20
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def relative_errors(model: onnx.ModelProto, dense: onnx.ModelProto, names: list[str], x: NDArray) -> dict[str, float]:
    found = []
    for one in (model, dense):
        extended = onnx.ModelProto()
        extended.CopyFrom(one)
        known = {o.name for o in extended.graph.output}
        extended.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in known)
        session = ort.InferenceSession(extended.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(dict(zip(names, session.run(names, {"x": x}), strict=True)))
    return {
        name: float(((found[0][name] - found[1][name]) ** 2).sum() / found[1][name].var() / found[1][name].size)
        for name in names
    }


def recovered(model: onnx.ModelProto, x: NDArray, config: Config = CONFIG) -> tuple[onnx.ModelProto, Recovery]:
    """The dense model with the recovered weights."""
    graph = prepare(io.to_graph(model))
    proto = io.to_proto(graph, model)
    found = recover(graph, survey(graph, config), proto, config, {"x": x})
    return masked_dense(model, found.plan, found.weights), found


def test_worth_of_an_output_is_what_the_layers_behind_read_of_it() -> None:
    model = two_branches()
    graph = prepare(io.to_graph(model))
    layers = find_layers(graph)
    by_name = {layer.name: layer for layer in layers}
    pruned = by_name["c"].weight.copy()
    pruned[:, 3] = 0
    worth = output_worth(graph, layers, {"c": NewWeights(pruned, np.zeros(16, np.float32))})
    expected = (pruned.astype(np.float64) ** 2).sum(axis=(0, 2, 3))
    expected = np.maximum(expected, 1e-3 * expected.max())
    for name in ("a", "b"):  # both reach c, through the Add
        np.testing.assert_allclose(worth[name], expected / expected.mean())
    # c's channels reach y through the pooling and the Flatten; nothing reads y.
    expected = (by_name["y"].weight.astype(np.float64) ** 2).sum(axis=0)
    np.testing.assert_allclose(worth["c"], expected / expected.mean())
    assert "y" not in worth


@pytest.mark.parametrize("sweeps", [1, 3])
def test_the_best_sweep_wins(sweeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    original = recovery._prune

    def noted(*arguments: object) -> Recovery:
        found.append(original(*arguments))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(recovery, "_prune", noted)
    graph = prepare(io.to_graph(two_branches()))
    proto = io.to_proto(graph, two_branches())
    candidates = survey(graph, replace(CONFIG, sweeps=sweeps))
    result = recover(graph, candidates, proto, replace(CONFIG, sweeps=sweeps), {"x": inputs(48, seed=1)})
    errors = [next(row.output_error for row in one.rows if row.layer == "y") for one in found]
    assert 1 <= len(found) <= sweeps and (sweeps == 1 or len(found) > 1)
    assert all(error is not None for error in errors)
    assert result is found[int(np.argmin(np.array(errors, float)))]


def test_a_small_network_is_swept_twice(calibration: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    optimize(network(), CONFIG, calibration=calibration, progress=lambda *call: calls.append(call))
    assert sum(stage == "recover" and done == 0 for stage, done, _ in calls) == 2


def test_a_layer_before_an_add_makes_up_for_the_other_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, unseen = two_branches(), inputs(32, seed=3)
    config = replace(CONFIG, importance="l1", reorder="none")  # the same blocks, whatever the fits are
    errors = {}
    for together in (True, False):
        if not together:
            monkeypatch.setattr(Activations, "_added_to", lambda self, layer: None)
        result, found = recovered(model, inputs(48, seed=1), config)
        assert {"a", "b", "c"} <= set(found.weights)
        errors[together] = relative_errors(result, model, ["t"], unseen)
    assert errors[True]["t"] < 0.8 * errors[False]["t"], errors


def test_layers_that_stay_dense_make_up_for_those_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load_machine()
    no_products = replace(machine, sparse={**machine.sparse, "product": 1e6})
    monkeypatch.setattr(planner, "load_machine", lambda: no_products)
    model, unseen = two_branches(), inputs(64, seed=3)
    result, found = recovered(model, inputs(256, seed=1))
    assert found.plan.get("y") is None and "y" in found.weights
    assert "s0" not in found.weights  # nothing comes before it
    without = masked_dense(model, found.plan, {name: w for name, w in found.weights.items() if name != "y"})
    after, before = (relative_errors(m, model, ["y"], unseen)["y"] for m in (result, without))
    assert after < 0.9 * before, (after, before)


def test_skipped_layers_are_left_alone() -> None:
    model = two_branches()
    graph = prepare(io.to_graph(model))
    config = Config(sparsity=0.5, block_size=(8, 8), layers=(LayerRule("y", skip=True), LayerRule("c", skip=True)))
    found = recover(graph, survey(graph, config), io.to_proto(graph, model), config, {"x": inputs(48, seed=1)})
    assert {"y", "c"}.isdisjoint(found.weights) and {"a", "b"} <= set(found.weights)


@pytest.mark.parametrize(
    ("n", "allocation", "augment", "copies"),
    [
        (48, "uniform", None, 1),
        (48, "uniform", 0, 0),
        (48, "uniform", 2, 2),
        (128, "uniform", None, 1),
        (129, "uniform", None, 0),
        (2, "uniform", 2, 2),
        (64, "global", None, 1),
        (65, "global", None, 0),
    ],
)
def test_few_images_are_joined_by_varied_copies(
    n: int, allocation: str, augment: int | None, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[tuple[int, int]] = []

    class Spy(recovery.LayerSamples):
        def __init__(self, u: NDArray, *rest: Any, **options: Any) -> None:
            super().__init__(u, *rest, **options)
            problems.append((len(u), self.inputs))

    monkeypatch.setattr(recovery, "LayerSamples", Spy)
    model = network()
    graph = prepare(io.to_graph(model))
    layers = (LayerRule("b", sparsity=0.5), LayerRule("*", skip=True))
    config = replace(CONFIG, allocation=allocation, augment=augment, sweeps=1, layers=layers)
    recover(graph, survey(graph, config), io.to_proto(graph, model), config, {"x": inputs(n, seed=1)})
    # The layer has 6x11 output positions. A sample and its copies are held out together. Blocks are chosen by the
    # samples themselves, if these have as many positions as the layer has features (192).
    assert problems == [(n * 66, n)] * (copies > 0) + [(n * (1 + copies) * 66, n)]


def test_without_copies_the_samples_are_those_there_would_be_without_any() -> None:
    layer = next(x for x in find_layers(prepare(io.to_graph(network()))) if x.name == "b")
    rng = np.random.default_rng(0)
    seen = Seen(rng.standard_normal((6, 32, 12, 12)), rng.standard_normal((6, 32, 6, 11)), None)
    influence = rng.random((2, 6, 11), np.float32)
    found, _ = layer_samples(layer, seen, seed=0, influence=influence, alike=3, copies=False)
    plain, _ = layer_samples(layer, Seen(seen.data[::3], seen.output[::3], None), seed=0, influence=influence)
    assert found.inputs == plain.inputs == 2
    for name in ("u", "y", "_share"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


def test_positions_of_copies_count_the_same_and_those_of_originals_by_their_influence() -> None:
    model = network()
    layer = next(x for x in find_layers(prepare(io.to_graph(model))) if x.name == "b")
    rng = np.random.default_rng(0)
    seen = Seen(rng.standard_normal((4, 32, 12, 12)), rng.standard_normal((4, 32, 6, 11)), None)
    influence = rng.random((2, 6, 11), np.float32)
    samples, _ = layer_samples(layer, seen, seed=0, influence=influence, alike=2)
    assert samples.inputs == 2
    share = samples._share.reshape(4, 66)  # type: ignore[union-attr]
    np.testing.assert_allclose(share.mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(share[1::2], 1, rtol=1e-5)
    wanted = 0.2 + 0.8 * influence / influence.mean()
    np.testing.assert_allclose(share[::2], wanted.reshape(2, 66), rtol=1e-4)


def classifier() -> onnx.ModelProto:
    """Two convolutions and three logits: few of the directions that 32 channels can err in change those."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model("""
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 12, 12] x) => (float[N, 3] z)
{
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, wa)
  ar = Relu (a)
  b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (ar, wb)
  br = Relu (b)
  pooled = GlobalAveragePool (br)
  flat = Flatten (pooled)
  y = Gemm (flat, wy)
  z = Softmax (y)
}
""")
    for name, shape in {"wa": (32, 3, 3, 3), "wb": (32, 32, 3, 3), "wy": (32, 3)}.items():
        model.graph.initializer.append(
            numpy_helper.from_array((rng.standard_normal(shape) / 8).astype(np.float32), name)
        )
    return model


def test_outputs_are_fitted_together_by_what_they_do_to_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    config = Config(block_size=(8, 8), layers=(LayerRule("b", sparsity=0.5), LayerRule("*", sparsity=0.0)), sweeps=1)
    graph = prepare(io.to_graph(model))
    proto, candidates = io.to_proto(graph, model), survey(graph, config)
    samples, unseen = {"x": inputs(128, seed=1)}, inputs(64, seed=3)
    plan = recover(graph, candidates, proto, config, samples).plan
    coupled: list[tuple[int, ...]] = []
    fit = Coupling.fit

    def noted(self: Coupling, weight: NDArray, products: NDArray) -> NDArray:
        coupled.append(weight.shape)
        return fit(self, weight, products)

    def logit_error() -> float:
        weights = recover(graph, candidates, proto, config, samples, plan).weights
        logits = [np.log(run(m, unseen)) for m in (model, masked_dense(model, plan, weights))]
        dense, pruned = (value - value.mean(axis=1, keepdims=True) for value in logits)
        return float(((pruned - dense) ** 2).mean() / dense.var())

    monkeypatch.setattr(Coupling, "fit", noted)
    together = logit_error()
    assert set(coupled) == {(32, 288)}  # the pruned layer, and no other
    measure = recovery.measure_influence
    monkeypatch.setattr(
        recovery, "measure_influence", lambda *a: {k: replace(v, metric=None) for k, v in measure(*a).items()}
    )
    coupled.clear()
    alone = logit_error()
    assert not coupled
    assert together < 0.8 * alone, (together, alone)
