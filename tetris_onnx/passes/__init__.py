"""Graph passes. Each file is one pass, named like its function; `run_passes` applies them to copies of a graph."""

from tetris_onnx.passes.absorb_gathers import absorb_gathers
from tetris_onnx.passes.attach_fallback import attach_fallback
from tetris_onnx.passes.channels_last import channels_last
from tetris_onnx.passes.fold_gathers import fold_gathers
from tetris_onnx.passes.fuse_add_and_pool import fuse_add_and_pool
from tetris_onnx.passes.fuse_batchnorm import fuse_batchnorm
from tetris_onnx.passes.fuse_epilogue import fuse_epilogue
from tetris_onnx.passes.group_channels import group_channels
from tetris_onnx.passes.join_quantized import join_quantized
from tetris_onnx.passes.lower_block_sparse import lower_block_sparse
from tetris_onnx.passes.normalize_layers import normalize_layers
from tetris_onnx.passes.open_layers import open_layers
from tetris_onnx.passes.pipeline import Pass, PassError, run_passes
from tetris_onnx.passes.prune_blocks import prune_blocks
from tetris_onnx.passes.reorder_weights import reorder_weights
from tetris_onnx.passes.set_precision import set_precision
from tetris_onnx.passes.set_weights import NewWeights, set_weights

__all__ = [
    "NewWeights",
    "Pass",
    "PassError",
    "absorb_gathers",
    "attach_fallback",
    "channels_last",
    "fold_gathers",
    "fuse_add_and_pool",
    "fuse_batchnorm",
    "fuse_epilogue",
    "group_channels",
    "join_quantized",
    "lower_block_sparse",
    "normalize_layers",
    "open_layers",
    "prune_blocks",
    "reorder_weights",
    "run_passes",
    "set_precision",
    "set_weights",
]
