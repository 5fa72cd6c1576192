"""Model files in and out: ONNX file <-> `onnx.ModelProto` <-> onnx-graphsurgeon graph.

`to_graph` also annotates every value with its shape as far as it is known: an int for a dimension that is the same
for every input size, a name otherwise. The passes rely on these annotations and keep them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import onnx
import onnx_graphsurgeon as gs
from onnx import version_converter
from onnx_graphsurgeon.logger import G_LOGGER

from tetris_onnx.graph.plain import plain_form
from tetris_onnx.graph.shapes import UNKNOWN, infer_shapes
from tetris_onnx.graph.widen import rounding

# The functions that define our ops for other runtimes use operators as they are since this version.
MIN_OPSET = 13
_MIN_OPSET_HALF = 15
# protobuf refuses larger messages: such a model keeps its weights in a file beside it.
_MAX_PROTO_BYTES = 2**31 - 2**20


class ModelError(ValueError):
    """A model that cannot be read, written or worked on; the message is one line that says why."""


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes ``path`` when the block ends without an exception, and vanishes otherwise."""
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; a model is an ordinary one
        temporary.replace(path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file. Raises `ModelError`."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf and onnx raise many types for broken files
        raise ModelError(f"{path}: not a readable ONNX model ({_first_line(error)})") from None
    if not model.HasField("graph") or not model.opset_import:
        raise ModelError(f"{path}: not an ONNX model")
    try:
        onnx.checker.check_model(path)
    except Exception as error:
        if "No Op registered" not in str(error):  # an operator of another domain or a newer opset is not ours to judge
            raise ModelError(f"{path}: not a valid ONNX model ({_first_line(error)})") from None
    return model


def save(model: onnx.ModelProto, path: str | Path) -> None:
    """Write a model, whole or not at all. Above 2 GB its weights go to ``PATH.data``. Raises `ModelError`."""
    path = Path(path)
    if model.ByteSize() < _MAX_PROTO_BYTES:
        with write_atomically(path) as file:
            file.write(model.SerializeToString())
        return
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            external = f"{path.name}.data"
            split = onnx.ModelProto()
            split.CopyFrom(model)  # onnx moves the weights out of the message it is given
            onnx.save_model(split, Path(folder) / path.name, save_as_external_data=True, location=external)
            (Path(folder) / external).replace(path.parent / external)
            (Path(folder) / path.name).replace(path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from None


def raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model at opset `MIN_OPSET` or later, in `plain_form` (unchanged where it already is).

    With float16 or bfloat16 weights at 15 or later, where the functions can take the type of their inputs (CastLike).
    Raises `ModelError`.
    """
    try:
        model = plain_form(model)
    except Exception as error:  # onnx raises many types for broken functions, numpy for broken sparse tensors
        raise ModelError(
            f"a function or a sparse weight of the model cannot be expanded ({_first_line(error)})"
        ) from None
    least = _MIN_OPSET_HALF if rounding(model) else MIN_OPSET
    if opset(model) >= least:
        return model
    try:
        # The converter needs default values of initializers among the inputs only before IR version 4.
        converted = version_converter.convert_version(model, least)
    except Exception as error:
        raise ModelError(
            f"the model is at opset {opset(model)} and cannot be converted to opset {least}: "
            f"export it again at a later one ({_first_line(error)})"
        ) from None
    # The converter invents names for nodes that have none, where those of their outputs are what they are known by.
    nameless = {output for node in model.graph.node if not node.name for output in node.output}
    for node in converted.graph.node:
        if node.output and node.output[0] in nameless:
            node.name = ""
    return converted


def opset(model: onnx.ModelProto) -> int:
    """The version of the default operator set that a model imports."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def to_graph(model: onnx.ModelProto) -> gs.Graph:
    """The model as an onnx-graphsurgeon graph with shapes annotated. Weights are shared with ``model``, not copied."""
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns of each value of a type that numpy lacks
        graph = gs.import_onnx(model)
        tensors = graph.tensors()
        for tensor in tensors.values():
            if isinstance(tensor, gs.Constant) and isinstance(tensor.dtype, int):
                tensor.values = tensor.values  # read now, and known by numpy's name for its type
    shapes = infer_shapes(model)
    for name, tensor in tensors.items():
        if isinstance(tensor, gs.Variable):
            if name in shapes:
                tensor.dtype, tensor.shape = shapes[name][0], list(shapes[name][1])
            elif tensor.shape is not None:  # declared only: a dimension without a size comes as None
                tensor.shape = [UNKNOWN if d is None else d for d in tensor.shape]
    _name_nodes(graph)
    return graph


def to_proto(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as a model that keeps what graphs do not hold (metadata, producer, documentation) from ``like``."""
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        model = gs.export_onnx(graph, ir_version=max(like.ir_version, 8), opset_imports=graph.import_domains)
    model.ir_version = max(like.ir_version, 8)  # the first version with functions
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, field, getattr(like, field))
    model.metadata_props.extend(like.metadata_props)
    _restore_notes(model.graph, like.graph)
    for ours, theirs in ((model.graph.input, like.graph.input), (model.graph.output, like.graph.output)):
        known = {value.name: value for value in theirs}
        for value in ours:
            value.CopyFrom(known.get(value.name, value))
    for value in model.graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == UNKNOWN:  # runtimes take equal names for equal sizes
                dim.ClearField("dim_param")
    return model


def _restore_notes(graph: onnx.GraphProto, like: onnx.GraphProto) -> None:
    """Give the graph, its nodes and its values the documentation and metadata that ``like`` has for them.

    A node is known by its name, which passes keep; a node without one had been called like its first output.
    """
    nodes = {node.name or (node.output[0] if node.output else ""): node for node in like.node}
    pairs: list[tuple] = [(graph, like)]
    pairs += [(node, nodes[node.name]) for node in graph.node if node.name in nodes]
    for field in ("initializer", "value_info"):
        known = {value.name: value for value in getattr(like, field)}
        pairs += [(value, known[value.name]) for value in getattr(graph, field) if value.name in known]
    for ours, theirs in pairs:
        if theirs.doc_string and not ours.doc_string:
            ours.doc_string = theirs.doc_string
        if hasattr(theirs, "metadata_props") and not ours.metadata_props:  # since onnx 1.16
            ours.metadata_props.extend(theirs.metadata_props)


def _name_nodes(graph: gs.Graph) -> None:
    """Give nodes without a name (or with one that is taken) that of their first output."""
    given = {node.name for node in graph.nodes}
    taken = {""}
    for node in graph.nodes:
        if node.name in taken:
            base = node.name = node.outputs[0].name if node.outputs else node.op
            number = 1
            while node.name in taken or node.name in given:
                number += 1
                node.name = f"{base}_{number}"
        taken.add(node.name)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
