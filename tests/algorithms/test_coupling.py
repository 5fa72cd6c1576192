"""The coupled fit: against the solution written out as one system of equations, and against each row by itself."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tetris_onnx.algorithms import coupling
from tetris_onnx.algorithms.coupling import Coupling, Rows, can_couple
from tetris_onnx.algorithms.refit import LayerSamples

OUT, FEATURES = 7, 12


def metric(seed: int = 3) -> NDArray[np.float64]:
    """Few directions that count, as a network has."""
    mix = np.random.default_rng(seed).standard_normal((2, OUT))
    return mix.T @ mix


def problem(seed: int = 0, n: int = 600) -> tuple[NDArray, NDArray, NDArray]:
    """Correlated features [n, 12], targets that no weights reach, and a weight [7, 12]."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((n, FEATURES)) @ (rng.standard_normal((FEATURES, FEATURES)) + 2 * np.eye(FEATURES))
    weight = rng.standard_normal((OUT, FEATURES))
    return u.astype(np.float32), (u @ weight.T + rng.standard_normal((n, OUT))).astype(np.float32), weight


def supports() -> tuple[NDArray[np.bool_], list[Rows]]:
    """Three supports, one of rows that are not neighbors, one that keeps nothing."""
    rows = [np.array([0, 2, 5]), np.array([1, 3]), np.array([4, 6])]
    features = [np.array([0, 1, 4, 7, 9]), np.array([2, 3, 4, 10, 11]), np.array([], np.int64)]
    keep = np.zeros((OUT, FEATURES), bool)
    for r, f in zip(rows, features, strict=True):
        keep[np.ix_(r, f)] = True
    return keep, [Rows(r, f) for r, f in zip(rows, features, strict=True)]


def written_out(
    gram: NDArray, products: NDArray, towards: NDArray, damping: NDArray, whole: NDArray, keep: NDArray[np.bool_]
) -> NDArray:
    """The same weights from the normal equations of all kept weights at once."""
    root = np.sqrt(damping)
    ridge = whole * np.outer(root, root)
    matrix = np.kron(whole, gram) + np.kron(ridge, np.eye(FEATURES))
    right = (whole @ products + ridge @ towards).ravel()
    kept = keep.ravel()
    weight = np.zeros(keep.size)
    weight[kept] = np.linalg.solve(matrix[np.ix_(kept, kept)], right[kept])
    return weight.reshape(keep.shape)


def test_it_solves_the_normal_equations_of_all_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "_MOST_STEPS", 200)
    monkeypatch.setattr(coupling, "_CLOSE", 1e-12)
    u, y, towards = problem()
    gram, products = u.T @ u / len(u), (y.T @ u / len(u)).astype(np.float64)
    keep, sets = supports()
    damping = np.linspace(0.1, 2, OUT)
    for part in sets:  # one for each support, as a refit chooses it
        damping[part.rows] = damping[part.rows].mean()
    start = np.where(keep, towards, 0)

    found = Coupling(sets, gram, towards, damping, metric()).fit(start, products)

    whole = (1 - coupling._EVEN) / (np.trace(metric()) / OUT) * metric() + coupling._EVEN * np.eye(OUT)
    expected = written_out(gram.astype(np.float64), products, towards, damping, whole, keep)
    assert not found[~keep].any()
    np.testing.assert_allclose(found, expected, atol=1e-3)  # products of float32
    assert np.abs(expected - start).max() > 0.3  # there was something to find


def test_an_even_metric_leaves_rows_as_they_are_fitted_alone() -> None:
    u, y, weight = problem()
    keep, _ = supports()
    alone, together = (LayerSamples(u, y, weight).refit(keep, metric=m) for m in (None, 3.0 * np.eye(OUT)))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0.0, np.inf)])
@pytest.mark.parametrize("shared", [False, True])
def test_refit_with_a_metric_lowers_the_error_in_it(bounds: tuple[float, float], shared: bool) -> None:
    u, y, weight = problem()
    keep, _ = supports()
    share = np.random.default_rng(4).uniform(0.2, 1.8, len(u)).astype(np.float32) if shared else None
    samples = LayerSamples(u, y, weight, damping=1e-3, share=share)

    def error(fitted: NDArray, bias: NDArray) -> float:
        wrong = np.clip(u @ fitted.T + bias, *bounds) - np.clip(y, *bounds)
        return float(np.mean((1 if share is None else share) * np.einsum("no,op,np->n", wrong, metric(), wrong)))

    alone, together = samples.refit(keep, bounds), samples.refit(keep, bounds, metric=metric())
    assert not together[0][~keep].any()
    assert error(*together) < 0.8 * error(*alone)
    assert samples.error(together[0]) < 2 * samples.error(alone[0])  # of single outputs it may grow, not much


def test_it_does_not_depend_on_the_number_of_threads() -> None:
    u, y, weight = problem()
    keep, _ = supports()
    one, two = (LayerSamples(u, y, weight).refit(keep, (0, np.inf), workers=n, metric=metric()) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_metric_that_says_nothing_changes_nothing(value: float) -> None:
    u, y, weight = problem()
    keep, _ = supports()
    samples = LayerSamples(u, y, weight)
    fitted, bias = samples.refit(keep, metric=np.full((OUT, OUT), value))
    np.testing.assert_allclose(fitted, samples.refit(keep)[0], atol=1e-4)
    assert np.isfinite(bias).all()


def test_features_that_never_change_and_few_samples_do_no_harm() -> None:
    u, y, weight = problem()
    u[:, [0, 3, 4]] = 2.0
    keep, _ = supports()
    fitted, bias = LayerSamples(u, y, weight).refit(keep, (0, np.inf), metric=metric())
    assert np.isfinite(fitted).all() and np.isfinite(bias).all()
    few = LayerSamples(u[:5], y[:5], weight)
    np.testing.assert_array_equal(few.refit(keep, metric=metric())[0], few.refit(keep)[0])


def test_a_damping_below_the_rounding_of_the_features_does_no_harm() -> None:
    gram = np.ones((2, 2), np.float32)  # with 1e-9 on its diagonal, in single precision it is singular still
    sets = [Rows(np.arange(3), np.arange(2))]
    towards, products = np.zeros((3, 2)), np.ones((3, 2))
    found = Coupling(sets, gram, towards, np.full(3, 1e-9), np.eye(3)).fit(towards, products)
    assert np.isfinite(found).all()
    assert np.sum((found @ gram - products) ** 2) <= np.sum(products**2)


def test_supports_whose_inverses_take_too_much_memory_are_told() -> None:
    rows, features = np.arange(1), np.arange(2048)
    assert can_couple([Rows(rows, features)] * 64)
    assert not can_couple([Rows(rows, features)] * 65)
