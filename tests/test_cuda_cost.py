"""The roofline that keeps layers dense which a GPU runs no faster."""

from __future__ import annotations

import pytest

from tetris_onnx.cost import LayerShape
from tetris_onnx.cuda_cost import dense_seconds, why_dense

# conv4_2 of VGG16: 512 x 512 x 3 x 3 on 28 x 28, 1.85e9 multiplications.
LARGE = LayerShape(512, 512, (3, 3), (1, 1), (1, 1), (28, 28), (28, 28))
SMALL = LayerShape(64, 64, (1, 1), (1, 1), (1, 1), (7, 7), (7, 7))
# A matrix product of one row reads its weight, and that is all.
PRODUCT = LayerShape(4096, 4096)


def test_multiplications_or_memory_bound() -> None:
    assert dense_seconds(LARGE, 2) == pytest.approx(2 * 512 * 512 * 9 * 28 * 28 / 400e12)
    assert dense_seconds(LARGE, 4) == 2 * dense_seconds(LARGE, 2)
    assert dense_seconds(LARGE, 2, batch=8) == 8 * dense_seconds(LARGE, 2)
    assert dense_seconds(PRODUCT, 2) == pytest.approx(2 * (4096 * 4096 + 2 * 4096) / 3e12)


def test_what_can_gain() -> None:
    assert why_dense(LARGE, 0.5, (64, 64), 2) == ""
    assert why_dense(PRODUCT, 0.5, (64, 64), 2) == ""
    assert "less than a launch" in why_dense(SMALL, 0.1, (64, 64), 2)
    assert "less than a launch" in why_dense(LARGE, 1.0, (64, 64), 2)
    assert why_dense(None, 0.5, (64, 64), 2) == ""  # of an unknown size
    assert why_dense(None, 0.5, (64, 32), 2) == ""
    assert "smaller than the CUDA kernels' tiles" in why_dense(LARGE, 0.1, (64, 16), 2)
