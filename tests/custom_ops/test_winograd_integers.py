"""bfloat16 convolutions by Winograd's algorithm, whose products are of 16-bit integers (custom_ops/cpu/winograd.h).

The sharp test: numpy computes the same transforms, rounds them to the same integers and adds up their products exactly,
so that what is left is the float32 of the last steps. Against the plain oracle, the error is that of 16 bits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.custom_ops import models
from tests.custom_ops.test_block_sparse_conv import random_input
from tests.reference import dense_weight, max_pool

TOLERANCE = 3e-6  # of the largest output, against the same integers: float32 after the sums, some 30 additions
# Against the unrounded oracle, of up to some 70 channels. The transforms of 4x4 tiles make larger errors than 2x2's.
ERROR = {"winograd2": 1e-3, "winograd4": 4e-3}
A, B = np.sqrt(0.5), np.sqrt(2.0)


@pytest.fixture(autouse=True)
def _isa(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setenv("TETRIS_ONNX_ISA", "avx512_bf16")
    try:
        models.session(models.make_model(models.random_op(rng, (1, 1), (1, 1)), [1, 1]))
    except Exception as error:
        if "this build and processor support" not in str(error):
            raise
        pytest.skip("this processor has no avx512_bf16")


@pytest.fixture(params=ERROR)
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TETRIS_ONNX_CONV", request.param)
    return str(request.param)


def fma(a: float | np.float32, b: models.Array, c: models.Array) -> models.Array:
    """a * b + c of float32, rounded once: a float64 holds the product of two of them."""
    return (np.float64(np.float32(a)) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def transform(size: int, d: models.Array) -> models.Array:
    """B d along the first axis, in the order of the kernel's float32 operations."""
    if size == 2:
        return np.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]])
    even_a, odd_a = fma(-2, d[2], d[4]), fma(-2, d[1], d[3])
    even_b, odd_b = fma(-0.5, d[2], d[4]), fma(-0.5, d[1], d[3])
    inner = [fma(A, odd_a, even_a), fma(-A, odd_a, even_a), fma(B, odd_b, even_b), fma(-B, odd_b, even_b)]
    return np.stack([fma(-2.5, d[2], d[0] + d[4]), *inner, fma(-2.5, d[3], d[1] + d[5])])


def matrices(size: int) -> tuple[models.Array, models.Array, models.Array]:
    """B, G and A of F(size x size, 3x3): of Winograd's algorithm for inputs, filters and outputs."""
    if size == 2:
        filters = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
        return transform(2, np.eye(4, dtype=np.float32)), np.array(filters), np.array([[1, 1, 1, 0], [0, 1, -1, 1]])
    points = [(A, -1.5), (-A, -1.5), (B, 6), (-B, 6)]  # and the product of the differences to the others
    filters = [[1, 0, 0], *([1 / d, p / d, p * p / d] for p, d in points), [0, 0, 1]]
    outputs = [[float(i == 0), *(p**i for p, _ in points), float(i == 3)] for i in range(4)]
    exact = [[1, 0, -2.5, 0, 1, 0], [0, -2 * A, -2, A, 1, 0], [0, 2 * A, -2, -A, 1, 0]]
    exact += [[0, -B / 2, -0.5, B, 1, 0], [0, B / 2, -0.5, -B, 1, 0], [0, 1, 0, -2.5, 0, 1]]
    return np.array(exact), np.array(filters), np.array(outputs)


def of_integers(op: models.Op, x: models.Array, size: int, addend: models.Array | None = None) -> models.Array:
    """What the kernel should compute, from the integers on in float64."""
    shape, (bo, bi), pads = op.attributes["weight_shape"], op.attributes["block_size"], op.attributes["pads"]
    weight = dense_weight(op.blocks, op.block_index, op.input_perm, op.output_perm, shape).astype(np.float64)
    into, filters, out = matrices(size)
    products = np.einsum("ip,jq->ijpq", into, into)
    bounds = np.maximum(np.maximum(products, 0).sum((2, 3)), np.maximum(-products, 0).sum((2, 3)))
    # Scales.
    kept = [0] * math.ceil(shape[0] / bo)
    for row, column in op.block_index:
        kept[row] += min(bi, shape[1] - column * bi)
    most = max([1, *kept])
    steps = 32700 * min(1.0, math.sqrt(128 / most))
    u = np.einsum("iu,ocuv,jv->ocij", filters, weight, filters)
    needed = np.maximum(np.abs(u).sum(1) / ((2**31 - 1) / (steps + 1) - most), np.abs(u).max(1, initial=0) / 32700)
    sums = needed.sum(0)
    element = np.where(sums > 0, sums / max(sums.sum(), 1e-300), 1).astype(np.float32)
    row = (needed / element).max((1, 2)).astype(np.float32)
    row[row == 0] = 1
    u_scale = np.float64(row)[:, None, None] * element
    u = np.rint(u / u_scale[:, None])
    # Tiles.
    n = size + 2
    height, width = (length + pads[i] + pads[i + 2] - 2 for i, length in enumerate(x.shape[2:]))
    down, across = math.ceil(height / size), math.ceil(width / size)
    padded = np.zeros((*x.shape[:2], size * down + 2, size * across + 2), np.float32)
    rows, columns = (min(x.shape[2 + i], padded.shape[2 + i] - pads[i]) for i in range(2))
    padded[:, :, pads[0] : pads[0] + rows, pads[1] : pads[1] + columns] = x[:, :, :rows, :columns]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (n, n), (2, 3))[:, :, ::size, ::size]
    used = np.abs(weight).sum((0, 2, 3)) > 0
    windows = windows[:, used]
    low, high = (limit(windows, axis=(1, 4, 5), initial=0) for limit in (np.min, np.max))
    ranges = np.maximum(high - low, np.float32(1e-30))
    v = np.moveaxis(transform(size, np.moveaxis(windows, 4, 0)), 0, 4)
    v = np.moveaxis(transform(size, np.moveaxis(v, 5, 0)), 0, 5)
    scale = (steps / bounds).astype(np.float32) * (np.float32(1) / ranges)[..., None, None]
    v = np.rint(v.astype(np.float64) * scale.astype(np.float64)[:, None])
    assert np.abs(v).max(initial=0) < 2**15 > np.abs(u).max(initial=0)
    m = np.einsum("bcyxij,ocij->boyxij", v, u[:, used], optimize=True)
    assert np.abs(m).max(initial=0) < 2**31
    m *= (
        np.float64(ranges)[:, None, :, :, None, None]
        * (element * bounds / steps)
        * np.float64(row)[:, None, None, None, None]
    )
    y = np.einsum("ui,boyxij,vj->boyuxv", out, m, out, optimize=True)
    y = y.reshape(len(x), shape[0], size * down, size * across)[:, :, :height, :width]
    y = y + (0 if op.bias is None else op.bias[:, None, None]) + (0 if addend is None else addend)
    y = np.clip(y, op.attributes.get("activation_min", -np.inf), op.attributes.get("activation_max", np.inf))
    return max_pool(y, (2, 2)) if op.op_type.endswith("MaxPool") else y


def check(
    op: models.Op, x: models.Array, algorithm: str, threads: int = 1, addend: models.Array | None = None
) -> models.Array:
    op = models.with_attributes(op, precision="bfloat16")
    y = models.run(op, x, threads, addend)
    expected = of_integers(op, x, int(algorithm[-1]), addend)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max(initial=0)))
    exact = models.with_attributes(op, precision="float32").expected(x, addend)
    np.testing.assert_allclose(y, exact, rtol=0, atol=ERROR[algorithm] * max(1.0, np.abs(exact).max(initial=0)))
    return y


@pytest.mark.parametrize("pads", [[0] * 4, [1] * 4, [0, 1, 2, 1], [0, 9, 7, 0]])
@pytest.mark.parametrize("size", [(3, 3), (7, 7), (13, 22), (28, 28), (5, 70)])
def test_pads_and_map_sizes(algorithm: str, rng: np.random.Generator, size: tuple[int, int], pads: list[int]) -> None:
    op = models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=pads, activation_min=0.0)
    check(op, random_input(rng, 2, 19, *size), algorithm)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 60), (60, 1)])
def test_maps_smaller_than_a_tile(algorithm: str, rng: np.random.Generator, size: tuple[int, int]) -> None:
    check(models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=[1] * 4), random_input(rng, 1, 19, *size), algorithm)


@pytest.mark.parametrize("columns", [1, 5, 16, 64])
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 33, 64])
def test_block_sizes(algorithm: str, rng: np.random.Generator, rows: int, columns: int) -> None:
    op = models.random_op(rng, (67, 71, 3, 3), (rows, columns), pads=[1] * 4, activation_max=3.0)
    check(op, random_input(rng, 1, 71, 9, 11), algorithm)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, "one", 0.1, 1.0])
def test_density(algorithm: str, rng: np.random.Generator, density: float | str, bias: bool) -> None:
    op = models.random_op(rng, (48, 40, 3, 3), (16, 8), density, bias=bias, pads=[1] * 4)
    check(op, random_input(rng, 1, 40, 15, 14), algorithm)


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("size", [(5, 6), (26, 25), (90, 70)])  # from a part of one strip of tiles to many
def test_strips_threads_and_batch(
    algorithm: str, rng: np.random.Generator, size: tuple[int, int], threads: int, batch: int
) -> None:
    op = models.random_op(rng, (24, 53, 3, 3), (8, 16), 0.3, pads=[1] * 4)
    check(op, random_input(rng, batch, 53, *size), algorithm, threads)


# 25 and 49 tiles of 4x4: with 28x28, two halves for two threads, or one tile after three vectors.
@pytest.mark.parametrize("size", [(12, 12), (28, 28), (60, 45)])
def test_same_result_with_any_number_of_threads(
    algorithm: str, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    op = models.random_op(rng, (136, 120, 3, 3), (8, 8), 0.5, pads=[1] * 4, precision="bfloat16")
    x = random_input(rng, 1, 120, *size)
    alone = models.run(op, x, threads=1)
    np.testing.assert_array_equal(models.run(op, x, threads=4), alone)
    pair = models.session(models.make_model(op, x.shape), threads=2)
    for _ in range(24):  # how many threads there are is learned
        np.testing.assert_array_equal(pair.run(None, {"x": x})[0], alone)


@pytest.mark.parametrize("kind", ["Add", "MaxPool"])
@pytest.mark.parametrize("pads", [[1] * 4, [2, 0, 1, 2]])
@pytest.mark.parametrize("size", [(3, 4), (7, 9), (14, 14), (29, 43)])
def test_fused(algorithm: str, rng: np.random.Generator, size: tuple[int, int], pads: list[int], kind: str) -> None:
    alone = models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=pads, activation_min=-1.0, activation_max=20.0)
    x = random_input(rng, 2, 19, *size)
    addend = random_input(rng, *alone.expected(x).shape) if kind == "Add" else None
    check(models.fused(alone, kind), x, algorithm, 2, addend)


def test_no_sum_overflows(algorithm: str, rng: np.random.Generator) -> None:
    """All channels alike, inputs at the ends of their range as an element's signs want them: its sums are largest."""
    size = int(algorithm[-1])
    into, filters, _ = matrices(size)
    op = models.random_op(rng, (4, 300, 3, 3), (4, 300), 1.0, pads=[0] * 4, bias=False)
    for i in range(size + 2):
        signs = np.outer(into[i], into[i])
        tile = (
            np.where(signs > 0, 7.0, 0.0)
            if signs.clip(0).sum() > -signs.clip(None, 0).sum()
            else np.where(signs < 0, 7.0, 0.0)
        )
        weight = np.outer(filters[i], filters[i])  # what its transform is large for
        for sign in (1, -1):
            blocks = np.broadcast_to(sign * weight, op.blocks.shape).astype(np.float32)
            x = np.broadcast_to(tile, (1, 300, *tile.shape)).astype(np.float32)
            op = models.with_attributes(op, precision="bfloat16")
            y = models.run(models.dataclasses.replace(op, blocks=blocks), x)
            exact = models.dataclasses.replace(models.with_attributes(op, precision="float32"), blocks=blocks).expected(
                x
            )
            np.testing.assert_allclose(y, exact, rtol=0, atol=0.03 * np.abs(exact).max() + 1)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25])
def test_any_magnitude(algorithm: str, rng: np.random.Generator, scale: float) -> None:
    op = models.random_op(rng, (20, 19, 3, 3), (8, 8), 0.9, pads=[1] * 4, bias=False, precision="bfloat16")
    x = random_input(rng, 1, 19, 9, 9)
    y, exact = models.run(op, x * np.float32(scale)), op.expected(x)
    # (Inputs below the least range lose their lowest bits, and then all.)
    np.testing.assert_allclose(y, scale * exact, rtol=0, atol=max(0.02 * scale * np.abs(exact).max(), 1e-32))


def test_a_row_of_large_weights_leaves_the_others_exact(algorithm: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (16, 19, 3, 3), (8, 8), 1.0, pads=[1] * 4, bias=False, permuted=False)
    op.blocks[:, 3] *= 1e6
    op.blocks[:, 5] = 0
    x = random_input(rng, 1, 19, 9, 9)
    y, exact = models.run(models.with_attributes(op, precision="bfloat16"), x), op.expected(x)
    for row in range(16):
        np.testing.assert_allclose(
            y[:, row], exact[:, row], rtol=0, atol=ERROR[algorithm] * np.abs(exact[:, row]).max()
        )


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threads", [1, 2])
def test_nan_and_infinity_stay_in_their_tiles(
    algorithm: str, rng: np.random.Generator, value: float, threads: int
) -> None:
    op = models.random_op(rng, (24, 20, 3, 3), (8, 4), 1.0, pads=[1] * 4, activation_min=0.0, precision="bfloat16")
    x = random_input(rng, 2, 20, 16, 16)
    expected = models.run(op, x, threads)
    x[1, 7, 5, 9] = value
    y = models.run(op, x, threads)
    size = int(algorithm[-1])
    near = (4 // size * size, 10 // size * size + size, 8 // size * size)  # of rows 4 to 6 and columns 8 to 10
    touched = np.zeros(y.shape, bool)
    touched[1, :, near[0] : 6 // size * size + size, near[2] : near[1]] = True
    assert np.isnan(y[1, :, 4:7, 8:11]).all()
    np.testing.assert_array_equal(y[~touched], expected[~touched])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number(algorithm: str, rng: np.random.Generator, value: float) -> None:
    op = models.random_op(rng, (16, 8, 3, 3), (8, 8), 1.0, pads=[1] * 4, permuted=False)
    exact = op.expected(x := random_input(rng, 1, 8, 9, 9))
    op.blocks[0, 3, 2, 1, 1] = value
    y = models.run(models.with_attributes(op, precision="bfloat16"), x)
    assert np.isnan(y[:, 3]).all()
    others = np.arange(16) != 3
    atol = ERROR[algorithm] * np.abs(exact).max()
    np.testing.assert_allclose(y[:, others], exact[:, others], rtol=0, atol=atol)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (29, 31)])
def test_what_lies_around_the_input_does_not_matter(
    algorithm: str, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    op = models.random_op(rng, (20, 19, 3, 3), (8, 8), 0.8, pads=[1] * 4, precision="bfloat16")
    x = random_input(rng, 1, 19, *size)
    models.check_surrounded_by_nan(op, x)


def test_what_was_computed_before_does_not_matter(algorithm: str, rng: np.random.Generator) -> None:
    """NaN of one run, left in scratch memory, must not get into the next; the model tells no size."""
    op = models.random_op(rng, (24, 53, 3, 3), (8, 16), 0.5, pads=[1] * 4, precision="bfloat16")
    session = models.session(models.make_model(op, ["N", 53, "H", "W"]), threads=2)
    session.run(None, {"x": np.full((2, 53, 30, 30), np.nan, np.float32)})
    for size in [(9, 9), (13, 25)]:
        x = random_input(rng, 1, 53, *size)
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], models.run(op, x))


@pytest.mark.parametrize(
    ("shape", "size", "density", "expected"),
    [
        ((256, 256, 3, 3), (28, 28), 0.3, "winograd4"),
        ((256, 256, 3, 3), (28, 28), 1.0, "winograd4"),
        ((8, 8, 3, 3), (28, 28), 1.0, "direct"),
        ((64, 64, 3, 3), (1, 1), 1.0, "direct"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    size: tuple[int, int],
    density: float,
    expected: str,
) -> None:
    """The algorithms round differently: the one whose result is the same to the last bit was used."""
    op = models.random_op(rng, shape, (32, 32), density, pads=[1] * 4, precision="bfloat16")
    x = random_input(rng, 1, shape[1], *size)
    results = {}
    for name in ("auto", "direct", *ERROR):
        monkeypatch.setenv("TETRIS_ONNX_CONV", name)
        results[name] = models.run(op, x)
    assert [name for name, y in results.items() if name != "auto" and np.array_equal(y, results["auto"])] == [expected]
