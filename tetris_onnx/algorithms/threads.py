"""Independent numpy work side by side: one thread per core, one BLAS thread in each.

BLAS's own threads wait for each other at every call, which makes them many times slower than one thread as soon as
another process wants a core. Threads with work of their own do not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

from joblib import cpu_count
from threadpoolctl import threadpool_limits

Result = TypeVar("Result")


def run_threads(function: Callable[..., Result], tasks: Iterable[tuple], workers: int | None = None) -> list[Result]:
    """``[function(*task) for task in tasks]`` in ``workers`` threads (one per core by default)."""
    # Not joblib: it looks for results every 10 ms, which is most of the time that a small layer takes.
    with threadpool_limits(1), ThreadPoolExecutor(workers or cpu_count()) as pool:
        return list(pool.map(lambda task: function(*task), tasks))


def once(function: Callable[[], Result]) -> Callable[[], Result]:
    """``function`` for several threads: the first one calls it, the others wait for its result."""
    lock = Lock()
    found: list[Result] = []

    def get() -> Result:
        with lock:
            if not found:
                found.append(function())
        return found[0]

    return get
