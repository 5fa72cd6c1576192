"""Edits that several passes make. All names are built on the name of a layer or node, so that dumps can be read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from tetris_onnx.algorithms.permutation import is_identity
from tetris_onnx.graph.layers import Layer
from tetris_onnx.graph.tensors import Deferred, values_of


def add_gather(
    graph: gs.Graph, data: gs.Tensor, perm: NDArray[np.int64], axis: int, name: str, output: gs.Variable | None = None
) -> gs.Tensor:
    """``data`` with ``axis`` in the order ``perm``; ``data`` itself if that is its own and no ``output`` is given."""
    if is_identity(perm) and output is None:
        return data
    if output is None:
        output = gs.Variable(f"{name}/gathered", data.dtype, data.shape)
    indices = gs.Constant(f"{name}/order", np.ascontiguousarray(perm, np.int64))
    graph.nodes.append(gs.Node("Gather", f"{name}/Gather", {"axis": axis}, [data, indices], [output]))
    return output


def set_constant(node: gs.Node, slot: int, values: NDArray | Deferred, name: str) -> None:
    """Give an input of one node new values. Other users of the old constant keep it."""
    constant = gs.Constant(name, values if isinstance(values, Deferred) else np.ascontiguousarray(values))
    if slot < len(node.inputs):
        node.inputs[slot] = constant
    else:
        node.inputs.extend(gs.Variable.empty() for _ in range(slot - len(node.inputs)))
        node.inputs.append(constant)


def change_weight(layer: Layer, change: Callable[[NDArray], NDArray], name: str) -> None:
    """Let the weight [out, in, *kernel] of a dense layer be ``change`` of what it is, of the same shape and type.

    Where it is in a file, it is computed when it is asked for.
    """
    constant, transposed = layer.node.inputs[1], layer.stored_transposed

    def compute() -> NDArray:
        weight = values_of(constant)
        changed = change(weight.T if transposed else weight)
        return np.ascontiguousarray(changed.T if transposed else changed)

    deferred = isinstance(constant._values, Deferred)
    set_constant(layer.node, 1, Deferred(constant.shape, constant.dtype, compute) if deferred else compute(), name)


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every node that reads ``old`` read ``new``. (A graph output keeps its producer: see the callers.)"""
    for node in list(old.outputs):
        for slot, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[slot] = new


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is an output of the model."""
    return any(tensor is output for output in graph.outputs)


def only_consumer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The one node of the main graph that reads ``tensor``; None where there are others or it is a model output."""
    if len(tensor.outputs) != 1 or is_output(graph, tensor):
        return None
    node = tensor.outputs[0]
    return node if any(node is other for other in graph.nodes) else None


def reads_alone(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether ``node`` is the one reader of ``tensor``, so that nobody else sees it change."""
    return only_consumer(graph, tensor) is node


def remove_node(graph: gs.Graph, node: gs.Node) -> None:
    """Take a node out, with its inputs and outputs."""
    node.inputs.clear()
    node.outputs.clear()
    graph.nodes = [n for n in graph.nodes if n is not node]
