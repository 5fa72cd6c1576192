"""Block-sparse ONNX models that are fast: TETRIS reordering, block pruning, and the operators that run the result.

A whole run::

    result = tetris_onnx.optimize("model.onnx", tetris_onnx.Config(sparsity=0.5))
    tetris_onnx.save(result.model, "model_bs.onnx")
    session = tetris_onnx.InferenceSession("model_bs.onnx")

What cannot be done is a `TetrisError`, whose message is one line that says why.
"""

from tetris_onnx.config import Config, LayerRule, load_config
from tetris_onnx.errors import TetrisError
from tetris_onnx.graph.io import save
from tetris_onnx.optimize import Result, optimize
from tetris_onnx.plan import LayerPlan, Plan
from tetris_onnx.runtime import InferenceSession, get_library_path, register

__version__ = "0.1.0"
__all__ = [
    "Config",
    "InferenceSession",
    "LayerPlan",
    "LayerRule",
    "Plan",
    "Result",
    "TetrisError",
    "get_library_path",
    "load_config",
    "optimize",
    "register",
    "save",
]
