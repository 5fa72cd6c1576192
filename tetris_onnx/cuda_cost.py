"""Where a block-sparse layer is worth its launches on a GPU: a roofline. Nothing in it has been measured.

    t(layer) = max(2 multiplications / F, bytes / B)

with F and B of an H100: half of its dense tensor-core peak, and its memory's bandwidth. A dense layer of that time
becomes density * t at best. Where the difference is below what launches vary by, the layer stays dense. The rule leaves
out how well small maps fill a GPU, which makes real layers slower, dense and sparse alike; so it drops only layers that
can win nothing.
"""

from __future__ import annotations

import math

from tetris_onnx.cost import LayerShape

_FLOPS = {2: 400e12, 4: 200e12}  # by bytes of a value: float16 and bfloat16, float32 through TF32
_BYTES_PER_SECOND = 3e12
_LEAST_SECONDS = 0.5e-6
# Side of the smallest tile: smaller blocks share one, and are computed where any of them is kept.
LEAST_BLOCK = 32
OPEN_BATCH = 8  # what a batch that the model leaves open counts as


def dense_seconds(shape: LayerShape, item_size: int, batch: int = 1) -> float:
    """The roofline of a dense layer, ``batch`` times what ``shape`` says, of values of ``item_size`` bytes."""
    multiplications = batch * shape.multiplications
    values = (
        batch
        * shape.samples
        * (shape.inputs * math.prod(shape.input_size) + shape.outputs * math.prod(shape.output_size))
    )
    values += shape.outputs * shape.inputs * shape.taps
    return max(2 * multiplications / _FLOPS[item_size], values * item_size / _BYTES_PER_SECOND)


def why_dense(
    shape: LayerShape | None, density: float, block_size: tuple[int, int], item_size: int, batch: int = 1
) -> str:
    """Why a layer cannot gain on a GPU, or "" where it can."""
    if min(block_size) < LEAST_BLOCK:
        rows, columns = block_size
        return f"blocks of {rows}x{columns} are smaller than the CUDA kernels' tiles of {LEAST_BLOCK}x{LEAST_BLOCK}"
    if shape is None:
        return ""
    saved = (1 - density) * dense_seconds(shape, item_size, batch)
    if saved < _LEAST_SECONDS:
        return f"it could save {1e6 * saved:.1g} us on a GPU, less than a launch varies by"
    return ""
