"""BlockSparseConv by Winograd's algorithm on every instruction set against the numpy oracle, and the choice of it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.custom_ops import models
from tests.custom_ops.test_block_sparse_conv import random_input

# Relative to the largest output. The transforms of 4x4 tiles add and subtract larger values than those of 2x2 ones: the
# largest errors seen are 1.2e-6 and, for 512 channels, 5e-6.
TOLERANCE = {"winograd2": 2e-6, "winograd4": 1e-5}

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(params=TOLERANCE)
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TETRIS_ONNX_CONV", request.param)
    return str(request.param)


def check(op: models.Op, x: models.Array, algorithm: str, threads: int = 1) -> None:
    y, expected = models.run(op, x, threads), op.expected(x)
    assert y.shape == expected.shape
    atol = TOLERANCE[algorithm] * max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(y, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("pads", [[0] * 4, [1] * 4, [2] * 4, [0, 1, 2, 1], [2, 0, 0, 1], [0, 9, 7, 0]])
@pytest.mark.parametrize("size", [(3, 3), (4, 5), (7, 7), (13, 22), (28, 28), (5, 70)])
def test_pads_and_map_sizes(algorithm: str, rng: np.random.Generator, size: tuple[int, int], pads: list[int]) -> None:
    op = models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=pads, activation_min=0.0)
    check(op, random_input(rng, 2, 19, *size), algorithm)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 60), (60, 1), (2, 2), (6, 1)])
def test_maps_smaller_than_a_tile(algorithm: str, rng: np.random.Generator, size: tuple[int, int]) -> None:
    check(models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=[1] * 4), random_input(rng, 1, 19, *size), algorithm)


@pytest.mark.parametrize("columns", [1, 5, 16, 64])
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 16, 33, 64])
def test_block_sizes(algorithm: str, rng: np.random.Generator, rows: int, columns: int) -> None:
    op = models.random_op(rng, (67, 71, 3, 3), (rows, columns), pads=[1] * 4, activation_max=3.0)
    check(op, random_input(rng, 1, 71, 9, 11), algorithm)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, "one", 0.1, 1.0])
def test_density(algorithm: str, rng: np.random.Generator, density: float | str, bias: bool) -> None:
    op = models.random_op(rng, (48, 40, 3, 3), (16, 8), density, bias=bias, pads=[1] * 4)
    check(op, random_input(rng, 1, 40, 15, 14), algorithm)


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 1), (2, 3), (2, 9)])
@pytest.mark.parametrize("size", [(5, 6), (31, 29), (90, 70)])  # from a part of one strip of tiles to many
def test_strips_threads_and_batch(
    algorithm: str, rng: np.random.Generator, size: tuple[int, int], threads: int, batch: int
) -> None:
    op = models.random_op(rng, (24, 53, 3, 3), (8, 16), 0.3, pads=[1] * 4)
    check(op, random_input(rng, batch, 53, *size), algorithm, threads)


def test_error_of_many_channels(algorithm: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (32, 512, 3, 3), (32, 32), 1.0, pads=[1] * 4)
    check(op, np.maximum(random_input(rng, 1, 512, 28, 28), 0), algorithm)


def test_same_result_with_any_number_of_threads(algorithm: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (96, 64, 3, 3), (32, 32), 0.5, pads=[1] * 4)
    x = random_input(rng, 1, 64, 40, 40)
    np.testing.assert_array_equal(models.run(op, x, threads=1), models.run(op, x, threads=4))


@pytest.mark.parametrize("size", [(12, 12), (28, 28), (26, 30)])  # 28 x 28: two halves of 49 tiles, the last by itself
def test_a_pair_of_threads_computes_the_same(algorithm: str, rng: np.random.Generator, size: tuple[int, int]) -> None:
    op = models.random_op(rng, (136, 120, 3, 3), (8, 8), 0.5, pads=[1] * 4)
    x = random_input(rng, 1, 120, *size)
    alone = models.run(op, x, threads=1)
    session = models.session(models.make_model(op, x.shape), threads=2)
    for _ in range(24):
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], alone)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (29, 31)])
def test_what_lies_around_the_input_does_not_matter(
    algorithm: str, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    op = models.random_op(rng, (20, 19, 3, 3), (8, 8), 0.8, pads=[1] * 4)
    x = random_input(rng, 1, 19, *size)
    models.check_surrounded_by_nan(op, x)


def test_what_was_computed_before_does_not_matter(algorithm: str, rng: np.random.Generator) -> None:
    """NaN of one run, left in scratch memory, must not get into the next."""
    op = models.random_op(rng, (24, 53, 3, 3), (8, 16), 0.5, pads=[1] * 4)
    session = models.session(models.make_model(op, ["N", 53, "H", "W"]))
    session.run(None, {"x": np.full((2, 53, 30, 30), np.nan, np.float32)})
    for size in [(9, 9), (13, 25)]:
        x = random_input(rng, 1, 53, *size)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], op.expected(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(9, 9), (45, 45)])
def test_concurrent_runs(algorithm: str, rng: np.random.Generator, size: tuple[int, int]) -> None:
    op = models.random_op(rng, (40, 64, 3, 3), (8, 8), pads=[1] * 4)
    model = models.make_model(op, ["N", 64, "H", "W"])
    inputs = [random_input(rng, 1, 64, size[0] + i, size[1]) for i in range(4)]
    other = models.session(model, threads=2)
    expected = [other.run(None, {"x": x})[0] for x in inputs]
    session = models.session(model, threads=2)  # its first runs, which transform the weight, are concurrent too
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not np.array_equal(session.run(None, {"x": inputs[i]})[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_any_map_where_the_model_tells_no_size(algorithm: str, rng: np.random.Generator) -> None:
    """A model that tells the size keeps only the transformed weight, another one both: the same results."""
    op = models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=[1] * 4)
    session = models.session(models.make_model(op, ["N", 19, "H", "W"]))
    for size in [(9, 9), (1, 1), (30, 7)]:
        x = random_input(rng, 2, 19, *size)
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], models.run(op, x))
        check(op, x, algorithm)


@pytest.mark.parametrize("x_shape", [[1, 20, 5, 5], [1, 19, 0, 5], [1, 19, 5], [1, 19, 2, 2]])
def test_a_shape_that_does_not_fit_is_an_error_of_the_run(
    algorithm: str, rng: np.random.Generator, x_shape: list[int]
) -> None:
    session = models.session(models.make_model(models.random_op(rng, (20, 19, 3, 3), (8, 8)), x_shape))
    with pytest.raises(Exception, match="input 'X' has shape"):
        session.run(None, {"x": np.zeros(x_shape, np.float32)})


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((256, 256, 3, 3), (28, 28), "winograd4"), ((8, 8, 3, 3), (28, 28), "direct"), ((64, 64, 3, 3), (1, 1), "direct")],
)
@pytest.mark.parametrize("auto", ["auto", ""])
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
    auto: str,
    shape: tuple[int, ...],
    size: tuple[int, int],
    expected: str,
) -> None:
    """The algorithms round differently: the one whose result is the same to the last bit was used."""
    op = models.random_op(rng, shape, (32, 32), 0.9, pads=[1] * 4)
    x = random_input(rng, 1, shape[1], *size)
    results = {}
    for name in (auto, "direct", "winograd2", "winograd4"):
        monkeypatch.setenv("TETRIS_ONNX_CONV", name)
        results[name] = models.run(op, x)
    same = [name for name, y in results.items() if name != auto and np.array_equal(y, results[auto])]
    assert same == [expected]


def test_unknown_algorithm(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setenv("TETRIS_ONNX_CONV", "fft")
    model = models.make_model(models.random_op(rng, (4, 4, 3, 3), (4, 4)), [1, 4, 5, 5])
    with pytest.raises(Exception, match="TETRIS_ONNX_CONV is 'fft', expected auto, direct, winograd2 or winograd4"):
        models.session(model)


@pytest.mark.parametrize("kind", ["Add", "MaxPool"])
@pytest.mark.parametrize("pads", [[1] * 4, [2, 0, 1, 2]])
@pytest.mark.parametrize("size", [(3, 4), (7, 9), (14, 14), (29, 43)])
def test_fused(algorithm: str, rng: np.random.Generator, size: tuple[int, int], pads: list[int], kind: str) -> None:
    alone = models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=pads, activation_min=-1.0, activation_max=20.0)
    op, x = models.fused(alone, kind), random_input(rng, 2, 19, *size)
    addend = random_input(rng, *alone.expected(x).shape) if kind == "Add" else None
    y, expected = models.run(op, x, 2, addend), op.expected(x, addend)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE[algorithm] * np.abs(expected).max())


def test_pooling_keeps_nan(algorithm: str, rng: np.random.Generator) -> None:
    op = models.fused(models.random_op(rng, (24, 20, 3, 3), (8, 4), 1.0, pads=[1] * 4, activation_min=0.0), "MaxPool")
    x = random_input(rng, 1, 20, 16, 16)
    x[0, 7, 1, 5] = np.nan
    y = models.run(op, x)
    assert np.isnan(y[0, :, 0, 2]).all()  # a window that uses it
    assert not np.isnan(y[0, :, 4:]).any()  # tiles that do not see it
