"""Attribute precision: products of bfloat16 and int8 against the numpy oracle of the same rounded operands."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from tests.custom_ops import models

# Of operands rounded alike, what remains is float32 sums of up to some thousand products (bfloat16: in whatever order;
# int8: exact sums, scaled), relative to the largest output.
TOLERANCE = 1e-5

# The instruction sets that have the precisions. AMX's instructions are emulated where the processor lacks them.
ISA = {"bfloat16": "avx512_bf16", "int8": "avx512_vnni"}
KERNELS = [*ISA.items(), *((precision, "amx") for precision in ISA)]
BLOCK_SIZES = [1, 2, 3, 5, 8, 13, 16, 31, 32, 33, 64]


@pytest.fixture(params=KERNELS, ids="-".join)
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> str:
    """A precision and an instruction set that has it, forced; skips the test where the processor has none of it."""
    name, isa = request.param
    if isa == "amx":
        request.getfixturevalue("amx")
    monkeypatch.setenv("TETRIS_ONNX_ISA", isa)
    monkeypatch.setenv("TETRIS_ONNX_CONV", "direct")  # Winograd's form: test_winograd_integers.py
    try:
        models.session(models.make_model(models.random_op(rng, (1, 1), (1, 1)), [1, 1]))
    except Exception as error:
        if "this build and processor support" not in str(error):
            raise
        pytest.skip(f"this processor has no {isa}")
    return str(name)


def check(op: models.Op, x: models.Array, threads: int = 1) -> None:
    y = models.run(op, x, threads)
    expected = op.expected(x)
    assert y.shape == expected.shape
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max(initial=0)))


def random_input(rng: np.random.Generator, *shape: int) -> models.Array:
    return rng.standard_normal(shape).astype(np.float32)


def test_it_is_another_result_than_float32s(precision: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (24, 40, 3, 3), (8, 8), pads=[1, 1, 1, 1])
    x = random_input(rng, 1, 40, 9, 9)
    exact = op.expected(x)
    op = models.with_attributes(op, precision=precision)
    error = np.abs(models.run(op, x) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 3e-2
    check(op, x)


@pytest.mark.parametrize("isa", ["scalar", "avx512"])
def test_falls_back_to_float32(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, isa: str) -> None:
    monkeypatch.setenv("TETRIS_ONNX_ISA", isa)
    op = models.random_op(rng, (24, 40, 3, 3), (8, 8), pads=[1, 1, 1, 1])
    x = random_input(rng, 1, 40, 9, 9)
    try:
        exact = models.run(op, x)
    except Exception as error:
        if "this build and processor support" not in str(error):
            raise
        pytest.skip(f"this processor has no {isa}")
    for precision in ISA:
        np.testing.assert_array_equal(models.run(models.with_attributes(op, precision=precision), x), exact)


@pytest.mark.parametrize("kernel", [(3, 3), ()])
def test_an_unknown_precision_is_an_error(rng: np.random.Generator, kernel: tuple[int, ...]) -> None:
    op = models.random_op(rng, (4, 4, *kernel), (4, 4), precision="int4")
    with pytest.raises(Exception, match="attribute precision is 'int4', expected float32, bfloat16 or int8"):
        models.session(models.make_model(op, (1, 4, 5, 5) if kernel else (1, 4)))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 2, 1]])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_attributes(
    precision: str, rng: np.random.Generator, kernel: int, stride: int, pads: list[int], dilation: int
) -> None:
    op = models.random_op(
        rng,
        (29, 37, kernel, kernel),
        tuple(rng.choice(BLOCK_SIZES, 2).tolist()),
        strides=[stride, stride],
        pads=pads,
        dilations=[dilation, dilation],
        activation_min=-1.0,
        precision=precision,
    )
    check(op, random_input(rng, 2, 37, 17, 19))


@pytest.mark.parametrize("columns", BLOCK_SIZES)
@pytest.mark.parametrize("rows", [1, 5, 16, 33])
def test_block_sizes(precision: str, rng: np.random.Generator, rows: int, columns: int) -> None:
    op = models.random_op(rng, (67, 71, 3, 3), (rows, columns), pads=[1, 1, 1, 1], precision=precision)
    check(op, random_input(rng, 1, 71, 9, 11))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, "one", 1.0])
def test_density(precision: str, rng: np.random.Generator, density: float | str, bias: bool) -> None:
    op = models.random_op(rng, (48, 40, 3, 3), (16, 8), density, bias=bias, pads=[1] * 4, precision=precision)
    check(op, random_input(rng, 2, 40, 6, 5))


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (1, 50), (7, 7), (14, 14), (29, 28), (29, 29), (400, 2), (56, 56), (33, 64)]
)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_map_sizes(precision: str, rng: np.random.Generator, size: tuple[int, int], kernel: int, stride: int) -> None:
    op = models.random_op(
        rng, (20, 19, kernel, kernel), (8, 8), strides=[stride] * 2, pads=[kernel // 2] * 4, precision=precision
    )
    check(op, random_input(rng, 1, 19, *size))


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 3), (2, 9)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(15, 13), (180, 70)])  # in one piece; more than the cache holds, so in strips
def test_strips_threads_and_batch(
    precision: str, rng: np.random.Generator, size: tuple[int, int], stride: int, threads: int, batch: int
) -> None:
    if os.environ["TETRIS_ONNX_ISA"] == "amx" and size[0] > 100:
        size = (90, 70)  # in strips in test_amx.py
    op = models.random_op(rng, (24, 53, 3, 3), (8, 16), 0.3, pads=[1] * 4, strides=[stride] * 2, precision=precision)
    check(op, random_input(rng, batch, 53, *size), threads)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("kernel", "pads"), [((1,), [0, 0]), ((3,), [1, 1]), ((7,), [0, 5]), ((3, 1, 2), [1, 0, 1] * 2)]
)
def test_1d_and_3d(
    precision: str, rng: np.random.Generator, kernel: tuple[int, ...], pads: list[int], stride: int
) -> None:
    op = models.random_op(
        rng, (21, 23, *kernel), (8, 16), pads=pads, strides=[stride] * len(kernel), precision=precision
    )
    check(op, random_input(rng, 2, 23, *((103,) if len(kernel) == 1 else (7, 6, 9))))


@pytest.mark.parametrize("kind", ["Add", "MaxPool"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1)])
@pytest.mark.parametrize("size", [(7, 7), (14, 15), (90, 62)])
def test_fused(
    precision: str, rng: np.random.Generator, size: tuple[int, int], kernel: int, stride: int, kind: str
) -> None:
    pads = [kernel // 2] * 4
    op = models.random_op(
        rng, (51, 37, kernel, kernel), (16, 7), pads=pads, strides=[stride] * 2, activation_min=0.0, precision=precision
    )
    x = random_input(rng, 2, 37, *size)
    addend = random_input(rng, *op.expected(x).shape) if kind == "Add" else None
    op = models.fused(op, kind)
    expected = op.expected(x, addend)
    y = models.run(op, x, 2, addend)
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_only_bfloat16_of_vectors_has_winograds_form(
    precision: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = precision == "bfloat16" and os.environ["TETRIS_ONNX_ISA"] == "avx512_bf16"
    op = models.random_op(rng, (64, 32, 3, 3), (32, 32), 1.0, pads=[1] * 4, precision=precision)
    x = random_input(rng, 1, 32, 14, 14)
    monkeypatch.setenv("TETRIS_ONNX_CONV", "direct")
    direct = models.run(op, x)
    monkeypatch.setenv("TETRIS_ONNX_CONV", "winograd4")
    assert np.array_equal(models.run(op, x), direct) != vectors


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_inputs(precision: str, rng: np.random.Generator, sign: int) -> None:
    op = models.random_op(rng, (24, 40, 3, 3), (8, 8), pads=[1, 1, 1, 1], precision=precision)
    check(op, (sign * np.abs(random_input(rng, 1, 40, 9, 9))).astype(np.float32))
    check(op, np.zeros((1, 40, 9, 9), np.float32))


@pytest.mark.parametrize("kernel", [(3, 3), ()])
def test_an_image_does_not_depend_on_the_others(
    precision: str, rng: np.random.Generator, kernel: tuple[int, ...]
) -> None:
    op = models.random_op(rng, (24, 40, *kernel), (8, 8), precision=precision)
    x = random_input(rng, 3, 40, 9, 9) if kernel else random_input(rng, 3, 40)
    x[1] *= 100
    session = models.session(models.make_model(op, ["N", *x.shape[1:]]), threads=2)
    together = session.run(None, {"x": x})[0]
    for image in range(3):
        alone = session.run(None, {"x": x[image : image + 1]})[0]
        np.testing.assert_allclose(alone[0], together[image], rtol=1e-6, atol=1e-6 * np.abs(alone).max())


@pytest.mark.parametrize("input_range", [(-1.0, 2.0), (0.0, 1.5), (-0.5, -0.25), (0.0, 0.0), (-3e38, 3e38)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), ()])
def test_the_range_of_the_input_may_be_given(
    precision: str, rng: np.random.Generator, kernel: tuple[int, ...], input_range: tuple[float, float]
) -> None:
    """With int8; what lies beyond is cut off. Another precision has no use for it."""
    op = models.random_op(rng, (24, 40, *kernel), (8, 8), precision=precision, input_range=input_range)
    x = random_input(rng, 3, 40, 9, 9) if kernel else random_input(rng, 3, 40)
    check(op, x, threads=2)
    same = np.array_equal(models.run(op, x), models.run(models.without_attribute(op, "input_range"), x))
    assert same == (precision == "bfloat16")


def test_with_a_given_range_nan_and_inf_are_its_ends(rng: np.random.Generator) -> None:
    attributes = {"weight_shape": [1, 4], "block_size": [1, 4], "precision": "int8", "input_range": [-1.0, 2.0]}
    op = models.Op(
        "BlockSparseGemm",
        np.eye(1, 4)[None].astype(np.float32),
        np.zeros((1, 2), np.int64),
        *map(np.arange, (4, 1)),
        None,
        attributes,
    )
    x = np.array([[np.nan, 0, 0, 0], [np.inf, 0, 0, 0], [-np.inf, 0, 0, 0]], np.float32)
    y = models.run(op, x)
    if np.isnan(y).any():
        pytest.skip("this processor has no int8 kernels")
    np.testing.assert_allclose(y, [[-1], [2], [-1]], atol=3 / 510 + 1e-6)  # half a step


@pytest.mark.parametrize(
    ("input_range", "found"),
    [
        ([1.0], "has 1 values"),
        ([1.0, 2.0, 3.0], "has 3 values"),
        ([2.0, 1.0], r"is \[2.0+, 1.0+\]"),
        ([0.0, np.inf], r"is \[0.0+, inf\]"),
        ([np.nan, 1.0], "nan, 1.0+"),
    ],
)
@pytest.mark.parametrize("kernel", [(3, 3), ()])
def test_a_range_that_is_none_is_an_error(
    rng: np.random.Generator, kernel: tuple[int, ...], input_range: list[float], found: str
) -> None:
    op = models.random_op(rng, (4, 4, *kernel), (4, 4), precision="int8", input_range=input_range)
    with pytest.raises(Exception, match=f"attribute input_range .*{found}.*expected"):
        models.session(models.make_model(op, (1, 4, 5, 5) if kernel else (1, 4)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf(precision: str, rng: np.random.Generator, value: float) -> None:
    """bfloat16: exactly the outputs that use it, as in float32; int8: all outputs of its image, of no other."""
    op = models.random_op(rng, (24, 20, 3, 3), (8, 5), 0.5, pads=[1] * 4)
    x = random_input(rng, 2, 20, 8, 7)
    where = np.zeros(x.shape, bool)
    where[1, op.input_perm[op.block_index[0, 1] * 5], 3, 2] = True
    uses = op.expected(np.where(where, 1e6, x)) != op.expected(np.where(where, -1e6, x))
    assert uses.any()
    y = models.run(models.with_attributes(op, precision=precision), np.where(where, value, x).astype(np.float32))
    if precision == "int8":
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()
    else:
        np.testing.assert_array_equal(~np.isfinite(y), uses)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (29, 31)])
def test_what_lies_around_the_input_does_not_matter(
    precision: str, rng: np.random.Generator, kernel: int, size: tuple[int, int]
) -> None:
    op = models.random_op(rng, (20, 19, kernel, kernel), (8, 5), 0.8, pads=[kernel // 2] * 4, precision=precision)
    x = random_input(rng, 1, 19, *size)
    models.check_surrounded_by_nan(op, x)


def test_same_result_with_any_number_of_threads(precision: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (96, 64, 3, 3), (32, 32), 0.5, pads=[1, 1, 1, 1], precision=precision)
    x = random_input(rng, 1, 64, 60, 60)
    np.testing.assert_array_equal(models.run(op, x, threads=1), models.run(op, x, threads=4))


@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 7, 12, 13, 32, 81, 100])
@pytest.mark.parametrize("block_size", [(32, 32), (5, 7), (40, 1)])
def test_products(
    precision: str, rng: np.random.Generator, samples: int, permuted: bool, block_size: tuple[int, int]
) -> None:
    op = models.random_op(rng, (131, 173), block_size, permuted=permuted, activation_min=0.0, precision=precision)
    check(op, random_input(rng, samples, 173), threads=2)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_leading_dimensions(precision: str, rng: np.random.Generator, leading: tuple[int, ...]) -> None:
    check(models.random_op(rng, (19, 23), (8, 8), precision=precision), random_input(rng, *leading, 23))


@pytest.mark.parametrize("samples", [1, 600])
def test_large_products(precision: str, rng: np.random.Generator, samples: int) -> None:
    check(models.random_op(rng, (70, 9000), (32, 32), 0.2, precision=precision), random_input(rng, samples, 9000), 2)


def test_sums_that_could_overflow_are_computed_in_float32(rng: np.random.Generator) -> None:
    """2^31 / (255 x 127) products of bytes of the greatest magnitude fit into an integer; here are more."""
    inputs = 66400
    attributes: dict[str, Any] = {"weight_shape": [1, inputs], "block_size": [1, inputs // 2], "precision": "int8"}
    blocks, index = np.ones((2, 1, inputs // 2), np.float32), np.array([[0, 0], [0, 1]])
    op = models.Op("BlockSparseGemm", blocks, index, np.arange(inputs), np.arange(1), None, attributes)
    np.testing.assert_allclose(models.run(op, np.ones((1, inputs), np.float32)), inputs, rtol=1e-5)
