"""What holds for every test: predicted times are those of a made-up machine, not of the one that runs the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tetris_onnx.cost import AVX512
from tetris_onnx.machine import save_machine


@pytest.fixture(autouse=True, scope="session")
def made_up_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own, with a machine on which a call costs nothing: even small layers gain.

    In the environment, so that it also holds for the programs that tests start.
    """
    folder = tmp_path_factory.mktemp("cache")
    dense, sparse = ({**c, "call": 0.0, "panel": 0.0, "input": 0.0} for c in (AVX512.dense, AVX512.sparse))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        save_machine(replace(AVX512, dense=dense, sparse={**sparse, "output": 0.0}))
        yield folder
