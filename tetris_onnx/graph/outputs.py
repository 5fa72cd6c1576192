"""What a model gives: other values than its outputs, and those that a squashing function hides differences in."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

_SQUASHING = frozenset(("HardSigmoid", "LogSoftmax", "Sigmoid", "Softmax", "Tanh"))
_RESHAPING = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_MAX_TAIL = 8


def with_outputs(model: onnx.ModelProto, values: Iterable[str]) -> onnx.ModelProto:
    """A copy of the model that gives ``values`` in the place of its outputs; their types are left to who runs it."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    del other.graph.output[:]
    other.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values)
    return other


def before_squashing(model: onnx.ModelProto) -> dict[str, list[str]]:
    """By each output's name, the values in front of the squashing functions that it ends in, the last one first.

    Reshaping operators between them are passed over. An empty list for an output that ends in none.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, list[str]] = {}
    for output in model.graph.output:
        values = found.setdefault(output.name, [])
        node = producers.get(output.name)
        for _ in range(_MAX_TAIL):
            if node is None or not node.input:
                break
            squashing = node.op_type in _SQUASHING
            if squashing:
                values.append(node.input[0])
            node = producers.get(node.input[0]) if squashing or node.op_type in _RESHAPING else None
    return found
