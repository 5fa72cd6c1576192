"""The block-sparse sample, for the tests of what runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tetris_onnx import Config, optimize, save

DENSE = Path(__file__).parents[2] / "samples" / "fashion_mnist" / "fashion_mnist.onnx"


@pytest.fixture(scope="session")
def dense_sample() -> Path:
    return DENSE


@pytest.fixture(scope="session")
def block_sparse_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the weights; quickly made, so its answers are not the best."""
    path = tmp_path_factory.mktemp("sample") / "fashion_mnist_bs.onnx"
    result = optimize(DENSE, Config(sparsity=0.5, reorder="none"))
    assert len(result.plan) > 0
    save(result.model, path)
    return path
