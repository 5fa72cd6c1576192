"""Predict the time of a layer, dense in onnxruntime and block-sparse in our operators. Numbers and formulas only.

    predict(shape, density, block_size, machine, threads)  -> seconds of the block-sparse layer; density may be an array
    predict_dense(shape, machine, threads)                 -> seconds of onnxruntime's layer, in its own network
    predict_reorder(values, machine, threads)              -> seconds of a change of layout between the two

``machine`` comes from `tetris_onnx.timing.machine.load_machine()`; all are in a `tetris_onnx.planner.Candidate`.

All are sums of work times what a unit of it takes, t = sum_i c_i w_i with c_i >= 0. The work w is counted from the
shape: a call, multiplications by kind of kernel (as the kernels do them: filled up to whole vectors and row groups),
weights read from the caches or from memory, input read or copied, output written. The machine's coefficients c are
fitted to measured times by non-negative least squares on relative errors (`fit`). Everything is linear, so that a few
dozen timed layers determine a machine, a prediction costs microseconds, and the block-sparse time can only grow with
the density: that of a layer with several algorithms is the least of theirs. Threads divide the work but for the call
and a share that stays serial (Amdahl).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What a layer's multiplications are: the kernels differ in how fast they do them.
KINDS = ("wide", "strided", "pointwise", "general", "product")
DENSE_WORK = ("call", *KINDS, "weights", "cold", "input", "output")
WINOGRAD_WORK = ("winograd", "transform", "transformed")
SPARSE_WORK = ("call", *KINDS, *WINOGRAD_WORK, "weights", "cold", "panel", "packing", "input", "output")
# How the block-sparse operator computes a layer: by its plain kernel, or a 3x3 one by Winograd's algorithm,
# F(2x2, 3x3) or F(4x4, 3x3).
ALGORITHMS = ("direct", "winograd2", "winograd4")
# A network with more weights than these does not keep them in the caches from one run to the next.
CACHED_WEIGHTS = 2**23
_ROWS = 8  # output channels that the sparse kernel computes at a time
_FEWEST_ROWS = 3  # below, the multipliers wait for their own results
_FEW_SAMPLES = 12  # more are computed in vectors of samples, fewer in vectors of output channels
_TAIL_PIXELS = 4  # as many at the end of a map are computed without a vector for them
_VECTORS = 3  # of pixels that it computes at a time
_LAYOUT_CHANNELS = 16  # onnxruntime's convolutions compute this many channels at a time


@dataclass(frozen=True)
class LayerShape:
    """What the time of a layer depends on, but for what is kept of it."""

    outputs: int  # channels
    inputs: int
    kernel: tuple[int, ...] = ()  # () for a matrix product
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    input_size: tuple[int, ...] = ()  # of a channel
    output_size: tuple[int, ...] = ()
    samples: int = 1  # images of a batch, or rows of a matrix product
    cold: bool = False  # a run of the network finds the weights in memory, not in a cache (see `CACHED_WEIGHTS`)
    groups: int = 1  # of the dense layer; to the block-sparse one they are zeros

    @property
    def taps(self) -> int:
        """Weights per pair of channels."""
        return math.prod(self.kernel)

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if not self.kernel:
            return "product"
        if self.taps == 1 and max(self.strides) == 1:
            return "pointwise"
        if self.kernel[-1] == 3 and len(self.kernel) < 3 and self.dilations[-1] == 1 and self.strides[-1] <= 2:
            return "strided" if max(self.strides) > 1 else "wide"
        return "general"

    @property
    def winograd(self) -> bool:
        """Whether the block-sparse kernel may use Winograd's algorithm."""
        return self.kernel == (3, 3) and {*self.strides, *self.dilations} == {1}

    @property
    def multiplications(self) -> int:
        """Of the dense layer, had it one group."""
        return self.samples * self.outputs * self.inputs * self.taps * math.prod(self.output_size)


@dataclass(frozen=True)
class Machine:
    """The coefficients of a machine, nanoseconds per unit of work on one thread."""

    name: str
    lanes: int  # float32 values of a vector register
    dense: Mapping[str, float]  # by DENSE_WORK
    sparse: Mapping[str, float]  # by SPARSE_WORK
    # With several threads, of (dense, block-sparse) layers: more per call, and the share of the work not divided.
    fork: tuple[float, float] = (2300.0, 2300.0)
    serial: tuple[float, float] = (0.03, 0.03)
    reorder: tuple[float, float] = (1500.0, 0.1)  # a change of layout: per call, per value
    # Time of a multiplication, and size of a weight, in a precision as a share of float32's; absent = as in float32.
    precisions: Mapping[str, float] = field(default_factory=dict)


# AMD EPYC of the Zen 5 generation, onnxruntime 1.31. Fitted to 891 layers of 12 networks with random densities and
# block sizes, each profiled in its network: half of the predictions are within 6 % (dense) and 14 % (block-sparse),
# nine tenths within a factor of 1.4; sums over a network are mostly within 5 %.
AVX512 = Machine(
    name="avx512",
    lanes=16,
    dense={
        "call": 3700.0,
        "wide": 0.0076,
        "strided": 0.0078,
        "pointwise": 0.0074,
        "general": 0.0074,
        "product": 0.0061,
        "weights": 0.039,
        "cold": 0.090,
        "input": 0.019,
        "output": 0.040,
    },
    sparse={
        "call": 4400.0,
        "wide": 0.0062,
        "strided": 0.0074,
        "pointwise": 0.0081,
        "general": 0.0066,
        "product": 0.0061,
        "winograd": 0.0077,
        "transform": 1.5,
        "transformed": 0.05,
        "weights": 0.077,
        "cold": 0.102,
        "panel": 0.212,
        "packing": 0.07,
        "input": 0.011,
        "output": 0.075,
    },
    # Of whole networks with two threads (ResNet-50, VGG16, SqueezeNet): layers of 20 microseconds gain nothing.
    fork=(2300.0, 5500.0),
    serial=(0.05, 0.25),
)


def _slower(machine: Machine, name: str, lanes: int) -> Machine:
    """``machine`` with narrower registers: its multiplications take longer by as much, everything else the same."""
    factor = machine.lanes / lanes  # (a transform is counted in vectors: it takes as long, there are more of them)
    dense, sparse = (
        {work: c * factor if work in (*KINDS, "winograd") else c for work, c in coefficients.items()}
        for coefficients in (machine.dense, machine.sparse)
    )
    return replace(machine, name=name, lanes=lanes, dense=dense, sparse=sparse)


# Of the instruction sets that the op library has kernels for; scaled where they have not been measured.
BUILT_IN = {
    machine.name: machine
    for machine in (AVX512, _slower(AVX512, "avx2", 8), _slower(AVX512, "neon", 4), _slower(AVX512, "scalar", 1))
}


# What a multiplication in another precision takes, as a share of one in float32, where the processor has its
# instructions: VDPBF16PS does two for one, VPDPBUSD four.
PRECISION_SHARES = {"bf16": 0.5, "int8": 0.25}


def algorithms(shape: LayerShape, precision: str = "float32") -> tuple[str, ...]:
    """Those of `ALGORITHMS` that the block-sparse operator chooses from."""
    return ALGORITHMS if shape.winograd and precision in ("float32", "bf16") else ALGORITHMS[:1]


def sparse_work(
    shape: LayerShape,
    density: ArrayLike,
    block_size: tuple[int, int],
    lanes: int = 16,
    algorithm: str = "direct",
    precision: str = "float32",
) -> NDArray[np.float64]:
    """The work of the block-sparse operator by one of `ALGORITHMS`, [..., len(SPARSE_WORK)] for densities [...]."""
    kept = np.asarray(density, np.float64)
    rows = min(block_size[0], shape.outputs)
    work = dict.fromkeys(SPARSE_WORK, np.zeros_like(kept))
    work["call"] = np.ones_like(kept)
    weights = kept * (shape.outputs * shape.inputs * shape.taps)
    # The share of input channels that some kept block reads, of blocks kept at random.
    used = 1.0 - (1.0 - kept) ** math.ceil(shape.outputs / rows)
    pixels, maps = math.prod(shape.output_size), math.prod(shape.input_size)
    many_rows = shape.kind == "product" and shape.samples > _FEW_SAMPLES
    if algorithm == "direct":
        work["cold" if shape.cold else "weights"] = weights
    if shape.kind == "product":
        work["product"] = weights * shape.samples * _fill(rows, _ROWS if many_rows else lanes) / rows
        # Rows are turned into columns first, and the columns of the result into rows.
        if shape.samples > 1:
            work["packing"] = np.full_like(kept, shape.samples * (shape.inputs + shape.outputs))
        else:
            work["input"] = np.full_like(kept, shape.inputs)
    elif algorithm == "direct":
        work[shape.kind] = weights * _row_groups(rows) / rows * shape.samples * _whole_vectors(pixels, lanes)
        # The other precisions convert what they read.
        in_place = shape.kind == "pointwise" and precision == "float32"
        work["input" if in_place else "panel"] = used * (
            shape.samples
            * shape.inputs
            * (maps if shape.kind in ("wide", "strided", "pointwise") else pixels * shape.taps)
        )
    else:
        size = int(algorithm.removeprefix("winograd"))
        elements = (size + 2) ** 2
        down, across = (-(-n // size) for n in shape.output_size)
        tiles = _whole_vectors(shape.samples * down * across, lanes) / lanes
        strips = math.ceil(tiles / _VECTORS)
        transformed = weights / shape.taps * elements
        work["winograd"] = transformed * _row_groups(rows) / rows * lanes * tiles
        vectors = (used * shape.inputs + shape.outputs) * math.ceil(tiles)
        work["transform"] = elements * vectors
        work["transformed"] = transformed * strips  # every strip of tiles reads all weights
    if not many_rows:
        work["output"] = np.full_like(kept, shape.samples * shape.outputs * pixels)
    return np.stack([work[name] for name in SPARSE_WORK], axis=-1)


def dense_work(shape: LayerShape, lanes: int = 16) -> NDArray[np.float64]:
    """The work of onnxruntime's layer, [len(DENSE_WORK)]."""
    work = dict.fromkeys(DENSE_WORK, 0.0)
    work["call"] = 1.0
    outputs = shape.outputs if shape.kind == "product" else _fill(shape.outputs, layout_channels(lanes))
    work[shape.kind] = shape.multiplications / shape.outputs * outputs / shape.groups
    work["cold" if shape.cold else "weights"] = shape.outputs * shape.inputs * shape.taps / shape.groups
    work["input"] = shape.samples * shape.inputs * math.prod(shape.input_size)
    work["output"] = shape.samples * shape.outputs * math.prod(shape.output_size)
    return np.array([work[name] for name in DENSE_WORK])


def predict(
    shape: LayerShape,
    density: ArrayLike,
    block_size: tuple[int, int],
    machine: Machine,
    threads: int = 1,
    precision: str = "float32",
) -> NDArray[np.float64]:
    """Seconds of the block-sparse layer for each density; never less for a higher one.

    ``precision``: one of `config.PRECISIONS`; the machine computes those that it does not have in float32.
    """
    precision = precision if precision in machine.precisions else "float32"
    share = machine.precisions.get(precision, 1.0)
    shares = dict.fromkeys((*KINDS, "weights", "cold", "winograd", "transformed"), share)
    coefficients = {name: c * shares.get(name, 1.0) for name, c in machine.sparse.items()}
    found = []
    for algorithm in algorithms(shape, precision):
        work = sparse_work(shape, density, block_size, machine.lanes, algorithm, precision)
        found.append(work @ _on_threads(machine, coefficients, SPARSE_WORK, threads))
    return 1e-9 * np.min(found, axis=0)


def predict_dense(shape: LayerShape, machine: Machine, threads: int = 1) -> float:
    """Seconds of the dense layer in onnxruntime, between layers of its own layout."""
    return 1e-9 * float(dense_work(shape, machine.lanes) @ _on_threads(machine, machine.dense, DENSE_WORK, threads))


def predict_reorder(values: int, machine: Machine, threads: int = 1) -> float:
    """Seconds of a change between onnxruntime's own layout and the one of the model, of so many values."""
    call, each = machine.reorder
    return 1e-9 * (call + each * values * _divided(machine.serial[0], threads))


def layout_channels(lanes: int) -> int:
    """How many channels lie side by side in onnxruntime's own layout."""
    return min(lanes, _LAYOUT_CHANNELS)


def _on_threads(
    machine: Machine, coefficients: Mapping[str, float], names: Sequence[str], threads: int
) -> NDArray[np.float64]:
    values = np.array([coefficients[name] for name in names])
    side = 0 if names is DENSE_WORK else 1
    if threads > 1:
        values[1:] *= _divided(machine.serial[side], threads)
        values[0] += machine.fork[side]
    return values


def _divided(serial: float, threads: int) -> float:
    return serial + (1 - serial) / threads


def fit(work: NDArray[np.float64], seconds: NDArray[np.float64], prior: Sequence[float]) -> NDArray[np.float64]:
    """Coefficients >= 0 [w] with the least squares of relative errors, for ``work`` [layers, w] that took ``seconds``.

    ``prior``: what a coefficient is where the layers do not tell (it counts as a hundredth of a layer).
    """
    from scipy.optimize import nnls

    scale = np.asarray(prior, np.float64)
    matrix = 1e-9 * work / seconds[:, None] * scale
    damping = 0.1 * np.eye(len(scale))
    found, _ = nnls(np.vstack([matrix, damping]), np.concatenate([np.ones(len(work)), np.diag(damping)]))
    return found * scale


def _fill(n: int, size: int) -> int:
    return -(-n // size) * size


def _row_groups(rows: int) -> int:
    """What the rows of a block cost, in rows of a full group: groups of 8, 4, 2 and 1."""
    total = 0
    while rows > 0:
        group = _ROWS
        while group > 1 and group // 2 >= rows:
            group //= 2
        total += max(group, _FEWEST_ROWS)
        rows -= group
    return total


def _whole_vectors(pixels: int, lanes: int) -> int:
    """Pixels that are computed for a map of ``pixels``."""
    tail = pixels % lanes
    return pixels if tail <= _TAIL_PIXELS else pixels - tail + lanes
