"""The reckoning that keeps layers dense which a GPU runs no faster, and chooses the height of blocks.

That the op library reckons alike: tests/custom_ops/cuda/test_choice.py.
"""

from __future__ import annotations

import pytest

from tetris_onnx.timing.cost import LayerShape
from tetris_onnx.timing.cuda_cost import block_height, choose_tile, dense_seconds, sparse_seconds, why_dense


def conv(outputs: int, inputs: int, size: int, kernel: int = 3) -> LayerShape:
    return LayerShape(outputs, inputs, (kernel, kernel), (1, 1), (1, 1), (size, size), (size, size))


# conv4_2 of VGG16, 1.85e9 multiplications.
LARGE = conv(512, 512, 28)
SMALL = conv(64, 64, 7, kernel=1)
# A matrix product of one row reads its weight, and that is all.
PRODUCT = LayerShape(4096, 4096)
WIDE = conv(1024, 1024, 28, kernel=1)


def test_times_are_in_the_region_of_what_a_gpu_does() -> None:
    """Between the peak of the tensor cores, 990e12 operations a second in float16, and half of it for a large layer."""
    peak = 2 * LARGE.multiplications * 8 / 990e12
    assert peak < dense_seconds(LARGE, 2, 8) < 2 * peak
    assert dense_seconds(LARGE, 4, 8) == pytest.approx(2 * dense_seconds(LARGE, 2, 8), rel=0.1)
    # Memory bounds a product of one row: 3 TB/s.
    assert dense_seconds(PRODUCT, 2) == pytest.approx(4096 * (4096 + 2) * 2 / 3e12)
    huge = LayerShape(25088, 4096)
    assert sparse_seconds(huge, 0.5, (64, 64), 2) == pytest.approx((25088 * 2048 + 25088 + 4096) * 2 / 3e12)


def test_the_time_falls_with_the_density_down_to_what_a_launch_takes() -> None:
    times = [sparse_seconds(LARGE, density, (64, 64), 2, 8) for density in (1.0, 0.5, 0.27, 0.1, 0.0)]
    assert times == sorted(times, reverse=True)
    assert times[1] == pytest.approx(0.5 * times[0], rel=0.15)
    assert times[-1] >= 1.5e-6


def test_what_can_gain() -> None:
    assert why_dense(LARGE, 0.5, (64, 64), 2) == ""
    assert why_dense(PRODUCT, 0.5, (64, 64), 2) == ""
    assert "us block-sparse against" in why_dense(SMALL, 0.1, (64, 64), 2)
    assert "us block-sparse against" in why_dense(LARGE, 1.0, (64, 64), 2)
    assert why_dense(None, 0.5, (64, 64), 2) == ""  # of an unknown size
    assert why_dense(None, 0.5, (64, 32), 2) == ""
    assert "smaller than the CUDA kernels' tiles" in why_dense(LARGE, 0.1, (64, 16), 2)


def test_taller_blocks_where_they_gain_a_tenth() -> None:
    assert block_height(WIDE, 0.5, 64, 2, 8) == 128
    assert sparse_seconds(WIDE, 0.5, (128, 64), 2, 8) <= 0.9 * sparse_seconds(WIDE, 0.5, (64, 64), 2, 8)
    assert choose_tile(WIDE, 0.5, (128, 64), 2, 8)[1] == (128, 128)
    # Several taps find their pixels in L1, so that larger tiles gain little; few pixels make too few programs.
    assert block_height(LARGE, 0.27, 64, 2, 8) == 64
    assert block_height(WIDE, 0.5, 64, 2, 1) == 64
    assert block_height(conv(64, 512, 56, kernel=1), 0.5, 64, 2, 8) == 64  # half of each block would be empty
    assert block_height(None, 0.5, 64, 2) == 64


def test_sums_are_split_where_programs_are_few() -> None:
    _, tile, splits = choose_tile(conv(512, 512, 14), 0.27, (64, 64), 2)
    assert tile == (64, 64) and splits > 1
    assert choose_tile(LARGE, 0.27, (64, 64), 2, 8)[2] == 1
    assert choose_tile(LARGE, 0.27, (32, 32), 2, 8)[1][0] == 32
    assert choose_tile(conv(64, 64, 28, kernel=5), 0.5, (64, 64), 4)[1] == (64, 64)
