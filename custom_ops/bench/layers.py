"""Time single layers: the block-sparse op against onnxruntime's own dense layer, interleaved in one process.

    python custom_ops/bench/layers.py custom_ops/bench/vgg16.txt --density 0.27

Prints, for each layer, the medians of both, the speed-up and `fraction` = speed-up x density: 1 is a time exactly
proportional to the number of kept blocks. Both take NCHW tensors; onnxruntime's time includes the conversion to its own
layout and back, which it would save between two of its own layers. `error` is the largest difference of the outputs
over the largest output: that of `--precision`.

    python custom_ops/bench/layers.py custom_ops/bench/vgg16.txt --algorithm auto --baseline direct

compares two ways to compute the same block-sparse layer: `fraction` is the speed-up then.

    python custom_ops/bench/layers.py --network resnet50.onnx resnet50_bs.onnx --threads 1 -o resnet50.csv

times the layers inside whole networks instead: of the first model, dense, and of each other one, a block-sparse form of
it (timing.bench, from onnxruntime's profile). The dense layer is then the fastest that onnxruntime has, in its own
layout. Rows are added to the table (-o); those of the same models and threads are replaced.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from one_layer import random_layer  # beside this file
from result_table import add_to_table
from shapes import Layer, read_layers
from tetris_onnx import runtime
from tetris_onnx.timing.bench import bench

# Largest difference of the outputs over the largest. Rounding to bfloat16 is off by up to 2^-9 of each factor, to
# bytes by up to 1/510 of the range; over the many products of an output the errors mostly cancel.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2, "int8": 5e-2}


ALGORITHMS = ("auto", "direct", "winograd2", "winograd4")


def timer(model: bytes, x: np.ndarray, threads: int, algorithm: str = "auto") -> tuple[Callable[[], float], np.ndarray]:
    """A function that runs the model once and returns the seconds it took, and the model's output."""
    os.environ["TETRIS_ONNX_CONV"] = algorithm  # read when the session is created
    options = onnxruntime.SessionOptions()
    if threads > 1:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0]
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(y))

    def once() -> float:
        # One thread runs on the caller: its own time does not count what other processes take.
        clock = time.thread_time if threads == 1 else time.perf_counter
        start = clock()
        session.run_with_iobinding(binding)
        return clock() - start

    return once, y


def measure(layer: Layer, arguments: argparse.Namespace) -> tuple[float, float, float, float]:
    """Density of the grid, median seconds of the baseline, median seconds block-sparse, error."""
    rng = np.random.default_rng(0)
    sparse = random_layer(layer, arguments.block_size, arguments.density, rng)
    x = rng.standard_normal((arguments.batch, layer.inputs, *layer.map_size), dtype=np.float32)
    model = sparse.sparse_model(arguments.batch, arguments.precision)
    run_sparse, y_sparse = timer(model, x, arguments.threads, arguments.algorithm)
    if arguments.baseline == "dense":
        run_dense, y_dense = timer(sparse.dense_model(arguments.batch), x, arguments.threads)
    else:
        run_dense, y_dense = timer(model, x, arguments.threads, arguments.baseline)
    error = float(np.abs(y_sparse - y_dense).max() / np.abs(y_dense).max())
    if error > TOLERANCES[arguments.precision]:
        raise SystemExit(f"{layer.name}: the two outputs differ by {error:.1e} of the largest")
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + arguments.seconds
    while len(times[0]) < 7 or time.perf_counter() < end:
        times[0].append(run_dense())
        times[1].append(run_sparse())
    return sparse.density, statistics.median(times[0]), statistics.median(times[1]), error


COLUMNS = ("network", "threads", "layer", "dense_ms", "sparse_ms", "density", "speedup", "fraction")


def measure_network(dense: Path, sparse: Path, arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The layers of two models inside them, and last, as the layer "network", the whole."""
    result = bench(dense, sparse, arguments.threads, "cpu", arguments.batch, seconds=arguments.seconds, per_layer=True)
    whole = tuple(timing.median_ms for timing in result.timings)
    measured = [(layer.name, layer.median_ms, layer.density) for layer in result.layers if layer.kind == "layer"]
    rows = []
    for name, (first, second), density in [*measured, ("network", whole, None)]:
        speedup = first / second if first and second else None
        fraction = speedup * density if speedup and density is not None else None
        values = (first, second, density, speedup, fraction)
        numbers = ["" if value is None else f"{value:.{6 if i < 2 else 4}f}" for i, value in enumerate(values)]
        rows.append(dict(zip(COLUMNS, (sparse.stem, str(arguments.threads), name, *numbers), strict=True)))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", type=Path, nargs="+", help="file of layers, one a line; of --network, the models")
    parser.add_argument("--network", action="store_true", help="time the layers inside whole networks")
    parser.add_argument("-o", "--output", type=Path, help="of --network: add the rows to this table (.csv)")
    parser.add_argument("--density", type=float, default=0.27)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=TOLERANCES, default="float32", help="of the block-sparse op")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="auto", help="of the op's 3x3 convolutions")
    parser.add_argument(
        "--baseline", choices=("dense", *ALGORITHMS), default="dense", help="or the op, with another one"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each layer")
    parser.add_argument("--layers", help="only the layers whose name holds this")
    arguments = parser.parse_args()
    if arguments.network:
        dense, *forms = arguments.shapes
        rows = [row for sparse in forms for row in measure_network(dense, sparse, arguments)]
        for row in rows:
            print(*row.values(), sep=",")
        if arguments.output is not None:
            add_to_table(arguments.output, COLUMNS, 2, rows)
        return
    if len(arguments.shapes) != 1:
        parser.error("one file of layers at a time")
    if arguments.threads > 1:
        # One pool for both sessions: after a run, a session's own threads would go on spinning into the other's time.
        onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)
    print(
        f"{'layer':<14} {arguments.baseline + ' ms':>12} {'GFLOP/s':>8} {'sparse ms':>9} {'density':>8} "
        f"{'speed-up':>8} fraction   error"
    )
    total_dense = total_sparse = total_ideal = 0.0
    for layer in read_layers(arguments.shapes[0]):
        if arguments.layers and arguments.layers not in layer.name:
            continue
        density, dense, sparse, error = measure(layer, arguments)
        ideal = density if arguments.baseline == "dense" else 1.0  # time, relative to the baseline's
        rate = 2e-9 * layer.multiplications() * arguments.batch * density / ideal / dense
        print(
            f"{layer.name:<14} {dense * 1e3:>12.3f} {rate:>8.0f} {sparse * 1e3:>9.3f} {density:>8.3f} "
            f"{dense / sparse:>8.2f} {dense / sparse * ideal:>8.2f} {error:.1e}",
            flush=True,
        )
        total_dense, total_sparse = total_dense + dense, total_sparse + sparse
        total_ideal += dense * ideal
    if total_sparse:
        print(
            f"{'sum':<14} {total_dense * 1e3:>12.3f} {'':>8} {total_sparse * 1e3:>9.3f} {'':>8} "
            f"{total_dense / total_sparse:>8.2f} {total_ideal / total_sparse:>8.2f}"
        )


if __name__ == "__main__":
    main()
