"""Running passes: each sees a copy, and what it may not change is checked behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from tetris_onnx.errors import TetrisError
from tetris_onnx.graph import io


class PassError(TetrisError, RuntimeError):
    """A pass failed or broke the graph; the message names it."""


@dataclass(frozen=True)
class Pass:
    """A named step. ``apply`` may edit the graph that it is given: the runner gives it a copy."""

    name: str
    apply: Callable[[gs.Graph], None]


def run_passes(
    graph: gs.Graph, passes: Sequence[Pass], dump: Path | None = None, like: onnx.ModelProto | None = None
) -> gs.Graph:
    """The graph after all ``passes``, in order; ``graph`` itself is unchanged.

    With ``dump`` (a folder) and ``like`` (the original model, for its metadata) the model after each pass is written
    there. Raises `PassError` when a pass raises, leaves a value without a producer or changes the model's inputs or
    outputs.
    """
    for number, step in enumerate(passes, 1):
        before = _signature(graph)
        graph = copy_graph(graph)
        known = {id(tensor) for tensor in graph.tensors().values()}
        try:
            step.apply(graph)
            _rename_clashes(graph, known)
            graph.cleanup(remove_unused_node_outputs=False, recurse_functions=False).toposort(
                recurse_functions=False, mode="nodes"
            )
            graph.tensors(check_duplicates=True)
        except Exception as error:
            raise PassError(f"pass {step.name}: {error}") from error
        if _signature(graph) != before:
            raise PassError(f"pass {step.name} changed the inputs or outputs of the model")
        orphan = _orphan(graph)
        if orphan:
            raise PassError(f"pass {step.name} left the value {orphan!r} without a producer")
        if dump is not None and like is not None:
            dump.mkdir(parents=True, exist_ok=True)
            io.save(io.to_proto(graph, like), dump / f"{number:02d}_{step.name}.onnx")
    return graph


def copy_graph(graph: gs.Graph) -> gs.Graph:
    """A copy to edit: new nodes and values, shared weights (a pass replaces them, it never writes into them)."""
    copy = graph.copy()
    copy.producer_name, copy.producer_version = graph.producer_name, graph.producer_version
    copy.import_domains = list(graph.import_domains)
    return copy


def _rename_clashes(graph: gs.Graph, known: set[int]) -> None:
    """Rename the constants that a pass has made (those not ``known``) whose name the model gave to another value."""
    tensors = [t for node in graph.nodes for t in (*node.inputs, *node.outputs)] + graph.inputs + graph.outputs
    taken: dict[str, gs.Tensor] = {t.name: t for t in tensors if id(t) in known or isinstance(t, gs.Variable)}
    for subgraph in graph.subgraphs(recursive=True):
        taken |= subgraph.tensors()
    for tensor in tensors:
        if isinstance(tensor, gs.Constant) and id(tensor) not in known:
            base, number = tensor.name, 1
            while taken.setdefault(tensor.name, tensor) is not tensor:
                number += 1
                tensor.name = f"{base}_{number}"


def _signature(graph: gs.Graph) -> tuple:
    return tuple(tuple((t.name, t.dtype) for t in tensors) for tensors in (graph.inputs, graph.outputs))


def _orphan(graph: gs.Graph) -> str | None:
    produced = {id(t) for t in graph.inputs} | {id(t) for node in graph.nodes for t in node.outputs}
    needed = [t for node in graph.nodes for t in node.inputs] + graph.outputs
    for tensor in needed:
        if id(tensor) not in produced and isinstance(tensor, gs.Variable) and not tensor.is_empty():
            return str(tensor.name)
    return None
