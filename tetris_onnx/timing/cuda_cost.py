"""What layers take on a GPU, reckoned from what its caches and tensor cores can do. Nothing in it has been measured.

A convolution is a matrix product: rows (output channels) by pixels, cut into tiles, a program each. A program takes its
steps one after another, one tile of weights and one of pixels each, at the pace of what is slowest:

    t = fill + ceil(programs / processors) * steps * max(bytes / L2, bytes / L1, multiplications / tensor cores)

and no less than what memory takes for the weights, the input and the output.
A layer is computed with the tile that makes this least, and where programs are few with sums that are split over
several of them. The block-sparse kernels go through the kept blocks only, and take repeated reads of a pixel by several
taps from the L1 cache; cuDNN's read larger tiles, which clusters of programs share. Both share the numbers below, of an
H100, so that their ratio is less wrong than either. The op library chooses its tiles by the same reckoning
(custom_ops/cuda/sparse_kernel.cc).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tetris_onnx.timing.cost import LayerShape

_PROCESSORS = 132
_L2, _L1 = 42.0, 225.0  # kilobytes a microsecond for each multiprocessor
_MEMORY = 3e6  # bytes a microsecond, of the whole GPU
_MULTIPLICATIONS = {2: 3.75, 4: 1.875}  # millions a microsecond, by bytes of a value (float32: through TF32)
_FILL, _SUM, _STEP = 1.5, 2.0, 0.1  # microseconds: a program besides its steps, starting sum_splits, the least step
_REUSE = 0.6  # of the pixels that several taps read, the share that L1 still holds
_SPLITS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)

# Tiles (rows, pixels) by what blocks allow: that of the weight's rows, and whether the kernel has 1, 9 or other taps.
_TALL = {1: ((64, 16), (64, 64), (64, 128), (128, 128)), 9: ((64, 16), (64, 64), (64, 128), (64, 256), (128, 128))}
_LOW = {1: ((32, 64), (32, 128)), 9: ((32, 64), (32, 128))}
_DENSE = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
_SHARED = 2.0  # programs of cuDNN that share what they read from L2

# Side of the smallest tile: smaller blocks share one, and are computed where any of them is kept.
LEAST_BLOCK = 32
OPEN_BATCH = 8  # what a batch that the model leaves open counts as
# Heights of blocks to choose from, and what the taller one has to gain: it costs accuracy.
HEIGHTS = (64, 128)
_TALLER_GAINS = 0.9
# A layer becomes block-sparse where it is reckoned to take at most this share of its dense time, and to save more than
# what a launch varies by.
_WORTH_IT = 0.95
_LEAST_SECONDS = 0.5e-6


def dense_seconds(shape: LayerShape, item_size: int, batch: int = 1) -> float:
    """Time of a dense layer, ``batch`` times what ``shape`` says, of values of ``item_size`` bytes."""
    depth = 128 // item_size
    steps = shape.taps * math.ceil(shape.inputs / depth)
    work = _Work(shape.outputs, _pixels(shape, batch), steps, depth, item_size, _SHARED, _SHARED)
    time = min(work.microseconds(tile, n) for tile in _DENSE for n in (1, *(n for n in _SPLITS if n <= steps)))
    return 1e-6 * max(time, _memory(shape, 1.0, item_size, batch))


def sparse_seconds(
    shape: LayerShape, density: float, block_size: tuple[int, int], item_size: int, batch: int = 1
) -> float:
    """Time of a layer of which ``density`` is kept in blocks of ``block_size`` (rows, columns)."""
    time, _, _ = choose_tile(shape, density, block_size, item_size, batch)
    return 1e-6 * max(time, _memory(shape, density, item_size, batch))


def choose_tile(
    shape: LayerShape, density: float, block_size: tuple[int, int], item_size: int, batch: int = 1
) -> tuple[float, tuple[int, int], int]:
    """The microseconds, the tile (rows, pixels) and the number of splits that the op library chooses for a layer."""
    tall = block_size[0] % 64 == 0 and (item_size == 4 or block_size[1] % 64 == 0)
    height = 32 if not tall else 128 if block_size[0] % 128 == 0 else 64
    depth = 64 if tall and item_size == 2 else 32
    steps = density * math.ceil(shape.inputs / depth) * shape.taps
    taps = shape.taps if shape.taps == 1 or tuple(shape.kernel) == (3, 3) else 0
    uses = 1.0 if taps == 1 else max(1.0, _REUSE * shape.taps / math.prod(shape.strides))
    rows = math.ceil(shape.outputs / height) * height
    work = _Work(rows, _pixels(shape, batch), steps, depth, item_size, 1.0, uses, through_l1=taps != 1)
    row = 64 if tall else 32
    whole = (_TALL if tall else _LOW)[taps] if taps else ((row, 64),)
    split = ((row, 16), (row, 64)) if taps else ((row, 64),)
    choices = [(tile, 1) for tile in whole if height % tile[0] == 0]
    choices += [(tile, splits) for tile in split for splits in _SPLITS if splits <= steps]
    return min((work.microseconds(tile, splits), tile, splits) for tile, splits in choices)


def why_dense(
    shape: LayerShape | None, density: float, block_size: tuple[int, int], item_size: int, batch: int = 1
) -> str:
    """Why a layer cannot gain on a GPU, or "" where it can."""
    if min(block_size) < LEAST_BLOCK:
        rows, columns = block_size
        return f"blocks of {rows}x{columns} are smaller than the CUDA kernels' tiles of {LEAST_BLOCK}x{LEAST_BLOCK}"
    if shape is None:
        return ""
    dense = dense_seconds(shape, item_size, batch)
    sparse = sparse_seconds(shape, density, block_size, item_size, batch)
    if sparse > _WORTH_IT * dense or dense - sparse < _LEAST_SECONDS:
        return f"reckoned {1e6 * sparse:.1f} us block-sparse against {1e6 * dense:.1f} us dense on a GPU"
    return ""


def block_height(shape: LayerShape | None, density: float, columns: int, item_size: int, batch: int = 1) -> int:
    """64 or, where that is reckoned to be clearly faster, 128: output channels of a block of ``columns`` inputs."""
    if shape is None:
        return HEIGHTS[0]
    low, tall = (sparse_seconds(shape, density, (height, columns), item_size, batch) for height in HEIGHTS)
    return HEIGHTS[1] if tall <= _TALLER_GAINS * low else HEIGHTS[0]


def _pixels(shape: LayerShape, batch: int) -> int:
    return batch * shape.samples * math.prod(shape.output_size)


def _memory(shape: LayerShape, density: float, item_size: int, batch: int) -> float:
    """Microseconds for reading the weights that are kept and the input, and writing the output."""
    values = shape.inputs * math.prod(shape.input_size) + shape.outputs * math.prod(shape.output_size)
    weights = density * shape.outputs * shape.inputs * shape.taps
    return (batch * shape.samples * values + weights) * item_size / _MEMORY


@dataclass(frozen=True)
class _Work:
    """A matrix product, cut into steps of ``depth`` input channels of a tap."""

    rows: int
    pixels: int
    steps: float
    depth: int
    item_size: int
    weight_uses: float  # how often what is read from L2 is used
    pixel_uses: float
    through_l1: bool = False  # whether pixels are read from L1 into shared memory, not from L2

    def microseconds(self, tile: tuple[int, int], splits: int) -> float:
        """The formula of the module, for a tile of (rows, pixels)."""
        weights, pixels = (1e-3 * side * self.depth * self.item_size for side in tile)
        l2 = weights / self.weight_uses + pixels / self.pixel_uses
        l1 = 2 * weights + (3 if self.through_l1 else 2) * pixels
        multiplications = 1e-6 * tile[0] * tile[1] * self.depth / _MULTIPLICATIONS[self.item_size]
        step = max(l2 / _L2, l1 / _L1, multiplications, _STEP)
        programs = math.ceil(self.pixels / tile[1]) * math.ceil(self.rows / tile[0]) * splits
        time = _FILL + math.ceil(programs / _PROCESSORS) * max(1.0, self.steps / splits) * step
        if splits > 1:
            time += _SUM + 8e-3 * splits * self.rows * self.pixels / (_L2 * _PROCESSORS)
        return time
