"""The layers in a shapes file (vgg16.txt, resnet50.txt)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layer:
    """One line of a shapes file: a convolution of a square kernel, or (no map) a matrix product."""

    name: str
    outputs: int
    inputs: int
    map_size: tuple[int, ...] = ()
    kernel: int = 1
    stride: int = 1
    pad: int = 0

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return bool(self.map_size)

    def multiplications(self) -> int:
        """Multiplications of the dense layer for one image."""
        out = [(size + 2 * self.pad - self.kernel) // self.stride + 1 for size in self.map_size]
        return self.outputs * self.inputs * math.prod(out) * (self.kernel**2 if self.is_conv else 1)


def read_layers(path: Path) -> list[Layer]:
    """The layers of a shapes file; `#` starts a comment."""
    layers = []
    for line in path.read_text().splitlines():
        fields = line.partition("#")[0].split()
        if fields:
            outputs, inputs, *rest = map(int, fields[1:])
            layers.append(Layer(fields[0], outputs, inputs, tuple(rest[:2]), *rest[2:]))
    return layers
