"""Reordering: each M-step against brute force, the search against its promises, on arrays of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tetris_onnx.algorithms.blocks import block_grid, block_sums, expand_keep, group_capacities, keep_count, keep_mask
from tetris_onnx.algorithms.permutation import is_identity, is_permutation
from tetris_onnx.algorithms.reorder import (
    BlockPruner,
    Reordering,
    default_starts,
    exact_step,
    greedy_step,
    reorder,
    transport,
)

METHODS = ["exact", "greedy"]


@dataclass(frozen=True)
class BalancedPruner:
    """Another P: vectors of ``length`` rows, the same number ``kept`` in every row of vectors."""

    length: int
    kept: int

    @property
    def block_size(self) -> tuple[int, int]:
        return (self.length, 1)

    def prune(self, sums: NDArray[np.float64]) -> NDArray[np.bool_]:
        keep = np.zeros(sums.shape, np.bool_)
        np.put_along_axis(keep, np.argsort(-sums, axis=1, kind="stable")[:, : self.kept], True, axis=1)
        return keep


def channel_scaled(shape: tuple[int, ...], seed: int = 0, spread: float = 0.5) -> NDArray[np.float32]:
    """Normal values times a log-normal scale per slice of each axis."""
    rng = np.random.default_rng(seed)
    x = np.abs(rng.standard_normal(shape))
    for axis, n in enumerate(shape):
        scale = np.exp(spread * rng.standard_normal(n))
        x *= scale.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return x.astype(np.float32)


def apply(x: NDArray, perms: tuple[NDArray[np.int64], ...]) -> NDArray:
    return x[np.ix_(*perms)]


def check(x: NDArray, pruner: BlockPruner | BalancedPruner, result: Reordering, axes: tuple[int, ...]) -> None:
    """What must hold for every result."""
    total = float(x.sum(dtype=np.float64))
    assert len(result.perms) == x.ndim
    for axis, (perm, n) in enumerate(zip(result.perms, x.shape, strict=True)):
        assert perm.dtype == np.int64 and perm.size == n and is_permutation(perm)
        assert axis in axes or is_identity(perm)
    ordered = apply(x, result.perms)
    assert np.array_equal(result.keep, pruner.prune(block_sums(ordered, pruner.block_size)))
    held = float(ordered[expand_keep(result.keep, pruner.block_size, x.shape)].sum(dtype=np.float64))
    # the same float64 sums in another order
    assert result.retained == pytest.approx(held / total if total else 1.0, rel=1e-9)
    given_order = pruner.prune(block_sums(x, pruner.block_size))
    held = float(x[expand_keep(given_order, pruner.block_size, x.shape)].sum(dtype=np.float64))
    assert result.baseline == pytest.approx(held / total if total else 1.0, rel=1e-9)
    assert result.retained >= result.baseline


# The M-steps


def gained(gain: NDArray, pattern: NDArray[np.int64], groups: NDArray[np.int64]) -> float:
    return float(gain[np.arange(groups.size), pattern[groups]].sum(dtype=np.float64))


def test_steps_by_hand() -> None:
    # Three slices, two groups with room for 2 and 1. The best: slices 0 and 2 in group 0, 1 in group 1: 5 + 3 + 4.
    gain = np.array([[5.0, 1.0], [1.0, 3.0], [4.0, 4.0]])
    pattern, capacities = np.array([0, 1]), np.array([2, 1])
    for step in (exact_step, greedy_step):
        assert step(gain, pattern, capacities, np.array([0, 0, 1])).tolist() == [0, 1, 0]


def test_greedy_swaps_the_best_pair_first_and_can_stay_below_the_optimum() -> None:
    # Each slice wants the next group: a ring of three, which no swap of two improves.
    gain = np.array([[2.0, 3.0, 0.0], [0.0, 2.0, 3.0], [3.0, 0.0, 2.0]])
    alone = np.arange(3)
    assert greedy_step(gain, alone, np.ones(3, int), alone).tolist() == [0, 1, 2]
    assert exact_step(gain, alone, np.ones(3, int), alone).tolist() == [1, 2, 0]
    # Swapping 0 and 1 gains 4, 1 and 2 gains 3; after the first the second gains nothing.
    gain = np.array([[0.0, 2.0, 0.0], [2.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    assert greedy_step(gain, alone, np.ones(3, int), alone).tolist() == [1, 0, 2]


def test_exact_step_fills_like_groups_in_the_order_of_gain() -> None:
    # Groups 0 and 2 are alike: the next mask has more to choose from when they end up unequal.
    gain = np.array([[1.0, 0.0], [9.0, 0.0], [0.0, 5.0], [8.0, 0.0], [2.0, 0.0]])
    groups = exact_step(gain, np.array([0, 1, 0]), np.array([2, 1, 2]), np.array([0, 0, 1, 2, 2]))
    assert groups.tolist() == [2, 0, 1, 0, 2]


def test_exact_step_is_the_best_of_all_orders() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        gain, capacities = rng.integers(0, 10, (7, 3)).astype(float), np.array([3, 3, 1])
        start = np.repeat(np.arange(3), capacities)
        best = max(gained(gain, np.arange(3), start[list(p)]) for p in set(permutations(range(7))))
        new = exact_step(gain, np.arange(3), capacities, start)
        assert gained(gain, np.arange(3), new) == best  # whole numbers


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.sampled_from([np.float32, np.float64]),
)
def test_steps_against_linear_sum_assignment(n: int, size: int, patterns: int, seed: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    capacities = group_capacities(n, size)
    _, pattern = np.unique(rng.integers(0, patterns, capacities.size), return_inverse=True)  # groups that are alike
    gain = rng.random((n, pattern.max() + 1)).astype(dtype)
    seats = np.repeat(np.arange(capacities.size), capacities)
    start = rng.permutation(seats)
    rows, columns = linear_sum_assignment(gain[:, pattern[seats]], maximize=True)
    best = float(gain[rows, pattern[seats[columns]]].sum(dtype=np.float64))
    exact, greedy = (step(gain, pattern, capacities, start) for step in (exact_step, greedy_step))
    for new in (exact, greedy):
        assert np.array_equal(np.bincount(new, minlength=capacities.size), capacities)
    # the same sum in another order; greedy swaps only where float32 is sure of a gain
    assert gained(gain, pattern, exact) == pytest.approx(best, rel=1e-9)
    assert gained(gain, pattern, start) - 1e-6 <= gained(gain, pattern, greedy) <= best + 1e-9


@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None)
def test_greedy_ends_where_no_swap_gains(n: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacities = group_capacities(n, size)
    pattern = np.arange(capacities.size)
    gain = rng.integers(0, 4, (n, capacities.size)).astype(float)  # many ties
    groups = greedy_step(gain, pattern, capacities, np.repeat(pattern, capacities))
    own = gain[np.arange(n), groups]
    for i, k in product(range(n), repeat=2):
        assert gain[i, groups[k]] + gain[k, groups[i]] <= own[i] + own[k]


@settings(deadline=None)
@given(st.integers(2, 25), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_greedy_makes_the_swaps_of_the_paper(n: int, size: int, patterns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacities = group_capacities(n, size)
    _, pattern = np.unique(rng.integers(0, patterns, capacities.size), return_inverse=True)
    gain = rng.random((n, pattern.max() + 1))  # no ties
    start = rng.permutation(np.repeat(np.arange(capacities.size), capacities))
    # section 4.2 with the whole n x n matrix of swaps, the best one at a time
    expected = start.copy()
    while True:
        at = gain[:, pattern[expected]]  # [i, k]: slice i in the place of slice k
        swaps = at + at.T - np.diag(at)[:, None] - np.diag(at)
        i, k = np.unravel_index(swaps.argmax(), swaps.shape)
        if swaps[i, k] <= 1e-12:
            break
        expected[i], expected[k] = expected[k], expected[i]
    assert np.array_equal(greedy_step(gain, pattern, capacities, start), expected)


def test_greedy_on_many_groups_of_few_patterns() -> None:
    """What the wide layer behind a Flatten has: thousands of groups, few rows of blocks and so few patterns.

    The swaps of one pattern's groups are searched together; one by one, this takes minutes.
    """
    n, size, patterns = 2**15, 16, 4
    rng = np.random.default_rng(0)
    capacities = group_capacities(n, size)
    pattern = rng.integers(0, patterns, capacities.size)
    gain = rng.random((n, patterns))
    start = np.repeat(np.arange(capacities.size), capacities)
    groups = greedy_step(gain, pattern, capacities, start)
    assert np.array_equal(np.bincount(groups), capacities)
    best = gained(gain, pattern, exact_step(gain, pattern, capacities, start))
    # Swaps of two cannot gain any more; cycles of three would make up for the rest.
    assert 0.98 * best < gained(gain, pattern, groups) <= best
    at = pattern[groups]
    change = gain - gain[np.arange(n), at][:, None]
    most = np.array([change[at == p].max(axis=0) for p in range(patterns)])
    assert (most + most.T).max() <= 1e-9


def structured_gain(n: int, patterns: int, seed: int = 0) -> NDArray[np.float32]:
    """Gains as they come from pruning: importance of n slices in 64 block rows, on the kept ones of each pattern."""
    rng = np.random.default_rng(seed)
    kept = rng.random((patterns, 64)) < rng.random((patterns, 1)) * 0.3
    kept[0] = False
    return (channel_scaled((n, 64), seed) @ kept.T).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_transport_of_many_slices_equals_network_simplex_on_all(seed: int) -> None:
    from ot.lp import emd

    # More slices than the sample, so that most are settled by price; uneven room, half of it in one destination.
    n, patterns = 9000, 12
    gain = structured_gain(n, patterns, seed).astype(np.float64)
    room = np.full(patterns, 400)
    room[0] += n - room.sum()
    target = transport(gain, room)
    assert np.array_equal(np.bincount(target, minlength=patterns), room)
    cost = gain.max() - gain
    flow = emd(np.ones(n), room.astype(np.float64), cost, numItermax=10**7)
    # the optimum is one number; float64 sums of 9000 terms in another order
    assert gain[np.arange(n), target].sum() == pytest.approx((gain * flow).sum(), rel=1e-12)


def test_transport_of_many_slices_of_equal_gain_terminates() -> None:
    room = np.array([4999, 1, 1000])
    target = transport(np.ones((6000, 3), np.float32), room)
    assert np.array_equal(np.bincount(target), room)


# The search


def test_finds_the_hidden_blocks() -> None:
    # Two dense blocks on the diagonal, shuffled: half of the blocks can hold everything.
    hidden = np.kron(np.eye(2), np.ones((3, 3)))
    rng = np.random.default_rng(1)
    shuffled = hidden[rng.permutation(6)][:, rng.permutation(6)]
    assert keep_mask(shuffled, (3, 3), 0.5).sum() == 2
    result = reorder(shuffled, BlockPruner((3, 3), 0.5))
    assert result.baseline < 1.0
    assert result.retained == 1.0
    assert apply(shuffled, result.perms)[expand_keep(result.keep, (3, 3), (6, 6))].tolist() == [1.0] * 18


def test_finds_the_best_of_all_orders_of_a_small_array() -> None:
    x = np.array([[9.0, 0, 8, 1], [1, 7, 0, 9], [8, 1, 9, 0], [0, 9, 2, 8]])
    pruner = BlockPruner((2, 2), 0.75)
    best = 0.0
    for rows, columns in product(permutations(range(4)), repeat=2):
        best = max(best, block_sums(x[np.ix_(rows, columns)], (2, 2)).max())
    result = reorder(x, pruner)
    assert result.retained == pytest.approx(best / x.sum(), rel=1e-12)
    assert result.start != "none"


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 17),
    st.integers(1, 17),
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0, 1),
    st.sampled_from(METHODS),
    st.integers(0, 99),
    st.sampled_from([np.float32, np.float64]),
    st.booleans(),
)
def test_promises_hold_for_any_matrix(
    m: int, c: int, bo: int, bi: int, sparsity: float, method: str, seed: int, dtype: type, coarse: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.integers(0, 3, (m, c)) if coarse else rng.random((m, c))).astype(dtype)  # coarse: many ties and zeros
    pruner = BlockPruner((bo, bi), sparsity)
    starts = ["greedy", "identity", "sorted", "random", "shaken"]
    result = reorder(x, pruner, method=method, starts=starts)  # type: ignore[arg-type]
    check(x, pruner, result, (0, 1))
    assert result.keep.sum() == keep_count(result.keep.size, sparsity)
    greedy = reorder(x, pruner, method="greedy", starts=["identity"])
    assert result.retained >= greedy.retained


@pytest.mark.parametrize("shape", [(64, 3), (33, 65), (128, 96), (100, 10)])
@pytest.mark.parametrize("method", METHODS)
def test_reordering_gains_on_weights_with_structure(shape: tuple[int, int], method: str) -> None:
    x = channel_scaled(shape)
    pruner = BlockPruner((16, 2) if shape[1] == 3 else (16, 5), 0.7)
    result = reorder(x, pruner, method=method)  # type: ignore[arg-type]
    check(x, pruner, result, (0, 1))
    assert result.retained > result.baseline + 0.05
    assert result.iterations > 0
    assert result.retained >= reorder(x, pruner, method="greedy", starts=["identity"]).retained


@pytest.mark.parametrize("seed", range(5))
def test_default_is_never_below_greedy_from_identity(seed: int) -> None:
    x = channel_scaled((48, 40), seed, spread=0.1 + 0.2 * seed)
    pruner = BlockPruner((8, 8), 0.6)
    greedy = reorder(x, pruner, method="greedy", starts=["identity"])
    # its result is a candidate, whatever the exact steps make of it
    assert reorder(x, pruner, starts=["greedy"], max_iterations=100).retained >= greedy.retained
    assert reorder(x, pruner).retained >= greedy.retained
    assert "greedy" in default_starts((4096, 25088), "exact") and "identity" in default_starts((4096, 25088), "greedy")


def test_greedy_result_counts_whatever_becomes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, pruner = channel_scaled((48, 40)), BlockPruner((8, 8), 0.6)
    greedy = reorder(x, pruner, method="greedy", starts=["identity"])

    def spoil(gain: NDArray, pattern: NDArray, capacities: NDArray, groups: NDArray) -> NDArray:
        return np.random.default_rng(0).permutation(groups)

    monkeypatch.setattr("tetris_onnx.algorithms.reorder.exact_step", spoil)
    result = reorder(x, pruner, starts=["greedy"])
    assert result.retained == greedy.retained
    assert result.start == "greedy"


def test_more_starts_never_retain_less() -> None:
    x, pruner = channel_scaled((64, 64), 3), BlockPruner((16, 16), 0.6)
    few = reorder(x, pruner, starts=["identity"])
    more = reorder(x, pruner, starts=["identity", "sorted", "random", "shaken", "shaken"])
    assert more.retained >= few.retained
    assert len(default_starts((64, 64), "exact")) > len(default_starts((512, 512), "exact"))
    assert len(default_starts((512, 512), "exact")) > len(default_starts((4096, 4096), "exact"))


def test_deterministic_for_a_seed() -> None:
    x, pruner = channel_scaled((40, 40), 5), BlockPruner((8, 8), 0.7)
    first, again = (reorder(x, pruner, starts=["random", "shaken"], seed=7) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.perms, again.perms, strict=True))
    assert (first.retained, first.start, first.iterations) == (again.retained, again.start, again.iterations)
    others = [reorder(x, pruner, starts=["random"], seed=seed).perms[0] for seed in range(4)]
    assert any(not np.array_equal(others[0], other) for other in others[1:])


def test_input_is_not_changed() -> None:
    x = channel_scaled((20, 20))
    before = x.copy()
    reorder(x, BlockPruner((4, 4), 0.5))
    assert np.array_equal(x, before)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (1, 0), ()])
def test_only_the_named_axes_are_reordered(axes: tuple[int, ...]) -> None:
    x, pruner = channel_scaled((32, 32)), BlockPruner((8, 8), 0.6)
    result = reorder(x, pruner, axes=axes)
    check(x, pruner, result, axes)
    assert [not is_identity(p) for p in result.perms] == [0 in axes, 1 in axes]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2), (2, 1), (1,)])
def test_arrays_of_three_axes(method: str, axes: tuple[int, ...]) -> None:
    x, pruner = channel_scaled((12, 10, 7)), BlockPruner((4, 3, 2), 0.7)
    result = reorder(x, pruner, axes=axes, method=method)  # type: ignore[arg-type]
    check(x, pruner, result, axes)
    assert result.retained > result.baseline


def test_one_and_four_axes() -> None:
    x = np.array([1.0, 9.0, 2.0, 8.0])
    result = reorder(x, BlockPruner((2,), 0.5), axes=(0,))
    assert result.retained == 17 / 20
    y, pruner = channel_scaled((6, 5, 4, 3)), BlockPruner((2, 2, 2, 1), 0.5)
    result = reorder(y, pruner, axes=(0, 1, 2, 3))
    check(y, pruner, result, (0, 1, 2, 3))
    assert result.retained > result.baseline


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_size", [(8, 1), (1, 8), (5, 1)])
def test_vector_pruning(method: str, block_size: tuple[int, int]) -> None:
    x, pruner = channel_scaled((32, 24)), BlockPruner(block_size, 0.75)
    result = reorder(x, pruner, method=method)  # type: ignore[arg-type]
    check(x, pruner, result, (0, 1))
    assert result.keep.shape == block_grid((32, 24), block_size)
    assert result.retained > result.baseline


@pytest.mark.parametrize("method", METHODS)
def test_a_pruning_method_of_the_callers_own(method: str) -> None:
    x, pruner = channel_scaled((32, 24)), BalancedPruner(length=8, kept=6)
    result = reorder(x, pruner, method=method)  # type: ignore[arg-type]
    check(x, pruner, result, (0, 1))
    assert result.keep.sum(axis=1).tolist() == [6] * 4
    assert result.retained > result.baseline


def test_single_elements_cannot_be_helped_by_order() -> None:
    x = channel_scaled((12, 12))
    result = reorder(x, BlockPruner((1, 1), 0.5))
    assert result.retained == result.baseline
    assert result.start == "none"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("x", "block_size", "sparsity", "retained"),
    [
        (np.ones((8, 8)), (2, 2), 0.5, 0.5),  # all equal
        (np.zeros((8, 8)), (2, 2), 0.5, 1.0),  # nothing to retain
        (np.ones((8, 8)), (8, 8), 0.5, 1.0),  # a single block, which is kept
        (np.ones((8, 8)), (100, 100), 0.5, 1.0),  # a block larger than the array
        (np.ones((1, 8)), (1, 2), 0.5, 0.5),
        (np.ones((8, 1)), (2, 1), 0.75, 0.25),
        (np.ones((1, 1)), (1, 1), 0.5, 1.0),
        (np.arange(64.0).reshape(8, 8), (2, 2), 0.0, 1.0),
        (np.arange(64.0).reshape(8, 8), (2, 2), 1.0, 0.0),
    ],
)
def test_nothing_to_gain(
    method: str, x: NDArray, block_size: tuple[int, int], sparsity: float, retained: float
) -> None:
    result = reorder(x, BlockPruner(block_size, sparsity), method=method)  # type: ignore[arg-type]
    assert result.retained == result.baseline == retained
    assert result.start == "none" and all(is_identity(p) for p in result.perms)


def test_method_none_only_chooses_the_mask() -> None:
    x = channel_scaled((20, 20))
    result = reorder(x, BlockPruner((4, 4), 0.5), method="none")
    assert all(is_identity(p) for p in result.perms)
    assert result.retained == result.baseline
    assert np.array_equal(result.keep, keep_mask(x, (4, 4), 0.5))


def test_more_iterations_never_retain_less() -> None:
    x, pruner = channel_scaled((64, 64), 2), BlockPruner((8, 8), 0.7)
    for method in METHODS:
        shares = [
            reorder(x, pruner, method=method, starts=["identity"], max_iterations=n).retained  # type: ignore[arg-type]
            for n in range(6)
        ]
        assert shares[0] == reorder(x, pruner, method="none").retained
        assert shares[1] > shares[0]
        # float32 gains: a step may lose what rounding cannot see
        assert all(later >= earlier - 1e-6 for earlier, later in pairwise(shares))


class FirstMask:
    """A P that sticks to the mask it chose first."""

    def __init__(self, pruner: BlockPruner) -> None:
        self.pruner, self.keep = pruner, None
        self.block_size = pruner.block_size

    def prune(self, sums: NDArray[np.float64]) -> NDArray[np.bool_]:
        if self.keep is None:
            self.keep = self.pruner.prune(sums)
        return self.keep


@pytest.mark.parametrize("method", METHODS)
def test_the_mask_is_chosen_again_after_reordering(method: str) -> None:
    x, pruner = channel_scaled((64, 64), 2), BlockPruner((8, 8), 0.7)
    once = reorder(x, FirstMask(pruner), starts=["identity"], method=method)  # type: ignore[arg-type]
    again = reorder(x, pruner, starts=["identity"], method=method)  # type: ignore[arg-type]
    sums = block_sums(apply(x, once.perms), (8, 8))
    # even when the last order gets the best mask for it
    assert again.retained > sums[pruner.prune(sums)].sum() / x.sum() + 0.005
    assert once.retained > once.baseline


def test_refuses_bad_input() -> None:
    x, pruner = np.ones((4, 4)), BlockPruner((2, 2), 0.5)
    for axes in [(0, 2), (-1,), (0, 0)]:
        with pytest.raises(ValueError, match="cannot reorder axes"):
            reorder(x, pruner, axes=axes)
    with pytest.raises(ValueError, match="use 'exact', 'greedy' or 'none'"):
        reorder(x, pruner, method="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown start 'best'"):
        reorder(np.diag([1.0, 2, 3, 4]), pruner, starts=["best"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="not negative"):
        reorder(-x, pruner)
    with pytest.raises(ValueError, match="finite"):
        reorder(np.full((4, 4), np.nan), pruner)
    with pytest.raises(ValueError, match="does not fit shape"):
        reorder(x, BlockPruner((2,), 0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        reorder(x, BlockPruner((2, 2), 1.5))
