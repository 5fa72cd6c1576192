from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import tetris_onnx.algorithms

MODULES = [module.name for module in pkgutil.iter_modules(tetris_onnx.algorithms.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"tetris_onnx.algorithms.{name}"))
    assert results.failed == 0
    if name == "reorder":
        # the worked example that says why blocks are chosen again after reordering
        assert results.attempted >= 6
