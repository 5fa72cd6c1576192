"""The search by true output error: each step against brute force, the whole against what it starts from."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tetris_onnx.algorithms import error_search
from tetris_onnx.algorithms.error_search import by_blocks, choose_blocks, eliminate_blocks, search, support
from tetris_onnx.algorithms.permutation import identity, is_permutation
from tetris_onnx.algorithms.refit import LayerSamples

OUT, IN, TAPS = 10, 9, 2
BLOCK = (4, 3)


def layer(seed: int = 0, n: int = 500) -> LayerSamples:
    rng = np.random.default_rng(seed)
    mix = 0.4 * rng.standard_normal((IN * TAPS, IN * TAPS)) + np.eye(IN * TAPS)
    u = (rng.standard_normal((n, IN * TAPS)) @ mix).astype(np.float32)
    weight = rng.standard_normal((OUT, IN * TAPS))
    return LayerSamples(u, (u @ weight.T).astype(np.float32), weight, damping=1e-6)


def eliminate(
    samples: LayerSamples, rows: NDArray[np.int64], blocks: list[NDArray[np.int64]], most: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """eliminate_blocks for blocks in the features' own order."""
    return eliminate_blocks(*by_blocks(samples.inverse, samples.fitted[rows], blocks), most)


def squared_error(samples: LayerSamples, keep: NDArray[np.bool_]) -> float:
    return samples.error(samples.refit(keep)[0]) * samples.power


def test_eliminate_blocks_drops_the_cheapest_and_tells_its_exact_cost() -> None:
    samples = layer()
    rows = np.array([1, 4, 7])
    blocks = [np.arange(3 * TAPS * i, 3 * TAPS * (i + 1)) for i in range(IN // 3)]
    order, costs = eliminate(samples, rows, blocks)
    assert sorted(order.tolist()) == [0, 1, 2]

    def error(kept: set[int]) -> float:
        keep = np.ones((OUT, IN * TAPS), bool)
        keep[rows] = False
        for i in kept:
            keep[np.ix_(rows, blocks[i])] = True
        return squared_error(samples, keep)

    kept = {0, 1, 2}
    before = error(kept)
    for dropped, cost in zip(order.tolist(), costs.tolist(), strict=True):
        assert dropped == min(kept, key=lambda i: error(kept - {i}))
        kept.discard(dropped)
        after = error(kept)
        assert cost == pytest.approx(after - before, rel=1e-2)  # float32 products
        before = after


@pytest.mark.parametrize(("count", "size"), [(12, 3), (9, 70), (70, 2)])
def test_eliminate_blocks_looks_at_all_that_might_be_the_cheapest(count: int, size: int) -> None:
    """Features so alike that a drop makes others much dearer: costs of an earlier step say little."""
    rng = np.random.default_rng(0)
    d, rows = count * size, 4
    u = rng.standard_normal((3 * d, d // 3)) @ rng.standard_normal((d // 3, d)) + 0.3 * rng.standard_normal((3 * d, d))
    inverse = np.linalg.inv(u.T @ u / len(u) + 0.01 * np.eye(d))
    weight = rng.standard_normal((rows, d)) * rng.uniform(0.2, 2, d)
    blocks = [np.arange(i * size, (i + 1) * size) for i in range(count)]
    order, costs = eliminate_blocks(*by_blocks(inverse, weight, blocks))
    # The plain way, in float64: every block's cost at every step, from the whole inverse.
    live, dropped, told = list(range(count)), 0, iter(costs)
    changed = 0
    first: list[int] | None = None
    while live:
        cost = {
            i: float(
                np.sum(
                    weight[:, blocks[i]]
                    * np.linalg.solve(inverse[np.ix_(blocks[i], blocks[i])], weight[:, blocks[i]].T).T
                )
            )
            for i in live
        }
        ranked = sorted(live, key=cost.__getitem__)
        first = first or ranked
        some = ranked[: max(1, len(live) // 32)]
        assert order[dropped : dropped + len(some)].tolist() == some
        changed += some != first[dropped : dropped + len(some)]
        gone = np.concatenate([blocks[i] for i in some])
        part = np.linalg.solve(inverse[np.ix_(gone, gone)], np.hstack([inverse[gone], weight[:, gone].T]))
        total = float(np.sum(part[:, d:] * weight[:, gone].T))
        assert sum(next(told) for _ in some) == pytest.approx(total, rel=1e-3)  # float32 products
        weight, inverse = weight - (inverse[:, gone] @ part[:, d:]).T, inverse - inverse[:, gone] @ part[:, :d]
        live = [i for i in live if i not in some]
        dropped += len(some)
    assert changed > count // 4, "the order of the first step would not do"


def test_eliminate_blocks_of_uneven_sizes_stops_where_asked() -> None:
    samples = layer()
    blocks = [np.arange(0, 10), np.arange(10, 12), np.arange(12, 18)]
    whole, _ = eliminate(samples, np.array([0]), blocks)
    part, costs = eliminate(samples, np.array([0]), blocks, 2)
    assert part.tolist() == whole[:2].tolist() and len(costs) == 2


def test_choose_blocks_takes_the_cheapest_drops_in_their_order() -> None:
    orders = [np.array([2, 0, 1]), np.array([1, 2, 0])]
    costs = [np.array([1.0, 5.0, 9.0]), np.array([2.0, 3.0, 30.0])]
    assert choose_blocks(orders, costs, 3, 3).tolist() == [[True, True, False], [True, False, False]]
    # The second drop of row 0 is free, but only to be had behind a dear one: together they cost 3 each.
    costs = [np.array([6.0, 0.0, 9.0]), np.array([2.0, 4.0, 30.0])]
    assert choose_blocks(orders, costs, 3, 3).tolist() == [[False, True, False], [True, False, True]]
    assert choose_blocks(orders, costs, 3, 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_search_never_ends_above_its_start_and_drops_what_is_asked(seed: int) -> None:
    samples = layer(seed)
    start = identity(OUT), identity(IN)
    drop = 4
    fixed = search(samples, start, BLOCK, drop, axes=())
    free = search(samples, start, BLOCK, drop)
    for found in (fixed, free):
        assert (~found.keep).sum() == drop
        assert is_permutation(found.out_perm) and is_permutation(found.in_perm)
        keep = support((found.out_perm, found.in_perm), BLOCK, found.keep, TAPS)
        assert found.error == pytest.approx(samples.error(samples.refit(keep)[0]))
    assert free.error < fixed.error, "random weights leave room for better permutations"
    np.testing.assert_array_equal(fixed.out_perm, start[0])
    np.testing.assert_array_equal(fixed.in_perm, start[1])


def test_more_starts_only_lower_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    start = identity(OUT), identity(IN)
    more = [search(layer(seed), start, BLOCK, 4).error for seed in range(4)]
    monkeypatch.setattr(error_search, "_MOST_SHAKES", 0)
    one = [search(layer(seed), start, BLOCK, 4).error for seed in range(4)]
    assert all(a <= b * (1 + 1e-6) for a, b in zip(more, one, strict=True))
    assert sum(more) < sum(one), "random weights have poor local optima"


def test_search_does_not_depend_on_the_number_of_threads() -> None:
    one, two = (search(layer(), (identity(OUT), identity(IN)), BLOCK, 4, workers=n) for n in (1, 2))
    np.testing.assert_array_equal(one.out_perm, two.out_perm)
    np.testing.assert_array_equal(one.keep, two.keep)


def test_a_hidden_block_structure_costs_nothing() -> None:
    """Outputs that each read one half of the inputs, shuffled: half of the blocks can go at no cost."""
    rng = np.random.default_rng(3)
    out_order, in_order = rng.permutation(8), rng.permutation(8)
    weight = np.zeros((8, 8))
    weight[:4, :4] = rng.standard_normal((4, 4))
    weight[4:, 4:] = rng.standard_normal((4, 4))
    weight = weight[out_order][:, in_order]
    u = rng.standard_normal((300, 8)).astype(np.float32)
    samples = LayerSamples(u, (u @ weight.T).astype(np.float32), weight)
    order = np.argsort(out_order), np.argsort(in_order)
    assert search(samples, order, (4, 4), 2).error < 1e-6
