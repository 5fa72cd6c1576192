"""What holds for every test: predicted times are those of a made-up machine, not of the one that runs the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tetris_onnx.timing.cost import AVX512
from tetris_onnx.timing.machine import save_machine


@pytest.fixture(autouse=True, scope="session")
def made_up_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own, with a machine on which every block-sparse layer gains, however small.

    In the environment, so that it also holds for the programs that tests start.
    """
    folder = tmp_path_factory.mktemp("cache")
    sparse = {name: c / 10 for name, c in AVX512.sparse.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        save_machine(replace(AVX512, sparse=sparse))
        yield folder
