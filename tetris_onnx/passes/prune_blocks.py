"""Set the blocks that a plan drops to zero, in the layers' own channel order.

The result is the dense model that every later pass has to reproduce.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.algorithms.blocks import original_mask
from tetris_onnx.graph.layers import find_layers
from tetris_onnx.passes.surgery import change_weight
from tetris_onnx.plan import LayerPlan, Plan


def prune_blocks(graph: gs.Graph, plan: Plan) -> None:
    """Apply the pass. Layers that share a weight get their own where their plans differ."""
    # (plan, original, pruned) by the original and its form; holding the original keeps its id from being used again.
    pruned: dict[tuple[int, bool], list[tuple[LayerPlan, gs.Constant, gs.Constant]]] = {}
    for layer in find_layers(graph):
        decision = plan.get(layer.name)
        if decision is None:
            continue
        original = layer.node.inputs[1]
        made = pruned.setdefault((id(original), layer.stored_transposed), [])
        shared = next((c for p, _, c in made if _same(p, decision)), None)
        if shared is None:
            change_weight(layer, partial(_masked, decision), f"{layer.name}/weight")
            made.append((decision, original, layer.node.inputs[1]))
        else:
            layer.node.inputs[1] = shared


def weight_mask(plan: LayerPlan) -> np.ndarray:
    """Which weights [out, in] survive, in the layer's own channel order."""
    return original_mask(plan.keep, plan.block_size, plan.out_perm, plan.in_perm)


def _masked(plan: LayerPlan, weight: NDArray) -> NDArray:
    keep = weight_mask(plan).reshape(*plan.shape, *[1] * (weight.ndim - 2))
    return np.where(keep, weight, weight.dtype.type(0))


def _same(a: LayerPlan, b: LayerPlan) -> bool:
    return a.block_size == b.block_size and all(
        np.array_equal(getattr(a, f), getattr(b, f)) for f in ("out_perm", "in_perm", "keep")
    )
