"""The activations of a network before and after pruning, layer by layer, for any number of samples.

Two versions of a model run side by side in onnxruntime: the dense one, and the one whose layers are replaced as they
are pruned. `Activations.advance` runs both as far as the next layer needs and no further: each node runs once per
version (once in all where no pruned layer comes before it), and only values that later nodes still read are kept.
They live in files where they would take more memory than allowed.
"""

from __future__ import annotations

import mmap
import tempfile
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tetris_onnx.data.calibration import Samples, count, fixed_batch, model_inputs
from tetris_onnx.graph.layers import DOMAIN
from tetris_onnx.passes.lower_block_sparse import whole_conv
from tetris_onnx.session import open_session, run

# By layer name: another weight, in the form that its node stores, and bias [out].
Changes: TypeAlias = Mapping[str, tuple[NDArray, NDArray]]

_BATCH = 8


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer sees while the layers before it have been pruned; first axis = samples."""

    data: NDArray  # its input in the pruned network
    output: NDArray  # its output in the dense network; with an ``addend`` the sum of the two in the dense network
    addend: NDArray | None  # what an Add behind the layer adds to its output in the pruned network, where that differs


class Activations:
    """What a layer sees in the pruned network and what it gives in the dense one. Use it in a ``with`` statement."""

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[str],
        samples: Samples,
        memory: int,
        dense: Sequence[str] = (),
        whole: Collection[str] = (),
    ) -> None:
        """``model``: prepared (see planner); ``layers``: outputs of those that will be replaced, in node order.

        ``dense``: outputs of layers that will be replaced too where they come behind such a layer (see `changes`).
        ``samples``: one array per model input; ``memory``: bytes that stored values may take. ``whole``: outputs of
        convolutions that our operator runs faster, with all their weights (see operators).
        """
        self._whole = frozenset(whole)
        self._model = model
        self._inputs = model_inputs(model)
        self._count = count(samples, self._inputs)
        self._nodes = list(model.graph.node)
        self._producer = {name: i for i, node in enumerate(self._nodes) for name in node.output if name}
        self._readers: dict[str, list[int]] = {}
        for i, node in enumerate(self._nodes):
            for name in _reads(node):
                self._readers.setdefault(name, []).append(i)
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._tainted = self._behind(layers)  # nodes whose results pruning changes
        # Layers that have not been replaced yet.
        self._waiting = {self._producer[name] for name in (*layers, *(name for name in dense if self.changes(name)))}
        self._replaced: dict[int, tuple[list[onnx.NodeProto], list[onnx.TensorProto]]] = {}
        self._done: tuple[set[int], set[int]] = (set(), set())  # nodes that have run: dense, pruned
        self._values: tuple[dict[str, NDArray], dict[str, NDArray]] = (dict(samples), {})
        # All batches have one size, so that a value computed from the size of a batch (a Shape) fits the others too.
        self._batch = fixed_batch(self._inputs) or max(b for b in range(1, _BATCH + 1) if self._count % b == 0)
        self._sliced = {spec.name for spec in self._inputs if not spec.whole}  # values with one part per batch
        self._wanted: set[str] = set()  # what the current layer is asked for
        self._memory = memory

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for values in self._values:
            values.clear()

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._count

    @property
    def batch(self) -> int:
        """Samples that run at a time; divides their number."""
        return self._batch

    def behind(self, layer: str, values: Sequence[str]) -> list[str]:
        """Those of the ``values`` that depend on ``layer``, in their order."""
        reached = self._behind([layer])
        return [name for name in values if name != layer and self._producer.get(name) in reached]

    def changes(self, layer: str) -> bool:
        """Whether pruning changes what ``layer`` reads."""
        return self._is_tainted(self._nodes[self._producer[layer]].input[0])

    def advance(self, layer: str) -> Seen:
        """What ``layer`` reads in the pruned network, and what it gives in the dense one.

        Layers come in node order. The arrays are valid until the next call. Raises `SessionError` where a part of the
        model does not run.
        """
        data = self._nodes[self._producer[layer]].input[0]
        beside = self._added_to(layer)
        self._wanted = {layer, data, beside or data}
        self._forget()
        self._run(0, sorted(self._wanted))
        self._run(1, [name for name in sorted({data, beside or data}) if self._is_tainted(name)])
        output = self._values[0][layer]
        addend = None if beside is None else self._values[1][beside]
        if beside is None or addend is None or not self._values[0][beside].shape == output.shape == addend.shape:
            return Seen(self._value(1, data), output, None)
        total = self._allocate(output.shape, output.dtype, {})
        np.add(output, self._values[0][beside], out=total)
        return Seen(self._value(1, data), total, addend)

    def replace(self, layer: str, weight: NDArray, bias: NDArray) -> None:
        """Give ``layer`` of the pruned network another weight, in the form that its node stores, and bias [out]."""
        index = self._producer[layer]
        self._replaced[index] = self._changed(layer, weight, bias)
        self._waiting.discard(index)

    def consequence(
        self, layer: str, changes: Changes, targets: Sequence[str], first: int = 0, stop: int | None = None
    ) -> list[NDArray]:
        """The values ``targets`` of the dense network with ``changes``, for the samples from ``first`` to ``stop``.

        ``layer`` is the last one advanced to, and no layer before it is changed: only what comes behind it runs.
        """
        index = self._producer[layer]
        changed = {self._producer[name]: self._changed(name, *change) for name, change in changes.items()}
        need: set[int] = set()
        todo = list(targets)
        while todo:
            name = todo.pop()
            producer = self._producer.get(name)
            if producer is not None and producer not in need and (producer == index or name not in self._values[0]):
                need.add(producer)
                todo += _reads(self._nodes[producer])
        order = sorted(need)
        made = {name for i in order for name in self._nodes[i].output if name}
        reads = {name for i in order for name in _reads(self._nodes[i])} - made
        given = {name: self._values[0][name] for name in sorted(reads) if name not in self._initializers}
        kept = [name for name in targets if name in made]
        values: dict[str, NDArray] = {}
        if kept:
            session = open_session(self._part(order, changed, given, kept))
            values = self._collect(session, given, kept, first, self._count if stop is None else stop)
        return [values[name] if name in values else self._values[0][name][first:stop] for name in targets]

    def _changed(
        self, layer: str, weight: NDArray, bias: NDArray
    ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The nodes and constants of a layer with another weight and bias."""
        node = self._nodes[self._producer[layer]]
        constants = [
            numpy_helper.from_array(np.ascontiguousarray(weight), f"{layer}/weight_refit"),
            numpy_helper.from_array(np.ascontiguousarray(bias), f"{layer}/bias_refit"),
        ]
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        nodes = [changed]
        del changed.input[1:]
        changed.input.append(constants[0].name)
        if node.op_type == "MatMul":
            changed.output[0] = f"{layer}/product"
            nodes.append(helper.make_node("Add", [f"{layer}/product", constants[1].name], [layer]))
        else:
            changed.input.append(constants[1].name)
        return nodes, constants

    def partner(self, layer: str) -> str | None:
        """What the only reader of ``layer``, an Add, adds to it; None where the reader is another operator."""
        readers = self._readers.get(layer, [])
        if len(readers) != 1 or self._nodes[readers[0]].op_type != "Add" or self._nodes[readers[0]].domain:
            return None
        left, right = self._nodes[readers[0]].input
        other = right if left == layer else left
        return None if other == layer or self._producer[layer] in self._before(other) else other

    def _added_to(self, layer: str) -> str | None:
        """The `partner` of a layer where pruning has changed it, and will not change it any more.

        The error in it (of a residual network's shortcut, say) is one that the layer can make up for.
        """
        other = self.partner(layer)
        if other is None or not self._is_tainted(other) or self._before(other) & self._waiting:
            return None
        return other

    def _before(self, name: str) -> set[int]:
        """The nodes that a value depends on."""
        found: set[int] = set()
        todo = [name]
        while todo:
            index = self._producer.get(todo.pop())
            if index is not None and index not in found:
                found.add(index)
                todo += _reads(self._nodes[index])
        return found

    def _behind(self, layers: Sequence[str]) -> set[int]:
        found: set[int] = set()
        todo = [self._producer[name] for name in layers]
        while todo:
            index = todo.pop()
            if index not in found:
                found.add(index)
                todo += [reader for name in self._nodes[index].output for reader in self._readers.get(name, ())]
        return found

    def _is_tainted(self, name: str) -> bool:
        return self._producer.get(name) in self._tainted

    def _run(self, version: int, targets: Sequence[str]) -> None:
        """Compute ``targets`` in the dense (0) or pruned (1) network, and keep what is read later."""
        need: set[int] = set()
        todo = [name for name in targets if name not in self._values[version]]
        while todo:
            name = todo.pop()
            index = self._producer.get(name)
            if index is None or index in need or index in self._done[version]:
                continue
            if version == 1 and index not in self._tainted:
                self._wanted.add(name)
                self._run(0, [name])
                continue
            need.add(index)
            todo += _reads(self._nodes[index])
        if not need:
            return
        order = sorted(need)
        made = {name for index in order for name in self._nodes[index].output if name}
        reads = {name for index in order for name in _reads(self._nodes[index])} - made
        self._done[version].update(need)
        kept = [name for name in sorted(made) if name in self._wanted or self._is_read_later(version, name)]
        given = {name: self._value(version, name) for name in sorted(reads) if name not in self._initializers}
        part = self._part(order, self._replaced if version == 1 else {}, given, kept)
        self._values[version].update(self._collect(open_session(part), given, kept, 0, self._count))
        self._forget()

    def _value(self, version: int, name: str) -> NDArray:
        return self._values[1][name] if version == 1 and self._is_tainted(name) else self._values[0][name]

    def _is_read_later(self, version: int, name: str) -> bool:
        readers = self._readers.get(name, ())
        if any(reader not in self._done[version] for reader in readers):
            return True
        # An untouched value serves the pruned network too.
        return (
            version == 0
            and not self._is_tainted(name)
            and any(reader in self._tainted and reader not in self._done[1] for reader in readers)
        )

    def _forget(self) -> None:
        for version, values in enumerate(self._values):
            for name in list(values):
                if name not in self._wanted and not self._is_read_later(version, name):
                    del values[name]

    def _part(
        self,
        order: list[int],
        replaced: dict[int, tuple[list[onnx.NodeProto], list[onnx.TensorProto]]],
        given: dict[str, NDArray],
        kept: list[str],
    ) -> onnx.ModelProto:
        """The nodes ``order`` as a model of their own, some of them replaced."""
        nodes: list[onnx.NodeProto] = []
        constants: dict[str, onnx.TensorProto] = {}
        for index in order:
            own = [self._nodes[index]]
            known: Mapping[str, onnx.TensorProto] = self._initializers
            if index in replaced:
                own, extra = replaced[index]
                known = ChainMap({t.name: t for t in extra}, self._initializers)
            for node in own:
                lowered = self._by_our_operator(node, known)
                if lowered is None:
                    nodes.append(node)
                    constants |= {name: known[name] for name in _reads(node) if name in known}
                else:
                    nodes.append(lowered[0])
                    constants |= {t.name: t for t in lowered[1]}
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim if array.ndim else []
            )
            for name, array in given.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in kept]
        part = onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import)
        if any(node.domain == DOMAIN for node in nodes):
            part.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        part.functions.extend(self._model.functions)
        part.graph.CopyFrom(helper.make_graph(nodes, "part", inputs, outputs, list(constants.values())))
        return part

    def _by_our_operator(
        self, node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
    ) -> tuple[onnx.NodeProto, list[onnx.TensorProto]] | None:
        """A convolution that is one of ``whole`` as our operator, with its constants."""
        if node.op_type != "Conv" or node.output[0] not in self._whole:
            return None
        weight, *bias = (numpy_helper.to_array(constants[name]) for name in node.input[1:] if name)
        found = whole_conv(node, weight, bias[0] if bias else None)
        if found is not None and any(t.name in self._initializers for t in found[1]):
            return None  # the model has other constants of these names
        return found

    def _collect(
        self, session: object, given: dict[str, NDArray], kept: list[str], first: int, stop: int
    ) -> dict[str, NDArray]:
        """Run the samples ``first`` to ``stop`` through a part: the values that it gives, first axis = samples."""
        arrays: dict[str, NDArray] = {}
        for start in range(first, stop, self._batch):
            part = slice(start, start + self._batch)
            feed = {name: array[part] if name in self._sliced else array for name, array in given.items()}
            for name, result in zip(kept, run(session, feed, "the model"), strict=True):
                value = np.asarray(result)
                if start == first and value.ndim and len(value) == self._batch:
                    self._sliced.add(name)
                    arrays[name] = self._allocate((stop - first, *value.shape[1:]), value.dtype, arrays)
                if name in self._sliced:
                    arrays[name][start - first : start - first + self._batch] = value
                else:
                    arrays[name] = value
            leave_to_system(*given.values(), *arrays.values())
        return arrays

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype, beside: Mapping[str, NDArray]) -> NDArray:
        """An empty array, in a file where it and the values that are held, and those ``beside`` them, take too much."""
        held = [a for values in (*self._values, beside) for a in values.values()]
        held_bytes = sum(a.nbytes for a in held if not isinstance(a, np.memmap))
        if held_bytes + np.dtype(dtype).itemsize * np.prod(shape, dtype=np.float64) <= self._memory:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile() as file:  # which has no name: a run that is killed leaves nothing behind
            return np.memmap(file, dtype, "w+", shape=shape)


def leave_to_system(*arrays: NDArray) -> None:
    """Take the pages of arrays in files out of this process: the system keeps them as long as it has room."""
    for array in arrays:
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            array.base.madvise(mmap.MADV_DONTNEED)


def _reads(node: onnx.NodeProto) -> list[str]:
    """The values that a node reads, those that its subgraphs take from outside included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            own = {o for inner in graph.node for o in inner.output} | {
                v.name for v in (*graph.input, *graph.initializer)
            }
            names += [name for inner in graph.node for name in _reads(inner) if name not in own]
            names += [v.name for v in graph.output if v.name not in own]
    return names
