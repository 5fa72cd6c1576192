"""ChannelsLastMaxPool against numpy; tests/custom_ops/cuda runs the same on the stand-in GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.custom_ops import models


def pool_model(x_shape: Sequence[int | str], **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node("ChannelsLastMaxPool", ["x"], ["y"], "pool", domain=models.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x_shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(models.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def max_pool(x: models.Array, kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int]) -> models.Array:
    """The largest value of each window of x [N, H, W, C], window by window."""
    padded = np.pad(x, [(0, 0), (pads[0], pads[2]), (pads[1], pads[3]), (0, 0)], constant_values=-np.inf)
    out = [(padded.shape[1 + d] - kernel[d]) // strides[d] + 1 for d in range(2)]
    y = np.empty((len(x), *out, x.shape[3]), x.dtype)
    for h, w in np.ndindex(*out):
        top, left = h * strides[0], w * strides[1]
        y[:, h, w] = padded[:, top : top + kernel[0], left : left + kernel[1]].max(axis=(1, 2))
    return y


WINDOWS = [
    ((2, 2), (2, 2), (0, 0, 0, 0)),
    ((3, 3), (2, 2), (1, 1, 1, 1)),
    ((3, 2), (1, 3), (2, 0, 0, 1)),
    ((1, 1), (1, 1), (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("kernel", "strides", "pads"), WINDOWS)
@pytest.mark.parametrize("shape", [(2, 9, 7, 5), (1, 4, 4, 70), (0, 4, 4, 3)])
def test_values(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, ...],
) -> None:
    x = rng.standard_normal(shape).astype(np.float32)
    if x.size:
        x[0, 1, 2, 0], x[0, 3, 3, -1], x[-1, 0, 0, 1] = np.nan, np.inf, -np.inf
    session = models.session(pool_model(shape, kernel_shape=kernel, strides=strides, pads=pads), threads=2)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], max_pool(x, kernel, strides, pads))


def test_shape_is_inferred() -> None:
    session = models.session(pool_model(["N", 9, "W", 5], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 0, 1]))
    batch, height, _, channels = session.get_outputs()[0].shape
    assert (batch, height, channels) == ("N", 4, 5)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "attribute kernel_shape is missing"),
        ({"kernel_shape": [2]}, "attribute kernel_shape is .2., expected 2 values of at least 1"),
        ({"kernel_shape": [2, 0]}, "expected 2 values of at least 1"),
        ({"kernel_shape": [2, 2], "strides": [0, 1]}, "attribute strides is"),
        (
            {"kernel_shape": [2, 2], "pads": [0, 0, 2, 0]},
            "pads is .0, 0, 2, 0., expected less than kernel_shape",
        ),
    ],
)
def test_malformed(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=f"ChannelsLastMaxPool node 'pool': .*{message}"):
        models.session(pool_model([1, 4, 4, 3], **attributes))


@pytest.mark.parametrize("shape", [(1, 1, 4, 3), (4, 4, 3)])
def test_wrong_input(shape: tuple[int, ...]) -> None:
    model = pool_model([None] * len(shape), kernel_shape=[2, 2])
    with pytest.raises(Exception, match="ChannelsLastMaxPool node 'pool': input 'X' has shape"):
        models.session(model).run(None, {"x": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("pads", [(2**63 - 1, 0, 0, 0), (0, 0, -(2**63), 0), (2**62,) * 4])
def test_pads_without_bounds(pads: tuple[int, ...]) -> None:
    with pytest.raises(Exception, match="attribute pads"):
        models.session(pool_model((1, 4, 4, 3), kernel_shape=(2, 2), strides=(2, 2), pads=pads))


@pytest.mark.parametrize("size", [2**40, 2**62, 2**63 - 1])
def test_declared_sizes_without_bounds(size: int) -> None:
    session = models.session(pool_model(("N", size, "W", 3), kernel_shape=(2, 2), strides=(2, 2), pads=(1, 1, 1, 1)))
    with pytest.raises(Exception):  # noqa: B017  (onnxruntime's own, of a size that differs)
        session.run(None, {"x": np.zeros((1, 4, 4, 3), np.float32)})
