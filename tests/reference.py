"""The block-sparse ops in plain numpy: the oracle that every kernel is compared with.

Written for being obviously right, not for speed: the kept blocks are put into a dense weight, the permutations are
undone by their definition W[output_perm[i], input_perm[j]] = W_reordered[i, j], and the convolution is a sum over taps.
All sums are in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]


def dense_weight(
    blocks: FloatArray,
    block_index: IntArray,
    input_perm: IntArray,
    output_perm: IntArray,
    weight_shape: Sequence[int],
) -> FloatArray:
    """The dense weight [M, C, K1..Kk] that kept blocks [B, bo, bi, K1..Kk] at grid positions [B, 2] stand for."""
    outputs, inputs, *kernel = weight_shape
    bo, bi = blocks.shape[1:3]
    reordered = np.zeros((math.ceil(outputs / bo) * bo, math.ceil(inputs / bi) * bi, *kernel), blocks.dtype)
    for block, (row, column) in zip(blocks, block_index, strict=True):
        reordered[row * bo : (row + 1) * bo, column * bi : (column + 1) * bi] = block
    weight = np.zeros(tuple(weight_shape), blocks.dtype)
    weight[np.ix_(output_perm, input_perm)] = reordered[:outputs, :inputs]
    return weight


def conv(
    x: FloatArray,
    weight: FloatArray,
    bias: FloatArray | None = None,
    *,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
) -> FloatArray:
    """Convolution as in ONNX Conv with group 1: x [N, C, D1..Dk], weight [M, C, K1..Kk], pads begin..end; float64."""
    kernel = weight.shape[2:]
    rank = len(kernel)
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    pads = pads or [0] * (2 * rank)
    padding = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    padded = np.pad(x.astype(np.float64), padding)
    size = [
        (padded.shape[2 + d] - (kernel[d] - 1) * dilations[d] - 1) // strides[d] + 1  # output size along d
        for d in range(rank)
    ]
    y = np.zeros((x.shape[0], weight.shape[0], *size))
    for tap in itertools.product(*(range(k) for k in kernel)):
        window = tuple(
            slice(
                tap[d] * dilations[d],
                tap[d] * dilations[d] + (size[d] - 1) * strides[d] + 1,
                strides[d],
            )
            for d in range(rank)
        )
        y += np.einsum(
            "mc,nc...->nm...", weight[(slice(None), slice(None), *tap)].astype(np.float64), padded[(..., *window)]
        )
    if bias is not None:
        y += bias.reshape(-1, *[1] * rank)
    return y


def round_to_bfloat16(values: FloatArray) -> FloatArray:
    """To the nearest number of 8 significant bits, ties to even; float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def quantize_weight(weight: FloatArray) -> FloatArray:
    """What the bytes of a weight [M, ...] stand for: -127 to 127 for -m to m, m the largest magnitude of the row."""
    rows = weight.reshape(len(weight), -1).astype(np.float32)
    most = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    scale = np.where(most > 0, most / np.float32(127), np.float32(1)).astype(np.float32)
    quantized: FloatArray = (np.rint(rows / scale) * scale.astype(np.float64)).reshape(weight.shape)
    return quantized


def quantize_input(
    x: FloatArray, used: npt.NDArray[np.bool_], input_range: Sequence[float] | None = None
) -> FloatArray:
    """What the bytes of one input [C, ...] stand for: 0 to 255 for a range and 0: by default its ``used`` channels'."""
    seen = x[used] if input_range is None else np.array(input_range)
    low = seen.min(initial=0).astype(np.float32)
    high = seen.max(initial=0).astype(np.float32)
    scale = high / np.float32(255) - low / np.float32(255)
    scale = scale if scale > 0 else np.float32(1)
    zero_point = np.rint(-low / scale)
    quantized: FloatArray = np.clip(np.rint(x * (np.float32(1) / scale)), -zero_point, 255 - zero_point)
    return quantized.astype(np.float64) * np.float64(scale)


def _rounded(
    x: FloatArray,
    weight: FloatArray,
    used: npt.NDArray[np.bool_],
    precision: str,
    input_range: Sequence[float] | None,
) -> tuple[FloatArray, FloatArray]:
    """Inputs [N, C, ...] and a weight as a precision's products see them."""
    if precision == "bfloat16":
        return round_to_bfloat16(x), round_to_bfloat16(weight)
    if precision == "int8":
        images = [quantize_input(image, used, input_range) for image in x]
        return (np.stack(images) if images else x), quantize_weight(weight)
    assert precision == "float32"
    return x, weight


def _used_channels(block_index: IntArray, input_perm: IntArray, block_inputs: int) -> npt.NDArray[np.bool_]:
    """Which input channels [C] lie in a kept block."""
    used = np.zeros(len(input_perm), bool)
    for column in block_index[:, 1]:
        used[input_perm[column * block_inputs : (column + 1) * block_inputs]] = True
    return used


def block_sparse_conv(
    x: FloatArray,
    blocks: FloatArray,
    block_index: IntArray,
    input_perm: IntArray,
    output_perm: IntArray,
    bias: FloatArray | None = None,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    activation_min: float = -math.inf,
    activation_max: float = math.inf,
    precision: str = "float32",
    input_range: Sequence[float] | None = None,
) -> FloatArray:
    """Op BlockSparseConv (see custom_ops/README.md) in float64, of operands rounded to ``precision``."""
    weight = dense_weight(blocks, block_index, input_perm, output_perm, weight_shape)
    x, weight = _rounded(x, weight, _used_channels(block_index, input_perm, blocks.shape[2]), precision, input_range)
    y = conv(x, weight, bias, strides=strides, pads=pads, dilations=dilations)
    return np.clip(y, activation_min, activation_max)


def block_sparse_conv_add(
    x: FloatArray,
    blocks: FloatArray,
    block_index: IntArray,
    input_perm: IntArray,
    output_perm: IntArray,
    bias: FloatArray | None,
    addend: FloatArray,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    activation_min: float = -math.inf,
    activation_max: float = math.inf,
    precision: str = "float32",
    input_range: Sequence[float] | None = None,
) -> FloatArray:
    """Op BlockSparseConvAdd (see custom_ops/README.md) in float64: addend has the shape of the output."""
    weight = dense_weight(blocks, block_index, input_perm, output_perm, weight_shape)
    x, weight = _rounded(x, weight, _used_channels(block_index, input_perm, blocks.shape[2]), precision, input_range)
    y = conv(x, weight, bias, strides=strides, pads=pads, dilations=dilations)
    return np.clip(y + addend, activation_min, activation_max)


def max_pool(x: FloatArray, shape: Sequence[int]) -> FloatArray:
    """Largest values of x [N, C, D1..Dk] in windows of ``shape``, one beside the other; NaN where one has a NaN."""
    size = [d // s for d, s in zip(x.shape[2:], shape, strict=True)]
    cut = x[(..., *(slice(n * s) for n, s in zip(size, shape, strict=True)))]
    windows = cut.reshape(*x.shape[:2], *(d for pair in zip(size, shape, strict=True) for d in pair))
    return windows.max(axis=tuple(range(3, windows.ndim, 2)))  # numpy's max gives NaN where there is one


def block_sparse_conv_max_pool(
    x: FloatArray,
    blocks: FloatArray,
    block_index: IntArray,
    input_perm: IntArray,
    output_perm: IntArray,
    bias: FloatArray | None = None,
    *,
    weight_shape: Sequence[int],
    pool_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    activation_min: float = -math.inf,
    activation_max: float = math.inf,
    precision: str = "float32",
    input_range: Sequence[float] | None = None,
) -> FloatArray:
    """Op BlockSparseConvMaxPool (see custom_ops/README.md) in float64."""
    weight = dense_weight(blocks, block_index, input_perm, output_perm, weight_shape)
    x, weight = _rounded(x, weight, _used_channels(block_index, input_perm, blocks.shape[2]), precision, input_range)
    y = conv(x, weight, bias, strides=strides, pads=pads, dilations=dilations)
    return max_pool(np.clip(y, activation_min, activation_max), pool_shape)


def block_sparse_gemm(
    x: FloatArray,
    blocks: FloatArray,
    block_index: IntArray,
    input_perm: IntArray,
    output_perm: IntArray,
    bias: FloatArray | None = None,
    *,
    weight_shape: Sequence[int],
    activation_min: float = -math.inf,
    activation_max: float = math.inf,
    precision: str = "float32",
    input_range: Sequence[float] | None = None,
) -> FloatArray:
    """Op BlockSparseGemm (see custom_ops/README.md) in float64: x [.., K] -> [.., M], rounded to ``precision``."""
    weight = dense_weight(blocks, block_index, input_perm, output_perm, weight_shape)
    shape = x.shape
    x, weight = _rounded(x.reshape(-1, shape[-1]), weight, np.ones(shape[-1], bool), precision, input_range)
    x = x.reshape(shape)
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        y = y + bias
    return np.clip(y, activation_min, activation_max)
