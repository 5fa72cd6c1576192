"""BlockSparseConvAdd and BlockSparseConvMaxPool on every instruction set against the numpy oracle."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import reference
from tests.custom_ops import models

# float32 sums of up to some thousand products against float64: relative to the largest output.
TOLERANCE = 1e-5

KINDS = ("Add", "MaxPool")


def random_input(rng: np.random.Generator, *shape: int) -> models.Array:
    return rng.standard_normal(shape).astype(np.float32)


def check(op: models.Op, kind: str, x: models.Array, rng: np.random.Generator, threads: int = 1) -> None:
    alone = op.expected(x)
    op = models.fused(op, kind)
    addend = random_input(rng, *alone.shape) if kind == "Add" else None
    expected = op.expected(x, addend)
    assert expected.shape == alone.shape if kind == "Add" else expected.size < alone.size
    y = models.run(op, x, threads, addend)
    assert y.shape == expected.shape
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("pads", [[1, 1, 1, 1], [2, 0, 1, 3]])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_attributes(
    isa: str, rng: np.random.Generator, kernel: int, stride: int, pads: list[int], dilation: int, kind: str
) -> None:
    block_size = tuple(rng.choice([3, 8, 16, 32, 40], 2).tolist())
    op = models.random_op(
        rng,
        (51, 37, kernel, kernel),
        block_size,
        strides=[stride, stride],
        pads=pads,
        dilations=[dilation, dilation],
        activation_min=-3.0,
        activation_max=60.0,
    )
    check(op, kind, random_input(rng, 2, 37, 17, 19), rng)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size",
    [
        *((2, 2), (2, 3), (3, 2), (3, 3), (7, 7), (14, 14), (29, 28), (28, 29), (29, 29)),
        *((400, 2), (300, 3), (2, 2500), (56, 56), (31, 97)),
    ],
)
@pytest.mark.parametrize(("kernel", "strides"), [(3, [1, 1]), (1, [1, 1]), (3, [2, 1])])
def test_map_sizes(
    isa: str, rng: np.random.Generator, size: tuple[int, int], kernel: int, strides: list[int], kind: str
) -> None:
    if kind == "MaxPool" and size[0] < 2 * strides[0]:
        size = (size[0] + 2, size[1])  # a map of one row has nothing to pool
    op = models.random_op(rng, (20, 5, kernel, kernel), (16, 3), strides=strides, pads=[kernel // 2] * 4)
    check(op, kind, random_input(rng, 1, 5, *size), rng)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inputs", [31, 32, 40, 47, 48])
def test_rows_fetched_ahead(isa: str, rng: np.random.Generator, inputs: int, threads: int) -> None:
    # With 32 to 47 channels, a pointwise tile fetches the rows that a later one adds: 37 outputs are not whole groups.
    op = models.random_op(rng, (37, inputs, 1, 1), (16, 8), 1.0, activation_min=0.0)
    check(op, "Add", random_input(rng, 2, inputs, 13, 11), rng, threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 1), (2, 9)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("size", [(15, 13), (91, 71)])  # in one piece; more than the cache holds, so in strips
def test_strips_threads_and_batch(
    isa: str,
    rng: np.random.Generator,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    threads: int,
    batch: int,
    kind: str,
) -> None:
    if batch > 2 and size[0] > 20:
        batch = 2
    op = models.random_op(rng, (16, 90, kernel, kernel), (8, 16), 0.3, pads=[kernel // 2] * 4, strides=[stride] * 2)
    check(op, kind, random_input(rng, batch, 90, *size), rng, threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, "one", 1.0])
def test_density(isa: str, rng: np.random.Generator, density: float | str, bias: bool, kind: str) -> None:
    if kind == "Add" and not bias:
        pytest.skip("an addend stands behind a bias")
    op = models.random_op(rng, (48, 40, 3, 3), (16, 8), density, bias=bias, pads=[1] * 4, activation_max=1.5)
    check(op, kind, random_input(rng, 2, 40, 33, 30), rng)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 13, 33, 64, 100])  # bands hold some of a block's rows at a time
def test_block_rows_of_a_band(isa: str, rng: np.random.Generator, rows: int) -> None:
    check(
        models.random_op(rng, (130, 24, 3, 3), (rows, 8), pads=[1] * 4), "MaxPool", random_input(rng, 1, 24, 9, 11), rng
    )


@pytest.mark.parametrize(("rank", "pads", "size"), [(1, [1, 1], (103,)), (3, [1] * 6, (7, 6, 9))])
def test_add_in_one_and_three_dimensions(
    isa: str, rng: np.random.Generator, rank: int, pads: list[int], size: tuple[int, ...]
) -> None:
    check(models.random_op(rng, (21, 23, *[3] * rank), (8, 16), pads=pads), "Add", random_input(rng, 2, 23, *size), rng)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(isa: str, rng: np.random.Generator, kind: str) -> None:
    op = models.fused(models.random_op(rng, (20, 19, 3, 3), (8, 8)), kind)
    addend = np.zeros((0, 20, 4, 6), np.float32) if kind == "Add" else None
    shape = (0, 20, 4, 6) if kind == "Add" else (0, 20, 2, 3)
    assert models.run(op, random_input(rng, 0, 19, 6, 8), addend=addend).shape == shape


@pytest.mark.parametrize("size", [(8, 10), (30, 40), (31, 67)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_reaches_exactly_the_windows_that_have_it(
    isa: str, rng: np.random.Generator, size: tuple[int, int], kernel: int
) -> None:
    op = models.random_op(rng, (8, 4, kernel, kernel), (8, 4), 1.0, pads=[kernel // 2] * 4, activation_min=0.0)
    x = random_input(rng, 1, 4, *size)
    where = rng.random(x.shape) < 0.02
    y = models.run(models.fused(op, "MaxPool"), np.where(where, np.nan, x).astype(np.float32))
    with np.errstate(invalid="ignore"):
        expected = reference.max_pool(op.expected(np.where(where, np.nan, x)), (2, 2))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert 0 < np.isnan(y).sum() < y.size
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)


def test_infinite_values_are_pooled(isa: str, rng: np.random.Generator) -> None:
    op = models.random_op(rng, (8, 4, 1, 1), (8, 4), 1.0, permuted=False)
    x = np.full((1, 4, 4, 34), -np.inf, np.float32)
    x[..., 0, 0] = 1.0
    op.blocks[:] = np.abs(op.blocks)
    y = models.run(models.fused(op, "MaxPool"), x)
    assert np.isfinite(y[..., 0, 0]).all()
    assert (y.reshape(8, -1)[:, 1:] == -np.inf).all()


def test_addend_keeps_nan(isa: str, rng: np.random.Generator) -> None:
    op = models.fused(models.random_op(rng, (24, 20, 1, 1), (8, 4), 1.0, activation_min=0.0), "Add")
    addend = random_input(rng, 1, 24, 5, 7)
    addend[rng.random(addend.shape) < 0.1] = np.nan
    y = models.run(op, random_input(rng, 1, 20, 5, 7), addend=addend)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(addend))


def _chain(op: models.Op, size: tuple[int, int]) -> onnx.ModelProto:
    """z = op(x, addend = Exp(addend)): the addend is a value of the model, read by the node only."""
    model = models.make_model(op, ["N", op.attributes["weight_shape"][1], *size])
    model.graph.node.insert(0, helper.make_node("Exp", ["addend"], ["made"]))
    model.graph.node[1].input[6] = "made"
    model.graph.input[1].CopyFrom(
        helper.make_tensor_value_info("addend", TensorProto.FLOAT, ["N", op.attributes["weight_shape"][0], *size])
    )
    return model


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (29, 31), (56, 57)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_output_in_the_place_of_the_addend(
    isa: str, rng: np.random.Generator, kernel: int, size: tuple[int, int], threads: int
) -> None:
    op = models.random_op(rng, (40, 24, kernel, kernel), (16, 8), pads=[kernel // 2] * 4, activation_min=0.0)
    op = models.fused(op, "Add")
    session = models.session(_chain(op, size), threads)
    for batch in (1, 3):
        x, addend = random_input(rng, batch, 24, *size), random_input(rng, batch, 40, *size)
        expected = op.expected(x, np.exp(addend.astype(np.float64)))
        y = session.run(None, {"x": x, "addend": addend})[0]
        np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_one_session_runs_any_size(isa: str, rng: np.random.Generator) -> None:
    op = models.fused(models.random_op(rng, (20, 19, 3, 3), (8, 8), pads=[1] * 4, strides=[2, 1]), "MaxPool")
    session = models.session(models.make_model(op, ["N", 19, "H", "W"]), threads=2)
    for batch, height, width in [(1, 9, 9), (2, 30, 41), (1, 9, 9), (3, 3, 2), *((1, 4, w) for w in range(2, 12))]:
        x = random_input(rng, batch, 19, height, width)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], op.expected(x), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_same_result_with_any_number_of_threads(isa: str, rng: np.random.Generator, kind: str) -> None:
    op = models.fused(models.random_op(rng, (96, 64, 3, 3), (32, 32), 0.5, pads=[1] * 4), kind)
    x = random_input(rng, 1, 64, 60, 60)
    addend = random_input(rng, 1, 96, 60, 60) if kind == "Add" else None
    np.testing.assert_array_equal(models.run(op, x, 1, addend), models.run(op, x, 4, addend))


@pytest.mark.parametrize(
    ("x_shape", "attributes", "expected"),
    [
        (["N", 4, 9, 10], {"pads": [1, 1, 1, 1]}, ["N", 6, 4, 5]),
        (["N", 4, "H", "W"], {"pads": [1, 1, 1, 1]}, ["N", 6, None, None]),
        ([2, 4, 10, 8], {"strides": [2, 2], "dilations": [2, 1]}, [2, 6, 1, 1]),
    ],
)
def test_shape_inference_of_max_pool(
    rng: np.random.Generator, x_shape: Sequence[int | str], attributes: dict[str, Any], expected: list[Any]
) -> None:
    op = models.fused(models.random_op(rng, (6, 4, 3, 3), (4, 4), **attributes), "MaxPool")
    shape = models.session(models.make_model(op, x_shape)).get_outputs()[0].shape
    assert [None if known is None else size for size, known in zip(shape, expected, strict=True)] == expected
    assert not any(isinstance(size, int) for size, known in zip(shape, expected, strict=True) if known is None)


def test_shape_inference_of_add(rng: np.random.Generator) -> None:
    op = models.fused(models.random_op(rng, (6, 4, 3, 3), (4, 4), pads=[1] * 4), "Add")
    assert models.session(models.make_model(op, ["N", 4, 5, "W"])).get_outputs()[0].shape == ["N", 6, 5, "W"]


@pytest.fixture
def op(rng: np.random.Generator) -> models.Op:
    return models.random_op(rng, (20, 10, 3, 3), (8, 8), 1.0, pads=[1, 1, 1, 1])


@pytest.mark.parametrize(
    "shape", [(1, 20, 5, 4), (1, 20, 5), (20,), (), (1, 19, 5, 5), (2, 20, 5, 5), (1, 20, 1, 1), (0, 20, 5, 5)]
)
def test_addend_of_another_shape(rng: np.random.Generator, op: models.Op, shape: tuple[int, ...]) -> None:
    message = rf"BlockSparseConvAdd node 'the_node': input 'addend' has shape {re.escape(str(list(shape)))}, expected"
    with pytest.raises(Exception, match=message):
        models.run(models.fused(op, "Add"), random_input(rng, 1, 10, 5, 5), addend=np.zeros(shape, np.float32))


def test_addend_has_to_be_there(op: models.Op) -> None:
    model = models.make_model(models.fused(op, "Add"), [1, 10, 5, 5])
    del model.graph.node[0].input[6:]
    with pytest.raises(Exception, match="the_node"):
        models.session(model)


@pytest.mark.parametrize(
    ("pool_shape", "message"),
    [
        (None, "attribute 'pool_shape' .* is missing"),
        ([2], r"attribute pool_shape is \[2\], only \[2, 2\] is supported"),
        ([2, 2, 2], "only"),
        ([3, 3], "only"),
        ([0, 2], "only"),
        ([2, -(2**62)], "only"),
    ],
)
def test_bad_pool_shape(op: models.Op, pool_shape: list[int] | None, message: str) -> None:
    attributes = {**op.attributes, **({} if pool_shape is None else {"pool_shape": pool_shape})}
    bad = dataclasses.replace(op, op_type="BlockSparseConvMaxPool", attributes=attributes)
    with pytest.raises(Exception, match=message) as error:
        models.session(models.make_model(bad, [1, 10, 5, 5]))
    assert "BlockSparseConvMaxPool node 'the_node'" in str(error.value)


@pytest.mark.parametrize("rank", [1, 3])
def test_pooling_is_of_maps(rng: np.random.Generator, rank: int) -> None:
    op = models.fused(models.random_op(rng, (6, 4, *[3] * rank), (4, 4)), "MaxPool")
    with pytest.raises(Exception, match=r"attribute weight_shape is .* expected \[M, C, K1, K2\]"):
        models.session(models.make_model(op, [1, 4, *[6] * rank]))


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (0, 4)])
def test_map_too_small_to_pool(rng: np.random.Generator, op: models.Op, size: tuple[int, int]) -> None:
    model = models.make_model(models.fused(op, "MaxPool"), [1])
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match="too small"):
        models.session(model).run(None, {"x": random_input(rng, 1, 10, *size)})
