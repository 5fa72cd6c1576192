"""BlockSparseGemm on every instruction set against the numpy oracle."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.custom_ops import models

# float32 sums of up to some thousand products against float64: relative to the largest output.
TOLERANCE = 1e-5

BLOCK_SIZES = [1, 2, 3, 5, 8, 13, 16, 31, 32, 33, 64]


def check(op: models.Op, x: models.Array, threads: int = 1) -> None:
    y = models.run(op, x, threads)
    expected = op.expected(x)
    assert y.shape == expected.shape
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max(initial=0)))


def random_input(rng: np.random.Generator, *shape: int) -> models.Array:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 3, 5, 7, 12, 13, 16, 17, 25, 64, 100, 197])
@pytest.mark.parametrize("threads", [1, 2])
def test_samples(isa: str, rng: np.random.Generator, samples: int, permuted: bool, threads: int) -> None:
    op = models.random_op(rng, (131, 173), (32, 32), permuted=permuted, activation_min=0.0)
    check(op, random_input(rng, samples, 173), threads)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("columns", BLOCK_SIZES)
@pytest.mark.parametrize("rows", BLOCK_SIZES)
def test_block_sizes(isa: str, rng: np.random.Generator, rows: int, columns: int, samples: int) -> None:
    check(models.random_op(rng, (67, 71), (rows, columns)), random_input(rng, samples, 71))


@pytest.mark.parametrize("columns", [3, 16, 64])
@pytest.mark.parametrize("rows", [1, 4, 12, 16, 20, 32, 48, 64])
def test_block_sizes_of_strips(isa: str, rng: np.random.Generator, rows: int, columns: int) -> None:
    check(models.random_op(rng, (67, 71), (rows, columns)), random_input(rng, 51, 71))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (15, 17), (16, 16), (33, 31)])
@pytest.mark.parametrize("samples", [33, 513])
def test_small_weights_with_many_samples(
    isa: str, rng: np.random.Generator, samples: int, shape: tuple[int, int]
) -> None:
    check(models.random_op(rng, shape, (8, 8)), random_input(rng, samples, shape[1]), threads=2)


@pytest.mark.parametrize("threads", [1, 2])
def test_result_does_not_depend_on_how_many_samples_there_are(isa: str, rng: np.random.Generator, threads: int) -> None:
    # Whether a sample is computed in a strip or with a few others, it is added up in the same order; but a single one,
    # which has all registers to itself.
    op = models.random_op(rng, (70, 90), (32, 16), 0.5)
    x = random_input(rng, 200, 90)
    y = models.run(op, x)
    for samples in (2, 11, 14, 16, 17, 31, 33, 65, 129, 199):
        np.testing.assert_array_equal(models.run(op, x[:samples], threads), y[:samples])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("samples", [1, 3, 50])
@pytest.mark.parametrize("density", [0.0, "one", 0.1, 1.0])
def test_density(isa: str, rng: np.random.Generator, density: float | str, samples: int, bias: bool) -> None:
    op = models.random_op(rng, (48, 100), (16, 8), density, bias=bias, activation_min=-1.0, activation_max=1.5)
    check(op, random_input(rng, samples, 100))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 5), (0,), (3, 0)])
def test_leading_dimensions(isa: str, rng: np.random.Generator, leading: tuple[int, ...]) -> None:
    check(models.random_op(rng, (19, 23), (8, 8)), random_input(rng, *leading, 23))


@pytest.mark.parametrize("samples", [1, 600])
def test_large(isa: str, rng: np.random.Generator, samples: int) -> None:
    # 600 samples of 5000 values are packed in more than one round.
    check(models.random_op(rng, (70, 5000), (32, 32), 0.2), random_input(rng, samples, 5000), threads=2)


@pytest.mark.parametrize("samples", [3, 38])
def test_nan_reaches_exactly_the_outputs_that_use_it(isa: str, rng: np.random.Generator, samples: int) -> None:
    op = models.random_op(rng, (24, 20), (8, 4), 0.5, activation_min=0.0)
    x = random_input(rng, samples, 20)
    x[1, 7] = x[samples - 1, 3] = np.nan
    uses = op.expected(np.nan_to_num(x, nan=1e6)) != op.expected(np.nan_to_num(x, nan=-1e6))
    y = models.run(op, x)
    np.testing.assert_array_equal(np.isnan(y), uses)
    assert uses.any()


def test_concurrent_runs(isa: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (300, 400), (16, 16), 0.5)
    session = models.session(models.make_model(op, ["N", 400]), threads=2)
    inputs = [random_input(rng, 1 + 7 * i, 400) for i in range(4)]
    expected = [session.run(None, {"x": x})[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(50) if not np.array_equal(session.run(None, {"x": inputs[i]})[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("x_shape", "expected"),
    [([2, 4], [2, 6]), (["N", "T", 4], ["N", "T", 6]), ([4], [6]), (["N", 1, "K"], ["N", 1, 6])],
)
def test_shape_inference(rng: np.random.Generator, x_shape: list[Any], expected: list[Any]) -> None:
    op = models.random_op(rng, (6, 4), (4, 4))
    assert models.session(models.make_model(op, x_shape)).get_outputs()[0].shape == expected
