"""Work in threads."""

from __future__ import annotations

import time

import pytest

from tetris_onnx.algorithms.threads import once, run_threads


def test_results_are_in_the_order_of_the_tasks() -> None:
    def slow_first(n: int) -> int:
        time.sleep(0.02 if n == 0 else 0)
        return n

    assert run_threads(slow_first, [(n,) for n in range(5)], workers=2) == list(range(5))


def test_what_several_threads_need_is_made_once() -> None:
    calls = []

    def make() -> list[int]:
        time.sleep(0.02)
        calls.append(1)
        return calls

    get = once(make)
    assert calls == []
    results = run_threads(get, [()] * 8, workers=4)
    assert calls == [1] and all(result is calls for result in results)


def test_an_error_reaches_all_of_them() -> None:
    def fail() -> None:
        raise ValueError("no factor")

    get = once(fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="no factor"):
            get()
