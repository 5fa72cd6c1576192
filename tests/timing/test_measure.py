"""Measuring a machine: the networks run on this one, and the coefficients come out of the times.

Nothing here asserts a time that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from tetris_onnx.timing import measure
from tetris_onnx.timing.cost import AVX512, KINDS, LayerShape, Machine, predict, predict_dense
from tetris_onnx.timing.measure import _block, _cold, _network, _time, _warm, measure_machine
from tetris_onnx.timing.profiling import LAYER, LayerTiming

TRUTH = replace(
    AVX512,
    dense={name: 2 * c for name, c in AVX512.dense.items()},
    sparse={name: 3 * c for name, c in AVX512.sparse.items()},
    fork=(2000.0, 4000.0),
    serial=(0.25, 0.1),
)


def stub(truth: Machine) -> Any:
    """What `profiling.profile` would say on a machine with these coefficients."""

    def profile(models: Sequence[onnx.ModelProto], feeds: object, names: object, provider: str, threads: int) -> Any:
        dense, sparse = models
        assert provider == "cpu"
        shapes = next(s for s in (_warm(), _cold()) if len(s) == len(dense.graph.input))
        found = []
        for i, shape in enumerate(shapes):
            node = next(n for n in sparse.graph.node if n.name == f"layer{i}")
            blocks = {t.name: t.dims for t in sparse.graph.initializer}[node.input[1]]
            bo, bi = _block(shape)
            grid = -(-shape.outputs // bo) * -(-shape.inputs // bi)
            times = (
                1e3 * predict_dense(shape, truth, threads),
                1e3 * float(predict(shape, blocks[0] / grid, (bo, bi), truth, threads)),
            )
            found.append(LayerTiming(f"layer{i}", LAYER, ("", ""), times, (0.0, 0.0), 1.0))
        return tuple(found)

    return profile


def test_the_coefficients_come_out_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "profile", stub(TRUTH))
    monkeypatch.setattr(measure, "built_in", lambda: AVX512)
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 4)
    steps: list[tuple[int, int]] = []
    found = measure_machine(lambda *step: steps.append(step))
    assert steps == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert found.layers == 2 * (3 * len(_warm()) + len(_cold()))
    assert found.error < 0.02  # the prior pulls a little
    for shape in (*_warm(), *_cold()):
        for threads in (1, 4):
            assert predict_dense(shape, found.machine, threads) == pytest.approx(
                predict_dense(shape, TRUTH, threads), rel=0.1
            )
            assert float(predict(shape, 0.3, (32, 32), found.machine, threads)) == pytest.approx(
                float(predict(shape, 0.3, (32, 32), TRUTH, threads)), rel=0.1
            )


def test_one_core_tells_nothing_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "profile", stub(TRUTH))
    monkeypatch.setattr(measure, "built_in", lambda: AVX512)
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 1)
    machine = measure_machine().machine
    assert (machine.fork, machine.serial) == (AVX512.fork, AVX512.serial)


def test_the_layers_are_of_every_kind() -> None:
    assert {shape.kind for shape in _warm()} == set(KINDS)
    assert all(shape.cold for shape in _cold()) and not any(shape.cold for shape in _warm())


def test_small_networks_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real profile: every layer is found, dense and block-sparse, with what was kept of it."""
    shapes = [
        LayerShape(64, 33, (3, 3), (2, 2), (1, 1), (8, 8), (4, 4)),
        LayerShape(32, 64, (1, 1), (1, 1), (1, 1), (5, 5), (5, 5)),
        LayerShape(64, 64, samples=2),
    ]
    keeps = [np.ones((2, 2), np.bool_), np.ones((1, 2), np.bool_), np.eye(2, dtype=np.bool_)]
    for model in (_network(shapes, None), _network(shapes, keeps)):
        inferred = onnx.shape_inference.infer_shapes(model)
        sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.output}
        if any(sizes.values()):  # (not of our operators)
            assert sizes == {"z0": [1, 1, 4, 4], "z1": [1, 1, 5, 5], "z2": [2, 1]}
    points = _time(shapes, 0.5, threads=1)
    assert [point[0] for point in points] == shapes
    assert [point[1] for point in points] == [0.5, 0.5, 0.5]
    assert all(0 < seconds < 1 for point in points for seconds in point[2:])
