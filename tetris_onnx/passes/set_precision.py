"""Let our operators compute their products in another precision; everything between them stays float32.

It comes last, when the float32 result has been verified: that check is strict, while rounding hides small mistakes.
Layers that are kept whole stay float32, as they would be without our operator.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from tetris_onnx.graph.layers import DOMAIN, OUR_OPS
from tetris_onnx.passes.lower_block_sparse import is_whole

# What the option says -> what the operators' attribute says.
PRECISION_ATTRIBUTES = {"float32": "float32", "bf16": "bfloat16", "int8": "int8"}


def set_precision(
    graph: gs.Graph, precision: str, input_ranges: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Apply the pass: ``precision`` is a key of `PRECISION_ATTRIBUTES`.

    ``input_ranges``: by the name of a node, what the bytes of its input stand for; without, each run finds it. A
    range that a quantized model brings stays.
    """
    for node in graph.nodes:
        if node.domain == DOMAIN and node.op in OUR_OPS and not is_whole(node):
            node.attrs["precision"] = PRECISION_ATTRIBUTES[precision]
            if input_ranges is not None and node.name in input_ranges and "input_range" not in node.attrs:
                node.attrs["input_range"] = list(input_ranges[node.name])
    for function in graph.functions:
        if function.domain == DOMAIN and function.name in OUR_OPS:
            # Names that its nodes have, and that its body has no use for.
            function.attrs["precision"] = None
            if input_ranges is not None:
                function.attrs["input_range"] = None
