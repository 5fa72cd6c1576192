"""BlockSparseConv on every instruction set against the numpy oracle."""

from __future__ import annotations

import threading
from collections.abc import Sequence
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


PADS: dict[str, Any] = {
    "none": lambda k: [0, 0, 0, 0],
    "same": lambda k: [k // 2] * 4,
    "uneven": lambda k: [k // 2, 0, k - 1, 1],
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_attributes(
    isa: str, rng: np.random.Generator, kernel: int, stride: int, pads: str, dilation: int, batch: int
) -> None:
    block_size = tuple(rng.choice(BLOCK_SIZES, 2).tolist())
    op = models.random_op(
        rng,
        (29, 37, kernel, kernel),
        block_size,
        kernel_shape=[kernel, kernel],
        strides=[stride, stride],
        pads=PADS[pads](kernel),
        dilations=[dilation, dilation],
        group=1,
    )
    check(op, random_input(rng, batch, 37, 17, 19))


@pytest.mark.parametrize("columns", BLOCK_SIZES)
@pytest.mark.parametrize("rows", BLOCK_SIZES)
def test_block_sizes(isa: str, rng: np.random.Generator, rows: int, columns: int) -> None:
    check(
        models.random_op(rng, (67, 71, 3, 3), (rows, columns), pads=[1, 1, 1, 1], activation_min=0.0),
        random_input(rng, 1, 71, 9, 11),
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, "one", 0.1, 1.0])
@pytest.mark.parametrize("size", [(6, 5), (40, 30)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_density(
    isa: str, rng: np.random.Generator, kernel: int, size: tuple[int, int], density: float | str, bias: bool
) -> None:
    op = models.random_op(
        rng, (48, 40, kernel, kernel), (16, 8), density, bias=bias, pads=[kernel // 2] * 4, activation_max=1.5
    )
    check(op, random_input(rng, 2, 40, *size))


@pytest.mark.parametrize(
    "size",
    [
        *((1, 1), (1, 2), (2, 1), (1, 50), (50, 1), (2, 3), (7, 7), (14, 14), (28, 28), (29, 28), (29, 29), (16, 48)),
        *((800, 1), (400, 2), (300, 3), (1, 800), (2, 500), (56, 56), (33, 64)),
    ],
)
@pytest.mark.parametrize(("strides", "pads"), [([1, 1], [1, 1, 1, 1]), ([2, 2], [1, 1, 1, 1]), ([1, 2], [1, 1, 0, 0])])
def test_map_sizes_3x3(
    isa: str, rng: np.random.Generator, size: tuple[int, int], strides: list[int], pads: list[int]
) -> None:
    if size[1] == 1 and pads[3] == 0:
        pads = [1, 1, 0, 1]  # one column alone would be smaller than the kernel
    if size[0] == 1 and pads[2] == 0:
        pads = [1, 1, 1, pads[3]]
    check(models.random_op(rng, (20, 19, 3, 3), (8, 8), strides=strides, pads=pads), random_input(rng, 1, 19, *size))


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 2), (1, 2, 1), (2, 1, 7), (1, 1, 20)])
@pytest.mark.parametrize("stride", [1, 2])
def test_map_sizes_3x3x3(isa: str, rng: np.random.Generator, size: tuple[int, int, int], stride: int) -> None:
    # Along an axis of length 1, taps of the kernel see padding only.
    op = models.random_op(rng, (20, 19, 3, 3, 3), (8, 8), pads=[1] * 6, strides=[stride] * 3)
    check(op, random_input(rng, 2, 19, *size))


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (7, 7), (14, 14), (5, 31), (16, 16), (29, 31)])
@pytest.mark.parametrize("threads", [1, 2])
def test_map_sizes_1x1(isa: str, rng: np.random.Generator, size: tuple[int, int], threads: int) -> None:
    check(models.random_op(rng, (20, 19, 1, 1), (8, 8)), random_input(rng, 2, 19, *size), threads)


@pytest.mark.parametrize(
    ("kernel", "pads", "dilation"),
    [
        ((1, 3), [0, 1, 0, 1], (1, 1)),  # in place, one row of taps
        ((5, 3), [2, 1, 2, 1], (1, 1)),  # in place, five rows
        ((3, 3), [2, 1, 2, 1], (2, 1)),  # in place, rows apart
        ((3, 3), [5, 1, 0, 1], (1, 1)),  # in place, more rows out than in
        ((3, 3), [0, 1, 0, 1], (1, 1)),  # in place, fewer rows out
        ((3, 3), [1, 2, 1, 2], (1, 2)),
        ((3, 1), [1, 0, 1, 0], (1, 1)),
        ((2, 2), [0, 0, 1, 1], (1, 1)),
        ((3, 3), [9, 9, 9, 9], (1, 1)),  # taps that see padding only
    ],
)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (1, 2)])
def test_kernel_shapes_on_large_maps(
    isa: str,
    rng: np.random.Generator,
    kernel: tuple[int, int],
    pads: list[int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
) -> None:
    op = models.random_op(rng, (9, 10, *kernel), (4, 4), pads=pads, dilations=list(dilation), strides=list(stride))
    check(op, random_input(rng, 1, 10, 31, 37))


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 1), (2, 3), (2, 9)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(15, 13), (90, 70)])  # in one piece; more than the cache holds, so in strips
def test_strips_threads_and_batch(
    isa: str, rng: np.random.Generator, size: tuple[int, int], stride: int, threads: int, batch: int
) -> None:
    op = models.random_op(rng, (24, 53, 3, 3), (8, 16), 0.3, pads=[1, 1, 1, 1], strides=[stride, stride])
    check(op, random_input(rng, batch, 53, *size), threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_panel_larger_than_the_cache(isa: str, rng: np.random.Generator, threads: int) -> None:
    # The copy of the input has 1.3 MB: four strips, the last one of fewer rows.
    op = models.random_op(rng, (21, 150, 3, 3), (8, 16), strides=[2, 2], pads=[1, 1, 1, 1])
    check(op, random_input(rng, 1, 150, 46, 47), threads)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize(("kernel", "pads"), [(1, [0, 0]), (3, [1, 1]), (7, [0, 5])])
def test_1d(isa: str, rng: np.random.Generator, kernel: int, pads: list[int], dilation: int, stride: int) -> None:
    op = models.random_op(rng, (21, 23, kernel), (8, 16), pads=pads, dilations=[dilation], strides=[stride])
    check(op, random_input(rng, 2, 23, 103))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "pads"),
    [((1, 1, 1), [0] * 6), ((3, 3, 3), [1] * 6), ((3, 1, 2), [1, 0, 1, 2, 0, 0]), ((1, 3, 3), [0, 1, 1, 0, 1, 1])],
)
def test_3d(
    isa: str, rng: np.random.Generator, kernel: tuple[int, ...], pads: list[int], dilation: int, stride: int
) -> None:
    op = models.random_op(
        rng, (11, 13, *kernel), (8, 4), pads=pads, dilations=[dilation] * 3, strides=[stride, 1, stride]
    )
    check(op, random_input(rng, 2, 13, 7, 6, 9))


def test_empty_batch(isa: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (20, 19, 3, 3), (8, 8))
    assert models.run(op, random_input(rng, 0, 19, 5, 5)).shape == (0, 20, 3, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [(8, 7), (30, 40)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_nan_and_inf_reach_exactly_the_outputs_that_use_them(
    isa: str,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    kernel: int,
    size: tuple[int, int],
    value: float,
) -> None:
    monkeypatch.setenv("TETRIS_ONNX_CONV", "direct")  # Winograd's spreads them to the rest of a tile
    op = models.random_op(rng, (24, 20, kernel, kernel), (8, 4), 0.5, pads=[kernel // 2] * 4)
    where = np.zeros((1, 20, *size), bool)
    for channel, row, column in [(3, 0, 0), (5, size[0] // 2, size[1] - 1), (7, size[0] - 1, size[1] - 1)]:
        where[0, channel, row, column] = True
    x = random_input(rng, *where.shape)
    # The outputs that move with those inputs. (The oracle itself multiplies pruned blocks, so it must not see NaN.)
    uses = op.expected(np.where(where, 1e6, x)) != op.expected(np.where(where, -1e6, x))
    y = models.run(op, np.where(where, value, x).astype(np.float32))
    np.testing.assert_array_equal(~np.isfinite(y), uses)
    assert uses.any()


def test_activation_keeps_nan(isa: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (24, 20, 1, 1), (8, 4), 1.0, activation_min=0.0, activation_max=6.0)
    x = random_input(rng, 1, 20, 3, 3)
    x[0, 7, 1, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(models.run(op, x))[0].all(axis=0), np.isnan(x)[0].any(axis=0))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (29, 31)])
def test_what_lies_around_the_input_does_not_matter(
    isa: str, rng: np.random.Generator, kernel: int, size: tuple[int, int]
) -> None:
    op = models.random_op(rng, (20, 19, kernel, kernel), (8, 8), 0.8, pads=[kernel // 2] * 4)
    x = random_input(rng, 1, 19, *size)
    models.check_surrounded_by_nan(op, x)


def test_one_session_runs_any_size(isa: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=[1, 1, 1, 1], strides=[2, 1])
    session = models.session(models.make_model(op, ["N", 19, "H", "W"]), threads=2)
    for batch, height, width in [(1, 9, 9), (2, 30, 41), (1, 9, 9), (3, 1, 1), *((1, 2, w) for w in range(1, 12))]:
        x = random_input(rng, batch, 19, height, width)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], op.expected(x), atol=1e-4)


@pytest.mark.parametrize("size", [(9, 9), (45, 45)])
def test_concurrent_runs(isa: str, rng: np.random.Generator, size: tuple[int, int]) -> None:
    op = models.random_op(rng, (40, 64, 3, 3), (8, 8), pads=[1, 1, 1, 1], strides=[1, 1])
    session = models.session(models.make_model(op, ["N", 64, "H", "W"]), threads=2)
    inputs = [random_input(rng, 1, 64, size[0] + i, size[1]) for i in range(4)]
    expected = [session.run(None, {"x": x})[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not np.array_equal(session.run(None, {"x": inputs[i]})[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_same_result_with_any_number_of_threads(isa: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (96, 64, 3, 3), (32, 32), 0.5, pads=[1, 1, 1, 1])
    x = random_input(rng, 1, 64, 60, 60)
    np.testing.assert_array_equal(models.run(op, x, threads=1), models.run(op, x, threads=4))


@pytest.mark.parametrize(
    ("weight", "size", "attributes"),
    [
        ((136, 120, 3, 3), (14, 14), {"pads": [1] * 4}),  # two halves, of which one has the last pixels
        ((136, 120, 3, 3), (27, 30), {"pads": [1] * 4, "strides": [2, 2]}),
        ((136, 120, 1, 1), (27, 28), {"strides": [2, 2]}),  # with AVX-512, tiles of a pixel more
        ((136, 120, 5, 3), (33, 21), {"pads": [2, 0, 2, 2], "dilations": [1, 2]}),
        ((136, 120, 3, 3), (7, 7), {"pads": [1] * 4}),  # too small to halve: each thread has a panel of its own
        ((136, 120, 1, 1), (13, 13), {"strides": [2, 2]}),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_pair_of_threads_computes_the_same(
    isa: str,
    rng: np.random.Generator,
    weight: tuple[int, ...],
    size: tuple[int, int],
    attributes: dict[str, list[int]],
    batch: int,
) -> None:
    """In the first runs, before it is known how many threads there are, and when they have settled."""
    # (Small layers are done before the second thread is awake.)
    op = models.random_op(rng, weight, (8, 8), 0.5, **attributes)
    x = random_input(rng, batch, weight[1], *size)
    alone = models.run(op, x, threads=1)
    np.testing.assert_allclose(alone, op.expected(x), atol=1e-3)  # sums of some 500 products, up to 100
    session = models.session(models.make_model(op, x.shape), threads=2)
    for _ in range(6 if isa == "scalar" else 24):  # (its runs are long enough for both threads to be there)
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], alone)


@pytest.mark.parametrize(
    ("x_shape", "attributes", "expected"),
    [
        (["N", 4, 9, 9], {"pads": [1, 1, 1, 1]}, ["N", 6, 9, 9]),
        (["N", 4, "H", "W"], {"pads": [1, 1, 1, 1]}, ["N", 6, "H", "W"]),
        ([2, 4, 9, 8], {"strides": [2, 2], "dilations": [2, 1]}, [2, 6, 3, 3]),
        ([2, 4, "H", 8], {"strides": [1, 2]}, [2, 6, None, 3]),
        (["N", 4, None, "W"], {"pads": [1, 1, 0, 0]}, ["N", 6, None, None]),
    ],
)
def test_shape_inference(
    rng: np.random.Generator, x_shape: Sequence[int | str], attributes: dict[str, Any], expected: list[Any]
) -> None:
    op = models.random_op(rng, (6, 4, 3, 3), (4, 4), **attributes)
    shape = models.session(models.make_model(op, x_shape)).get_outputs()[0].shape
    unknown = [name for name, known in zip(shape, expected, strict=True) if known is None]
    assert [None if name in unknown else name for name in shape] == expected
    assert len(set(unknown)) == len(unknown)  # equal names would promise equal sizes
    assert not any(isinstance(name, int) for name in unknown)


def test_unknown_rank(rng: np.random.Generator) -> None:
    op = models.random_op(rng, (6, 4, 3, 3), (4, 4))
    model = models.make_model(op, [1])
    model.graph.input[0].type.tensor_type.ClearField("shape")
    x = random_input(rng, 1, 4, 5, 5)
    np.testing.assert_allclose(models.session(model).run(None, {"x": x})[0], op.expected(x), atol=1e-5)


@pytest.mark.parametrize(("input_last", "output_last"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("size", [(11,), (7, 9), (4, 5, 6)])
def test_channels_last(rng: np.random.Generator, size: tuple[int, ...], input_last: bool, output_last: bool) -> None:
    rank = len(size)
    layout = models.transposes(rank, input_last, output_last)
    op = models.random_op(rng, (19, 13, *[3] * rank), (8, 8), pads=[1] * 2 * rank, **layout)
    check(op, random_input(rng, 2, *((*size, 13) if input_last else (13, *size))))


@pytest.mark.parametrize("input_last", [True, False])
def test_channels_last_addend(rng: np.random.Generator, input_last: bool) -> None:
    op = models.random_op(rng, (19, 13, 3, 3), (8, 8), pads=[1] * 4, **models.transposes(2, input_last, True))
    x, addend = random_input(rng, 2, *((7, 9, 13) if input_last else (13, 7, 9))), random_input(rng, 2, 7, 9, 19)
    op = models.fused(op, "Add")
    expected = op.expected(x, addend)
    np.testing.assert_allclose(models.run(op, x, addend=addend), expected, rtol=0, atol=1e-4)


def test_channels_last_max_pooled(rng: np.random.Generator) -> None:
    op = models.random_op(rng, (19, 13, 3, 3), (8, 8), pads=[1] * 4, **models.transposes(2, True, True))
    check(models.fused(op, "MaxPool"), random_input(rng, 2, 7, 9, 13))


def test_channels_last_infers_its_shape(rng: np.random.Generator) -> None:
    op = models.random_op(rng, (19, 13, 3, 3), (8, 8), strides=[2, 1], **models.transposes(2, True, True))
    session = models.session(models.make_model(op, ["N", 9, "W", 13]))
    batch, height, _, channels = session.get_outputs()[0].shape
    assert (batch, height, channels) == ("N", 4, 19)


@pytest.mark.parametrize("name", ["input_transpose", "output_transpose"])
@pytest.mark.parametrize("perm", [[0, 2, 1, 3], [0, 1, 2], [0, 1, 2, 3, 4], [0, -1, 1, 2]])
def test_any_other_transpose_is_an_error(rng: np.random.Generator, name: str, perm: list[int]) -> None:
    op = models.random_op(rng, (8, 8, 3, 3), (8, 8), **{name: perm})
    with pytest.raises(Exception, match=rf"attribute {name} is \[.*\], expected \[0, 1, 2, 3\] or \[0, .*\]"):
        models.session(models.make_model(op, [1, 8, 9, 9]))
