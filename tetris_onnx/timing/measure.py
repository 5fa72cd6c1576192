"""Measure the cost model's coefficients on this machine: a few seconds of small networks, dense and block-sparse.

Each network holds layers of every kind in a few sizes, side by side, behind a Relu that leaves their input in the
caches as a network's previous layer would. They are profiled in turns (profiling.profile), with the conversions of
layout apart, and the coefficients fitted to their times (cost.fit); the built-in ones hold for what they do not tell.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tetris_onnx.algorithms.blocks import block_grid
from tetris_onnx.graph.layers import CONV, DOMAIN, GEMM
from tetris_onnx.timing.cost import (
    DENSE_WORK,
    SPARSE_WORK,
    LayerShape,
    Machine,
    algorithms,
    dense_work,
    fit,
    predict,
    predict_dense,
    sparse_work,
)
from tetris_onnx.timing.machine import built_in
from tetris_onnx.timing.profiling import LayerTiming, profile

_BLOCK = 32
_DENSITIES = (0.15, 0.5, 1.0)
_FITS = 3  # each time the algorithm of a layer is the one that is fastest by the fit before


@dataclass(frozen=True)
class Measurement:
    """Coefficients, and how well they describe what they were fitted to."""

    machine: Machine
    layers: int  # timings
    error: float  # median of |predicted / measured - 1|


def measure_machine(progress: Callable[[int, int], None] | None = None) -> Measurement:
    """Time layers on this machine and fit the coefficients. Raises `SessionError`.

    ``progress`` is called with the number of networks done and of all.
    """
    start = built_in()
    networks = [(_warm(), density) for density in _DENSITIES] + [(_cold(), _DENSITIES[1])]
    points: list[tuple[LayerShape, float, float, float]] = []
    for done, (shapes, density) in enumerate(networks):
        if progress is not None:
            progress(done, len(networks) + 1)
        points += _time(shapes, density, threads=1)
    dense_seconds, sparse_seconds = (np.array([point[i] for point in points]) for i in (2, 3))
    dense = fit(
        np.array([dense_work(shape, start.lanes) for shape, *_ in points]),
        dense_seconds,
        [start.dense[name] for name in DENSE_WORK],
    )
    machine = replace(start, dense=dict(zip(DENSE_WORK, dense.tolist(), strict=True)))
    for _ in range(_FITS):
        work = np.array([_least_work(shape, density, machine) for shape, density, *_ in points])
        sparse = fit(work, sparse_seconds, [start.sparse[name] for name in SPARSE_WORK])
        machine = replace(machine, sparse=dict(zip(SPARSE_WORK, sparse.tolist(), strict=True)))
    threads = os.cpu_count() or 1
    if threads > 1:
        if progress is not None:
            progress(len(networks), len(networks) + 1)
        machine = _with_threads(machine, _time(_warm(), _DENSITIES[1], threads), threads)
    if progress is not None:
        progress(len(networks) + 1, len(networks) + 1)
    predicted = [predict_dense(shape, machine) for shape, *_ in points]
    predicted += [float(predict(shape, density, _block(shape), machine)) for shape, density, *_ in points]
    errors = np.abs(predicted / np.concatenate([dense_seconds, sparse_seconds]) - 1)
    return Measurement(machine, len(errors), float(np.median(errors)))


def _with_threads(machine: Machine, points: Sequence[tuple[LayerShape, float, float, float]], threads: int) -> Machine:
    """The machine with what several threads cost and save: t = call + fork + work (serial + (1 - serial) / threads)."""
    from scipy.optimize import nnls

    found = []
    for side, call in enumerate((machine.dense["call"], machine.sparse["call"])):
        rows, left = [], []
        for shape, density, *times in points:
            one = predict_dense(shape, machine), float(predict(shape, density, _block(shape), machine))
            work, seconds = one[side] - 1e-9 * call, times[side]
            rows.append([1e-9 / seconds, work * (1 - 1 / threads) / seconds])
            left.append(1 - (1e-9 * call + work / threads) / seconds)
        (fork, serial), _ = nnls(np.array(rows), np.array(left))
        found.append((float(fork), min(1.0, float(serial))))
    return replace(machine, fork=(found[0][0], found[1][0]), serial=(found[0][1], found[1][1]))


def _least_work(shape: LayerShape, density: float, machine: Machine) -> NDArray[np.float64]:
    """The work of a block-sparse layer by the algorithm that takes the least time."""
    coefficients = np.array([machine.sparse[name] for name in SPARSE_WORK])
    works = [sparse_work(shape, density, _block(shape), machine.lanes, a) for a in algorithms(shape)]
    return min(works, key=lambda work: float(work @ coefficients))


def _warm() -> list[LayerShape]:
    """Layers of a small network."""

    def conv(out: int, in_: int, kernel: int, size: int, stride: int = 1) -> LayerShape:
        small = -(-size // stride)
        return LayerShape(out, in_, (kernel, kernel), (stride, stride), (1, 1), (size, size), (small, small))

    return [
        *(conv(64, 64, 3, 56), conv(128, 128, 3, 28), conv(256, 256, 3, 14), conv(64, 64, 3, 14), conv(64, 64, 3, 7)),
        *(conv(128, 64, 3, 56, 2), conv(128, 128, 3, 28, 2), conv(64, 64, 3, 14, 2)),
        *(conv(64, 64, 3, 112), conv(64, 128, 1, 112)),  # of maps that the second-level cache does not hold
        *(conv(256, 64, 1, 56), conv(64, 256, 1, 28), conv(256, 256, 1, 14), conv(128, 512, 1, 7), conv(64, 64, 1, 1)),
        *(conv(64, 64, 5, 28), conv(128, 64, 1, 28, 2)),
        *(LayerShape(512, 1024), LayerShape(64, 64), LayerShape(256, 256, samples=64)),
    ]


def _cold() -> list[LayerShape]:
    """Layers of a network that the caches do not hold."""
    return [
        LayerShape(4096, 4096, cold=True),
        LayerShape(1024, 1024, cold=True),
        LayerShape(512, 512, (3, 3), (1, 1), (1, 1), (7, 7), (7, 7), cold=True),
        LayerShape(1024, 512, (1, 1), (1, 1), (1, 1), (7, 7), (7, 7), cold=True),
    ]


def _block(shape: LayerShape) -> tuple[int, int]:
    return min(_BLOCK, shape.outputs), min(_BLOCK, shape.inputs)


def _time(shapes: Sequence[LayerShape], density: float, threads: int) -> list[tuple[LayerShape, float, float, float]]:
    """(shape, density of its grid, dense seconds, block-sparse seconds) of each layer."""
    rng = np.random.default_rng(0)
    keeps = [_keep(rng, shape, density) for shape in shapes]
    models = [_network(shapes, None), _network(shapes, keeps)]
    feed = {f"x{i}": rng.standard_normal(_input_shape(shape), dtype=np.float32) for i, shape in enumerate(shapes)}
    timings = {t.name: t for t in profile(models, [feed, feed], ["the network to measure"] * 2, "cpu", threads)}
    found = []
    for i, (shape, keep) in enumerate(zip(shapes, keeps, strict=True)):
        dense, sparse = _milliseconds(timings[f"layer{i}"])
        found.append((shape, float(keep.mean()), 1e-3 * dense, 1e-3 * sparse))
    return found


def _milliseconds(timing: LayerTiming) -> tuple[float, float]:
    dense, sparse = (max(ms or 0.0, 5e-4) for ms in timing.median_ms)  # the profile counts whole microseconds
    return dense, sparse


def _keep(rng: np.random.Generator, shape: LayerShape, density: float) -> NDArray[np.bool_]:
    rows, columns = block_grid((shape.outputs, shape.inputs), _block(shape))
    keep = np.zeros(rows * columns, np.bool_)
    keep[rng.permutation(keep.size)[: max(1, round(density * keep.size))]] = True
    return keep.reshape(rows, columns)


def _input_shape(shape: LayerShape) -> tuple[int, ...]:
    return shape.samples, shape.inputs, *shape.input_size


def _network(shapes: Sequence[LayerShape], keeps: Sequence[NDArray[np.bool_]] | None) -> onnx.ModelProto:
    """All layers side by side, a Relu before and in or after each: dense, or with the blocks of ``keeps``."""
    nodes, inputs, outputs, constants = [], [], [], []
    rng = np.random.default_rng(1)
    for i, shape in enumerate(shapes):
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, _input_shape(shape)))
        outputs.append(helper.make_tensor_value_info(f"z{i}", TensorProto.FLOAT, None))
        nodes.append(helper.make_node("Relu", [f"x{i}"], [f"a{i}"], name=f"before{i}"))
        bias, weight_shape = np.zeros(shape.outputs, np.float32), (shape.outputs, shape.inputs, *shape.kernel)
        window = {"strides": shape.strides, "dilations": shape.dilations, "pads": _pads(shape)} if shape.kernel else {}
        values: dict[str, NDArray[Any]]
        if keeps is None:
            values = {"w": rng.standard_normal(weight_shape, dtype=np.float32), "b": bias}
            op, domain = ("Conv", "") if shape.kernel else ("Gemm", "")
            attributes: dict = window if shape.kernel else {"transB": 1}
        else:
            index = np.argwhere(keeps[i])
            values = {
                "blocks": rng.standard_normal((len(index), *_block(shape), *shape.kernel), dtype=np.float32),
                "index": index,
                "in": rng.permutation(shape.inputs),
                "out": rng.permutation(shape.outputs),
                "b": bias,
            }
            op, domain = (CONV, DOMAIN) if shape.kernel else (GEMM, DOMAIN)
            attributes = window | {
                "weight_shape": weight_shape,
                "block_size": _block(shape),
                "activation_min": 0.0,
            }
        constants += [numpy_helper.from_array(value, f"{name}{i}") for name, value in values.items()]
        result = f"y{i}" if keeps is not None else f"linear{i}"
        names = [f"a{i}", *(f"{name}{i}" for name in values)]
        nodes.append(helper.make_node(op, names, [result], name=f"layer{i}", domain=domain, **attributes))
        if keeps is None:
            nodes.append(helper.make_node("Relu", [result], [f"y{i}"], name=f"after{i}"))
        # An output of the model would be in memory that is new each time.
        nodes.append(helper.make_node("Slice", [f"y{i}", "zero", "one", "one"], [f"z{i}"], name=f"behind{i}"))
    constants += [numpy_helper.from_array(np.array([n]), name) for n, name in enumerate(("zero", "one"))]
    graph = helper.make_graph(nodes, "measure", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17)] + [helper.make_opsetid(DOMAIN, 1)] * (keeps is not None)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return model


def _pads(shape: LayerShape) -> list[int]:
    """Of a kernel around each pixel."""
    return [(k - 1) // 2 for k in shape.kernel] * 2 if math.prod(shape.kernel) > 1 else [0] * 2 * len(shape.kernel)
