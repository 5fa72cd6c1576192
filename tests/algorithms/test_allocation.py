"""Allocation: the optimum by brute force, the budget to the last digit, and options that make sense."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tetris_onnx.algorithms.allocation import MOST_OPTIONS, BudgetError, Options, allocate, kept_counts, kept_shares


def random_layers(rng: np.random.Generator, layers: int, most: int, falling: bool) -> list[Options]:
    made = []
    for _ in range(layers):
        n = int(rng.integers(1, most + 1))
        cost, loss = rng.random(n) * 10 ** rng.uniform(-2, 2), rng.random(n) * 10 ** rng.uniform(-4, 1)
        if falling:
            cost, loss = np.sort(cost), np.sort(loss)[::-1].copy()
        made.append(Options(np.arange(1, n + 1), cost, loss))
    return made


def totals(layers: list[Options], choice: tuple[int, ...] | list[int]) -> tuple[float, float]:
    return (
        sum(float(o.cost[i]) for o, i in zip(layers, choice, strict=True)),
        sum(float(o.loss[i]) for o, i in zip(layers, choice, strict=True)),
    )


@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_within_the_budget(seed: int, falling: bool) -> None:
    rng = np.random.default_rng(seed)
    layers = random_layers(rng, layers=4, most=6, falling=falling)
    low = sum(o.cost.min() for o in layers)
    high = sum(o.cost.max() for o in layers)
    for share in (0.0, 0.1, 0.4, 0.8, 1.0):
        budget = low + share * (high - low)
        choices = itertools.product(*(range(o.cost.size) for o in layers))
        within = [c for c in choices if totals(layers, c)[0] <= budget]
        best = min(totals(layers, c)[1] for c in within)
        cost, loss = totals(layers, allocate(layers, budget))
        assert cost <= budget
        assert loss <= best * (1 + 2e-4)  # the solver's gap, and its rounding


def test_a_budget_that_a_choice_meets_exactly_is_used_up() -> None:
    options = Options(np.arange(1, 4), np.array([0.1, 0.2, 0.3]), np.array([1.0, 0.5, 0.1]))
    assert totals([options] * 7, allocate([options] * 7, sum([0.2] * 7)))[1] == pytest.approx(3.5)
    assert allocate([options, options], 0.2 + 0.2) == [1, 1]


def test_a_budget_for_everything_keeps_everything() -> None:
    layers = random_layers(np.random.default_rng(1), 5, 8, falling=True)
    assert allocate(layers, 1e9) == [o.cost.size - 1 for o in layers]


def test_an_impossible_budget_is_an_error() -> None:
    layers = [Options(np.array([1, 2]), np.array([3.0, 4.0]), np.array([1.0, 0.0]))]
    with pytest.raises(BudgetError, match=r"costs 3, more than the budget of 2\.5"):
        allocate(layers, 2.5)


def test_no_layers_need_no_budget() -> None:
    assert allocate([], 0.0) == []


def test_many_layers_with_many_options_are_within_the_budget() -> None:
    rng = np.random.default_rng(2)
    layers = [
        Options(np.arange(1, 65), np.linspace(0.02, 1, 64) * 10**e, 10**s * np.linspace(1, 0, 64) ** p)
        for e, s, p in zip(rng.uniform(5, 9, 60), rng.uniform(-6, 0, 60), rng.uniform(1, 8, 60), strict=True)
    ]
    budget = 0.4 * sum(o.cost[-1] for o in layers)
    cost, loss = totals(layers, allocate(layers, budget))
    uniform = totals(layers, [24] * 60)
    assert uniform[0] <= budget and cost <= budget and cost > 0.99 * budget
    assert loss < 0.5 * uniform[1]


def test_shares_count_blocks_at_the_edge_with_what_they_hold() -> None:
    # 5 x 3 in blocks of 2 x 2: 4, 4, then two of 2 (2 x 1, 2 x 1), one of 2 (1 x 2) and one of 1.
    np.testing.assert_allclose(kept_shares((5, 3), (2, 2)) * 15, [0, 4, 8, 10, 12, 14, 15])


@pytest.mark.parametrize("blocks", [1, 2, 4, 65, 66, 10**5])
def test_counts_to_choose_from(blocks: int) -> None:
    counts = kept_counts(blocks)
    assert counts[0] == 1 and counts[-1] == blocks and counts.size == min(blocks, MOST_OPTIONS)
    assert (np.diff(counts) > 0).all()


@pytest.mark.parametrize(
    "arrays",
    [([1], [1.0, 2.0], [0.0]), ([1], [np.inf], [0.0]), ([1], [1.0], [np.nan]), ([], [], [])],
)
def test_options_that_make_no_sense_are_an_error(arrays: tuple[list, list, list]) -> None:
    kept, cost, loss = arrays
    with pytest.raises(ValueError, match=r"options of|finite"):
        Options(np.array(kept, np.int64), np.array(cost), np.array(loss))
