"""The CUDA ops against the numpy oracle: everything but the GPU is real (see stand_in.py)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.custom_ops import models
from tests.custom_ops.cuda import stand_in
from tests.custom_ops.cuda.stand_in import Launch, StandIn
from tests.custom_ops.test_channels_last_max_pool import WINDOWS, max_pool, pool_model

pytestmark = pytest.mark.usefixtures("shared_library")

# Numbers with 8 significant bits are exact in every type, and so are their products in float32. What is left is the
# order of the float32 sums, and the rounding of the output: half a unit in its last place, of the largest output.
TOLERANCES = {"tf32": 1e-5, "f32": 1e-5, "f16": 2**-11, "bf16": 2**-8}
ONNX_TYPES = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, driver: StandIn, execute: Callable[[Launch], None]) -> None:
    driver.execute = execute
    if (
        execute is not stand_in.run_numpy
        and "kind" in request.fixturenames
        and request.getfixturevalue("kind") == "bf16"
    ):
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")


def eight_bits(values: models.Array) -> models.Array:
    return stand_in.to_float(stand_in.from_float(values, "bf16"))


def op_of(rng: np.random.Generator, *arguments: Any, **keywords: Any) -> models.Op:
    op = models.random_op(rng, *arguments, **keywords)
    bias = None if op.bias is None else eight_bits(op.bias)
    return models.Op(
        op.op_type, eight_bits(op.blocks), op.block_index, op.input_perm, op.output_perm, bias, op.attributes
    )


def model_of(op: models.Op, x_shape: Any, kind: str) -> onnx.ModelProto:
    """float32 in and out; the node itself in another type, between Casts."""
    return in_type(models.make_model(op, x_shape), kind)


def in_type(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """The model of one node with the node in another type, between Casts."""
    if kind in ONNX_TYPES:
        node = model.graph.node[0]
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                values = stand_in.from_float(numpy_helper.to_array(tensor), kind)
                tensor.CopyFrom(
                    helper.make_tensor(tensor.name, ONNX_TYPES[kind], values.shape, values.tobytes(), raw=True)
                )
        for slot, name in enumerate(node.input):
            if name in ("x", "addend"):
                node.input[slot] = f"{name}_cast"
                model.graph.node.insert(0, helper.make_node("Cast", [name], [f"{name}_cast"], to=ONNX_TYPES[kind]))
        node.output[0] = "y_cast"
        model.graph.node.append(helper.make_node("Cast", ["y_cast"], ["y"], to=TensorProto.FLOAT))
    return model


def check(op: models.Op, x: models.Array, kind: str, driver: StandIn) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TETRIS_ONNX_TF32", "0" if kind == "f32" else "1")
        session = models.session(model_of(op, x.shape, kind))
    try:
        y = session.run(None, {"x": x})[0]
    except Exception as error:
        raise AssertionError("\n".join([str(error), *driver.errors])) from error
    expected = op.expected(x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCES[kind] * max(1.0, np.abs(expected).max(initial=0)))
    used = {launch.variant.type for launch in driver.launches if launch.variant.kernel == "block_sparse_conv"}
    assert used <= {kind}
    assert used or x.size == 0


def random_input(rng: np.random.Generator, *shape: int) -> models.Array:
    return eight_bits(rng.standard_normal(shape))


@pytest.mark.parametrize(
    ("block_size", "kind"),
    [
        *((block, kind) for block in [(32, 32), (128, 64), (48, 80), (5, 33)] for kind in ("tf32", "f16")),
        *((block, kind) for block in [(64, 64), (16, 8)] for kind in TOLERANCES),
    ],
)
@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        ((1, 1), {}),
        ((1, 1), {"strides": [2, 3]}),
        ((3, 3), {"pads": [1, 1, 1, 1], "activation_min": 0.0}),
        ((3, 3), {"pads": [0, 2, 1, 0], "strides": [2, 1], "dilations": [1, 2]}),
        ((2, 5), {"pads": [1, 2, 0, 2], "dilations": [2, 1], "activation_max": 0.5}),
    ],
)
def test_conv(
    rng: np.random.Generator,
    driver: StandIn,
    kernel: tuple[int, int],
    attributes: dict[str, Any],
    block_size: tuple[int, int],
    kind: str,
) -> None:
    # Channels that fill no block, two images, more than one tile of pixels.
    check(op_of(rng, (150, 70, *kernel), block_size, **attributes), random_input(rng, 2, 70, 9, 7), kind, driver)


@pytest.mark.parametrize("kind", ["tf32", "f16"])
@pytest.mark.parametrize(
    ("kernel", "size", "attributes"),
    [
        ((3,), (40,), {"pads": [1, 1], "strides": [2]}),
        ((1,), (40,), {}),
        ((3, 3, 3), (4, 5, 6), {"pads": [1, 1, 1, 1, 0, 1], "strides": [1, 2, 1], "dilations": [1, 1, 2]}),
        ((1, 3, 3), (4, 5, 6), {"pads": [0, 1, 1, 0, 1, 1]}),
        ((1, 1, 1), (4, 5, 6), {"strides": [2, 1, 1], "pads": [1, 0, 0, 1, 0, 0]}),
        ((9, 1), (12, 4), {}),
    ],
)
def test_other_ranks_and_kernels(
    rng: np.random.Generator,
    driver: StandIn,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    attributes: dict[str, Any],
    kind: str,
) -> None:
    check(op_of(rng, (40, 36, *kernel), (32, 32), 0.6, **attributes), random_input(rng, 2, 36, *size), kind, driver)


@pytest.mark.parametrize("kind", ["tf32", "f16", "f32"])
@pytest.mark.parametrize(("input_last", "output_last"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("kernel", "size", "attributes"),
    [
        ((3, 3), (7, 6), {"pads": [1, 1, 1, 1], "strides": [2, 1], "activation_min": 0.0}),
        ((1, 1), (7, 6), {}),
        ((2, 5), (7, 6), {"pads": [1, 2, 0, 2]}),
        ((3,), (13,), {}),
        ((2, 3, 3), (3, 4, 5), {"pads": [0, 1, 1, 1, 1, 1]}),
    ],
)
def test_channels_last(
    rng: np.random.Generator,
    driver: StandIn,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    attributes: dict[str, Any],
    input_last: bool,
    output_last: bool,
    kind: str,
) -> None:
    layout = models.transposes(len(kernel), input_last, output_last)
    op = op_of(rng, (150, 70, *kernel), (64, 64), **attributes, **layout)
    check(op, random_input(rng, 2, *((*size, 70) if input_last else (70, *size))), kind, driver)


@pytest.mark.parametrize("kind", ["tf32", "f16"])
def test_channels_last_in_order_is_read_in_place(rng: np.random.Generator, driver: StandIn, kind: str) -> None:
    """Between two of our convolutions there is nothing: the second reads what the first has written."""
    layout = models.transposes(2, True, True)
    op = op_of(rng, (128, 192, 3, 3), (64, 64), 0.4, pads=[1, 1, 1, 1], permuted=False, **layout)
    check(op, random_input(rng, 1, 9, 7, 192), kind, driver)
    assert {launch.variant.kernel for launch in driver.launches} <= {"block_sparse_conv", "sum_splits"}


@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("kernel", "block_size"), [(1, (64, 64)), (3, (64, 64)), (3, (32, 32)), (2, (128, 64))])
def test_addend(
    rng: np.random.Generator, driver: StandIn, kernel: int, block_size: tuple[int, int], last: bool, kind: str
) -> None:
    layout = models.transposes(2, last, last)
    limits = {"activation_min": 0.0, "activation_max": 4.0}
    op = op_of(rng, (150, 70, kernel, kernel), block_size, **limits, **layout)
    x = random_input(rng, 2, *((9, 8, 70) if last else (70, 9, 8)))
    shape = op.expected(x).shape
    op, addend = models.fused(op, "Add"), 4 * random_input(rng, *shape)
    model = models.make_model(op, x.shape, addend_shape=shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TETRIS_ONNX_TF32", "0" if kind == "f32" else "1")
        session = models.session(in_type(model, kind))
    y = session.run(None, {"x": x, "addend": addend})[0]
    expected = op.expected(x, addend)
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCES[kind] * np.abs(expected).max())
    assert (expected > 0).any() and (expected < 4).any()


@pytest.mark.parametrize("kind", ["tf32", "f16", "bf16"])
@pytest.mark.parametrize(("kernel", "strides", "pads"), WINDOWS)
def test_max_pool(
    rng: np.random.Generator,
    driver: StandIn,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, ...],
    kind: str,
) -> None:
    x = random_input(rng, 2, 9, 7, 70)
    x[0, 1, 2, 0], x[0, 3, 3, -1], x[-1, 0, 0, 1] = np.nan, np.inf, -np.inf
    model = pool_model(x.shape, kernel_shape=kernel, strides=strides, pads=pads)
    session = models.session(in_type(model, kind))
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], max_pool(x, kernel, strides, pads))
    assert [launch.variant.kernel for launch in driver.launches] == ["max_pool"]


@pytest.mark.parametrize("kind", ["tf32", "f16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, "one", 1.0])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_density(
    rng: np.random.Generator, driver: StandIn, kernel: tuple[int, ...], density: float | str, bias: bool, kind: str
) -> None:
    op = op_of(rng, (200, 130, *kernel), (64, 64), density, bias=bias)
    check(op, random_input(rng, 3, 130, *(6 for _ in kernel)), kind, driver)


@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (0, 3), (2, 3, 5), (130,)])
def test_gemm(rng: np.random.Generator, driver: StandIn, leading: tuple[int, ...], permuted: bool, kind: str) -> None:
    op = op_of(rng, (131, 256), (64, 64), permuted=permuted, activation_min=-1.0, activation_max=1.5)
    check(op, random_input(rng, *leading, 256), kind, driver)
    kernels = [launch.variant.kernel for launch in driver.launches]
    assert ("channels_last" in kernels) == (permuted and 0 not in leading)  # an input in order is read in place


@pytest.mark.parametrize("kind", ["tf32", "f16", "bf16", "f32"])
def test_every_tile(rng: np.random.Generator, driver: StandIn, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Every compiled form of the convolution kernel, right, on an input with more than one of its tiles."""
    wanted = {v for v in stand_in.build.variants() if v.kernel == "block_sparse_conv" and v.type == kind}
    for variant in sorted(wanted, key=lambda v: v.name):
        taps = variant.taps or 4
        kernel = {1: (1, 1), 9: (3, 3), 4: (2, 2)}[taps]
        last = variant.layout == "nhwc"
        block = (variant.bm, max(32, variant.bk)) if variant.bm > 32 else (32, 32)
        layout = models.transposes(2, last, last)
        op = op_of(rng, (variant.bm + 20, 140, *kernel), block, 0.6, pads=[k // 2 for k in kernel] * 2, **layout)
        splits = 3 if variant.layout == "split" else 1
        monkeypatch.setenv("TETRIS_ONNX_CUDA_TILE", f"{variant.bm}x{variant.bn}x{splits}")
        size = 5, math.ceil(variant.bn / 9)
        check(op, random_input(rng, 2, *((*size, 140) if last else (140, *size))), kind, driver)
        assert driver.launches[-1 - (splits > 1)].variant == variant


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["tf32", "f16", "bf16"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_nan_and_inf_reach_exactly_the_outputs_that_use_them(
    rng: np.random.Generator, driver: StandIn, kernel: int, kind: str, value: float
) -> None:
    op = op_of(rng, (128, 128, kernel, kernel), (64, 64), 0.5, pads=[kernel // 2] * 4, activation_min=-6.0)
    where = np.zeros((1, 128, 6, 5), bool)
    for channel, row, column in [(3, 0, 0), (70, 2, 4)]:
        where[0, channel, row, column] = True
    x = random_input(rng, *where.shape)
    uses = op.expected(np.where(where, 1e6, x)) != op.expected(np.where(where, -1e6, x))
    y = models.session(model_of(op, x.shape, kind)).run(None, {"x": np.where(where, value, x).astype(np.float32)})[0]
    if np.isnan(value):
        np.testing.assert_array_equal(np.isnan(y), uses)
    else:  # the limit hides -inf
        assert not np.isfinite(y[~np.isfinite(y)]).any()
        assert (np.isfinite(y) | uses).all()
    assert uses.any()


def test_tf32_rounds_to_nearest(rng: np.random.Generator, driver: StandIn) -> None:
    """11 significant bits of each operand: products are off by at most 2^-11 of each, and the errors average out."""
    op = models.random_op(rng, (64, 512), (64, 64), 1.0)
    x = rng.standard_normal((8, 512)).astype(np.float32)
    y = models.run(op, x)
    error = y - op.expected(x)
    scale = np.sqrt(512)  # of the outputs: sums of 512 products of unit variance
    assert 1e-6 * scale < np.abs(error).max() < 1.2e-3 * scale
    assert abs(error.mean()) < 1e-4 * scale  # cutting off instead would pull all towards zero
    exact = rng.integers(-1000, 1000, (64, 512)).astype(np.float32)
    whole = models.Op(
        op.op_type, *[op.blocks * 0 + 1], op.block_index, op.input_perm, op.output_perm, None, op.attributes
    )
    np.testing.assert_array_equal(models.run(whole, exact), whole.expected(exact))


def test_large_batch_is_cut(rng: np.random.Generator, driver: StandIn) -> None:
    op = op_of(rng, (64, 33, 1, 1), (64, 64), 1.0)
    check(op, random_input(rng, 9, 33, 40, 30), "f16", driver)
    kernels = [launch for launch in driver.launches if launch.variant.kernel == "block_sparse_conv"]
    assert [launch.arguments["P"] for launch in kernels] == [5 * 1200, 4 * 1200]


def test_one_session_runs_any_size(rng: np.random.Generator, driver: StandIn) -> None:
    op = op_of(rng, (70, 45, 3, 3), (32, 32), pads=[1, 1, 1, 1], strides=[2, 1])
    session = models.session(model_of(op, ["N", 45, "H", "W"], "f32"))
    for batch, height, width in [(1, 3, 3), (2, 12, 17), (1, 3, 3), (3, 1, 1)]:
        x = random_input(rng, batch, 45, height, width)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], op.expected(x), atol=1e-3)
    before = len([call for call in driver.log if call.startswith("cuMem")])
    session.run(None, {"x": x})
    # No allocation and no copy once the sizes are known, and never a wait.
    assert len([call for call in driver.log if call.startswith("cuMem")]) == before
    assert driver.log[-1].startswith("cuLaunchKernel")
    in_compute = driver.log[driver.log.index("cuLaunchKernel channels_last") :]
    assert not any(call.startswith(("cuCtxSynchronize", "cuModule", "cuMemcpy")) for call in in_compute)


def test_memory_goes_with_the_session(rng: np.random.Generator, driver: StandIn, library: Path) -> None:
    before = driver.bytes_in_use
    op = op_of(rng, (70, 45, 3, 3), (32, 32))
    first, second = (models.session(model_of(op, [1, 45, 9, 9], "f16")) for _ in range(2))
    for session in (first, second):
        session.run(None, {"x": random_input(rng, 1, 45, 9, 9)})
    held = driver.bytes_in_use
    assert held > before
    del first, session
    assert before < driver.bytes_in_use < held
    del second
    assert driver.bytes_in_use == before


def test_concurrent_runs(rng: np.random.Generator, driver: StandIn) -> None:
    driver.execute = stand_in.run_numpy  # Triton's interpreter runs in one thread only
    op = op_of(rng, (64, 64, 3, 3), (32, 32), 0.5, pads=[1, 1, 1, 1])
    session = models.session(model_of(op, ["N", 64, "H", "W"], "f16"), threads=1)
    inputs = [random_input(rng, 1, 64, 5 + i, 6) for i in range(4)]
    expected = [session.run(None, {"x": x})[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(10) if not np.array_equal(session.run(None, {"x": inputs[i]})[0], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert driver.errors == []
