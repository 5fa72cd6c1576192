"""How many programs each layer of VGG16 and ResNet-50 gives a GPU of 132 multiprocessors (H100): a table, in Markdown.

    python custom_ops/bench/gpu_tiles.py [--batch 1] [--density 0.27] [--block-size 64x64]

Needs no GPU: the choice is reckoned as the op library does it (tests/custom_ops/cuda/test_choice.py).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from shapes import Layer, read_layers
from tetris_onnx.config import parse_block_size
from tetris_onnx.timing.cost import LayerShape
from tetris_onnx.timing.cuda_cost import choose_tile

NETWORKS = ("vgg16", "resnet50")


def layer_shape(layer: Layer) -> LayerShape:
    """A line of a shapes file as the cost model has it."""
    if not layer.is_conv:
        return LayerShape(layer.outputs, layer.inputs)
    size = tuple((s + 2 * layer.pad - layer.kernel) // layer.stride + 1 for s in layer.map_size)
    kernel, strides = (layer.kernel,) * 2, (layer.stride,) * 2
    return LayerShape(layer.outputs, layer.inputs, kernel, strides, (1, 1), layer.map_size, size)


def programs(layer: Layer, batch: int, density: float, block: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
    """The tile of a layer in float16, over how many programs its sums are split, and the number of all programs."""
    shape = layer_shape(layer)
    block = min(block[0], layer.outputs), min(block[1], layer.inputs)
    _, tile, splits = choose_tile(shape, density, block, 2, batch)
    rows = math.ceil(layer.outputs / block[0]) * max(1, block[0] // tile[0])
    return tile, splits, rows * math.ceil(batch * math.prod(shape.output_size) / tile[1]) * splits


def lines(batch: int, density: float, block: tuple[int, int]) -> Iterator[str]:
    """The table."""
    yield "| layer | tile | splits | programs |"
    yield "|---|---|---|---|"
    for network in NETWORKS:
        for layer in read_layers(Path(__file__).with_name(f"{network}.txt")):
            (rows, pixels), splits, count = programs(layer, batch, density, block)
            yield f"| {network} {layer.name} | {rows}x{pixels} | {splits} | {count} |"


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--density", type=float, default=0.27)
    parser.add_argument("--block-size", type=parse_block_size, default=(64, 64))
    arguments = parser.parse_args()
    for line in lines(arguments.batch, arguments.density, arguments.block_size):
        print(line)


if __name__ == "__main__":
    main()
