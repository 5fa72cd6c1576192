"""Independent numpy work side by side: one thread per core, one BLAS thread in each.

BLAS's own threads wait for each other at every call, which makes them many times slower than one thread as soon as
another process wants a core. Threads with work of their own do not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from joblib import Parallel, cpu_count, delayed
from threadpoolctl import threadpool_limits

Result = TypeVar("Result")


def run_threads(function: Callable[..., Result], tasks: Iterable[tuple], workers: int | None = None) -> list[Result]:
    """``[function(*task) for task in tasks]`` in ``workers`` threads (one per core by default)."""
    with threadpool_limits(1):
        return list(Parallel(n_jobs=workers or cpu_count(), prefer="threads")(delayed(function)(*t) for t in tasks))
