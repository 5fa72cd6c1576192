"""Check and time the CUDA kernels on a GPU. Needs PyTorch with CUDA and a C++ compiler, no CUDA toolkit.

    python custom_ops/bench/gpu.py --output gpu.json --markdown gpu.md        # all of it, in under 10 minutes
    python custom_ops/bench/gpu.py --check                            # correctness only
    python custom_ops/bench/gpu.py --tune --write-tiles custom_ops/cuda/tiles.csv --output tune.json
    python custom_ops/bench/gpu.py --rehearse                         # the program itself, without a GPU

First correctness: each compiled form of each kernel against numpy in float64, with random kept blocks, permutations,
strides and paddings, outputs filled with NaN before; where onnxruntime-gpu and the op library are installed, the ops in
onnxruntime's CUDA provider too (the tests marked `gpu`). A wrong value ends the run. Then single layers of VGG16, each
against the same layer dense in cuDNN, the fastest of PyTorch's (NCHW and channels-last, autotuned) and onnxruntime's
(the same), in the same precision, and without cuDNN (the baseline of the TETRIS paper); the whole VGG16 (densities of
Deep Compression) and ResNet-50 (0.27), in PyTorch, and as models in onnxruntime with CUDA graphs.

`run`: channels-last in and out, the input in order, as inside a run of our layers. `alone`: NCHW in and out with both
permutations, as for a single layer between dense ones. `scattered` (at density 0.27, batch 8): as `run`, but with the
channels of y in any order. `fraction` = density x speed-up of `run`: 1 is a time exactly proportional to what is kept.

Times are medians over replays of a captured CUDA graph, so launches cost what they cost in a deployed model; inputs
rotate over more memory than the L2 cache holds. The most important points come first (`importance`); those that do not
fit the time budget (--minutes) are dropped and listed.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_library import ROOT, Sparse, compile_library, max_pool  # beside this file
from gpu_networks import NETWORKS, TYPES, Pair
from gpu_report import best_dense, header, line, markdown

from shapes import Layer, read_layers

sys.path.insert(0, str(ROOT / "custom_ops" / "cuda"))
import build

if TYPE_CHECKING:
    from gpu_onnxruntime import OnnxRuntime

# Relative to the largest output: rounding of operands (TF32: 11 bits) or of the output, the order of float32 sums.
TOLERANCES = {"f16": 1e-3, "bf16": 8e-3, "tf32": 1e-3, "f32": 1e-5}
# Of a whole network: the roundings of all its layers, in another order on both sides.
NETWORK_TOLERANCES = {"f16": 2e-2, "bf16": 1e-1, "tf32": 1e-2, "f32": 1e-4}
TILE_COLUMNS = "sm,type,taps,height,rows,steps,pixels,tile_rows,tile_pixels,splits"


def check(library: ctypes.CDLL, device: str, short: bool) -> int:
    """Every tile and many shapes against the oracle. Returns the number of cases; a wrong one ends the program.

    ``short``: a few tiles only, for a rehearsal (the tests have run all of them on the stand-in).
    """
    rng = np.random.default_rng()  # fresh inputs every time
    cases = 0

    def one(
        kind: str,
        shape: Sequence[int],
        block: tuple[int, int],
        x_shape: Sequence[int],
        add: bool = False,
        last: tuple[bool, bool] = (False, False),
        **arguments: Any,
    ) -> None:
        nonlocal cases
        layer = Sparse(library, kind, shape, block, 0.5, rng, last=last, **arguments)
        if last[0] and len(shape) > 2:
            x_shape = (x_shape[0], *x_shape[2:], x_shape[1])
        x = torch.from_numpy(rng.standard_normal(x_shape, dtype=np.float32)).to(TYPES[kind])
        y = torch.full(layer.output_shape(x_shape), math.nan, dtype=TYPES[kind], device=device)
        addend = torch.randn(y.shape).to(TYPES[kind]) if add else None
        there = None if addend is None else addend.to(device)
        x_device = x.to(device)
        for _ in range(2):
            layer(x_device, y, there)
        expected = layer.expected(x.float().numpy(), None if addend is None else addend.float().numpy())
        error = np.abs(y.float().cpu().numpy() - expected).max() / np.abs(expected).max()
        cases += 1
        if not error <= TOLERANCES[kind]:  # NaN too
            tile = os.environ.get("TETRIS_ONNX_CUDA_TILE", "")
            case = f"{kind} {shape} blocks {block} x {x_shape} last {last} add {add} {arguments} tile {tile!r}"
            raise SystemExit(f"WRONG: {case}: error {error:.2e}")

    both = (True, True)
    for kind in () if short else TYPES:
        for block in ((32, 32), (64, 64), (128, 64), (16, 8), (48, 80)):
            for stride, pad, dilation in ((1, 1, 1), (2, 0, 1), (1, 2, 2)):
                one(kind, (150, 70, 3, 3), block, (2, 70, 13, 11), stride=stride, pad=pad, dilation=dilation)
                one(kind, (150, 70, 3, 3), block, (2, 70, 13, 11), stride=stride, pad=pad, dilation=dilation, last=both)
            for last in ((True, False), (False, True), both):
                one(kind, (150, 70, 3, 3), block, (2, 70, 13, 11), pad=1, last=last, add=True)
            one(kind, (150, 70, 3, 3), block, (2, 70, 13, 11), pad=1, add=True)
            one(kind, (150, 70, 1, 1), block, (2, 70, 13, 11), stride=2)
            one(kind, (150, 70, 5, 5), block, (1, 70, 13, 11), pad=2)
            one(kind, (150, 70, 5, 5), block, (1, 70, 13, 11), pad=2, last=both, add=True)
            one(kind, (150, 70, 3), block, (2, 70, 40), pad=1)
            one(kind, (70, 36, 3, 3, 3), block, (2, 36, 5, 6, 7), pad=1)
            one(kind, (150, 256), block, (5, 256))
            one(kind, (150, 256), block, (300, 256), permuted=(False, False))
            one(kind, (512, 512, 3, 3), block, (1, 512, 14, 14), pad=1)
            one(kind, (512, 512, 3, 3), block, (1, 512, 14, 14), pad=1, last=both, permuted=(False, True))
    for number, variant in enumerate(build.variants()):
        if variant.kernel != "block_sparse_conv" or (short and number % 16):
            continue
        splits = 3 if variant.layout == "split" else 1
        os.environ["TETRIS_ONNX_CUDA_TILE"] = f"{variant.bm}x{variant.bn}x{splits}"
        block = (variant.bm, max(32, variant.bk)) if variant.bm > 32 else (32, 32)
        k = {1: 1, 9: 3, 0: 2}[variant.taps]
        last = (variant.layout == "nhwc",) * 2
        shape = (variant.bm * 2 + 20, 140, k, k)
        one(variant.type, shape, block, (3, 140, 9, variant.bn // 4), pad=k // 2, last=last)
    os.environ.pop("TETRIS_ONNX_CUDA_TILE", None)
    for kind, (window, stride, pad) in itertools.product(("f16", "bf16", "f32"), ((2, 2, 0), (3, 2, 1), (3, 1, 1))):
        x = torch.randn(3, 13, 11, 70).to(TYPES[kind])
        expected = F.max_pool2d(x.float().permute(0, 3, 1, 2), window, stride, pad).permute(0, 2, 3, 1)
        y = torch.full(expected.shape, math.nan, dtype=TYPES[kind], device=device)
        max_pool(library, kind, x.to(device), y, window, stride, pad)
        cases += 1
        if not torch.equal(y.float().cpu(), expected):
            raise SystemExit(f"WRONG: max_pool {kind} {window} {stride} {pad}")
    return cases


@functools.cache
def timing_stream() -> torch.cuda.Stream:
    """One for all: the library keeps a workspace for each stream."""
    return torch.cuda.Stream()


def median_us(functions: Sequence[Callable[[], object]], seconds: float) -> float:
    """Median microseconds of one call, the calls rotating over the functions, inside replays of a captured graph."""
    if not torch.cuda.is_available():  # a rehearsal
        start = time.perf_counter()
        functions[0]()
        return (time.perf_counter() - start) * 1e6
    stream = timing_stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs are being made there
    with torch.cuda.stream(stream):
        for function in [*functions, functions[0]]:
            function()
        stream.synchronize()
        start = time.perf_counter()
        functions[0]()
        stream.synchronize()
        single = max(time.perf_counter() - start, 5e-6)
    calls = len(functions) * max(1, min(20, int(2e-3 / single / len(functions))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in range(calls):
            functions[call % len(functions)]()
    times: list[float] = []
    end = time.perf_counter() + seconds
    graph.replay()
    while len(times) < 7 or time.perf_counter() < end:
        begin, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(begin.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times)


def copies_of(x: torch.Tensor) -> list[torch.Tensor]:
    """So many inputs that together they exceed the L2 cache."""
    count = max(1, min(8, math.ceil(120e6 / (x.numel() * x.element_size()))))
    return [torch.randn_like(x) for _ in range(count)]


def same_precision(kind: str) -> None:
    """Let PyTorch use TF32 exactly where we do, and try all of cuDNN's algorithms."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"


def dense_us(layer: Layer, kind: str, batch: int, device: str, seconds: float) -> dict[str, float]:
    """The dense layer with Relu in PyTorch: NCHW and channels-last through cuDNN, and without cuDNN."""
    same_precision(kind)
    options = {"dtype": TYPES[kind], "device": device}
    bias = torch.randn(layer.outputs, **options)
    times: dict[str, float] = {}
    with torch.no_grad():
        if not layer.is_conv:
            weight = torch.randn(layer.outputs, layer.inputs, **options)
            inputs = copies_of(torch.empty(batch, layer.inputs, **options))
            times["cublas"] = median_us([lambda x=x: F.linear(x, weight, bias).relu_() for x in inputs], seconds)
            return times
        weight = torch.randn(layer.outputs, layer.inputs, layer.kernel, layer.kernel, **options)
        inputs = copies_of(torch.empty(batch, layer.inputs, *layer.map_size, **options))
        formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
        for name, memory in formats.items():
            w = weight.contiguous(memory_format=memory)
            xs = [x.contiguous(memory_format=memory) for x in inputs]
            times[name] = median_us(
                [lambda x=x, w=w: F.conv2d(x, w, bias, layer.stride, layer.pad).relu_() for x in xs], seconds
            )
        with torch.backends.cudnn.flags(enabled=False):
            times["no_cudnn"] = median_us(
                [lambda x=x: F.conv2d(x, weight, bias, layer.stride, layer.pad).relu_() for x in inputs], seconds
            )
    return times


def sparse_us(ours: Sparse, layer: Layer, batch: int, kind: str, device: str, seconds: float) -> float:
    """Our layer."""
    x_shape = (batch, *layer.map_size, layer.inputs) if ours.last[0] else (batch, layer.inputs, *layer.map_size)
    inputs = copies_of(torch.empty(x_shape, dtype=TYPES[kind], device=device))
    outputs = [torch.empty(ours.output_shape(x_shape), dtype=TYPES[kind], device=device) for _ in inputs]
    return median_us([lambda x=x, y=y: ours(x, y) for x, y in zip(inputs, outputs, strict=True)], seconds)


def make(library: ctypes.CDLL, layer: Layer, kind: str, block: int, density: float, where: str) -> Sparse:
    """A layer of the shapes file: in a `run` of our layers, there but `scattered`, or `alone`."""
    in_run = where != "alone"
    kernel = (layer.kernel, layer.kernel) if layer.is_conv else ()
    return Sparse(
        library,
        kind,
        (layer.outputs, layer.inputs, *kernel),
        (min(block, layer.outputs), min(block, layer.inputs)),
        density,
        np.random.default_rng(0),
        stride=layer.stride,
        pad=layer.pad,
        permuted=(not in_run, True),
        columns=block if where == "run" else 0,
        last=(in_run and layer.is_conv,) * 2,
    )


@dataclass(frozen=True)
class Point:
    """One thing to time: a layer, or with no layer a network at its own densities in blocks of 64."""

    kind: str
    batch: int
    network: str = ""
    layer: Layer | None = None
    block: int = 64
    density: float = 0.0
    onnxruntime: bool = False  # of a network: as a model in onnxruntime, not in PyTorch

    @property
    def importance(self) -> float:
        """The smallest is first: networks; batch 8, density .27, 64 x 64 blocks, float16, large 3x3 layers."""
        rank = {8: 0, 1: 1, 64: 2}.get(self.batch, 3) + (self.kind != "f16") * 0.5
        if self.layer is None:
            return rank + (self.network != "vgg16") * 0.5 + self.onnxruntime * 0.25 - 1
        rank += {0.27: 0, 0.5: 1, 0.1: 2}.get(self.density, 3) + {64: 0, 128: 1, 32: 2}.get(self.block, 3)
        return rank + (2 if not self.layer.is_conv else 1 if self.layer.inputs < 256 else 0)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"{self.layer.name} {self.block}x{self.block} density {self.density}"
        where = " in onnxruntime" if self.onnxruntime else ""
        return f"{self.network or layer}{where}, {self.kind}, batch {self.batch}"

    @property
    def sort(self) -> str:
        """What takes about as long."""
        return "layer" if self.layer is not None else "onnxruntime" if self.onnxruntime else "network"

    @property
    def places(self) -> tuple[str, ...]:
        """The surroundings that a layer is timed in."""
        important = self.density == 0.27 and self.batch == 8
        return ("run", "alone", "scattered") if important else ("run", "alone")


@dataclass
class Budget:
    """The time that is left, and what a point of each sort took so far."""

    end: float
    taken: dict[str, list[float]] = field(default_factory=dict)
    dropped: list[Point] = field(default_factory=list)

    def estimate(self, point: Point) -> float:
        """Seconds; before any is measured, a guess."""
        known = self.taken.get(point.sort)
        return (
            statistics.mean(known[-20:]) if known else {"layer": 0.6, "network": 20.0, "onnxruntime": 45.0}[point.sort]
        )

    def took(self, point: Point, seconds: float) -> None:
        """Remember it."""
        self.taken.setdefault(point.sort, []).append(seconds)

    def fits(self, point: Point) -> bool:
        """Whether there is time for a point; else it is dropped."""
        if time.perf_counter() + self.estimate(point) <= self.end:
            return True
        self.dropped.append(point)
        return False


class Bench:
    """What the points share: layers that are made, dense times that are known."""

    def __init__(
        self,
        library: ctypes.CDLL,
        device: str,
        seconds: float,
        shapes: dict[str, dict[str, Layer]],
        onnxruntime: OnnxRuntime | None,
    ) -> None:
        self.library, self.device, self.seconds, self._shapes = library, device, seconds, shapes
        self._onnxruntime = onnxruntime
        self._dense: dict[tuple[str, str, int], dict[str, float]] = {}
        self._made: dict[tuple[str, str, int, float, str], Sparse] = {}
        self._pairs: dict[tuple[str, str], Pair] = {}

    def row(self, point: Point) -> dict[str, Any]:
        """Time a point."""
        common = {"type": point.kind, "batch": point.batch, "block": point.block}
        if point.layer is None:
            return {"network": point.network, **common, **self._network(point)}
        layer, kind = point.layer, point.kind
        key = layer.name, kind, point.batch
        if key not in self._dense:
            dense = dense_us(layer, kind, point.batch, self.device, self.seconds)
            if self._onnxruntime is not None:
                dense |= self._onnxruntime.dense_us(layer, kind, point.batch, best_dense(dense), self.seconds)
            self._dense[key] = dense
        dense = self._dense[key]
        times, density = {}, 0.0
        for place in point.places:
            made = (layer.name, kind, point.block, point.density, place)
            if made not in self._made:
                self._made[made] = make(self.library, layer, kind, point.block, point.density, place)
            ours = self._made[made]
            density = ours.density
            times[place] = sparse_us(ours, layer, point.batch, kind, self.device, self.seconds)
        best = best_dense(dense)
        row = {"layer": layer.name, **common, "density": density, "dense_us": dense, "sparse_us": times}
        return row | {"speedup": best / times["run"], "fraction": best / times["run"] * density}

    def _network(self, point: Point) -> dict[str, Any]:
        if point.onnxruntime:
            assert self._onnxruntime is not None
            tolerance = NETWORK_TOLERANCES[point.kind]
            row = self._onnxruntime.network(point.network, point.kind, point.batch, 10 * self.seconds, tolerance)
            return {"in": "onnxruntime", **row}
        key = point.network, point.kind
        if key not in self._pairs:
            size = 224 if self.device == "cuda" else 64
            layers = self._shapes[point.network]
            self._pairs[key] = Pair(self.library, point.network, layers, point.kind, point.block, self.device, size)
        pair = self._pairs[key]
        same_precision(point.kind)
        with torch.no_grad():
            image = pair.image(point.batch)
            expected, y = pair.dense(image).float(), pair.sparse(image).float()
            error = float((y - expected).abs().max() / expected.abs().max())
            if not error <= NETWORK_TOLERANCES[point.kind]:
                raise SystemExit(f"WRONG: {point}: error {error:.2e}")
            times = {"run": median_us([lambda: pair.sparse(image)], 10 * self.seconds)}
            dense = {"channels_last": median_us([lambda: pair.dense(image)], 10 * self.seconds)}
            with torch.backends.cudnn.flags(enabled=False):
                dense["no_cudnn"] = median_us([lambda: pair.dense(image)], 10 * self.seconds)
        row = {"dense_us": dense, "sparse_us": times, "speedup": dense["channels_last"] / times["run"], "error": error}
        return {"in": "PyTorch", **row}


def points_of(arguments: argparse.Namespace, layers: Sequence[Layer], onnxruntime: bool) -> list[Point]:
    """All that is asked for, the most important first. ``onnxruntime``: whether networks can be timed there, too."""
    made = [
        Point(kind, batch, layer=layer, block=block, density=density)
        for kind, batch, layer, block, density in itertools.product(
            arguments.types, arguments.batch, layers, arguments.block_size, arguments.density
        )
        # A block that is larger than the layer is the one of the layer's size.
        if block == min(arguments.block_size) or block <= max(layer.outputs, layer.inputs)
    ]
    if not arguments.layers:
        for kind, batch, network in itertools.product(arguments.types, arguments.batch, NETWORKS):
            made.append(Point(kind, batch, network=network))
            if onnxruntime and kind != "bf16":
                made.append(Point(kind, batch, network=network, onnxruntime=True))
    return sorted(made, key=lambda point: point.importance)


def run_points(bench: Bench, points: Sequence[Point], budget: Budget) -> list[dict[str, Any]]:
    """Time as many as the budget allows."""
    seconds, left = sum(budget.estimate(point) for point in points), budget.end - time.perf_counter()
    print(f"{len(points)} points, about {seconds:.0f} s; {left:.0f} s of the budget are left")
    print(header(), flush=True)
    rows = []
    for point in points:
        if budget.fits(point):
            start = time.perf_counter()
            rows.append(bench.row(point))
            print(line(rows[-1]), flush=True)
            budget.took(point, time.perf_counter() - start)
    if budget.dropped:
        print(f"dropped for lack of time: {len(budget.dropped)} points of {len(points)}, the least important:")
        for point in budget.dropped:
            print(f"  {point}")
    return rows


def tune(bench: Bench, arguments: argparse.Namespace, layers: Sequence[Layer], budget: Budget) -> list[dict[str, Any]]:
    """Time each tile and number of splits of each layer; print the fastest beside what the library chooses."""
    rows = []
    variants = [v for v in build.variants() if v.kernel == "block_sparse_conv"]
    for point in points_of(arguments, [layer for layer in layers if layer.is_conv], False):
        layer = point.layer
        if layer is None or not budget.fits(point):
            continue
        start = time.perf_counter()
        taps = {1: 1, 3: 9}.get(layer.kernel, 0)
        height = make(bench.library, layer, point.kind, point.block, point.density, "run").describe(1)[2]
        depth = 64 if height >= 64 and build.ITEM_SIZES[point.kind] == 2 else 32
        own = [v for v in variants if v.type == point.kind and v.taps == taps and v.bk == depth and height % v.bm == 0]
        choices = {(v.bm, v.bn, 1) for v in own if v.layout == "nhwc"}
        choices |= {(v.bm, v.bn, s) for v in own if v.layout == "split" for s in (2, 4, 8, 16)}

        def timed(tile: tuple[int, ...], point: Point = point, layer: Layer = layer) -> tuple[Sparse, float]:
            os.environ["TETRIS_ONNX_CUDA_TILE"] = "x".join(map(str, tile))
            ours = make(bench.library, layer, point.kind, point.block, point.density, "run")
            return ours, sparse_us(ours, layer, point.batch, point.kind, bench.device, bench.seconds)

        times = {tile: timed(tile)[1] for tile in sorted(choices)}
        ours, chosen = timed((0, 0, 0))
        os.environ.pop("TETRIS_ONNX_CUDA_TILE")
        best = min(times, key=times.__getitem__)
        output = ours.output_shape((point.batch, *layer.map_size, layer.inputs))
        pixels = point.batch * math.prod(output[1:-1])
        sm, _, _, packed_rows, steps = ours.describe(pixels)
        row = {"sm": sm, "type": point.kind, "taps": taps, "height": height, "rows": packed_rows, "steps": steps}
        row |= {"pixels": pixels, "tile": list(best), "us": times[best], "chosen_us": chosen, "point": str(point)}
        rows.append(row | {"all": {"x".join(map(str, tile)): us for tile, us in times.items()}})
        print(f"{point}: best {best} {times[best]:.1f} us, the library's choice {chosen:.1f} us", flush=True)
        budget.took(point, time.perf_counter() - start)
    for point in budget.dropped:
        print(f"dropped for lack of time: {point}")
    return rows


def write_tiles(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put tuned choices into the table at ``path``, in the place of those for the same GPU and types."""
    lines = path.read_text().splitlines() if path.exists() else [TILE_COLUMNS]
    head = [line for line in lines if line.startswith(("#", "sm,"))]
    replaced = {(str(row["sm"]), row["type"]) for row in rows}
    kept = [line for line in lines if line not in head and tuple(line.split(",")[:2]) not in replaced]
    keys = ("sm", "type", "taps", "height", "rows", "steps", "pixels")
    made = {tuple(row[key] for key in keys): row["tile"] for row in rows}
    new = [",".join(map(str, (*key, *tile))) for key, tile in sorted(made.items())]
    head = [line for line in head if not line.startswith("# Empty")]
    path.write_text("\n".join([*head, *kept, *new]) + "\n")


def shrunk(layer: Layer, name: str) -> Layer:
    """A small layer for a rehearsal: an eighth of the channels, a sixteenth of the map."""
    fewer = replace(layer, outputs=max(layer.outputs // 8, 8), inputs=max(layer.inputs // 8, 8))
    if name == "vgg16" and layer.name == "fc6":
        return replace(fewer, inputs=64 * 49)
    return replace(fewer, map_size=tuple(max(size // 16, 3) for size in layer.map_size))


def start_onnxruntime(rehearsal: bool) -> tuple[OnnxRuntime | None, str]:
    """onnxruntime, its ops checked, and its version; or None and why it is left out."""
    try:
        import gpu_onnxruntime
    except ImportError as error:
        found = str(error)
    else:
        found = "" if rehearsal else gpu_onnxruntime.why_not()
    if found:
        print(f"onnxruntime is left out: {found}", flush=True)
        return None, f"left out: {found}"
    if not rehearsal:
        print(f"the ops in onnxruntime: {gpu_onnxruntime.check_ops()}", flush=True)
    return gpu_onnxruntime.OnnxRuntime(gpu=not rehearsal), gpu_onnxruntime.import_onnxruntime().__version__


def rehearse(folder: Path) -> Any:
    """Put the tests' stand-in for the driver where the library looks for one, and the ops on the CPU provider."""
    from tests.custom_ops.cuda import stand_in
    from tetris_onnx import session

    session.PROVIDERS["cuda"], session.DEVICES["cuda"] = "CPUExecutionProvider", "cpu"
    library, path = stand_in.compile_libraries(folder)
    os.environ["TETRIS_ONNX_LIBRARY"] = str(library)
    driver = stand_in.StandIn(path)
    driver.reset()
    driver.execute = stand_in.run_numpy
    return driver


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=["f16", "tf32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.27, 0.1])
    parser.add_argument("--block-size", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--layers", default="", help="only the layers of VGG16 whose name holds this, and no networks")
    parser.add_argument("--seconds", type=float, default=0.03, help="for each time")
    parser.add_argument("--minutes", type=float, default=9.5, help="the budget for all, from the start")
    parser.add_argument("--output", type=Path, help="all results, as JSON")
    parser.add_argument("--markdown", type=Path, help="all results, as tables")
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--tune", action="store_true", help="every tile and number of splits of each layer instead")
    parser.add_argument("--write-tiles", type=Path, metavar="CSV", help="with --tune: put the fastest into this table")
    parser.add_argument("--rehearse", action="store_true", help="no GPU: the stand-in driver, small layers")
    return parser.parse_args()


def main() -> None:
    """Check, then time."""
    arguments = parse_arguments()
    budget = Budget(time.perf_counter() + 60 * arguments.minutes)
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device, or this PyTorch is built without CUDA")
    device = "cpu" if arguments.rehearse else "cuda"
    if arguments.rehearse:
        print("a rehearsal: the times mean nothing")
    here = Path(__file__).parent
    shapes = {name: {layer.name: layer for layer in read_layers(here / f"{name}.txt")} for name in NETWORKS}
    if arguments.rehearse:
        torch.set_num_threads(1)
        shapes = {name: {n: shrunk(layer, name) for n, layer in table.items()} for name, table in shapes.items()}
    layers = [layer for name, layer in shapes["vgg16"].items() if arguments.layers in name]
    if arguments.rehearse:
        layers = layers[::5]
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    results: dict[str, Any] = {"device": "none" if arguments.rehearse else torch.cuda.get_device_name(), "rows": []}
    results |= {
        "versions": versions,
        "arguments": vars(arguments) | {"output": None, "markdown": None, "write_tiles": None},
    }
    with tempfile.TemporaryDirectory() as folder:
        driver = rehearse(Path(folder)) if arguments.rehearse else None
        library = compile_library(Path(folder), "-O1" if arguments.rehearse else "-O2")
        start = time.perf_counter()
        results["cases"] = check(library, device, arguments.rehearse)
        print(f"{results['cases']} cases correct, {time.perf_counter() - start:.0f} s", flush=True)
        engine, results["onnxruntime"] = start_onnxruntime(arguments.rehearse)
        bench = Bench(library, device, arguments.seconds, shapes, engine)
        if arguments.tune:
            results["rows"] = tune(bench, arguments, layers, budget)
            if arguments.write_tiles:
                write_tiles(arguments.write_tiles, results["rows"])
                os.environ["TETRIS_ONNX_CUDA_TILES"] = str(arguments.write_tiles.resolve())
                Sparse(library, arguments.types[0], (64, 64), (64, 64), 1.0, np.random.default_rng(0))  # it can be read
        elif not arguments.check:
            results["rows"] = run_points(bench, points_of(arguments, layers, engine is not None), budget)
        if driver is not None:
            assert driver.errors == [], driver.errors[0]
    results["dropped"] = [str(point) for point in budget.dropped]
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results))


if __name__ == "__main__":
    main()
