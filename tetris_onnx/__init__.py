"""Block-sparse ONNX models that are fast: TETRIS reordering, block pruning, and the operators that run the result.

A whole run::

    result = tetris_onnx.optimize("model.onnx", tetris_onnx.Config(sparsity=0.5))
    tetris_onnx.save(result.model, "model_bs.onnx")
    session = tetris_onnx.InferenceSession("model_bs.onnx")

`inspect` lists the layers of a model, `compare` says how far two models are apart, `bench` how fast they are. Samples
are files, folders of images, or arrays by the name of the model's input. What cannot be done is a `TetrisError`, whose
message is one line that says why.
"""

from tetris_onnx.accuracy.compare import compare
from tetris_onnx.config import Config, LayerRule, load_config
from tetris_onnx.data.calibration import Data
from tetris_onnx.data.image_options import ImageOptions
from tetris_onnx.errors import TetrisError
from tetris_onnx.graph.io import save
from tetris_onnx.optimize import Result, optimize
from tetris_onnx.plan import LayerPlan, Plan
from tetris_onnx.planner import inspect
from tetris_onnx.runtime import InferenceSession, get_library_path, register
from tetris_onnx.timing.bench import bench

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Data",
    "ImageOptions",
    "InferenceSession",
    "LayerPlan",
    "LayerRule",
    "Plan",
    "Result",
    "TetrisError",
    "bench",
    "compare",
    "get_library_path",
    "inspect",
    "load_config",
    "optimize",
    "register",
    "save",
]
