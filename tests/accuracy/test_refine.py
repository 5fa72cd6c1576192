"""Refinement: all weights together come closer to the dense outputs, pruned ones stay zero, and it never does harm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from tetris_onnx import Config, optimize
from tetris_onnx.accuracy import refine
from tetris_onnx.accuracy.recovery import Recovery, recover
from tetris_onnx.accuracy.refine import recover_and_refine
from tetris_onnx.algorithms.blocks import original_mask
from tetris_onnx.data.calibration import Data
from tetris_onnx.graph import io
from tetris_onnx.optimize import masked_dense
from tetris_onnx.planner import prepare, survey

# A residual network with a BatchNormalization, a grouped convolution, one of stride 2, and both kinds of products.
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 12, 12] x) => (float[N, 10] z)
{
  s0 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, ws)
  s1 = BatchNormalization (s0, scale, shift, mean, variance)
  s = Relu (s1)
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (s, wa)
  b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 2> (s, wb)
  t0 = Add (b, a)
  t = Relu (t0)
  c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (t, wc)
  u = Relu (c)
  g = GlobalAveragePool (u)
  f = Flatten (g)
  h0 = MatMul (f, wh)
  h = Relu (h0)
  y = Gemm <transB = 1> (h, wy, by)
  z = Softmax (y)
}
"""
SHAPES = {
    **{"ws": (16, 3, 3, 3), "wa": (16, 16, 3, 3), "wb": (16, 8, 3, 3), "wc": (32, 16, 3, 3), "wh": (32, 24)},
    **{"wy": (10, 24), "by": (10,), "scale": (16,), "shift": (16,), "mean": (16,), "variance": (16,)},
}
# Blocks are chosen by the quickest means: what counts is what comes after.
CONFIG = Config(sparsity=0.5, block_size=(8, 8), importance="l1", reorder="none", workers=1, refine=6)


def network(text: str = TEXT) -> onnx.ModelProto:
    rng = np.random.default_rng(4)
    model = onnx.parser.parse_model(text)
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values *= np.exp(rng.standard_normal(shape[:2] + (1,) * (len(shape) - 2))) / 4
        values = np.abs(values) if name == "variance" else values
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return model


def images(n: int, seed: int) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).standard_normal((n, 3, 14, 14))
    return (x[..., :-2, :-2] + x[..., 1:-1, :-2] + x[..., :-2, 1:-1] + x[..., 2:, 2:]).astype(np.float32)


def refined(
    model: onnx.ModelProto, config: Config = CONFIG, n: int = 192
) -> tuple[Recovery, tuple[str, ...], onnx.ModelProto]:
    """The recovery, its notes, and the dense model with its weights."""
    graph = prepare(io.to_graph(model))
    candidates = survey(graph, config)
    found, notes = recover_and_refine(graph, candidates, io.to_proto(graph, model), config, {"x": images(n, seed=1)})
    return found, notes, masked_dense(model, found.plan, found.weights)


def output_error(model: onnx.ModelProto, dense: onnx.ModelProto, x: NDArray) -> float:
    """Squared error of the logits over their variance."""
    found = []
    for one in (dense, model):
        extended = onnx.ModelProto()
        extended.CopyFrom(one)
        extended.graph.output.append(onnx.helper.make_empty_tensor_value_info("y"))
        session = ort.InferenceSession(extended.SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(["y"], {"x": x})[0])
    return float(((found[1] - found[0]) ** 2).sum() / ((found[0] - found[0].mean(axis=0)) ** 2).sum())


def test_the_outputs_come_closer_and_pruned_weights_stay_zero() -> None:
    model, unseen = network(), images(128, seed=3)
    _, none, before = refined(model, replace(CONFIG, refine=0), 320)
    found, notes, after = refined(model, replace(CONFIG, refine=25), 320)
    assert none == () and len(notes) == 1 and notes[0].startswith("refined in ")
    errors = output_error(before, model, unseen), output_error(after, model, unseen)
    assert errors[1] < 0.8 * errors[0], errors
    assert len(found.plan) >= 4
    for decision in found.plan:
        weight = found.weights[decision.layer].weight
        keep = original_mask(decision.keep, decision.block_size, decision.out_perm, decision.in_perm)
        assert not weight[~keep].any() and weight[keep].any()
        assert weight.dtype == np.float32
    assert {"a", "b", "c"} <= {decision.layer for decision in found.plan}


def test_it_depends_on_nothing_but_its_seed() -> None:
    runs = [refined(network(), replace(CONFIG, seed=seed), 160)[0] for seed in (0, 0, 1)]
    assert all(np.array_equal(new.weight, runs[1].weights[name].weight) for name, new in runs[0].weights.items())
    assert any(not np.array_equal(new.weight, runs[2].weights[name].weight) for name, new in runs[0].weights.items())


def test_after_a_pass_that_does_harm_steps_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps some hundred times too large: the first pass is undone, and later ones help."""
    monkeypatch.setattr(refine, "_RATE", 300 * refine._RATE)
    note = refined(network(), replace(CONFIG, refine=12), 320)[1][0]
    before, after = (float(part.split()[-1]) for part in note.split(" on ")[0].split(" -> "))
    assert after < 0.9 * before, note
    monkeypatch.setattr(refine, "_HARM", np.inf)  # not undone
    assert "in vain" in refined(network(), replace(CONFIG, refine=12), 320)[1][0]


def test_steps_that_do_harm_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "_RATE", 3.0)
    monkeypatch.setattr(refine, "_HARM", np.inf)
    given = {}

    def noted(*arguments: object, **_: object) -> Recovery:
        given["recovery"] = recover(*arguments)  # type: ignore[arg-type]
        return given["recovery"]

    monkeypatch.setattr(refine, "recover", noted)
    found, notes, _ = refined(network())
    assert "in vain" in notes[0]
    assert all(found.weights[name] is new for name, new in given["recovery"].weights.items())


@pytest.mark.parametrize(
    ("change", "config", "n", "why"),
    [
        ("Softmax", CONFIG, 8, "8 samples are too few"),
        ("Softmax", replace(CONFIG, memory=100), 64, "a single sample takes more than the memory"),
        ("Erf", CONFIG, 64, "an operator behind them has no known derivative"),
    ],
)
def test_where_it_cannot_be_the_recovery_has_all_samples(change: str, config: Config, n: int, why: str) -> None:
    text = TEXT.replace("z = Softmax (y)", f"z = {change} (y)")
    found, notes, _ = refined(network(text), config, n)
    assert len(notes) == 1 and notes[0].startswith("not refined: ") and why in notes[0]
    plain, none, _ = refined(network(text), replace(config, refine=0), n)
    assert none == ()
    for name, new in plain.weights.items():
        np.testing.assert_array_equal(new.weight, found.weights[name].weight)
    assert refined(network(text), replace(config, refine=None), n)[1] == ()  # nobody asked for it


def test_batches_of_a_fixed_size_are_kept_whole() -> None:
    text = TEXT.replace("float[N,", "float[24,")
    assert "24 samples are too few" in refined(network(text), CONFIG, 24)[1][0]
    assert " over 48 samples" in refined(network(text), CONFIG, 72)[1][0]


def test_what_takes_minutes_is_done_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "_MOST_WORK", 1000)
    assert refined(network(), replace(CONFIG, refine=None), 64)[1] == ()
    assert refined(network(), replace(CONFIG, refine=1), 64)[1][0].startswith("refined")


def test_the_whole_pipeline_shows_progress_and_says_what_came_of_it() -> None:
    calls: list[tuple[str, int, int]] = []
    samples = Data("samples", {"x": images(64, seed=1)})
    result = optimize(network(), CONFIG, calibration=samples, progress=lambda *call: calls.append(call))
    assert [(done, total) for stage, done, total in calls if stage == "refine"] == [(i, 6) for i in range(7)]
    assert any(note.startswith("refined in ") for note in result.report.notes)
    assert result.report.max_error < 1e-4  # the block-sparse model computes what the refined weights say
