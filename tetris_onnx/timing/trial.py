"""Time a block-sparse model against its dense one, and find the layers that lose.

Layers are timed in their own networks, in turns (bench, profiling). One that seems to lose is timed again: only what is
slower beyond the noise both times counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from tetris_onnx.data.calibration import Samples, Shapes, fixed_batch, model_inputs
from tetris_onnx.timing.bench import BenchResult, bench
from tetris_onnx.timing.profiling import LAYER, LayerTiming, rows_of

_SECONDS = 1.0  # of each look at the whole networks
_OURS = "BlockSparse"


@dataclass(frozen=True)
class Trial:
    """What was measured."""

    network: BenchResult
    layers: dict[str, tuple[float, float]]  # milliseconds (dense, as it is now) by the name of the layer's output
    slower: frozenset[str]  # block-sparse layers that are slower than dense


def try_out(
    dense: onnx.ModelProto,
    model: onnx.ModelProto,
    layers: Sequence[str],
    samples: Samples | None,
    threads: int = 1,
    shapes: Shapes | None = None,
) -> Trial:
    """Time ``model`` against ``dense``, and its ``layers`` (names of outputs in ``dense``), on a batch of ``samples``.

    Inputs are random without samples, of the ``shapes`` that are given. Raises `BenchError`, `CalibrationError` or
    `SessionError`.
    """

    def timed() -> BenchResult:
        batch = fixed_batch(model_inputs(dense)) or 1
        return bench(
            dense,
            model,
            threads=threads,
            batch=batch,
            seconds=_SECONDS,
            per_layer=True,
            data=samples,
            shapes=shapes,
        )

    first = timed()
    times, slower = _of_layers(dense, first, layers)
    if slower:
        again, still = _of_layers(dense, timed(), layers)
        slower &= still
        times |= {name: again[name] for name in slower}
    return Trial(first, times, frozenset(slower))


def _of_layers(
    dense: onnx.ModelProto, result: BenchResult, layers: Sequence[str]
) -> tuple[dict[str, tuple[float, float]], set[str]]:
    """Milliseconds of each layer that has a row of its own, and the block-sparse ones that are slower."""
    rows = rows_of(dense)
    timings: dict[str, LayerTiming] = {timing.name: timing for timing in result.layers if timing.kind == LAYER}
    times, slower = {}, set()
    for layer in layers:
        row = rows.get(("value", layer))
        timing = None if row is None else timings.get(row.name)
        if timing is None or None in timing.median_ms:
            continue
        before, after = (ms or 0.0 for ms in timing.median_ms)
        times[layer] = before, after
        if timing.slower_ms > 0 and timing.op_types[1].startswith(_OURS):
            slower.add(layer)
    return times, slower
