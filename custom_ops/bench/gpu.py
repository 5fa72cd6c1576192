"""Check and time the CUDA kernels on a GPU. Needs PyTorch with CUDA and a C++ compiler, no onnxruntime or CUDA toolkit.

    python custom_ops/bench/gpu.py --output gpu.json                  # all of it, in under 10 minutes
    python custom_ops/bench/gpu.py --check                            # correctness only
    python custom_ops/bench/gpu.py --tune --layers conv4 --batch 1    # every tile of some layers

First correctness: each compiled form of each kernel against numpy in float64, with random kept blocks, permutations,
strides and paddings, outputs filled with NaN before; a wrong value ends the run. Then single layers of VGG16, each
against the same layer dense in cuDNN (the faster of NCHW and channels-last, autotuned, same precision) and without
cuDNN (the baseline of the TETRIS paper). `fraction` = speed-up x density: 1 is a time exactly proportional to the kept
blocks. Then the whole VGG16 at the densities of Deep Compression.

Times are medians over replays of a captured CUDA graph, so launches cost what they cost in a deployed model; inputs
rotate over more memory than the L2 cache holds. All tensors are NCHW outside, as in onnxruntime: our time includes the
change of layout and back.
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
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shapes import Layer, read_layers  # beside this file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "custom_ops" / "cuda"))
import build  # noqa: E402  (of the kernels)
from tests import reference  # noqa: E402  (the oracle)

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "f32": torch.float32}
# Relative to the largest output: rounding of operands (TF32: 11 bits) or of the output, the order of float32 sums.
TOLERANCES = {"f16": 1e-3, "bf16": 8e-3, "tf32": 1e-3, "f32": 1e-5}
# Kept share of the weights after Deep Compression (Han, Mao, Dally 2016, table 4).
DENSITIES = {
    "conv1_2": 0.22,
    "conv2_1": 0.34,
    "conv2_2": 0.36,
    "conv3_1": 0.53,
    "conv3_2": 0.24,
    "conv3_3": 0.42,
    "conv4_1": 0.32,
    "conv4_2": 0.27,
    "conv4_3": 0.34,
    "conv5_1": 0.35,
    "conv5_2": 0.29,
    "conv5_3": 0.36,
    "fc6": 0.04,
    "fc7": 0.04,
    "fc8": 0.23,
}
Three = ctypes.c_int64 * 3


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("device", "type", "last", "has_depth")),
        *((name, Three) for name in ("kernel", "strides", "dilations", "pads")),
        *((n, ctypes.c_int64) for n in ("outputs", "inputs", "taps", "block_outputs", "block_inputs", "block_count")),
        *((n, ctypes.c_void_p) for n in ("blocks", "block_index", "input_perm", "output_perm", "bias")),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    ]


def compile_library(folder: Path) -> ctypes.CDLL:
    """The kernels with the prebuilt images, apart from onnxruntime."""
    cuda = ROOT / "custom_ops" / "cuda"
    with tarfile.open(cuda / "prebuilt" / "kernels.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    sources = [cuda / f"{name}.cc" for name in ("device", "driver", "images", "pack", "sparse_kernel", "tile_table")]
    sources.append(Path(__file__).with_name("gpu_library.cc"))
    library = folder / "libtetris_gpu.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-fPIC", "-shared", f"-I{folder}", "-pthread"]
    definitions = [f'-DTETRIS_CUDA_KERNELS="{folder}"', f'-DTETRIS_CUDA_TILES="{cuda / "tiles.csv"}"']
    subprocess.run(
        [*command, *definitions, *sources, "-o", library, "-ldl", "-Wl,--no-undefined"],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.tetris_gpu_create.restype = ctypes.c_void_p
    return loaded


class Sparse:
    """One block-sparse layer on the GPU, made like the op from kept blocks; its dense weight for comparison."""

    def __init__(
        self,
        library: ctypes.CDLL,
        kind: str,
        weight_shape: Sequence[int],
        block: tuple[int, int],
        density: float,
        rng: np.random.Generator,
        *,
        stride: int = 1,
        pad: int = 0,
        dilation: int = 1,
        permuted: bool = True,
    ) -> None:
        outputs, inputs, *kernel = weight_shape
        self.shape, self.kernel, self.stride, self.pad, self.dilation = (
            tuple(weight_shape),
            kernel,
            stride,
            pad,
            dilation,
        )
        bo, bi = block
        rows, columns = math.ceil(outputs / bo), math.ceil(inputs / bi)
        # The same number of kept blocks in each row, to one.
        kept = max(1, round(density * rows * columns))
        counts = [kept * (row + 1) // rows - kept * row // rows for row in range(rows)]
        index = [(r, c) for r, n in enumerate(counts) for c in sorted(rng.choice(columns, n, replace=False))]
        self.index = np.array(index, np.int64).reshape(-1, 2)
        self.density = len(index) / (rows * columns)
        scale = 1 / math.sqrt(max(1.0, density * inputs * math.prod(kernel)))
        self.blocks = rng.standard_normal((len(index), bo, bi, *kernel), dtype=np.float32) * np.float32(scale)
        self.blocks = torch.from_numpy(self.blocks).to(TYPES[kind]).float().numpy()  # as the kernel will see them
        self.input_perm = rng.permutation(inputs) if permuted else np.arange(inputs)
        self.output_perm = rng.permutation(outputs) if permuted else np.arange(outputs)
        self.bias = rng.standard_normal(outputs, dtype=np.float32)
        spatial = [1] * (3 - len(kernel))
        zero = [0] * (3 - len(kernel))
        count = len(kernel)
        description = _Layer(
            device=0,
            type=list(TYPES).index(kind),
            last=not kernel,
            has_depth=count == 3,
            kernel=Three(*spatial, *kernel),
            strides=Three(*spatial, *[stride] * count),
            dilations=Three(*spatial, *[dilation] * count),
            pads=Three(*zero, *[pad] * count),
            outputs=outputs,
            inputs=inputs,
            taps=math.prod(kernel),
            block_outputs=bo,
            block_inputs=bi,
            block_count=len(index),
            low=0.0,
            high=math.inf,
        )
        for name, array in (
            ("blocks", self.blocks),
            ("block_index", self.index),
            ("input_perm", self.input_perm),
            ("output_perm", self.output_perm),
            ("bias", self.bias),
        ):
            setattr(description, name, array.ctypes.data)
        self._library, self._text = library, ctypes.create_string_buffer(4096)
        made = library.tetris_gpu_create(ctypes.byref(description), self._text, ctypes.c_size_t(4096))
        if not made:
            raise SystemExit(self._text.value.decode())
        self._kernel = ctypes.c_void_p(made)

    def __del__(self) -> None:
        if hasattr(self, "_kernel"):
            self._library.tetris_gpu_destroy(self._kernel)

    def output_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Of an input of this shape."""
        if not self.kernel:
            return (*x_shape[:-1], self.shape[0])
        size = [
            (s + 2 * self.pad - (k - 1) * self.dilation - 1) // self.stride + 1
            for s, k in zip(x_shape[2:], self.kernel, strict=True)
        ]
        return (x_shape[0], self.shape[0], *size)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Enqueue y = op(x) on the current stream."""
        size = Three(*[1] * (5 - x.dim()), *x.shape[2:]) if self.kernel else Three(1, 1, 1)
        output = Three(*[1] * (5 - y.dim()), *y.shape[2:]) if self.kernel else Three(1, 1, 1)
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        failed = self._library.tetris_gpu_run(
            self._kernel,
            ctypes.c_uint64(x.data_ptr()),
            ctypes.c_int64(x.shape[0]),
            size,
            output,
            ctypes.c_uint64(y.data_ptr()),
            ctypes.c_void_p(stream),
            self._text,
            ctypes.c_size_t(4096),
        )
        if failed:
            raise SystemExit(self._text.value.decode())

    def dense_weight(self) -> np.ndarray:
        """The weight with its zeros."""
        return reference.dense_weight(self.blocks, self.index, self.input_perm, self.output_perm, self.shape)

    def expected(self, x: np.ndarray) -> np.ndarray:
        """The oracle's answer, in float64."""
        arguments = (x, self.blocks, self.index, self.input_perm, self.output_perm, self.bias)
        if not self.kernel:
            return reference.block_sparse_gemm(*arguments, weight_shape=self.shape, activation_min=0.0)
        rank = len(self.kernel)
        return reference.block_sparse_conv(
            *arguments,
            weight_shape=self.shape,
            activation_min=0.0,
            strides=[self.stride] * rank,
            pads=[self.pad] * 2 * rank,
            dilations=[self.dilation] * rank,
        )


def check(library: ctypes.CDLL, device: str) -> int:
    """Every tile and many shapes against the oracle. Returns the number of cases; a wrong one ends the program."""
    rng = np.random.default_rng()  # fresh inputs every time
    cases = 0

    def one(kind: str, shape: Sequence[int], block: tuple[int, int], x_shape: Sequence[int], **arguments: Any) -> None:
        nonlocal cases
        layer = Sparse(library, kind, shape, block, 0.5, rng, **arguments)
        x = torch.from_numpy(rng.standard_normal(x_shape, dtype=np.float32)).to(TYPES[kind])
        y = torch.full(layer.output_shape(x_shape), math.nan, dtype=TYPES[kind], device=device)
        x_device = x.to(device)
        for _ in range(2):
            layer(x_device, y)
        found, expected = y.float().cpu().numpy(), layer.expected(x.float().numpy())
        error = np.abs(found - expected).max() / np.abs(expected).max()
        cases += 1
        if not error <= TOLERANCES[kind]:  # NaN too
            tile = os.environ.get("TETRIS_ONNX_CUDA_TILE", "")
            case = f"{kind} {shape} blocks {block} x {x_shape} {arguments} tile {tile!r}"
            raise SystemExit(f"WRONG: {case}: error {error:.2e}")

    for kind in TYPES:
        for block in ((32, 32), (64, 64), (128, 64), (16, 8), (48, 80)):
            for stride, pad, dilation in ((1, 1, 1), (2, 0, 1), (1, 2, 2)):
                one(kind, (150, 70, 3, 3), block, (2, 70, 13, 11), stride=stride, pad=pad, dilation=dilation)
            one(kind, (150, 70, 1, 1), block, (2, 70, 13, 11), stride=2)
            one(kind, (150, 70, 5, 5), block, (1, 70, 13, 11), pad=2)
            one(kind, (150, 70, 3), block, (2, 70, 40), pad=1)
            one(kind, (70, 36, 3, 3, 3), block, (2, 36, 5, 6, 7), pad=1)
            one(kind, (150, 256), block, (5, 256))
            one(kind, (150, 256), block, (300, 256), permuted=False)
            one(kind, (512, 512, 3, 3), block, (1, 512, 14, 14), pad=1)
    for variant in build.variants():
        if variant.kernel != "block_sparse_conv":
            continue
        splits = 3 if variant.layout == "split" else 1
        os.environ["TETRIS_ONNX_CUDA_TILE"] = f"{variant.bm}x{variant.bn}x{splits}"
        block = (variant.bm, max(32, variant.bk)) if variant.bm > 32 else (32, 32)
        if variant.layout == "nhwc":
            one(variant.type, (variant.bm * 2 + 20, 140), block, (variant.bn * 2 + 30, 140))
        else:
            k = {1: 1, 9: 3, 0: 2}[variant.taps]
            one(variant.type, (variant.bm * 2 + 20, 140, k, k), block, (3, 140, 9, variant.bn // 4), pad=k // 2)
    os.environ.pop("TETRIS_ONNX_CUDA_TILE", None)
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


def dense_us(layer: Layer, kind: str, batch: int, device: str, seconds: float) -> dict[str, float]:
    """The dense layer with Relu in PyTorch: NCHW and channels-last through cuDNN, and without cuDNN."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
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


def sparse_us(layer: Sparse, x_shape: Sequence[int], kind: str, device: str, seconds: float) -> float:
    """Our layer."""
    inputs = copies_of(torch.empty(x_shape, dtype=TYPES[kind], device=device))
    outputs = [torch.empty(layer.output_shape(x_shape), dtype=TYPES[kind], device=device) for _ in inputs]
    return median_us([lambda x=x, y=y: layer(x, y) for x, y in zip(inputs, outputs, strict=True)], seconds)


def make(library: ctypes.CDLL, layer: Layer, kind: str, block: int, density: float, rng: np.random.Generator) -> Sparse:
    """A layer of the shapes file. Permuted both ways: that is the usual case."""
    kernel = (layer.kernel, layer.kernel) if layer.is_conv else ()
    size = (min(block, layer.outputs), min(block, layer.inputs))
    return Sparse(
        library, kind, (layer.outputs, layer.inputs, *kernel), size, density, rng, stride=layer.stride, pad=layer.pad
    )


def whole_vgg16(
    library: ctypes.CDLL, layers: Sequence[Layer], kind: str, batch: int, block: int, device: str, seconds: float
) -> dict[str, Any]:
    """VGG16 with random weights: dense (channels-last) and at Deep Compression's densities. conv1_1 is always dense."""
    rng = np.random.default_rng(0)
    options = {"dtype": TYPES[kind], "device": device}
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    size = 224 if device == "cuda" else 32
    image = torch.randn(batch, 3, size, size, **options)
    first = torch.randn(64, 3, 3, 3, **options)
    pooled = {"conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3"}
    sparse = [(layer, make(library, layer, kind, block, DENSITIES[layer.name], rng)) for layer in layers]

    def run(sparse_layers: bool) -> torch.Tensor:
        memory = torch.contiguous_format if sparse_layers else torch.channels_last
        x = F.conv2d(image.contiguous(memory_format=memory), first, padding=1).relu_()
        for layer, ours in sparse:
            if not layer.is_conv and x.dim() == 4:
                x = F.adaptive_avg_pool2d(x, 7).flatten(1)
            if sparse_layers:
                y = torch.empty(ours.output_shape(x.shape), **options)
                ours(x.contiguous(), y)
                x = y
            elif layer.is_conv:
                x = F.conv2d(x, weights[layer.name], padding=layer.pad).relu_()
            else:
                x = F.linear(x, weights[layer.name]).relu_()
            if layer.name in pooled:
                x = F.max_pool2d(x, 2)
        return x

    weights = {}
    for layer, ours in sparse:
        weight = torch.from_numpy(ours.dense_weight()).to(**options)
        weights[layer.name] = weight.contiguous(memory_format=torch.channels_last) if layer.is_conv else weight
    with torch.no_grad():
        ours_us = median_us([lambda: run(True)], seconds)
        dense = median_us([lambda: run(False)], seconds)
    return {"model": "vgg16", "type": kind, "batch": batch, "block": block, "dense_us": dense, "sparse_us": ours_us}


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", type=Path, default=Path(__file__).with_name("vgg16.txt"))
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=["f16", "tf32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.27, 0.1])
    parser.add_argument("--block-size", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--layers", default="", help="only the layers whose name holds this")
    parser.add_argument("--seconds", type=float, default=0.03, help="for each time")
    parser.add_argument("--output", type=Path, help="all results, as JSON")
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--tune", action="store_true", help="every tile and number of splits of each layer")
    parser.add_argument("--rehearse", action="store_true", help="no GPU: the stand-in driver, to test this program")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("no CUDA device, or this PyTorch is built without CUDA")
    device = "cpu" if arguments.rehearse else "cuda"
    layers = [layer for layer in read_layers(arguments.shapes) if arguments.layers in layer.name]
    results: dict[str, Any] = {"device": "none" if arguments.rehearse else torch.cuda.get_device_name(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.rehearse:
            driver = rehearse(Path(folder))
        library = compile_library(Path(folder))
        start = time.perf_counter()
        print(f"{check(library, device)} cases correct, {time.perf_counter() - start:.0f} s", flush=True)
        if arguments.rehearse:
            assert driver.errors == [], driver.errors[0]
        if arguments.check:
            return
        rng = np.random.default_rng(0)
        print(f"{'layer':<10}{'type':>5}{'batch':>6}{'dense us':>10}{'no cuDNN':>10}", end="")
        print("   block density: us, speed-up, fraction", flush=True)
        for kind, layer in itertools.product(arguments.types, layers):
            made = {
                (b, d): make(library, layer, kind, b, d, rng) for b in arguments.block_size for d in arguments.density
            }
            for batch in arguments.batch:
                x_shape = (batch, layer.inputs, *layer.map_size)
                dense = dense_us(layer, kind, batch, device, arguments.seconds)
                best = min(us for name, us in dense.items() if name != "no_cudnn")
                print(
                    f"{layer.name:<10}{kind:>5}{batch:>6}{best:>10.1f}{dense.get('no_cudnn', math.nan):>10.1f}", end=" "
                )
                for (block, density), ours in made.items():
                    us = sparse_us(ours, x_shape, kind, device, arguments.seconds)
                    row = {"layer": layer.name, "type": kind, "batch": batch, "block": block, "density": ours.density}
                    row |= {"dense_us": dense, "sparse_us": us, "fraction": best / us * ours.density}
                    results["rows"].append(row)
                    print(f" | {block} {density}: {us:.1f} {best / us:.2f}x {row['fraction']:.2f}", end="", flush=True)
                print()
                if arguments.tune:
                    results["rows"] += tune(library, layer, kind, batch, arguments, device)
            del made
        if not arguments.layers and not arguments.tune:
            for kind, batch, block in itertools.product(arguments.types, arguments.batch, (64,)):
                row = whole_vgg16(library, layers, kind, batch, block, device, 10 * arguments.seconds)
                results["rows"].append(row)
                speedup = row["dense_us"] / row["sparse_us"]
                print(f"VGG16 {kind} batch {batch}: {row['dense_us']:.0f} -> {row['sparse_us']:.0f} us, {speedup:.2f}x")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


def rehearse(folder: Path) -> Any:
    """Put the tests' stand-in for the driver where the library looks for one."""
    from tests.custom_ops.cuda import stand_in

    _, path = stand_in.compile_libraries(folder)
    driver = stand_in.StandIn(path)
    driver.reset()
    driver.execute = stand_in.run_numpy
    return driver


def tune(
    library: ctypes.CDLL, layer: Layer, kind: str, batch: int, arguments: argparse.Namespace, device: str
) -> list[dict[str, Any]]:
    """Time each tile and number of splits; print the best and what the library chooses."""
    rows = []
    shapes = sorted({(v.bm, v.bn) for v in build.variants() if v.kernel == "block_sparse_conv" and v.type == kind})
    for block, density in itertools.product(arguments.block_size, arguments.density):
        times = {}
        for (bm, bn), splits in itertools.product([(0, 0), *shapes], (0, 1, 2, 4, 8, 16)):
            if bm > block or block % (bm or 1) != 0 or ((bm, splits) != (0, 0) and 0 in (bm, splits)):
                continue
            os.environ["TETRIS_ONNX_CUDA_TILE"] = f"{bm}x{bn}x{splits}"
            ours = make(library, layer, kind, block, density, np.random.default_rng(0))
            x_shape = (batch, layer.inputs, *layer.map_size)
            times[bm, bn, splits] = sparse_us(ours, x_shape, kind, device, arguments.seconds)
        os.environ.pop("TETRIS_ONNX_CUDA_TILE", None)
        best = min(times, key=times.__getitem__)
        print(
            f"    tune {block} {density}: best {best} {times[best]:.1f} us, chosen {times[0, 0, 0]:.1f} us", flush=True
        )
        for tile, us in times.items():
            row = {"layer": layer.name, "type": kind, "batch": batch, "block": block, "density": density}
            rows.append(row | {"tile": tile, "us": us})
    return rows


if __name__ == "__main__":
    main()
