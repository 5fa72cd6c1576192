"""A model with what our graphs cannot hold or look into written out: sparse weights, functions with layers in them.

onnx-graphsurgeon knows neither sparse initializers nor overloads of functions, and layers inside a function are
computed with each caller's weights: only inlined can they be pruned. Nodes in any order, as onnxruntime runs them (its
converter to float16 writes such models), are put into the order that ONNX asks for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import inliner, numpy_helper

from tetris_onnx.graph.layers import DOMAIN, MULTIPLIERS
from tetris_onnx.graph.tensors import all_graphs, bodies_of


def plain_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model (itself, where there is nothing to do), sorted, its sparse initializers dense, functions inlined.

    Functions without a layer, and those that define our own operators, stay functions.
    """
    model = sorted_form(model)
    inlined = _functions_to_inline(model)
    if inlined:
        model = inliner.inline_selected_functions(model, sorted(inlined))
    if any(graph.sparse_initializer for graph in all_graphs(model.graph)):
        dense = onnx.ModelProto()
        dense.CopyFrom(model)
        for graph in all_graphs(dense.graph):
            graph.initializer.extend(
                numpy_helper.from_array(_dense(t), t.values.name) for t in graph.sparse_initializer
            )
            del graph.sparse_initializer[:]
        model = dense
    return model


def sorted_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model (itself, where there is nothing to do) with every node behind those that it reads from.

    Nodes keep their order as far as that allows; those on a cycle, which no runtime takes, are left to the checker.
    """
    orders = [_sorted_order(graph) for graph in all_graphs(model.graph)]
    if all(order == list(range(len(order))) for order in orders):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for graph, order in reversed(list(zip(all_graphs(result.graph), orders, strict=True))):  # bodies first
        nodes = list(graph.node)
        graph.ClearField("node")
        graph.node.extend(nodes[i] for i in order)
    return result


def _sorted_order(graph: onnx.GraphProto) -> list[int]:
    """The nodes of a graph in the first order, by their numbers, in which each follows those that it reads from."""
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    readers: list[list[int]] = [[] for _ in graph.node]
    missing = []
    for i, node in enumerate(graph.node):
        # (what a body reads of the graph around it, the node reads)
        names = {name for inner in _nodes([node]) for name in inner.input}
        before = {producer[name] for name in names if name in producer}
        missing.append(len(before))
        for j in before:
            readers[j].append(i)
    ready = [i for i, count in enumerate(missing) if not count]
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for i in readers[order[-1]]:
            missing[i] -= 1
            if not missing[i]:
                heapq.heappush(ready, i)
    return order if len(order) == len(missing) else list(range(len(missing)))


def _functions_to_inline(model: onnx.ModelProto) -> set[tuple[str, str]]:
    """(domain, name) of the functions that have a layer, call such a function, or have overloads."""
    bodies = {(f.domain, f.name): f for f in model.functions if f.domain != DOMAIN}
    found = {key for key, function in bodies.items() if getattr(function, "overload", "")}
    while True:
        more = {
            key
            for key, function in bodies.items()
            if any(_is_layer(n) or (n.domain, n.op_type) in found for n in _nodes(function.node))
        }
        if more <= found:
            return found
        found |= more


def _is_layer(node: onnx.NodeProto) -> bool:
    return node.op_type in MULTIPLIERS and node.domain in ("", "ai.onnx")


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for graph in bodies_of(node):
            yield from _nodes(graph.node)


def _dense(tensor: onnx.SparseTensorProto) -> NDArray:
    """The values of a sparse tensor; its indices are flat or one row per value."""
    values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    dense = np.zeros(tuple(tensor.dims), values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return dense
