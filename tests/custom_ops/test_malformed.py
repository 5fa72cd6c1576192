"""A malformed node is an error at session creation that names the node and what is wrong with it; never a crash."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.custom_ops import models
from tests.custom_ops.models import Array, Op


@pytest.fixture
def conv(rng: np.random.Generator) -> Op:
    # A grid of 3 x 2 blocks, all kept but (1, 0).
    op = models.random_op(rng, (20, 10, 3, 3), (8, 8), 1.0, pads=[1, 1, 1, 1], strides=[1, 1], dilations=[1, 1])
    return Op(op.op_type, op.blocks[1:], np.delete(op.block_index, 2, axis=0), *_rest(op))


@pytest.fixture
def gemm(rng: np.random.Generator) -> Op:
    op = models.random_op(rng, (20, 10), (8, 8), 1.0)
    return Op(op.op_type, op.blocks[1:], np.delete(op.block_index, 2, axis=0), *_rest(op))


def _rest(op: Op) -> tuple[Any, ...]:
    return op.input_perm, op.output_perm, op.bias, dict(op.attributes)


def create_error(model: models.onnx.ModelProto) -> str:
    with pytest.raises(Exception) as error:  # onnxruntime's exception classes differ between its versions
        models.session(model)
    return str(error.value)


def edited(array: Array, position: tuple[int, ...], value: Any) -> Array:
    array = array.copy()
    array[position] = value
    return array


BAD_CONSTANTS: dict[str, tuple[str, Callable[[Array], Array], str]] = {
    "row beyond the grid": ("block_index", lambda a: edited(a, (4, 0), 3), r"entry 4 is \(3, 1\), outside the grid"),
    "column beyond the grid": ("block_index", lambda a: edited(a, (4, 1), 2), "outside the grid of 3 x 2 blocks"),
    "negative row": ("block_index", lambda a: edited(a, (0, 0), -1), "outside the grid"),
    "negative column": ("block_index", lambda a: edited(a, (0, 1), -1), "outside the grid"),
    "huge row": ("block_index", lambda a: edited(a, (4, 0), 2**62), "outside the grid"),
    "unsorted": ("block_index", lambda a: np.ascontiguousarray(a[::-1]), "sort by row, then column"),
    "unsorted columns": ("block_index", lambda a: np.ascontiguousarray(a[[1, 0, 2, 3, 4]]), "sort by row"),
    "duplicate": ("block_index", lambda a: edited(a, (1,), a[0]), "entry 1 is .* a second time"),
    "index for other blocks": ("block_index", lambda a: a[:-1], r"has shape \[4, 2\], expected \[5, 2\]"),
    "index of three": ("block_index", lambda a: np.pad(a, ((0, 0), (0, 1))), r"has shape \[5, 3\]"),
    "index flat": ("block_index", lambda a: a.reshape(-1), r"has shape \[10\]"),
    "index int32": ("block_index", lambda a: a.astype(np.int32), "type"),
    "blocks without a dimension": ("blocks", lambda a: a[..., 0], "attributes block_size and weight_shape say"),
    "blocks of other size": ("blocks", lambda a: a[:, :7], "attributes block_size and weight_shape say"),
    "blocks scalar": ("blocks", lambda a: np.array(1, a.dtype), "attributes block_size and weight_shape say"),
    "blocks double": ("blocks", lambda a: a.astype(np.float64), "type"),
    "input_perm short": ("input_perm", lambda a: a[:-1], r"has shape \[9\], expected \[10\]"),
    "input_perm matrix": ("input_perm", lambda a: a.reshape(2, 5), "has shape"),
    "input_perm repeats": ("input_perm", lambda a: edited(a, (4,), a[2]), "entry 4 is .* a second time"),
    "input_perm beyond": ("input_perm", lambda a: edited(a, (4,), 10), r"entry 4 is 10, outside 0\.\.9"),
    "input_perm negative": ("input_perm", lambda a: edited(a, (4,), -1), "is not a permutation"),
    "output_perm short": ("output_perm", lambda a: a[:-1], r"has shape \[19\], expected \[20\]"),
    "output_perm repeats": ("output_perm", lambda a: edited(a, (4,), a[2]), "is not a permutation"),
    "output_perm beyond": ("output_perm", lambda a: edited(a, (4,), 2**40), "is not a permutation"),
    "output_perm int32": ("output_perm", lambda a: a.astype(np.int32), "type"),
    "bias short": ("bias", lambda a: a[:-1], r"has shape \[19\], expected \[20\]"),
    "bias matrix": ("bias", lambda a: a[None], "has shape"),
    "bias double": ("bias", lambda a: a.astype(np.float64), "type"),
}


@pytest.mark.parametrize("case", BAD_CONSTANTS)
@pytest.mark.parametrize("kind", ["conv", "gemm"])
def test_bad_constant(request: pytest.FixtureRequest, kind: str, case: str) -> None:
    op: Op = request.getfixturevalue(kind)
    name, change, message = BAD_CONSTANTS[case]
    x_shape = [1, 10, 5, 5] if kind == "conv" else [1, 10]
    if kind == "gemm" and case == "blocks without a dimension":
        change = lambda a: a[..., 0]  # noqa: E731
    error = create_error(models.make_model(op, x_shape, replace={name: change(op.constants[name])}))
    if message == "type":  # refused by onnxruntime, which knows the op's types
        assert "type" in error.lower()
        assert "the_node" in error
        return
    assert f"{op.op_type} node 'the_node': input '{name}'" in error
    assert re.search(message, error), error


@pytest.mark.parametrize("name", ["blocks", "block_index", "input_perm", "output_perm", "bias"])
@pytest.mark.parametrize("kind", ["conv", "gemm"])
def test_not_constant(request: pytest.FixtureRequest, kind: str, name: str) -> None:
    op: Op = request.getfixturevalue(kind)
    error = create_error(models.make_model(op, [1, 10, 5, 5] if kind == "conv" else [1, 10], as_inputs=[name]))
    assert f"{op.op_type} node 'the_node': input '{name}' must be a constant initializer" in error


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"weight_shape": None}, "attribute 'weight_shape' .* is missing"),
        ({"weight_shape": [20, 10]}, r"attribute weight_shape is \[20, 10\], expected"),
        ({"weight_shape": [20, 10, 1, 1, 1, 1]}, "attribute weight_shape is"),
        ({"weight_shape": [0, 10, 3, 3]}, "at least one channel"),
        ({"weight_shape": [20, -10, 3, 3]}, "at least one channel"),
        ({"weight_shape": [20, 10, 0, 3]}, "kernel size"),
        ({"weight_shape": [20, 10, 2**31, 2**31]}, "kernel size"),
        ({"weight_shape": [20, 10, 2**20, 2**20]}, "kernel size"),
        ({"weight_shape": [2**62, 10, 3, 3]}, r"input 'output_perm' has shape \[20\]"),
        ({"weight_shape": [20, 2**62, 3, 3]}, r"input 'input_perm' has shape \[10\]"),
        ({"weight_shape": [20, 10, 3, 5]}, "input 'blocks' has shape"),
        ({"kernel_shape": [3, 5]}, r"attribute kernel_shape is \[3, 5\]"),
        ({"kernel_shape": [3]}, r"attribute kernel_shape is \[3\]"),
        ({"block_size": None}, "attribute 'block_size' .* is missing"),
        ({"block_size": [8]}, "attribute block_size"),
        ({"block_size": [8, 0]}, "attribute block_size"),
        ({"block_size": [-8, 8]}, "attribute block_size"),
        ({"block_size": [2**62, 8]}, "attribute block_size"),
        ({"block_size": [4, 8]}, "input 'blocks' has shape"),
        ({"strides": [1]}, "attribute strides"),
        ({"strides": [0, 1]}, "attribute strides"),
        ({"strides": [1, -1]}, "attribute strides"),
        ({"strides": [1, 2**40]}, "attribute strides"),
        ({"dilations": [0, 1]}, "attribute dilations"),
        ({"dilations": [1, 1, 1]}, "attribute dilations"),
        ({"pads": [0, 0]}, "attribute pads"),
        ({"pads": [0, 0, 0, -1]}, "attribute pads"),
        ({"pads": [0, 0, 0, 2**40]}, "attribute pads"),
        ({"group": 2}, "attribute group is 2"),
        ({"activation_min": math.nan}, "NaN"),
        ({"activation_max": math.nan}, "NaN"),
        ({"activation_min": 1.0, "activation_max": 0.0}, "activation_min is greater"),
    ],
)
def test_bad_conv_attribute(conv: Op, attributes: dict[str, Any], message: str) -> None:
    merged = {k: v for k, v in {**conv.attributes, **attributes}.items() if v is not None}
    op = Op(conv.op_type, conv.blocks, conv.block_index, conv.input_perm, conv.output_perm, conv.bias, merged)
    error = create_error(models.make_model(op, [1, 10, 5, 5]))
    assert "BlockSparseConv node 'the_node': " in error
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"weight_shape": None}, "attribute 'weight_shape'"),
        ({"weight_shape": [20, 10, 3]}, "attribute weight_shape"),
        ({"weight_shape": [20, 0]}, "attribute weight_shape"),
        ({"weight_shape": [-20, 10]}, "attribute weight_shape"),
        ({"weight_shape": [20, 11]}, "input 'input_perm'"),
        ({"block_size": [8, 8, 8]}, "attribute block_size"),
        ({"block_size": [0, 8]}, "attribute block_size"),
        ({"activation_min": math.nan}, "NaN"),
        ({"activation_min": 1.0, "activation_max": 0.0}, "activation_min is greater"),
    ],
)
def test_bad_gemm_attribute(gemm: Op, attributes: dict[str, Any], message: str) -> None:
    merged = {k: v for k, v in {**gemm.attributes, **attributes}.items() if v is not None}
    op = Op(gemm.op_type, gemm.blocks, gemm.block_index, gemm.input_perm, gemm.output_perm, gemm.bias, merged)
    error = create_error(models.make_model(op, [1, 10]))
    assert "BlockSparseGemm node 'the_node': " in error
    assert message in error


def test_missing_inputs(conv: Op) -> None:
    model = models.make_model(conv, [1, 10, 5, 5])
    del model.graph.node[0].input[3:]
    assert "the_node" in create_error(model)
    model = models.make_model(conv, [1, 10, 5, 5])
    model.graph.node[0].input[2] = ""
    assert "the_node" in create_error(model)


@pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 23),
    reason="older onnxruntime crashes on an empty input name before it calls a custom op",
)
def test_bias_may_be_an_empty_name(conv: Op, rng: np.random.Generator) -> None:
    model = models.make_model(conv, [1, 10, 5, 5])
    model.graph.node[0].input[5] = ""
    x = rng.standard_normal((1, 10, 5, 5)).astype(np.float32)
    without_bias = Op(conv.op_type, conv.blocks, conv.block_index, *_rest(conv)[:2], None, conv.attributes)
    np.testing.assert_allclose(models.session(model).run(None, {"x": x})[0], without_bias.expected(x), atol=1e-4)


def test_a_node_without_a_name_is_named_by_its_output(conv: Op) -> None:
    bad = {"bias": np.zeros(3, np.float32)}
    assert "BlockSparseConv node with output 'y': input 'bias'" in create_error(
        models.make_model(conv, [1, 10, 5, 5], name="", replace=bad)
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 10, 5), r"input 'X' has shape \[1, 10, 5\], expected 4 dimensions"),
        ((10,), "expected 4 dimensions"),
        ((), "expected 4 dimensions"),
        ((1, 10, 5, 5, 5), "expected 4 dimensions"),
        ((1, 11, 5, 5), "expected 10 channels"),
        ((1, 10, 0, 5), "too small"),
        ((1, 10, 5, 0), "too small"),
    ],
)
def test_bad_conv_input(conv: Op, shape: tuple[int, ...], message: str) -> None:
    model = models.make_model(conv, [1])
    model.graph.input[0].type.tensor_type.ClearField("shape")
    session = models.session(model)
    with pytest.raises(Exception, match=message) as error:
        session.run(None, {"x": np.zeros(shape, np.float32)})
    assert "BlockSparseConv node 'the_node'" in str(error.value)


@pytest.mark.parametrize("shape", [(), (9,), (2, 11), (10, 2)])
def test_bad_gemm_input(gemm: Op, shape: tuple[int, ...]) -> None:
    model = models.make_model(gemm, [1])
    model.graph.input[0].type.tensor_type.ClearField("shape")
    session = models.session(model)
    with pytest.raises(Exception, match=r"input 'X' has shape .* expected 10 values along the last dimension") as error:
        session.run(None, {"x": np.zeros(shape, np.float32)})
    assert "BlockSparseGemm node 'the_node'" in str(error.value)


@pytest.mark.parametrize("value", ["sse9", "AVX512", "scalar,avx2"])
def test_unknown_instruction_set(conv: Op, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TETRIS_ONNX_ISA", value)
    error = create_error(models.make_model(conv, [1, 10, 5, 5]))
    assert f"TETRIS_ONNX_ISA is '{value}', but this build and processor support: scalar" in error
    assert "the_node" in error


def test_empty_instruction_set_means_any(conv: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRIS_ONNX_ISA", "")
    models.session(models.make_model(conv, [1, 10, 5, 5]))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 10, 2**63 - 1, 5),
        (1, 10, 2**62, 2**62),
        (1, 10, 2**31, 2**31),
        (2**63 - 1, 10, 5, 5),
        (2**40, 10, 70_000, 70_000),
    ],
)
def test_declared_sizes_without_bounds(conv: Op, shape: tuple[int, ...]) -> None:
    # Nothing is computed or allocated by what a file says the input will be.
    session = models.session(models.make_model(conv, list(shape)))
    with pytest.raises(Exception):  # noqa: B017  (onnxruntime's own, of a size that differs)
        session.run(None, {"x": np.zeros((1, 10, 5, 5), np.float32)})


@pytest.mark.parametrize("shape", [(0, 10, 2**62, 2**62), (0, 10, 2**63 - 1, 5), (0, 10, 2**33, 5)])
def test_sizes_of_an_empty_batch(conv: Op, shape: tuple[int, ...]) -> None:
    model = models.make_model(conv, [1])
    model.graph.input[0].type.tensor_type.ClearField("shape")
    session = models.session(model)
    with pytest.raises(Exception):  # noqa: B017  (ours, or numpy's or onnxruntime's before)
        session.run(None, {"x": np.zeros(shape, np.float32)})
