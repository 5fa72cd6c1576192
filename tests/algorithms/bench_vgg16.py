"""How long the search takes on a full-size VGG16: ``python -m tests.algorithms.bench_vgg16``.

All 16 weight layers (138 M weights, the 25088 x 4096 one included) in blocks of 32 x 32 at the rates of Deep
Compression, two worker processes of one BLAS thread each. The weights are random with the structure that matters to
reordering: normal, times a log-normal scale per output and per input channel. Where the machine has other work to do,
read the CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

# name, (out, in), taps, sparsity
LAYERS = [
    ("conv1_1", (64, 3), 9, 0.42),
    ("conv1_2", (64, 64), 9, 0.78),
    ("conv2_1", (128, 64), 9, 0.66),
    ("conv2_2", (128, 128), 9, 0.64),
    ("conv3_1", (256, 128), 9, 0.47),
    ("conv3_2", (256, 256), 9, 0.76),
    ("conv3_3", (256, 256), 9, 0.58),
    ("conv4_1", (512, 256), 9, 0.68),
    ("conv4_2", (512, 512), 9, 0.78),
    ("conv4_3", (512, 512), 9, 0.66),
    ("conv5_1", (512, 512), 9, 0.65),
    ("conv5_2", (512, 512), 9, 0.71),
    ("conv5_3", (512, 512), 9, 0.64),
    ("fc6", (4096, 25088), 1, 0.96),
    ("fc7", (4096, 4096), 1, 0.96),
    ("fc8", (1000, 4096), 1, 0.77),
]

Task = tuple[str, tuple[int, int], int, float, str, float]  # a layer, the method, the spread of the channel scales
# shares retained without and with reordering, winning start, its iterations, seconds, CPU seconds, peak GiB
Outcome = tuple[float, float, str, int, float, float, float]


def search(
    task: tuple[str, tuple[int, int], int, float, str, float],
) -> tuple[float, float, str, int, float, float, float]:
    """Reorder one layer of random weights."""
    # Imported here: the environment that limits BLAS to one thread must be set before numpy is loaded.
    import numpy as np

    from tetris_onnx.algorithms.blocks import fit_block_size
    from tetris_onnx.algorithms.importance import importance
    from tetris_onnx.algorithms.reorder import BlockPruner, reorder

    name, (m, c), taps, sparsity, method, spread = task
    rng = np.random.default_rng(sum(map(ord, name)))
    weight = rng.standard_normal((m, c, taps), dtype=np.float32)
    weight *= np.exp(spread * rng.standard_normal((m, 1, 1), dtype=np.float32))
    weight *= np.exp(spread * rng.standard_normal((1, c, 1), dtype=np.float32))
    started, cpu_started = time.perf_counter(), time.process_time()
    scores = importance(weight)
    pruner = BlockPruner(fit_block_size((m, c), (32, 32)), sparsity)
    result = reorder(scores, pruner, method=method)  # type: ignore[arg-type]
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result.baseline, result.retained, result.start, result.iterations, seconds, cpu, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="exact", choices=("exact", "greedy", "none"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--spread", type=float, default=0.5, help="sigma of the log-normal channel scales")
    arguments = parser.parse_args()
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    tasks = [(*layer, arguments.method, arguments.spread) for layer in LAYERS]
    tasks.sort(key=lambda task: -task[1][0] * task[1][1])  # the largest first: it decides when the last one ends
    started = time.perf_counter()
    print("layer           shape sparsity    none reordered     start iterations  seconds      CPU")
    peaks = []
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for task, row in zip(tasks, pool.map(search, tasks), strict=True):
            baseline, retained, start, iterations, seconds, cpu, peak = row
            peaks.append(peak)
            name, shape, _, sparsity = task[:4]
            size = f"{shape[0]}x{shape[1]}"
            shares = f"{sparsity:8.2f} {baseline:7.4f} {retained:9.4f}"
            print(f"{name:8} {size:>12} {shares} {start:>9} {iterations:10d} {seconds:8.2f} {cpu:8.2f}", flush=True)
    print(f"all layers: {time.perf_counter() - started:.1f} s, largest worker {max(peaks):.1f} GiB")


if __name__ == "__main__":
    main()
