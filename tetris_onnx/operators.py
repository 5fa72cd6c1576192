"""Which operator runs each layer: onnxruntime's dense one, or ours on the kept blocks, or ours on a layer kept whole.

The choice minimizes the predicted time of the network (`cost`): that of the layers, and that of the changes between
onnxruntime's own layout and the model's (`graph.layouts`) wherever a dense convolution or pooling meets one of our
operators. Two layouts for each node and a price for each border make it a minimum cut (`algorithms.min_cut`).

A 3x3 convolution that is not pruned can gain too: ours computes it by Winograd's algorithm, at some 0.4 of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from tetris_onnx.algorithms.min_cut import least_labels
from tetris_onnx.graph.layouts import Layout, is_pool_2x2, layout_of, reads_plain
from tetris_onnx.graph.shapes import example_shapes
from tetris_onnx.passes.fuse_epilogue import clip_bounds
from tetris_onnx.passes.surgery import is_output, only_consumer
from tetris_onnx.timing.cost import LayerShape, layout_channels, predict_reorder

if TYPE_CHECKING:
    from tetris_onnx.planner import Candidate

# A layer becomes block-sparse, or is run whole by our operator, where it is predicted to take at most this share of the
# dense time: predictions are not better than that.
WORTH_IT = 0.95
WORTH_IT_WHOLE = 0.9
_PLAIN, _BLOCKED = 0, 1  # labels: the layout of a node's result


def choose(graph: gs.Graph, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The ``candidates``, all layers of a prepared ``graph``: dense or kept whole where that is predicted to be faster.

    A layer that has to be block-sparse (`Candidate.required`) stays so, and so does one whose time is not known.
    """
    network = _Network(graph, candidates)
    if not network.times:
        return list(candidates)
    labels = least_labels(network.costs, network.pairs)
    found = []
    for candidate in candidates:
        node = id(candidate.layer.node)
        in_graph = node in network.number  # not in a subgraph
        ours = network.decided.get(node, in_graph and labels[network.number[node]] == _PLAIN)
        found.append(_with_operator(candidate, bool(ours)))
    return found


def _with_operator(candidate: Candidate, ours: bool) -> Candidate:
    """The candidate, run by our operator if ``ours`` says so and it can be."""
    if candidate.why_dense:
        return replace(candidate, whole=ours and candidate.can_be_whole)
    predicted = candidate.predict(candidate.density)
    if ours or candidate.required or predicted is None:
        return candidate
    reason = slower_reason(predicted)
    if predicted[1] <= WORTH_IT * predicted[0]:
        reason += ", too little for the changes of layout around it"
    return replace(candidate, why_dense=reason)


def slower_reason(milliseconds: tuple[float, float]) -> str:
    """Why a layer of these times (dense, block-sparse) stays dense."""
    dense, sparse = milliseconds
    return f"predicted {sparse:.2g} ms block-sparse against {dense:.2g} ms dense"


def gain_of_whole(shape: LayerShape | None, milliseconds: tuple[float, float]) -> str:
    """What a layer of these times (dense, by our operator) gains by being kept whole."""
    dense, ours = milliseconds
    if ours >= dense:
        return "saves a change of layout"
    winograd = shape is not None and shape.winograd
    return f"{dense / ours:.1f}x" + (" by Winograd" if winograd else "")


class _Network:
    """The costs of both layouts for every node of a graph, and of a change between any two of them."""

    def __init__(self, graph: gs.Graph, candidates: Sequence[Candidate]) -> None:
        self._graph = graph
        self.number = {id(node): i for i, node in enumerate(graph.nodes)}
        self.costs = [(0.0, math.inf)] * len(graph.nodes)  # seconds; the model's layout, unless something else is said
        self.pairs: list[tuple[int, int, float]] = []
        by_node = {id(c.layer.node): c for c in candidates}
        self.times = {node: t for node, c in by_node.items() if (t := _seconds(c)) is not None}
        if not self.times:
            return
        self.decided: dict[int, bool] = {}  # layers that no layout depends on: whether our operator runs them
        self._machine, self._threads = candidates[0].machine, candidates[0].threads
        channels = layout_channels(self._machine.lanes)
        pools = {id(pool) for c in candidates if (pool := self._pool_behind(c)) is not None}
        layouts = [Layout.FOLLOWS if id(n) in pools else layout_of(n, channels) for n in graph.nodes]
        for node, layout in zip(graph.nodes, layouts, strict=True):
            self._add_node(node, layout, by_node.get(id(node)))
        self._sizes = example_shapes(gs.export_onnx(graph)) if self._has_open_sizes() else {}
        for value in graph.tensors().values():
            if isinstance(value, gs.Variable) and value.inputs:
                self._add_value(value, layouts, channels)

    def _add_node(self, node: gs.Node, layout: Layout, candidate: Candidate | None) -> None:
        i = self.number[id(node)]
        times = None if candidate is None else self.times.get(id(node))
        if candidate is not None and times is not None and layout is Layout.BLOCKED:
            self.costs[i] = times
        elif candidate is not None and times is not None:
            self.decided[id(node)] = times[0] <= times[1]
        elif candidate is not None and not candidate.why_dense:
            self.costs[i] = 0.0, math.inf  # by our operator: nothing is known of its time
        elif layout is Layout.BLOCKED:
            self.costs[i] = math.inf, 0.0
        elif layout in (Layout.FOLLOWS, Layout.JOINS):
            self.costs[i] = 0.0, 0.0
            inputs = node.inputs[:1] if layout is Layout.FOLLOWS else node.inputs
            for before in (t.inputs[0] if t.inputs else None for t in inputs):
                if before is None or id(before) not in self.number:
                    self.costs[i] = 0.0, math.inf
                    continue
                j = self.number[id(before)]
                self.pairs.append((j, i, math.inf))
                if layout is Layout.FOLLOWS:
                    self.pairs.append((i, j, math.inf))

    def _add_value(self, value: gs.Variable, layouts: Sequence[Layout], channels: int) -> None:
        """The changes of one value's layout: one for all nodes that read it in the other one."""
        producer = self.number.get(id(value.inputs[0]))
        if producer is None or value.inputs[0].outputs[0] is not value:
            return
        seconds = predict_reorder(self._size(value), self._machine, self._threads)
        readers = [self.number[id(n)] for n in value.outputs if id(n) in self.number]
        plain = [
            i for i in readers if self._graph.nodes[i].op == "Conv" and reads_plain(self._graph.nodes[i], channels)
        ]
        to_plain, to_blocked = self._new(), self._new()
        self.pairs += [(to_plain, producer, seconds), (producer, to_blocked, seconds)]
        if plain or len(readers) < len(value.outputs) or is_output(self._graph, value):
            self.costs[to_plain] = 0.0, math.inf
        for i in readers:
            if i not in plain:
                self.pairs += [(i, to_plain, math.inf), (to_blocked, i, math.inf)]

    def _new(self) -> int:
        self.costs.append((0.0, 0.0))
        return len(self.costs) - 1

    def _pool_behind(self, candidate: Candidate) -> gs.Node | None:
        """The MaxPool that our operator would take over from behind a convolution."""
        if not candidate.layer.is_conv or (candidate.why_dense and not candidate.can_be_whole):
            return None
        follower = only_consumer(self._graph, candidate.layer.output)
        if follower is not None and clip_bounds(follower) is not None:
            follower = only_consumer(self._graph, follower.outputs[0])
        return follower if follower is not None and is_pool_2x2(follower) else None

    def _has_open_sizes(self) -> bool:
        return any(
            not isinstance(d, int) for c in self._graph.nodes for t in c.outputs for d in (t.shape or ("?",))[1:]
        )

    def _size(self, value: gs.Variable) -> int:
        """Values of one run; an open batch counts as 1, another open size as in `shapes.EXAMPLE_SIZES`."""
        shape = self._sizes.get(value.name) or value.shape or ()
        return math.prod(d for d in shape if isinstance(d, int) and d > 0)


def _seconds(candidate: Candidate) -> tuple[float, float] | None:
    """What our operator and the dense one count as; None where nothing is predicted, or there is nothing to choose."""
    if not candidate.why_dense:
        predicted, worth = candidate.predict(candidate.density), WORTH_IT
    elif candidate.can_be_whole:
        predicted, worth = candidate.predict(1.0), WORTH_IT_WHOLE
    else:
        return None
    if predicted is None:
        return None
    dense, ours = predicted
    if candidate.why_dense and candidate.threads == 1:
        # Nobody asks for such a layer, and one thread is only a guess: it must not lose with two.
        with_two = replace(candidate, threads=2).predict(1.0)
        assert with_two is not None
        ours = max(ours, dense * with_two[1] / with_two[0])
    return 1e-3 * ours / worth, math.inf if candidate.required and not candidate.why_dense else 1e-3 * dense
