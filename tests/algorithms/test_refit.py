"""Least squares of one layer: against numpy's own, by definition, and against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tetris_onnx.algorithms import refit
from tetris_onnx.algorithms.refit import _DAMPINGS as DAMPINGS
from tetris_onnx.algorithms.refit import CLIP_ROUNDS, LayerSamples

FEATURES, OUT = 12, 5


def problem(n: int = 400, seed: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """Correlated features [n, 12] with a mean, a weight [5, 12] and its outputs with a bias."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((FEATURES, FEATURES)) + 2 * np.eye(FEATURES)
    u = (rng.standard_normal((n, FEATURES)) @ mix + 1.5).astype(np.float32)
    weight = rng.standard_normal((OUT, FEATURES))
    return u, (u @ weight.T + 0.5).astype(np.float32), weight


def random_keep(seed: int = 1) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random((OUT, FEATURES)) < 0.5


def test_refit_is_least_squares_on_the_support() -> None:
    u, y, weight = problem()
    keep = random_keep()
    fitted, bias = LayerSamples(u, y, weight, damping=1e-9).refit(keep)
    assert not fitted[~keep].any()
    for row in range(OUT):
        support = np.flatnonzero(keep[row])
        design = np.column_stack([u[:, support], np.ones(len(u))]).astype(np.float64)
        expected = np.linalg.lstsq(design, y[:, row].astype(np.float64), rcond=None)[0]
        # float32 products of 400 samples
        np.testing.assert_allclose(np.append(fitted[row, support], bias[row]), expected, rtol=1e-3, atol=1e-3)


def test_everything_kept_gives_the_dense_weight() -> None:
    u, y, weight = problem()
    samples = LayerSamples(u, y, weight)
    fitted, bias = samples.refit(np.ones((OUT, FEATURES), bool))
    np.testing.assert_allclose(fitted, weight, atol=1e-4)  # the damping pulls to this weight too
    np.testing.assert_allclose(bias, 0.5, atol=1e-3)
    assert samples.error(fitted) < 1e-6


def test_saliency_is_the_error_that_dropping_a_weight_adds() -> None:
    u, y, weight = problem()
    samples = LayerSamples(u, y, weight, damping=1e-9)
    saliency = samples.saliency()
    for row, feature in ((0, 0), (2, 7), (4, 11)):
        keep = np.ones((OUT, FEATURES), bool)
        keep[row, feature] = False
        error = samples.error(samples.refit(keep)[0]) * samples.power
        assert error == pytest.approx(saliency[row, feature], rel=1e-2)  # the dense fit's own error is rounding


def test_activation_importance_is_what_a_weight_adds_to_the_output() -> None:
    u, y, weight = problem()
    expected = [[np.sqrt(np.mean((w * u[:, f]) ** 2)) for f, w in enumerate(row)] for row in weight]
    np.testing.assert_allclose(LayerSamples(u, y, weight).activation(), expected, rtol=1e-4)


def test_few_samples_give_what_the_primal_problem_gives() -> None:
    u, y, weight = problem(n=8)
    few = LayerSamples(u, y, weight)
    twice = LayerSamples(np.tile(u, (2, 1)), np.tile(y, (2, 1)), weight)  # the same moments, more samples than features
    assert few.few and not twice.few
    keep = random_keep()
    np.testing.assert_allclose(few.saliency(), twice.saliency(), rtol=1e-3, atol=1e-5)
    for a, b in zip(few.refit(keep), twice.refit(keep), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_dead_features_and_constant_outputs() -> None:
    u, y, weight = problem()
    u[:, 3] = 2.0
    y[:, 1] = -1.0
    samples = LayerSamples(u, y, weight)
    fitted, bias = samples.refit(random_keep())
    assert np.isfinite(fitted).all() and np.isfinite(bias).all() and np.isfinite(samples.saliency()).all()
    zeros = LayerSamples(np.zeros_like(u), np.zeros_like(y), weight)
    assert all(np.isfinite(a).all() for a in (*zeros.refit(random_keep()), zeros.saliency()))


def test_refit_before_a_relu_lowers_the_error_behind_it() -> None:
    u, y, weight = problem()
    samples, keep = LayerSamples(u, y, weight), random_keep()
    wanted = np.maximum(y, 0)

    def error(bounds: tuple[float, float]) -> float:
        fitted, bias = samples.refit(keep, bounds)
        return float(((np.maximum(u @ fitted.T + bias, 0) - wanted) ** 2).mean())

    assert error((0, np.inf)) < 0.98 * error((-np.inf, np.inf))


def test_every_round_lowers_what_bounds_the_error_behind_a_relu() -> None:
    u, y, weight = problem()
    samples, keep = LayerSamples(u, y, weight, damping=1e-9), random_keep()
    errors = []
    for rounds in (0, 1, 2, CLIP_ROUNDS):
        fitted, bias = samples.refit(keep, (0, np.inf), clip_rounds=rounds)
        outputs = u @ fitted.T + bias
        errors.append(float((np.where(y > 0, outputs - y, np.maximum(outputs, 0)) ** 2).mean()))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    np.testing.assert_array_equal(samples.refit(keep, clip_rounds=0)[0], samples.refit(keep)[0])  # nothing clips


def test_refit_before_a_clip_lowers_the_error_behind_it() -> None:
    u, y, weight = problem()
    samples, keep = LayerSamples(u, y, weight), random_keep()
    low, high = float(np.quantile(y, 0.3)), float(np.quantile(y, 0.7))

    def error(bounds: tuple[float, float]) -> float:
        fitted, bias = samples.refit(keep, bounds)
        return float(((np.clip(u @ fitted.T + bias, low, high) - np.clip(y, low, high)) ** 2).mean())

    assert error((low, high)) < 0.98 * error((-np.inf, np.inf))


def test_the_damping_is_chosen_on_held_out_inputs() -> None:
    rng = np.random.default_rng(0)
    u, _, weight = problem(n=24)  # hardly more samples than features
    keep = np.ones((OUT, FEATURES), bool)
    y = (u @ weight.T + 10 * rng.standard_normal((24, OUT))).astype(np.float32)
    chosen, fixed = (LayerSamples(u, y, weight).refit(keep, choose_damping=c)[0] for c in (True, False))
    # Noise: stay close to the given weight.
    assert np.linalg.norm(chosen - weight) < 0.7 * np.linalg.norm(fixed - weight)
    u, y, weight = problem(n=4000)
    keep = random_keep()
    chosen, fixed = (LayerSamples(u, y, weight).refit(keep, choose_damping=c)[0] for c in (True, False))
    samples = LayerSamples(u, y, weight)
    assert samples.error(chosen) < samples.error(fixed)  # plenty of samples: no need to


def test_the_damping_is_the_best_of_all_on_the_inputs_held_out() -> None:
    u, _, weight = problem(n=80, seed=5)
    y = (u @ weight.T + 3 * np.random.default_rng(0).standard_normal((80, OUT))).astype(np.float32)
    samples = LayerSamples(u, y, weight, inputs=20)
    held = np.arange(80) // 4 % 4 == 3  # four samples of each of 20 inputs; every fourth input
    rows, s = np.arange(OUT), np.arange(FEATURES)
    errors = {}
    for damping in DAMPINGS:
        train = LayerSamples(u[~held], y[~held], weight, damping)
        fitted, _ = train.refit(np.ones((OUT, FEATURES), bool))
        residual = y[held] - u[held] @ fitted.T
        errors[damping] = float(np.sum((residual - residual.mean(axis=0)) ** 2))
    best = min(errors, key=lambda d: errors[d])
    found = samples._best_damping(rows, s) / samples._lam(1)
    assert found == pytest.approx(best) or errors[min(errors, key=lambda d: abs(d - found))] < 1.01 * errors[best]


def test_damping_that_shrinks_the_means_of_inputs_is_held_against_it() -> None:
    inputs, each = 40, 4
    weight = np.ones((1, FEATURES)) / FEATURES
    chosen = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        level = np.repeat(rng.standard_normal((inputs, 1)), each, axis=0)  # what the inputs differ in
        u = (level + rng.standard_normal((inputs * each, FEATURES))).astype(np.float32)
        y = (u @ weight.T + 2 * rng.standard_normal((inputs * each, 1))).astype(np.float32)  # noise at every position
        samples = LayerSamples(u, y, 0 * weight, inputs=inputs)  # damping pulls to zero
        both = samples._best_damping(np.arange(1), np.arange(FEATURES))
        means = samples._held_out_means
        assert means[0].shape == (inputs // 4, FEATURES) and np.allclose(means[0].mean(axis=0), 0)
        samples.__dict__["_held_out_means"] = tuple(0 * m for m in means)  # positions alone
        chosen.append((both, samples._best_damping(np.arange(1), np.arange(FEATURES))))
    assert np.mean([np.log(both / positions) for both, positions in chosen]) < -0.1, chosen


@pytest.mark.parametrize("few", [False, True])
def test_few_and_many_samples_choose_alike(few: bool) -> None:
    u, y, weight = problem(n=11 if few else 400, seed=2)
    samples = LayerSamples(u, y, weight)
    assert samples.few == few
    fitted, bias = samples.refit(random_keep(), (0, np.inf), choose_damping=True)
    assert np.isfinite(fitted).all() and np.isfinite(bias).all() and samples.error(fitted) < 1
    single, _ = LayerSamples(u[:1], y[:1], weight).refit(random_keep(), choose_damping=True)
    np.testing.assert_allclose(single, np.where(random_keep(), weight, 0), atol=1e-5)  # says nothing: nothing changes


def test_shares_count_samples_more_often() -> None:
    """A sample that counts three times is one that is there three times; the errors are those of that problem."""
    rng = np.random.default_rng(3)
    u, noise = rng.standard_normal((60, 6)).astype(np.float32), rng.standard_normal((60, 4)).astype(np.float32)
    weight = rng.standard_normal((4, 6)).astype(np.float32)
    y = u @ weight.T + 0.5 * noise + np.abs(u[:, :1])
    times = rng.integers(1, 4, 60)
    keep = np.ones((4, 6), bool)
    keep[:2, :3] = keep[2:, 4:] = False
    shared = LayerSamples(u, y, weight, share=(times / times.mean()).astype(np.float32))
    repeated = LayerSamples(np.repeat(u, times, axis=0), np.repeat(y, times, axis=0), weight)
    for bounds in ((-np.inf, np.inf), (0.0, np.inf)):
        (w1, b1), (w2, b2) = (problem.refit(keep, bounds) for problem in (shared, repeated))
        np.testing.assert_allclose(w1, w2, atol=1e-4)  # sums in float32
        np.testing.assert_allclose(b1, b2, atol=1e-4)
    assert shared.error(w1) == pytest.approx(repeated.error(w2), rel=1e-3)
    np.testing.assert_allclose(shared.saliency(), repeated.saliency(), rtol=1e-3, atol=1e-4)


def test_rescaling_finds_a_factor_and_a_shift_per_output() -> None:
    rng = np.random.default_rng(4)
    u, weight = rng.standard_normal((20, 50)).astype(np.float32), rng.standard_normal((3, 50)).astype(np.float32)
    factor, shift = np.array([1.25, 0.8, 1.0]), np.array([3.0, -1.0, 0.0])
    new, bias = LayerSamples(u, ((u @ weight.T) * factor + shift).astype(np.float32), weight).rescale()
    np.testing.assert_allclose(new, weight * factor[:, None], rtol=1e-4)
    np.testing.assert_allclose(bias, shift, atol=1e-4)
    worthless = LayerSamples(u, rng.standard_normal((20, 3)).astype(np.float32), weight).rescale()[0] / weight
    assert worthless.min() >= 0.5 and worthless.max() <= 2, "noise does not turn an output off or around"


@pytest.mark.parametrize("clip", [False, True])
def test_rows_fitted_together_come_out_as_alone(clip: bool) -> None:
    """Each row with a support of its own (one of them empty), in bundles of several rows: the same as row by row."""
    rng = np.random.default_rng(5)
    out, features = 70, 20
    u = (rng.standard_normal((300, features)) @ rng.standard_normal((features, features))).astype(np.float32)
    weight = rng.standard_normal((out, features)).astype(np.float32)
    y = (u @ weight.T + rng.standard_normal(out)).astype(np.float32)
    keep = rng.random((out, features)) < 0.4
    keep[3] = False
    bounds = (0.0, 4.0) if clip else (-np.inf, np.inf)
    together = LayerSamples(u, y, weight)
    fitted, bias = together.refit(keep, bounds)
    assert not fitted[~keep].any()
    for row in range(out):
        alone = LayerSamples(u, y[:, [row]], weight[[row]]).refit(keep[[row]], bounds)
        np.testing.assert_allclose(fitted[row], alone[0][0], atol=1e-3)  # float32 products of 300 samples
        np.testing.assert_allclose(bias[row], alone[1][0], atol=1e-3)


def test_of_many_supports_some_choose_the_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    u = rng.standard_normal((200, FEATURES)).astype(np.float32)
    weight = rng.standard_normal((40, FEATURES)).astype(np.float32)
    samples = LayerSamples(u, (u @ weight.T).astype(np.float32), weight)
    asked = []
    chosen = iter([samples._lam(0.1), samples._lam(10.0)] * 8)

    def best_damping(rows: NDArray[np.int64], features: NDArray[np.int64]) -> float:
        asked.append(rows.tolist())
        return next(chosen)

    monkeypatch.setattr(samples, "_best_damping", best_damping)
    keep = rng.random(weight.shape) < 0.6
    assert len(np.unique(keep, axis=0)) == 40
    fitted, _ = samples.refit(keep, choose_damping=True)
    assert len(asked) == 16 and sorted(asked)[0] == [0] and sorted(asked)[-1] == [39]
    monkeypatch.undo()
    fixed, _ = LayerSamples(u, (u @ weight.T).astype(np.float32), weight, damping=1.0).refit(keep)
    np.testing.assert_allclose(fitted, fixed, atol=1e-6)  # 1: the geometric mean of .1 and 10


@pytest.mark.parametrize("few", [False, True])
def test_a_set_of_many_rows_is_parted_and_fitted_as_one(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that keeps all weights: one factor for all its parts, and weights that are those of one part."""
    rng = np.random.default_rng(7)
    u = rng.standard_normal((FEATURES - 4 if few else 300, FEATURES)).astype(np.float32)
    weight = rng.standard_normal((300, FEATURES)).astype(np.float32)
    y = (u @ weight.T + rng.standard_normal((len(u), 300))).astype(np.float32)
    factors, tasks = [], []
    plain, run = refit.cholesky, refit.run_threads

    def cholesky(matrix: NDArray) -> tuple[NDArray, bool]:
        factors.append(matrix.shape)
        return plain(matrix)

    def run_threads(function: Any, given: Any, workers: int | None = None) -> list:
        given = list(given)
        tasks.append(len(given))
        return run(function, given, workers)

    monkeypatch.setattr(refit, "cholesky", cholesky)
    monkeypatch.setattr(refit, "run_threads", run_threads)
    keep = np.ones(weight.shape, bool)
    fitted, bias = LayerSamples(u, y, weight).refit(keep, (0, np.inf))
    assert len(factors) == 1 and tasks[-1] == 3
    monkeypatch.setattr(refit, "_MOST_ROWS", 300)
    alone, alone_bias = LayerSamples(u, y, weight).refit(keep, (0, np.inf))
    assert len(factors) == 2 and tasks[-1] == 1
    np.testing.assert_allclose(fitted, alone, atol=1e-5)
    np.testing.assert_allclose(bias, alone_bias, atol=1e-5)


@pytest.mark.parametrize("few", [False, True])
def test_one_set_chooses_the_same_damping_in_threads(few: bool) -> None:
    rng = np.random.default_rng(8)
    features = 40
    u = rng.standard_normal((32 if few else 200, features)).astype(np.float32)
    weight = rng.standard_normal((300, features)).astype(np.float32)
    chosen = set()
    for noise in (0, 1, 10):
        y = (u @ weight.T + noise * rng.standard_normal((len(u), 300))).astype(np.float32)
        samples = LayerSamples(u, y, np.zeros_like(weight))
        rows = np.arange(300)
        alone = samples._best_damping(rows, np.arange(features))
        assert samples._best_damping(rows, np.arange(features), 2) == alone
        assert alone == samples._best_damping(rows[::3], np.arange(features))  # of 300 rows every third is looked at
        chosen.add(round(alone / samples._lam(1), 6))
    assert len(chosen) > 1, chosen
