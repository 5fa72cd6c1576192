"""Throughput under load: a dense model against its block-sparse form, served in the same ways.

    python custom_ops/bench/concurrency.py resnet50.onnx resnet50_bs.onnx

Each line is one way of serving, in a process of its own: so many callers that run the model again and again without a
pause, on one session or each on its own, each session with so many threads of its own or all with one pool. The two
models take turns. The first two lines are without load: one caller, with one thread and with all; in the others, the
speed-up should not be much below theirs. -o adds the lines to a table (.csv), in place of those of the same model.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from result_table import add_to_table  # beside this file
from tetris_onnx.data.calibration import runnable_samples, session_inputs
from tetris_onnx.runtime import InferenceSession
from tetris_onnx.timing.bench import cpu_name
from tetris_onnx.timing.profiling import wait_until_idle

TOLERANCE = 1e-4  # of the largest output: runs of one model on one input, however served


@dataclass(frozen=True)
class Service:
    """One way of serving."""

    callers: int
    sessions: int  # 1: of all callers; else one for each
    threads: int  # of each session, or of the pool of all
    pool: bool = False  # onnxruntime's global one

    def __str__(self) -> str:
        callers = f"{self.callers} caller{'s' * (self.callers > 1)}"
        sessions = "one session" if self.sessions == 1 else "a session each"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{callers}, {sessions}, {threads}{' for all' if self.pool else ''}"


def services(cores: int) -> list[Service]:
    """No load, as much as the cores can take, and more."""
    found = [Service(1, 1, 1), Service(1, 1, cores)]
    loads = ((cores, 1, False), (2 * cores, 1, False), (cores, cores, False), (cores, cores, True))
    for callers, threads, pool in loads:
        found += [Service(callers, 1, threads, pool), Service(callers, callers, threads, pool)]
    return list(dict.fromkeys(found))


class Server:
    """The sessions of one model."""

    def __init__(self, model: Path, service: Service, batch: int) -> None:
        self.service = service
        self.sessions = [self._session(model) for _ in range(service.sessions)]
        inputs = session_inputs(self.sessions[0])
        self.feed = runnable_samples(lambda feed: self.sessions[0].run(None, feed), inputs, batch)
        self.expected = next(iter([self.run(caller) for caller in range(service.sessions)]))

    def _session(self, model: Path) -> Any:
        options = onnxruntime.SessionOptions()
        if self.service.pool:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = self.service.threads
        return InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, caller: int) -> NDArray[np.float32]:
        """One request; the first output."""
        session = self.sessions[caller % len(self.sessions)]
        y: NDArray[np.float32] = session.run(None, self.feed)[0]
        return y

    def throughput(self, seconds: float) -> float:
        """Runs per second of all callers together."""
        rates = [0.0] * self.service.callers
        start = threading.Barrier(self.service.callers)

        def call(caller: int) -> None:
            start.wait()
            begin, count = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - begin) < seconds:
                y = self.run(caller)
                count += 1
            # A run that has begun in time counts with the time that it took.
            elapsed = time.perf_counter() - begin
            error = np.abs(y - self.expected).max() / np.abs(self.expected).max()
            rates[caller] = count / elapsed if error <= TOLERANCE else float("nan")

        callers = [threading.Thread(target=call, args=(caller,)) for caller in range(self.service.callers)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        return sum(rates)


def measure(service: Service, models: Sequence[Path], batch: int, rounds: int, seconds: float) -> list[float]:
    """Runs per second of each model, medians over rounds of turns."""
    if service.pool:
        onnxruntime.set_global_thread_pool_sizes(service.threads, 1)
    servers = [Server(model, service, batch) for model in models]
    rates: list[list[float]] = [[] for _ in servers]
    for _, (server, found) in itertools.product(range(rounds), zip(servers, rates, strict=True)):
        wait_until_idle()
        found.append(server.throughput(seconds))
    return [statistics.median(found) for found in rates]


COLUMNS = ("network", "service", "dense_per_second", "sparse_per_second", "speedup")


def main() -> None:
    """Print a line for each way of serving."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="threads of all callers together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each model's turn")
    parser.add_argument("-o", "--output", type=Path, help="add the lines to this table (.csv)")
    arguments = parser.parse_args()
    for model in (arguments.dense, arguments.sparse):
        if not model.is_file():
            parser.error(f"{model}: no such file")
    print(f"runs per second, batch {arguments.batch}; onnxruntime {onnxruntime.__version__}, {cpu_name()}")
    print(f"{'':<46} {'dense':>8} {'sparse':>8} speed-up")
    rows: list[dict[str, str]] = []
    for service in services(arguments.cores):
        # A process of its own: the global pool is made once in a process.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            models = [arguments.dense, arguments.sparse]
            work = process.submit(measure, service, models, arguments.batch, arguments.rounds, arguments.seconds)
            dense, sparse = work.result()
        if np.isnan(dense + sparse):
            raise SystemExit(f"{service}: wrong outputs")
        print(f"{service!s:<46} {dense:>8.1f} {sparse:>8.1f} {sparse / dense:>7.2f}x", flush=True)
        values = (arguments.sparse.stem, str(service), f"{dense:.1f}", f"{sparse:.1f}", f"{sparse / dense:.3f}")
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    if arguments.output is not None:
        add_to_table(arguments.output, COLUMNS, 1, rows)


if __name__ == "__main__":
    main()
