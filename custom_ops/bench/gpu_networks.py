"""VGG16 and ResNet-50 on a GPU, with random weights: dense in PyTorch, and with the kernels of this library.

The dense ones are channels-last, as cuDNN likes them best. In the block-sparse ones every value between our layers is
channels-last and in the order that its reader wants, as the passes for the CUDA target make it; the first convolution
and the global pooling are PyTorch's.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from gpu_library import Sparse, max_pool  # beside this file

from shapes import Layer

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "f32": torch.float32}

# Kept share of the weights after Deep Compression (Han, Mao, Dally 2016, table 4).
DEEP_COMPRESSION = {
    "conv1_2": 0.22,
    "conv2_1": 0.34,
    "conv2_2": 0.36,
    "conv3_1": 0.53,
    "conv3_2": 0.24,
    "conv3_3": 0.42,
    "conv4_1": 0.32,
    "conv4_2": 0.27,
    "conv4_3": 0.34,
    "conv5_1": 0.35,
    "conv5_2": 0.29,
    "conv5_3": 0.36,
    "fc6": 0.04,
    "fc7": 0.04,
    "fc8": 0.23,
}
RESNET_DENSITY = 0.27
_VGG16_POOLED = ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3")
_RESNET_BLOCKS = {"conv2": 3, "conv3": 4, "conv4": 6, "conv5": 3}


class _Ops(Protocol):
    """The steps of a network, dense or block-sparse. ``use`` tells the uses of a layer of the same shape apart."""

    def first(self, image: torch.Tensor, kernel: int, stride: int) -> torch.Tensor: ...
    def layer(
        self, name: str, x: torch.Tensor, use: int = 0, addend: torch.Tensor | None = None, relu: bool = True
    ) -> torch.Tensor: ...
    def pool(self, x: torch.Tensor, window: int, pad: int = 0) -> torch.Tensor: ...
    def average(self, x: torch.Tensor, size: int) -> torch.Tensor: ...


def vgg16(ops: _Ops, image: torch.Tensor) -> torch.Tensor:
    """From images to scores."""
    x = ops.first(image, 3, 1)
    for name in DEEP_COMPRESSION:
        if name == "fc6":
            x = ops.average(x, 7)
        x = ops.layer(name, x)
        if name in _VGG16_POOLED:
            x = ops.pool(x, 2)
    return x


def resnet50(ops: _Ops, image: torch.Tensor) -> torch.Tensor:
    """From images to scores, BatchNormalization fused."""
    x = ops.pool(ops.first(image, 7, 2), 3, 1)
    for stage, blocks in _RESNET_BLOCKS.items():
        for block in range(blocks):
            begins = block == 0
            strided = begins and stage != "conv2"
            y = ops.layer(f"{stage}_reduce{'0' if begins else ''}", x, block)
            y = ops.layer(f"{stage}_3x3{'s2' if strided else ''}", y, block)
            # The first block of the first stage widens 64 channels with a convolution of the shape of its last one.
            short = f"{stage}_short" if strided else f"{stage}_expand"
            skip = ops.layer(short, x, 100, relu=False) if begins else x
            x = ops.layer(f"{stage}_expand", y, block, addend=skip)
    return ops.layer("fc", ops.average(x, 1))


NETWORKS = {"vgg16": vgg16, "resnet50": resnet50}


class Pair:
    """The two versions of a network: the same zeros in both."""

    def __init__(
        self,
        library: ctypes.CDLL,
        name: str,
        layers: Mapping[str, Layer],
        kind: str,
        block: int,
        device: str,
        image_size: int,
    ) -> None:
        self._network = NETWORKS[name]
        self._size, self._options = image_size, {"dtype": TYPES[kind], "device": device}
        make = _Maker(library, kind, layers, block)
        width = 64 if image_size > 64 else 8
        kernel = 3 if name == "vgg16" else 7
        first = torch.randn(width, 3, kernel, kernel, **self._options).contiguous(memory_format=torch.channels_last)
        self._sparse = _SparseOps(library, kind, make, first)
        self._dense = _DenseOps(self._sparse, first)

    def image(self, batch: int) -> torch.Tensor:
        """A random input."""
        image = torch.randn(batch, 3, self._size, self._size, **self._options)
        return image.contiguous(memory_format=torch.channels_last)

    def sparse(self, image: torch.Tensor) -> torch.Tensor:
        """The scores by our kernels."""
        return self._network(self._sparse, image)

    def dense(self, image: torch.Tensor) -> torch.Tensor:
        """The scores by PyTorch."""
        return self._network(self._dense, image)


@dataclasses.dataclass
class _Maker:
    library: ctypes.CDLL
    kind: str
    layers: Mapping[str, Layer]
    block: int

    def __post_init__(self) -> None:
        self.made: dict[tuple[str, int], Sparse] = {}
        self._rng = np.random.default_rng(0)

    def __call__(self, name: str, use: int, relu: bool) -> Sparse:
        key = name, use
        if key not in self.made:
            layer = self.layers[name]
            kernel = (layer.kernel, layer.kernel) if layer.is_conv else ()
            self.made[key] = Sparse(
                self.library,
                self.kind,
                (layer.outputs, layer.inputs, *kernel),
                (min(self.block, layer.outputs), min(self.block, layer.inputs)),
                DEEP_COMPRESSION.get(name, RESNET_DENSITY),
                self._rng,
                stride=layer.stride,
                pad=layer.pad,
                # Of several readers of a value one finds it in its order. (A shortcut is another reader.)
                permuted=(use == 100, True),
                columns=self.block,
                last=(True, True) if layer.is_conv else (False, False),
                relu=relu,
            )
        return self.made[key]


class _SparseOps:
    """Values are [N, H, W, C]."""

    def __init__(self, library: ctypes.CDLL, kind: str, make: _Maker, first: torch.Tensor) -> None:
        self._library, self._kind, self.make, self._first = library, kind, make, first

    def first(self, image: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
        return F.conv2d(image, self._first, stride=stride, padding=kernel // 2).relu_().permute(0, 2, 3, 1)

    def layer(
        self, name: str, x: torch.Tensor, use: int = 0, addend: torch.Tensor | None = None, relu: bool = True
    ) -> torch.Tensor:
        ours = self.make(name, use, relu)
        x = x.contiguous()
        y = torch.empty(ours.output_shape(x.shape), dtype=x.dtype, device=x.device)
        ours(x, y, addend)
        return y

    def pool(self, x: torch.Tensor, window: int, pad: int = 0) -> torch.Tensor:
        x = x.contiguous()
        size = [(s + 2 * pad - window) // 2 + 1 for s in x.shape[1:3]]
        y = torch.empty((x.shape[0], *size, x.shape[3]), dtype=x.dtype, device=x.device)
        max_pool(self._library, self._kind, x, y, window, 2, pad)
        return y

    def average(self, x: torch.Tensor, size: int) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size).flatten(1)


class _DenseOps:
    """Values are [N, C, H, W], in memory channels-last."""

    def __init__(self, sparse: _SparseOps, first: torch.Tensor) -> None:
        self._sparse, self._first = sparse, first
        self._weights: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def _weight(self, name: str, use: int, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
        key = name, use
        if key not in self._weights:
            ours = self._sparse.make(name, use, relu)
            weight = torch.from_numpy(ours.dense_weight()).to(self._first)
            bias = torch.from_numpy(ours.bias).to(self._first)
            if ours.kernel:
                weight = weight.contiguous(memory_format=torch.channels_last)
            self._weights[key] = weight, bias
        return self._weights[key]

    def first(self, image: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
        return F.conv2d(image, self._first, stride=stride, padding=kernel // 2).relu_()

    def layer(
        self, name: str, x: torch.Tensor, use: int = 0, addend: torch.Tensor | None = None, relu: bool = True
    ) -> torch.Tensor:
        weight, bias = self._weight(name, use, relu)
        layer = self._sparse.make.layers[name]
        y = F.conv2d(x, weight, bias, layer.stride, layer.pad) if layer.is_conv else F.linear(x, weight, bias)
        if addend is not None:
            y += addend
        return y.relu_() if relu else y

    def pool(self, x: torch.Tensor, window: int, pad: int = 0) -> torch.Tensor:
        return F.max_pool2d(x, window, 2, pad)

    def average(self, x: torch.Tensor, size: int) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x, size).flatten(1)
