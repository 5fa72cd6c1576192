"""The CUDA ops on a stand-in for the driver: see stand_in.py."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.custom_ops.cuda import stand_in


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if sys.platform != "linux":
        pytest.skip("the CUDA kernels are for Linux")
    return stand_in.compile_libraries(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def process_driver(compiled: tuple[Path, Path]) -> stand_in.StandIn:
    return stand_in.StandIn(compiled[1])


@pytest.fixture(scope="session", params=["numpy", "triton"])
def execute(request: pytest.FixtureRequest) -> Callable[[stand_in.Launch], None]:
    """What runs the kernels: a model of them in numpy, or they themselves in Triton's interpreter."""
    if request.param == "numpy":
        return stand_in.run_numpy
    # Not imported before interpreter.py has asked for the interpreter.
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the kernels run in Triton's interpreter: Triton is not installed")
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton 3.6's interpreter needs numpy older than 2.4")
    from tests.custom_ops.cuda import interpreter

    return interpreter.run


@pytest.fixture
def driver(process_driver: stand_in.StandIn) -> Iterator[stand_in.StandIn]:
    process_driver.reset()
    process_driver.execute = stand_in.run_numpy
    yield process_driver
    assert process_driver.broken_guards == 0
    assert process_driver.context_depth == 0


@pytest.fixture
def library(compiled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own of the op library: one that has not looked at the GPU yet."""
    copy = tmp_path / compiled[0].name
    shutil.copy(compiled[0], copy)
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", str(copy))
    return copy


@pytest.fixture
def shared_library(compiled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TETRIS_ONNX_LIBRARY", str(compiled[0]))
    return compiled[0]
