"""The CUDA kernels apart from onnxruntime, as PyTorch calls them: what gpu.py checks and times.

Making a layer and asking how it would be launched needs no PyTorch.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests import reference  # noqa: E402  (the oracle)

KINDS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "f32": np.float32}
_Three = ctypes.c_int64 * 3
_TEXT = 4096


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("device", "type", "input_last", "output_last", "has_depth")),
        *((name, _Three) for name in ("kernel", "strides", "dilations", "pads")),
        *((n, ctypes.c_int64) for n in ("outputs", "inputs", "taps", "block_outputs", "block_inputs", "block_count")),
        *((n, ctypes.c_void_p) for n in ("blocks", "block_index", "input_perm", "output_perm", "bias")),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    ]


def compile_library(folder: Path, optimization: str = "-O2") -> ctypes.CDLL:
    """The kernels with the prebuilt images, apart from onnxruntime."""
    cuda = ROOT / "custom_ops" / "cuda"
    with tarfile.open(cuda / "prebuilt" / "kernels.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # early releases of 3.10 and 3.11 have none
        archive.extractall(folder)
    names = ("device", "driver", "images", "pack", "pool_kernel", "sparse_kernel", "tile_table")
    sources = [*(cuda / f"{name}.cc" for name in names), Path(__file__).with_name("gpu_library.cc")]
    library = folder / "libtetris_gpu.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", optimization, "-fPIC", "-shared", f"-I{folder}", "-pthread"]
    definitions = [f'-DTETRIS_CUDA_KERNELS="{folder}"', f'-DTETRIS_CUDA_TILES="{cuda / "tiles.csv"}"']
    subprocess.run([*command, *definitions, *sources, "-o", library, "-ldl", "-Wl,--no-undefined"], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.tetris_gpu_create.restype = ctypes.c_void_p
    return loaded


def _stream(x: torch.Tensor) -> ctypes.c_void_p:
    import torch

    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if x.is_cuda else None)


class Sparse:
    """One block-sparse layer on the GPU, made like the op from kept blocks; its dense weight for comparison.

    ``last``: whether the channels of x and y are last, as between two of our ops. ``permuted``: whether input and
    output are. Inside a run the input is in order: its producer has written it so. ``columns``: how many channels the
    reader of y takes at a time, those of a row of blocks side by side among them (see passes/group_channels.py).
    """

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
        permuted: tuple[bool, bool] = (True, True),
        columns: int = 0,
        last: tuple[bool, bool] = (False, False),
        relu: bool = True,
    ) -> None:
        outputs, inputs, *kernel = weight_shape
        self.shape, self.kernel, self.stride, self.pad = tuple(weight_shape), kernel, stride, pad
        self.dilation, self.last, self.low = dilation, last, 0.0 if relu else -math.inf
        bo, bi = block
        rows, columns = math.ceil(outputs / bo), math.ceil(inputs / bi)
        # The same number of kept blocks in each row, to one.
        kept = max(1, round(density * rows * columns))
        counts = [kept * (row + 1) // rows - kept * row // rows for row in range(rows)]
        index = [(r, c) for r, n in enumerate(counts) for c in sorted(rng.choice(columns, n, replace=False))]
        self.index = np.array(index, np.int64).reshape(-1, 2)
        self.density = len(index) / (rows * columns)
        scale = 1 / math.sqrt(max(1.0, self.density * inputs * math.prod(kernel)))
        self.blocks = rng.standard_normal((len(index), bo, bi, *kernel), dtype=np.float32) * np.float32(scale)
        self.blocks = self.blocks.astype(KINDS[kind]).astype(np.float32)  # as the kernel will see them
        self.input_perm = rng.permutation(inputs) if permuted[0] else np.arange(inputs)
        self.output_perm = rng.permutation(outputs) if permuted[1] else np.arange(outputs)
        if columns:
            row_of = np.argsort(self.output_perm) // bo
            order = np.lexsort((row_of, np.arange(outputs) // columns))
            self.output_perm = np.argsort(order)[self.output_perm]
        self.bias = rng.standard_normal(outputs, dtype=np.float32)
        count = len(kernel)
        ones, zeros = [1] * (3 - count), [0] * (3 - count)
        description = _Layer(
            device=0,
            type=list(KINDS).index(kind),
            input_last=last[0] or not kernel,
            output_last=last[1] or not kernel,
            has_depth=count == 3,
            kernel=_Three(*ones, *kernel),
            strides=_Three(*ones, *[stride] * count),
            dilations=_Three(*ones, *[dilation] * count),
            pads=_Three(*zeros, *[pad] * count),
            outputs=outputs,
            inputs=inputs,
            taps=math.prod(kernel),
            block_outputs=bo,
            block_inputs=bi,
            block_count=len(index),
            low=self.low,
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
        self._library, self._text = library, ctypes.create_string_buffer(_TEXT)
        made = library.tetris_gpu_create(ctypes.byref(description), self._text, ctypes.c_size_t(_TEXT))
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
            for s, k in zip(self._spatial(x_shape, 0), self.kernel, strict=True)
        ]
        return (x_shape[0], *size, self.shape[0]) if self.last[1] else (x_shape[0], self.shape[0], *size)

    def _spatial(self, shape: Sequence[int], end: int) -> list[int]:
        if not self.kernel:
            return []
        return list(shape[1:-1] if self.last[end] else shape[2:])

    def __call__(self, x: torch.Tensor, y: torch.Tensor, addend: torch.Tensor | None = None) -> None:
        """Enqueue y = op(x) on the current stream."""
        sizes = [self._spatial(tensor.shape, end) for end, tensor in enumerate((x, y))]
        failed = self._library.tetris_gpu_run(
            self._kernel,
            ctypes.c_uint64(x.data_ptr()),
            ctypes.c_int64(x.shape[0]),
            *(_Three(*[1] * (3 - len(size)), *size) for size in sizes),
            ctypes.c_uint64(0 if addend is None else addend.data_ptr()),
            ctypes.c_uint64(y.data_ptr()),
            _stream(x),
            self._text,
            ctypes.c_size_t(_TEXT),
        )
        if failed:
            raise SystemExit(self._text.value.decode())

    def describe(self, pixels: int) -> tuple[int, ...]:
        """What the table of tiles knows the layer by: sm, taps, height, rows, steps."""
        out = (ctypes.c_int64 * 5)()
        self._library.tetris_gpu_describe(self._kernel, ctypes.c_int64(pixels), out)
        return tuple(out)

    def plan(self, pixels: int) -> tuple[int, int, int]:
        """How so many output pixels are computed: tile rows, tile pixels, splits."""
        out = (ctypes.c_int64 * 3)()
        self._library.tetris_gpu_plan(self._kernel, ctypes.c_int64(pixels), out)
        return out[0], out[1], out[2]

    def dense_weight(self) -> np.ndarray:
        """The weight with its zeros."""
        return reference.dense_weight(self.blocks, self.index, self.input_perm, self.output_perm, self.shape)

    def expected(self, x: np.ndarray, addend: np.ndarray | None = None) -> np.ndarray:
        """The oracle's answer, in float64."""
        arguments = (self.blocks, self.index, self.input_perm, self.output_perm, self.bias)
        if not self.kernel:
            return reference.block_sparse_gemm(x, *arguments, weight_shape=self.shape, activation_min=self.low)
        rank = len(self.kernel)
        window = {
            "strides": [self.stride] * rank,
            "pads": [self.pad] * 2 * rank,
            "dilations": [self.dilation] * rank,
        }
        x = np.moveaxis(x, -1, 1) if self.last[0] else x
        common = {"weight_shape": self.shape, "activation_min": self.low, **window}
        if addend is None:
            y = reference.block_sparse_conv(x, *arguments, **common)
        else:
            addend = np.moveaxis(addend, -1, 1) if self.last[1] else addend
            y = reference.block_sparse_conv_add(x, *arguments, addend, **common)
        return np.moveaxis(y, 1, -1) if self.last[1] else y


def max_pool(
    library: ctypes.CDLL, kind: str, x: torch.Tensor, y: torch.Tensor, window: int, stride: int, pad: int
) -> None:
    """Enqueue the pooling of x [N, H, W, C] into y on the current stream."""
    text = ctypes.create_string_buffer(_TEXT)
    two = ctypes.c_int64 * 2
    failed = library.tetris_gpu_max_pool(
        ctypes.c_int64(list(KINDS).index(kind)),
        ctypes.c_uint64(x.data_ptr()),
        ctypes.c_int64(x.shape[0]),
        two(*x.shape[1:3]),
        two(*y.shape[1:3]),
        ctypes.c_int64(x.shape[3]),
        *(ctypes.c_int64(value) for value in (window, stride, pad)),
        ctypes.c_uint64(y.data_ptr()),
        _stream(x),
        text,
        ctypes.c_size_t(_TEXT),
    )
    if failed:
        raise SystemExit(text.value.decode())
