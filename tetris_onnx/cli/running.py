"""What a report gets from running the model before and after: accuracy and times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetris_onnx.cli.terminal import percent_of

if TYPE_CHECKING:
    from tetris_onnx.data.calibration import Data, Shapes
    from tetris_onnx.reports.report import Report

_BENCH_SECONDS = 3.0


def with_accuracy(
    report: Report, model: Path, result: Any, data: Data, progress: Callable[[str, int, int], None]
) -> Report:
    """The report with the accuracy before and after, or at least the share of samples with the same answer."""
    from tetris_onnx.accuracy.compare import compare as run_compare

    found = run_compare(model, result, data, progress=lambda done, total: progress("accuracy", done, total))
    report = replace(report, agreement=found.agreement)
    if found.accuracy_a is None or found.accuracy_b is None:
        return replace(report, notes=(*report.notes, f"{data.source} has no labels, so there is no accuracy"))
    return replace(report, accuracy=(found.accuracy_a, found.accuracy_b), labeled=found.samples)


def with_times(
    report: Report, model: Path, result: Any, shapes: Shapes, progress: Callable[[str, int, int], None]
) -> Report:
    """The report with the time of one run on random inputs (of ``shapes``, by name), before and after."""
    from tetris_onnx.timing.bench import bench as run_bench

    shown = percent_of("bench", progress)
    found = run_bench(model, result, threads=report.threads, seconds=_BENCH_SECONDS, shapes=shapes, progress=shown)
    assert found.speedup is not None
    assert found.interval is not None
    first, second = (timing.median_ms for timing in found.timings)
    return replace(report, milliseconds=(first, second), speedup=(found.speedup, *found.interval))
