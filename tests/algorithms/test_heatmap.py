"""Pictures of weights: what a pixel stands for."""

from __future__ import annotations

import numpy as np
import pytest

from tetris_onnx.algorithms.heatmap import heatmap


def test_a_pixel_is_a_channel_pair_where_there_is_room() -> None:
    scores = np.arange(12.0).reshape(3, 4)
    found = heatmap(scores, limit=8)
    assert found.original.shape == (3, 4) and found.original.dtype == np.uint8
    assert found.reordered is None and found.pruned is None
    assert found.original[0, 0] == 1 and found.original[-1, -1] == 255
    assert (np.diff(found.original.ravel().astype(int)) >= 0).all(), "more importance is a higher level"


def test_dropped_blocks_are_zero_and_kept_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((70, 50))  # 3 x 2 blocks of 32, cut off at the edges
    perms = rng.permutation(70), rng.permutation(50)
    keep = np.array([[True, False], [False, True], [False, True]])
    found = heatmap(scores, 160, perms, keep, (32, 32))
    assert found.reordered is not None and found.pruned is not None
    assert (found.reordered == found.original[np.ix_(*perms)]).all()
    mask = np.repeat(np.repeat(keep, 32, 0)[:70], 32, 1)[:, :50]
    assert ((found.pruned > 0) == mask).all()
    assert (found.pruned[mask] == found.reordered[mask]).all()


@pytest.mark.parametrize("shape", [(512, 640), (1000, 33), (4096, 25088)])
def test_large_weights_are_averaged_along_the_grid_of_blocks(shape: tuple[int, int]) -> None:
    keep = np.zeros((-(-shape[0] // 32), -(-shape[1] // 32)), bool)
    keep[::2, ::3] = True
    found = heatmap(np.ones(shape, np.float32), 160, (np.arange(shape[0]), np.arange(shape[1])), keep, (32, 32))
    assert found.pruned is not None
    assert found.original.shape == found.pruned.shape and max(found.pruned.shape) <= 160
    if shape[0] <= 160 * 32 and shape[1] <= 160 * 32:  # pixels are parts of blocks: all or nothing
        area = np.multiply.outer(*(np.minimum(32, n - np.arange(0, n, 32)) for n in shape))
        assert (found.pruned > 0).mean() == pytest.approx((keep * area).sum() / area.sum(), abs=0.02)


def test_what_a_refit_left_is_shown_on_the_scale_of_the_original() -> None:
    scores = np.linspace(1, 2, 64).reshape(8, 8)
    identity = np.arange(8)
    found = heatmap(scores, 8, (identity, identity), np.ones((2, 2), bool), (4, 4), refitted=np.full((8, 8), 9.0))
    assert found.pruned is not None and (found.pruned == 255).all()


def test_a_weight_of_zeros_or_of_one_value_has_a_picture() -> None:
    for value in (0.0, 3.0):
        assert heatmap(np.full((4, 4), value), 2).original.shape == (2, 2)
