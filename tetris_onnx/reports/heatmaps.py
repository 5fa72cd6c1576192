"""The pictures of every layer that a report shows: its weight before, reordered and pruned."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from tetris_onnx.algorithms.heatmap import Heatmap, heatmap
from tetris_onnx.algorithms.importance import importance
from tetris_onnx.graph.layers import find_layers
from tetris_onnx.passes import NewWeights
from tetris_onnx.plan import Plan

# Pixels of all pictures together: what keeps a page, at a byte a pixel and a third more for its encoding, below 5 MB.
_PIXELS = 2_500_000
_LIMITS = 32, 160  # of the side of a picture


def weight_maps(graph: gs.Graph, plan: Plan, weights: Mapping[str, NewWeights]) -> dict[str, Heatmap]:
    """The pictures by layer name, for the layers of a prepared graph that can be pruned and those of ``plan``.

    ``weights``: refitted ones by layer name.
    """
    layers = [layer for layer in find_layers(graph) if not layer.why_dense or plan.get(layer.name)]
    pictures = sum(3 if plan.get(layer.name) else 1 for layer in layers)
    limit = min(max(int((_PIXELS / max(pictures, 1)) ** 0.5), _LIMITS[0]), _LIMITS[1])
    maps = {}
    for layer in layers:
        try:
            scores = importance(layer.weight)
        except ValueError:  # NaN: there is nothing to see
            continue
        found = plan.get(layer.name)
        if found is None:
            maps[layer.name] = heatmap(scores, limit)
            continue
        new = weights.get(layer.name)
        refitted = None if new is None else importance(new.weight)
        perms = found.out_perm, found.in_perm
        maps[layer.name] = heatmap(scores, limit, perms, found.keep, found.block_size, refitted)
    return maps
