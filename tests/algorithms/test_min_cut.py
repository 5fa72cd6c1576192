"""Least labels: against all labelings of small problems."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tetris_onnx.algorithms.min_cut import least_labels

Pairs = list[tuple[int, int, float]]


def total(labels: tuple[int, ...], costs: list[tuple[float, float]], pairs: Pairs) -> float:
    own = sum(cost[label] for cost, label in zip(costs, labels, strict=True))
    return own + sum(w for i, j, w in pairs if (labels[i], labels[j]) == (0, 1))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_labels_cost_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 8
    costs = [(float(a), float(b)) for a, b in rng.uniform(0, 1, (n, 2))]
    pairs = [(int(i), int(j), float(rng.uniform(0, 1))) for i, j in rng.integers(0, n, (12, 2)) if i != j]
    pairs += [(0, 1, math.inf), (2, 3, math.inf), (3, 2, math.inf)]
    costs[4] = math.inf, 1.0
    found = least_labels(costs, pairs)
    best = min(total(labels, costs, pairs) for labels in itertools.product((0, 1), repeat=n))
    assert total(tuple(map(int, found)), costs, pairs) == pytest.approx(best, rel=1e-6)  # it counts in 5e8 steps
    assert found[4] and found[2] == found[3]


def test_equal_costs_are_labeled_0_and_nothing_is_nothing() -> None:
    assert least_labels([(1.0, 1.0), (0.0, 0.0)], []).tolist() == [False, False]
    assert least_labels([], []).size == 0


def test_a_contradiction_is_an_error() -> None:
    with pytest.raises(ValueError, match="forbidden"):
        least_labels([(0.0, math.inf), (math.inf, 0.0)], [(0, 1, math.inf)])
