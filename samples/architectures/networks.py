"""Networks of the usual shapes, small enough to optimize in seconds, with random weights, as torch exports them.

Each has the building block that its family is known for and the tensors that have to share a channel order because of
it. They need torch; the table of `architectures.py` is made of them and of model files.
"""

# ruff: noqa: D102  (what a module's forward does is in the module's docstring)

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Network:
    """A network and the shape of its input (batch 1)."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: int = 0  # inputs are numbers below that; 0: floats


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNormalization, Relu."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def head(channels: int, classes: int = 100) -> nn.Sequential:
    """Pooling and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Bottleneck(nn.Module):
    """ResNet's: 1x1, 3x3, 1x1, plus the input."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        last = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.branch = nn.Sequential(conv_bn(channels, inner, 1), conv_bn(inner, inner), last)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x))


def resnet() -> nn.Module:
    """Two stages of bottlenecks."""
    stages = [
        *(Bottleneck(256, 64) for _ in range(3)),
        conv_bn(256, 512, 1, 2),
        *(Bottleneck(512, 128) for _ in range(2)),
    ]
    return nn.Sequential(conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), conv_bn(64, 256, 1), *stages, head(512))


class InvertedResidual(nn.Module):
    """MobileNetV2's: expand, depthwise, project, plus the input; with ``excite`` V3's squeeze-excite and HardSwish."""

    def __init__(self, channels: int, expansion: int, excite: bool) -> None:
        super().__init__()
        inner = channels * expansion
        act: nn.Module = nn.Hardswish() if excite else nn.ReLU6()
        self.expand = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner), act)
        depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(inner), act)
        self.project = nn.Sequential(nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels))
        gate = [nn.Conv2d(inner, inner // 4, 1), nn.ReLU(), nn.Conv2d(inner // 4, inner, 1), nn.Hardsigmoid()]
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *gate) if excite else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        if self.gate is not None:
            y = y * self.gate(y)
        return x + self.project(y)


def mobilenet(excite: bool) -> nn.Module:
    """Three stages of inverted residuals."""
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2)]
    for inputs, outputs in ((32, 64), (64, 96), (96, 160)):
        layers += [conv_bn(inputs, outputs, 3, 2), *(InvertedResidual(outputs, 4, excite) for _ in range(2))]
    return nn.Sequential(*layers, conv_bn(160, 640, 1), head(640))


class Inception(nn.Module):
    """GoogLeNet's module: four branches, joined by a Concat."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn(inputs, width, 1),
                nn.Sequential(conv_bn(inputs, width, 1), conv_bn(width, 2 * width)),
                nn.Sequential(conv_bn(inputs, width // 2, 1), conv_bn(width // 2, width, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(inputs, width, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def inception() -> nn.Module:
    """Four modules."""
    stem = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), conv_bn(64, 192), nn.MaxPool2d(3, 2, 1)]
    modules = [Inception(192, 64), Inception(320, 96), nn.MaxPool2d(3, 2, 1), Inception(480, 96), Inception(480, 128)]
    return nn.Sequential(*stem, *modules, head(640))


class DenseLayer(nn.Module):
    """DenseNet's: BatchNormalization before the convolutions, the result appended to all before it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        before = [nn.BatchNorm2d(inputs), nn.ReLU()]
        self.branch = nn.Sequential(
            *before, conv_bn(inputs, 4 * growth, 1), nn.Conv2d(4 * growth, growth, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.branch(x)], 1)


def densenet() -> nn.Module:
    """Two dense blocks of four layers and the transition between them."""
    layers: list[nn.Module] = [conv_bn(3, 64, 3, 2), nn.MaxPool2d(2)]
    channels = 64
    for block in range(2):
        for _ in range(4):
            layers.append(DenseLayer(channels, 32))
            channels += 32
        if block == 0:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), head(channels))


class UNet(nn.Module):
    """Encoder and decoder with skip connections; up by Resize or by ConvTranspose."""

    def __init__(self, transposed: bool, widths: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()
        ins = (3, *widths[:-1])
        self.down = nn.ModuleList(nn.Sequential(conv_bn(a, b), conv_bn(b, b)) for a, b in zip(ins, widths, strict=True))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        ups = [nn.ConvTranspose2d(a, b, 2, 2) if transposed else conv_bn(a, b, 1) for a, b in pairs]
        self.up = nn.ModuleList(ups)
        self.merge = nn.ModuleList(nn.Sequential(conv_bn(2 * b, b), conv_bn(b, b)) for _, b in pairs)
        self.last = nn.Conv2d(widths[0], 2, 1)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = up(x) if self.transposed else functional.interpolate(up(x), scale_factor=2.0)
            x = merge(torch.cat([skip, x], 1))
        return torch.sigmoid(self.last(x))


def conv_silu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """YOLO's unit: convolution, BatchNormalization, x * sigmoid(x)."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class SplitBottlenecks(nn.Module):
    """YOLOv8's C2f: a Split, residual bottlenecks on one part, and all of them in a Concat."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first, self.last = conv_silu(inputs, outputs, 1), conv_silu((2 + count) * half, outputs, 1)
        self.inner = nn.ModuleList(nn.Sequential(conv_silu(half, half), conv_silu(half, half)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.inner:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A backbone, one upward path with skip connections, and a head of two branches at each of two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_silu(3, 32, 3, 2), conv_silu(32, 64, 3, 2), SplitBottlenecks(64, 64, 1))
        self.middle = nn.Sequential(conv_silu(64, 128, 3, 2), SplitBottlenecks(128, 128, 2))
        self.deep = nn.Sequential(conv_silu(128, 256, 3, 2), SplitBottlenecks(256, 256, 1))
        self.pool = conv_silu(4 * 128, 256, 1)
        self.reduce = conv_silu(256, 128, 1)
        self.join = SplitBottlenecks(256 + 128, 128, 1)
        self.boxes = nn.ModuleList(nn.Sequential(conv_silu(c, 64), nn.Conv2d(64, 64, 1)) for c in (128, 256))
        self.classes = nn.ModuleList(nn.Sequential(conv_silu(c, 64), nn.Conv2d(64, 20, 1)) for c in (128, 256))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.middle(self.stem(x))
        coarse = self.deep(fine)
        pools = [self.reduce(coarse)]
        for _ in range(3):  # SPPF: pools of pools, joined
            pools.append(functional.max_pool2d(pools[-1], 5, 1, 2))
        coarse = self.pool(torch.cat(pools, 1))
        fine = self.join(torch.cat([functional.interpolate(coarse, scale_factor=2.0), fine], 1))
        maps = []
        for boxes, classes, features in zip(self.boxes, self.classes, (fine, coarse), strict=True):
            maps.append(torch.cat([boxes(features), classes(features)], 1).flatten(2))
        boxes, scores = torch.cat(maps, 2).split((64, 20), 1)
        return boxes, scores.sigmoid()


class Attention(nn.Module):
    """Multi-head attention with one product for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5, -1)
        return self.out((scores @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A transformer's: attention and a multilayer perceptron, each behind a LayerNormalization, each added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Vit(nn.Module):
    """A vision transformer: patches, a class token, positions, four blocks."""

    def __init__(self, width: int = 192, patch: int = 16, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, 3) for _ in range(4)), nn.LayerNorm(width))
        self.classifier = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions)
        return self.classifier(x[:, 0])


class BertLayer(nn.Module):
    """BERT's: products for queries, keys and values apart, each part added to its input, then normalized."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def split(self, x: Tensor) -> Tensor:
        """[batch, length, width] as [batch, heads, length, width / heads]."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(linear(x)) for linear in (self.query, self.key, self.value))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        x = self.norms[0](x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.down(functional.gelu(self.up(x))))


class Bert(nn.Module):
    """BERT-base's encoder but for the number of layers: words, positions, layers, the first word's class."""

    def __init__(self, layers: int = 2, width: int = 768, heads: int = 12, words: int = 1000) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Parameter(0.1 * torch.randn(1, 128, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(BertLayer(width, heads) for _ in range(layers)))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.norm(self.words(x) + self.positions))
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class ChannelsLast(nn.Module):
    """A convolution as converters write it for a network that was channels-last: a Transpose on each side."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class NhwcResidual(nn.Module):
    """Two of them, plus the input; bias and activation are on channels-last values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = ChannelsLast(channels, channels), ChannelsLast(channels, channels)
        self.scale = nn.Parameter(0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x) * self.scale)))


class Nhwc(nn.Module):
    """A channels-last network: NHWC input, a residual part, Flatten in NHWC order, two products."""

    def __init__(self) -> None:
        super().__init__()
        layers = [ChannelsLast(3, 64, 2), nn.ReLU(), NhwcResidual(64), ChannelsLast(64, 128, 2), nn.ReLU()]
        self.body = nn.Sequential(*layers, NhwcResidual(128), ChannelsLast(128, 128, 2), nn.ReLU(), nn.Flatten())
        self.tail = nn.Sequential(nn.Linear(128 * 16 * 16, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's: half of the channels pass, the other half is convolved, then both are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        middle = nn.Sequential(nn.Conv2d(half, half, 3, padding=1, groups=half), nn.BatchNorm2d(half))
        self.branch = nn.Sequential(conv_bn(half, half, 1), middle, conv_bn(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.branch(right)], 1)
        batch, channels, height, width = y.shape
        return y.reshape(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet() -> nn.Module:
    """Six units at two scales."""
    first, second = [ShuffleUnit(128) for _ in "..."], [ShuffleUnit(256) for _ in "..."]
    return nn.Sequential(
        conv_bn(3, 32, 3, 2), conv_bn(32, 128, 3, 2), *first, conv_bn(128, 256, 3, 2), *second, head(256)
    )


class ResNeXt(nn.Module):
    """Bottleneck with a grouped convolution."""

    def __init__(self, channels: int, inner: int, groups: int) -> None:
        super().__init__()
        last = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.branch = nn.Sequential(conv_bn(channels, inner, 1), conv_bn(inner, inner, groups=groups), last)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x))


def resnext() -> nn.Module:
    """Three bottlenecks of four groups of 64 channels."""
    return nn.Sequential(
        conv_bn(3, 64, 7, 4), conv_bn(64, 256, 1), *(ResNeXt(256, 256, 4) for _ in range(3)), head(256)
    )


def vgg() -> nn.Module:
    """A plain chain."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 256), (256, 256)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 49, 256), nn.ReLU(), nn.Linear(256, 100))


NETWORKS = {
    "VGG-like": Network(vgg, (1, 3, 112, 112)),
    "ResNet-like": Network(resnet, (1, 3, 128, 128)),
    "ResNeXt-like": Network(resnext, (1, 3, 128, 128)),
    "MobileNetV2-like": Network(lambda: mobilenet(excite=False), (1, 3, 160, 160)),
    "MobileNetV3-like": Network(lambda: mobilenet(excite=True), (1, 3, 160, 160)),
    "Inception-like": Network(inception, (1, 3, 128, 128)),
    "DenseNet-like": Network(densenet, (1, 3, 128, 128)),
    "U-Net-like, Resize": Network(lambda: UNet(transposed=False), (1, 3, 96, 96)),
    "U-Net-like, ConvTranspose": Network(lambda: UNet(transposed=True), (1, 3, 96, 96)),
    "YOLO-like": Network(Yolo, (1, 3, 192, 192)),
    "ShuffleNetV2-like": Network(shufflenet, (1, 3, 112, 112)),
    "ViT-like": Network(Vit, (1, 3, 224, 224)),
    "BERT-like": Network(Bert, (1, 128), words=1000),
    "channels-last": Network(Nhwc, (1, 128, 128, 3)),
}


def export(network: Network, seed: int = 0, dynamo: bool = False) -> onnx.ModelProto:
    """The network as ONNX (opset 17), with random weights and statistics of BatchNormalizations."""
    torch.manual_seed(seed)
    module = network.make()
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 1.5)
    module.eval()
    example = torch.randint(network.words, network.shape) if network.words else torch.randn(network.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            return torch.onnx.export(module, (example,), dynamo=True, verbose=False).model_proto
        file = io.BytesIO()
        names = {"input_names": ["input"], "dynamic_axes": {"input": {0: "batch"}}}
        torch.onnx.export(module, (example,), file, opset_version=17, dynamo=False, **names)
    return onnx.load_from_string(file.getvalue())
