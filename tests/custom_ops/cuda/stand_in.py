"""Runs the CUDA ops without a GPU: the op library on onnxruntime's CPU provider, with a stand-in for the driver.

Everything is real up to the launch: node checks, packing, choice of image and tile, uploads, argument marshalling.
What a launch does then is done here on host memory: by a model of each kernel in numpy, or by the kernels themselves in
Triton's interpreter, where Triton is installed.
"""

from __future__ import annotations

import ast
import ctypes
import math
import os
import re
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[3]
OPS = ROOT / "custom_ops"
CUDA = OPS / "cuda"
sys.path.insert(0, str(CUDA))
import build  # noqa: E402  (of the kernels: not a package)

Array = npt.NDArray[Any]

MAX_VALUES = 400_000  # of a tensor in one launch; 2^31 in earnest


def kernel_parameters() -> dict[str, list[str]]:
    """The run-time parameters of each kernel, in order, from the source: Triton is not needed for that."""
    tree = ast.parse((CUDA / "kernels.py").read_text())
    return {
        node.name: [a.arg for a in node.args.args if a.annotation is None]
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def compile_libraries(folder: Path) -> tuple[Path, Path]:
    """The op library with its CUDA ops on the CPU provider, and the stand-in driver."""
    with tarfile.open(CUDA / "prebuilt" / "kernels.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # early releases of 3.10 and 3.11 have none
        archive.extractall(folder)
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += os.environ.get("TETRIS_ONNX_TEST_CXXFLAGS", "").split()  # run_sanitizers.sh
    sources = [OPS / f for f in ("library.cc", "kernel_info.cc", "shape_inference.cc", "channels_last_max_pool.cc")]
    sources += [*OPS.glob("block_sparse_*.cc"), *CUDA.glob("*.cc"), *(OPS / "cpu").glob("*.cc")]
    sources = [s for s in sources if not re.search("kernels_(avx|amx|neon)", s.name)]
    library, driver = folder / "libtetris_onnx_ops.so", folder / "libcuda.so.1"
    definitions = [
        "-DTETRIS_CUDA",
        "-DTETRIS_WITHOUT_CPU",
        f"-DTETRIS_CUDA_MAX_VALUES={MAX_VALUES}",
        '-DTETRIS_CUDA_PROVIDER="CPUExecutionProvider"',
        f'-DTETRIS_CUDA_KERNELS="{folder}"',
        f'-DTETRIS_CUDA_TILES="{CUDA / "tiles.csv"}"',
        f"-I{folder}",
    ]
    version_script = f"-Wl,--version-script={OPS / 'exports.map'}"
    linking = ["-pthread", "-ldl"]
    if "-fsanitize" not in os.environ.get("TETRIS_ONNX_TEST_CXXFLAGS", ""):
        linking += ["-Wl,--no-undefined", version_script]

    def compiled(source: Path) -> Path:
        result = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([compiler, *flags, *definitions, "-c", source, "-o", result], check=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([compiler, *flags, *objects, "-o", library, *linking], check=True)
    flags.remove("-fvisibility=hidden")
    subprocess.run(
        [compiler, *flags, "-Wl,-soname,libcuda.so.1", Path(__file__).with_name("stand_in_driver.cc"), "-o", driver],
        check=True,
    )
    return library, driver


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as the driver got it."""

    variant: build.Variant
    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    threads: int
    shared: int


class StandIn:
    """The stand-in driver of this process."""

    def __init__(self, path: Path) -> None:
        # Under the name of the driver, so that the op library's own dlopen finds it.
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.stand_in_log.restype = ctypes.c_char_p
        for name in ("stand_in_broken_guards", "stand_in_bytes_in_use"):
            getattr(self._library, name).restype = ctypes.c_long
        self._names = kernel_parameters()
        self._images = self._read_images(path.parent)
        self._variants = {v.name: v for v in build.variants()}
        self._found: dict[int, str] = {}
        self.launches: list[Launch] = []
        self.errors: list[str] = []
        self.execute: Callable[[Launch], None] | None = None
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_uint * 3),
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
        )
        self._callback = prototype(self._launch)
        self._library.stand_in_launch(self._callback)

    @staticmethod
    def _read_images(folder: Path) -> list[tuple[str, str, bytes]]:
        content = (folder / "kernels.bin").read_bytes()
        entries = re.findall(r'\{"(\w+)", "(\w+)", \d+, \d+, \d+, (\d+), (\d+)\}', (folder / "kernels.inc").read_text())
        return [(name, function, content[int(at) : int(at) + int(size)]) for name, function, at, size in entries]

    def reset(self) -> None:
        """Forget what happened, be an H100 again."""
        self.device(90)
        self._library.stand_in_parameters(-1)
        self._library.stand_in_clear_log()
        self.launches.clear()
        self.errors.clear()

    def device(
        self, capability: int, *, processors: int = 132, shared: int | None = None, version: int = 12080
    ) -> None:
        """What the GPU is from now on, for libraries that have not asked yet."""
        shared = shared or (232448 if capability in (90, 100, 103) else 166912 if capability == 80 else 101376)
        self._library.stand_in_device(capability, processors, shared, version)

    def fail(self, function: str, error: int) -> None:
        """Let a driver function return an error, or with 0 no longer."""
        self._library.stand_in_fail(function.encode(), error)

    def parameters(self, count: int) -> None:
        """How many parameters every kernel says that it has."""
        self._library.stand_in_parameters(count)

    @property
    def log(self) -> list[str]:
        """The calls, one a line."""
        return self._library.stand_in_log().decode().splitlines()

    @property
    def broken_guards(self) -> int:
        """Freed blocks of device memory that were written beyond."""
        return self._library.stand_in_broken_guards()

    @property
    def bytes_in_use(self) -> int:
        """Of device memory."""
        return self._library.stand_in_bytes_in_use()

    @property
    def context_depth(self) -> int:
        """Contexts pushed and not popped."""
        return self._library.stand_in_context_depth()

    def _variant(self, image: int, function: str) -> str:
        if image not in self._found:
            self._found[image] = next(
                name
                for name, kernel, data in self._images
                if kernel == function and ctypes.string_at(image, len(data)) == data
            )
        return self._found[image]

    def _launch(
        self, image: int, name: bytes, grid: Any, threads: int, shared: int, stream: int, parameters: Any
    ) -> int:
        try:
            function = name.decode()
            values: dict[str, Any] = {}
            types = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "f": ctypes.c_float}
            kinds = build.SIGNATURES[function]
            for index, (parameter, kind) in enumerate(zip(self._names[function], kinds, strict=True)):
                values[parameter] = types[kind].from_address(parameters[index]).value
            for extra in range(2):
                assert ctypes.c_uint64.from_address(parameters[len(kinds) + extra]).value == 0
            for parameter in build.DIVISIBLE[function]:
                assert values[parameter] % 16 == 0, f"{parameter} = {values[parameter]}"
            launch = Launch(
                self._variants[self._variant(image, function)], values, tuple(grid.contents), threads, shared
            )
            self.launches.append(launch)
            if self.execute is not None:
                self.execute(launch)
        except Exception:
            self.errors.append(traceback.format_exc())
            return 700
        return 0


def view(pointer: int, dtype: str, count: int) -> Array:
    """Device memory as an array: f16, bf16 (as uint16), f32, i16, i32."""
    numpy_type = {"f16": "f2", "bf16": "u2", "tf32": "f4", "f32": "f4", "i16": "i2", "i32": "i4"}[dtype]
    size = np.dtype(numpy_type).itemsize
    return np.frombuffer((ctypes.c_char * (count * size)).from_address(pointer), numpy_type)


def to_float(values: Array) -> Array:
    """As float32, where uint16 stands for bfloat16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float(values: Array, dtype: str) -> Array:
    """Float32 as an element type."""
    if dtype != "bf16":
        return values.astype("f2" if dtype == "f16" else "f4")
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def run_numpy(launch: Launch) -> None:
    """What the kernel of a launch does, in numpy."""
    kernels = {"block_sparse_conv": _conv, "sum_splits": _sum, "channels_last": _channels_last, "max_pool": _max_pool}
    kernels[launch.variant.kernel](launch)


def _conv(launch: Launch) -> None:
    v, a = launch.variant, launch.arguments
    parts, splits, taps, pixels = (a[n] for n in ("parts", "splits", "taps", "P"))
    packed_rows = launch.grid[1] // parts
    assert launch.grid == (math.ceil(pixels / v.bn), packed_rows * parts, splits)
    assert a["C"] % v.bk == 0
    assert v.taps in (0, taps)
    assert splits == 1 or v.layout == "split"
    kernel = (taps // (a["kernel_h"] * a["kernel_w"]), a["kernel_h"], a["kernel_w"])
    assert v.taps != 9 or (kernel == (1, 3, 3) and a["D"] == a["OD"] == 1 and a["pad_d"] == 0)
    height = v.bm * parts  # of a packed row
    tile_begin = view(a["tile_begin_ptr"], "i32", packed_rows + 1)
    tiles = int(tile_begin[-1])
    assert a["w_tap"] == height * v.bk
    w = to_float(view(a["w_ptr"], v.type, tiles * taps * a["w_tap"])).reshape(tiles, taps, height, v.bk)
    channel_tile = view(a["channel_tile_ptr"], "i32", tiles + 1)
    order = view(a["row_order_ptr"], "i32", packed_rows)
    assert sorted(order) == list(range(packed_rows))
    assert (np.diff(np.diff(tile_begin)[order]) <= 0).all()  # heaviest first
    size, out = [a[n] for n in "DHW"], [a[n] for n in ("OD", "OH", "OW")]
    images = pixels // math.prod(out)
    x = to_float(view(a["x_ptr"], v.type, images * math.prod(size) * a["C"])).reshape(images, *size, a["C"])
    grid = np.meshgrid(*(np.arange(n) for n in (images, *out)), indexing="ij")
    n, *place = (g.reshape(-1) for g in grid)
    sums = np.zeros((splits, packed_rows * height, pixels), np.float32)
    for tap in range(taps):
        offset = np.unravel_index(tap, kernel)
        at = [place[d] * a[f"stride_{s}"] - a[f"pad_{s}"] + offset[d] * a[f"dilation_{s}"] for d, s in enumerate("dhw")]
        inside = np.logical_and.reduce([(at[d] >= 0) & (at[d] < size[d]) for d in range(3)])
        values = np.zeros((pixels, a["C"]), np.float32)
        values[inside] = x[n[inside], at[0][inside], at[1][inside], at[2][inside]]
        for row in range(packed_rows):
            begin, count = tile_begin[row], (tile_begin[row + 1] - tile_begin[row]) * taps
            for split in range(splits):
                for step in range(count * split // splits, count * (split + 1) // splits):
                    if step % taps == tap:
                        tile = begin + step // taps
                        first = channel_tile[tile] * v.bk
                        sums[split, row * height : (row + 1) * height] += (
                            w[tile, tap] @ values[:, first : first + v.bk].T
                        )
    if v.layout == "split":
        view(a["y_ptr"], "f32", sums.size)[:] = sums.reshape(-1)
        return
    bias = view(a["bias_ptr"], "f32", packed_rows * height)
    channel = view(a["output_channel_ptr"], "i32", packed_rows * height)
    result = (sums[0] + bias[:, None])[channel >= 0]
    shape = (pixels, a["OC"]) if v.layout == "nhwc" else (images, a["OC"], math.prod(out))
    if a["has_addend"]:
        assert v.layout == "nhwc"
        addend = to_float(view(a["addend_ptr"], v.type, pixels * a["OC"])).reshape(shape)
        result = result + addend.T[channel[channel >= 0]]
    result = _limited(result, a)
    y = view(a["y_ptr"], v.type, pixels * a["OC"]).reshape(shape)
    if v.layout == "nhwc":
        y[:, channel[channel >= 0]] = from_float(result.T, v.type)
    else:
        y[:, channel[channel >= 0]] = from_float(result.reshape(len(result), images, -1).swapaxes(0, 1), v.type)


def _limited(values: Array, arguments: dict[str, Any]) -> Array:
    return np.minimum(np.maximum(values, np.float32(arguments["low"])), np.float32(arguments["high"]))


def _sum(launch: Launch) -> None:
    a = launch.arguments
    last = launch.variant.layout == "nhwc"
    assert launch.grid == (math.ceil(a["P"] / 16), a["R"] / 32, 1)
    partial = view(a["partial_ptr"], "f32", a["splits"] * a["R"] * a["P"]).reshape(a["splits"], a["R"], a["P"])
    channel = view(a["output_channel_ptr"], "i32", a["R"])
    total = view(a["bias_ptr"], "f32", a["R"])[:, None] + np.zeros((1, a["P"]), np.float32)
    for part in partial:
        total = total + part
    volume = 1 if last else a["volume"]
    images = a["P"] // volume
    shape = images, a["OC"], volume
    total = total[channel >= 0].reshape(-1, images, volume).swapaxes(0, 1)
    channel = channel[channel >= 0]
    if a["has_addend"]:
        addend = view(a["addend_ptr"], launch.variant.type, a["P"] * a["OC"]).reshape(shape)
        total = total + to_float(addend[:, channel])
    y = view(a["y_ptr"], launch.variant.type, a["P"] * a["OC"]).reshape(shape)
    y[:, channel] = from_float(_limited(total, a), launch.variant.type)


def _channels_last(launch: Launch) -> None:
    v, a = launch.variant, launch.arguments
    assert launch.grid == (math.ceil(a["P"] / 64), a["packed"] / 32, 1)
    element = "i16" if v.type == "i16" else "i32"
    images = a["P"] // a["volume"]
    x = view(a["x_ptr"], element, a["P"] * a["C"])
    x = x.reshape(a["P"], a["C"]) if v.layout == "nhwc" else x.reshape(images, a["C"], -1).swapaxes(1, 2)
    x = x.reshape(a["P"], a["C"])
    if v.type == "tf32":
        bits = x.view(np.uint32)
        x = np.where(bits & 0x7F800000 == 0x7F800000, bits, (bits + 0x1000) & 0xFFFFE000).view(np.int32)
    channel = view(a["channel_ptr"], "i32", a["packed"])
    y = view(a["y_ptr"], element, a["P"] * a["packed"]).reshape(a["P"], a["packed"])
    y[:] = np.where(channel >= 0, x[:, np.maximum(channel, 0)], 0)


def _max_pool(launch: Launch) -> None:
    v, a = launch.variant, launch.arguments
    assert launch.grid == (math.ceil(a["P"] / 16), math.ceil(a["C"] / 64), 1)
    images = a["P"] // (a["OH"] * a["OW"])
    x = to_float(view(a["x_ptr"], v.type, images * a["H"] * a["W"] * a["C"])).reshape(images, a["H"], a["W"], a["C"])
    largest = np.full((images, a["OH"], a["OW"], a["C"]), -np.inf, np.float32)
    for kh, kw in np.ndindex(a["kernel_h"], a["kernel_w"]):
        h = np.arange(a["OH"]) * a["stride_h"] - a["pad_h"] + kh
        w = np.arange(a["OW"]) * a["stride_w"] - a["pad_w"] + kw
        at = np.ix_(range(images), (h >= 0) & (h < a["H"]), (w >= 0) & (w < a["W"]))
        inside = x[:, h[(h >= 0) & (h < a["H"])]][:, :, w[(w >= 0) & (w < a["W"])]]
        largest[at] = np.maximum(largest[at], inside)
    view(a["y_ptr"], v.type, largest.size)[:] = from_float(largest, v.type).reshape(-1)
