"""The ops under load: many sessions, one session in many threads, fewer threads than cores; values as without."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.custom_ops import models

CALLERS = 4
RUNS = 12
# (weight shape, attributes, input sizes): in place, from panels made by all threads together, strided, a product. More
# sizes than a kernel keeps plans for, and batches that divide the work differently.
SAME = {"pads": [1, 1, 1, 1]}
CASES: tuple[tuple[tuple[int, ...], dict[str, list[int]], list[tuple[int, ...]]], ...] = (
    ((20, 12, 3, 3), SAME, [(1 + n % 3, 12, 5 + n, 17 - n) for n in range(11)]),
    ((20, 12, 3, 3), {"strides": [2, 2], **SAME}, [(1, 12, 9, 9), (3, 12, 30, 8)]),
    ((20, 12, 1, 1), {}, [(1, 12, 7, 7), (2, 12, 19, 5)]),
    ((30, 50), {}, [(1, 50), (9, 50), (40, 50)]),
)


class Load:
    """Models with inputs and what the oracle makes of them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.models = []
        self.pairs: list[list[tuple[models.Array, models.Array]]] = []
        for weight_shape, attributes, sizes in CASES:
            op = models.random_op(rng, weight_shape, (8, 8), **attributes)
            self.models.append(models.make_model(op, ["n", *[None] * (len(sizes[0]) - 1)]).SerializeToString())
            inputs = [rng.standard_normal(size).astype(np.float32) for size in sizes]
            self.pairs.append([(x, op.expected(x)) for x in inputs])

    def sessions(self, options: Callable[[], onnxruntime.SessionOptions]) -> list[onnxruntime.InferenceSession]:
        """A session of each model."""
        return [models.runtime.InferenceSession(model, options(), ["CPUExecutionProvider"]) for model in self.models]

    def check(self, case: int, number: int, y: models.Array) -> None:
        """Whether y is the answer to the case's input of this number (counted around)."""
        _, expected = self.pairs[case][number % len(self.pairs[case])]
        # float32 sums of some hundred products, in any order.
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)

    def call(self, session: onnxruntime.InferenceSession, case: int, number: int) -> None:
        x, _ = self.pairs[case][number % len(self.pairs[case])]
        self.check(case, number, session.run(None, {"x": x})[0])


def at_once(work: Sequence[Callable[[], None]]) -> None:
    """Run functions in threads that start together; raises what the first of them raised."""
    start = threading.Barrier(len(work))
    failures: list[BaseException] = []
    finished: list[int] = []

    def call(number: int) -> None:
        start.wait()
        try:
            work[number]()
            finished.append(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a run does not end"
    if failures:
        raise failures[0]
    assert sorted(finished) == list(range(len(work)))


def options(threads: int) -> Callable[[], onnxruntime.SessionOptions]:
    def make() -> onnxruntime.SessionOptions:
        made = onnxruntime.SessionOptions()
        made.intra_op_num_threads = threads
        return made

    return make


def serve(load: Load, make_options: Callable[[], onnxruntime.SessionOptions], own_sessions: bool) -> None:
    """Callers that run all models over and over, each in another order, on common sessions or their own."""
    shared = load.sessions(make_options)

    def caller(number: int) -> Callable[[], None]:
        sessions = load.sessions(make_options) if own_sessions else shared

        def call() -> None:
            for run in range(RUNS):
                for step in range(len(sessions)):
                    case = (number + step) % len(sessions)
                    load.call(sessions[case], case, number + run)

        return call

    at_once([caller(number) for number in range(CALLERS)])


@pytest.fixture
def load(rng: np.random.Generator) -> Load:
    return Load(rng)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("own_sessions", [False, True], ids=["one-session", "own-sessions"])
def test_callers_at_once(load: Load, threads: int, own_sessions: bool) -> None:
    serve(load, options(threads), own_sessions)


@pytest.mark.parametrize("own_sessions", [False, True], ids=["one-session", "own-sessions"])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_pool_for_all_sessions(threads: int, own_sessions: bool) -> None:
    # onnxruntime makes its global pool once in a process, before the first session.
    script = f"""
import numpy, onnxruntime
from tests.custom_ops import test_concurrency as t
onnxruntime.set_global_thread_pool_sizes({threads}, 1)
def options():
    made = onnxruntime.SessionOptions()
    made.use_per_session_threads = False
    return made
t.serve(t.Load(numpy.random.default_rng(1)), options, {own_sessions})
print("served")
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "served\n"


def test_sessions_come_and_go_while_others_run(load: Load) -> None:
    lasting = load.sessions(options(2))

    def run() -> None:
        for number in range(2 * RUNS):
            for case, session in enumerate(lasting):
                load.call(session, case, number)

    def renew() -> None:
        for number in range(10):
            for case, session in enumerate(load.sessions(options(1 + number % 2))):
                load.call(session, case, number)

    at_once([run, renew, run, renew])


def test_many_requests_wait_in_one_session(load: Load) -> None:
    """run_async: the runs themselves are work of the session's pool, which their ops divide their work on."""
    requests = 40
    for case, session in enumerate(load.sessions(options(3))):
        received: queue.SimpleQueue[tuple[models.Array, int, str]] = queue.SimpleQueue()

        def receive(results: Sequence[models.Array], number: int, error: str, to: Any = received) -> None:
            to.put((results[0] if results else None, number, error))

        for number in range(requests):
            session.run_async(None, {"x": load.pairs[case][number % len(load.pairs[case])][0]}, receive, number)
        answers = [received.get(timeout=120) for _ in range(requests)]
        assert sorted(number for _, number, _ in answers) == list(range(requests))
        for y, number, error in answers:
            assert not error
            load.check(case, number, y)
