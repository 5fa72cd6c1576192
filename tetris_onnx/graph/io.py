"""Model files in and out: ONNX file <-> `onnx.ModelProto` <-> onnx-graphsurgeon graph.

`to_graph` also annotates every value with its shape as far as it is known: an int for a dimension that is the same
for every input size, a name otherwise. The passes rely on these annotations and keep them.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import version_converter
from onnx_graphsurgeon.logger import G_LOGGER

from tetris_onnx.graph.layers import malformed
from tetris_onnx.graph.plain import plain_form, sorted_form
from tetris_onnx.graph.shapes import UNKNOWN, infer_shapes
from tetris_onnx.graph.tensors import (
    IN_MEMORY,
    WORTH_A_FILE,
    Deferred,
    TensorFile,
    check_names,
    check_tensors,
    check_types,
    defer_external,
    gathered,
    in_files,
    inlined,
    is_external,
    place_external,
    split,
    stored_bytes,
    values_of,
    without_initializers,
    write_whole,
)
from tetris_onnx.graph.tensors import ModelError as ModelError
from tetris_onnx.graph.widen import rounding

# The functions that define our ops for other runtimes use operators as they are since this version.
MIN_OPSET = 13
_MIN_OPSET_HALF = 15
# A value of one sample that is larger is most likely an attack; no run would get through with it anyway.
_MOST_VALUE_BYTES = 2**33
# protobuf refuses larger messages: such a model keeps its weights in a file beside it.
_MAX_PROTO_BYTES = 2**31 - 2**20


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes ``path`` when the block ends without an exception, and vanishes otherwise."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a device, for one: not to be replaced
        raise ModelError(f"cannot write {path}: not a regular file")
    with _new_file(path) as (file, link):
        yield file
        _finish(file)
        temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
        try:
            link(temporary)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[tuple[IO[bytes], Callable[[Path], None]]]:
    """A file to write to in the folder of ``path``, and the function that gives it a name, which no file may have yet.

    Without a name it vanishes, on Linux even where the process is killed. Whatever fails is a `ModelError`.
    """
    path = Path(path)
    named: Path | None = None
    try:
        try:
            handle = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
        except (AttributeError, OSError):  # no Linux, or a file system that has no files without a name
            named = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.new")
            handle = os.open(named, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)

        def link(name: Path) -> None:
            if named is None:
                # (linkat, which follows the link, is used where a folder's descriptor is given: it is not needed.)
                os.link(f"/proc/self/fd/{handle}", name, src_dir_fd=handle)
                return
            try:
                os.link(named, name)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                name.touch(exist_ok=False)
                named.replace(name)

        with os.fdopen(handle, "wb") as file:
            yield file, link
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if named is not None:
            _remove({named})


def _finish(file: IO[bytes]) -> None:
    """Let everything be on the disk: a full one may say so only now."""
    file.flush()
    os.fsync(file.fileno())


def load(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file. Raises `ModelError`.

    Large weights that the model keeps in files stay there where they are more than `tensors.IN_MEMORY`.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if not path.is_file():
        raise ModelError(f"{path}: a folder, not an ONNX file" if path.is_dir() else f"{path}: not a regular file")
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # protobuf and onnx raise many types for broken files
        raise ModelError(f"{path}: not a readable ONNX model ({_first_line(error)})") from None
    if not model.HasField("graph") or not model.opset_import:
        raise ModelError(f"{path}: not an ONNX model")
    try:
        check_names(model)
        check_tensors(model)
        check_types(model)
        place_external(model, path.parent)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    ordered = sorted_form(model)
    # Neither the order of nodes nor an output's shape is needed to run a model: what lacks only these is no bad model.
    bare = [output.type.tensor_type for output in ordered.graph.output if _has_no_shape(output)]
    for kind in bare:
        kind.shape.SetInParent()
    try:
        with contextlib.nullcontext(path) if ordered is model and not bare else as_file(ordered) as file:
            onnx.checker.check_model(file)
    except ModelError:
        raise
    except Exception as error:
        if "No Op registered" not in str(error):  # an operator of another domain or a newer opset is not ours to judge
            raise ModelError(f"{path}: not a valid ONNX model ({_first_line(error)})") from None
    finally:
        for kind in bare:
            kind.ClearField("shape")
    return ordered


def _has_no_shape(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")


def given(model: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """A model from its file, or as it is. Raises `ModelError` for anything else."""
    if isinstance(model, onnx.ModelProto):
        return model
    if not isinstance(model, (str, Path)):
        raise ModelError(f"expected the path of an ONNX file or an onnx.ModelProto, found {type(model).__name__}")
    return load(model)


def save(model: onnx.ModelProto, path: str | Path) -> None:
    """Write a model, whole or not at all. Above 2 GB its weights go to a file beside it, ``PATH.data``.

    There are never a model and weights that do not belong together: where there is a model already, new weights get
    another name (``PATH.0a1b2c3d.data``), then the new model replaces the old one, then the old one's weights go.
    Raises `ModelError`.
    """
    path = Path(path)
    size = size_of(model)
    if size < _MAX_PROTO_BYTES:
        model = inlined(model)
        before = _own_data(path)
        with write_atomically(path) as file:
            if size < IN_MEMORY:
                file.write(model.SerializeToString())
            else:
                write_whole(model, file)
        _remove(before)
        return
    with _new_file(path) as (data, link):
        light = split(model, TensorFile(data, ""))
        _finish(data)
        final = _claim(link, path)
        for tensor in light.graph.initializer:
            if is_external(tensor):
                tensor.external_data[0].value = final.name
        try:
            if light.ByteSize() >= _MAX_PROTO_BYTES:
                raise ModelError(f"cannot write {path}: without its weights it still takes more than 2 GB")
            before = _own_data(path)
            with write_atomically(path) as file:
                file.write(light.SerializeToString())
        except BaseException:
            if final not in _own_data(path):  # an interruption may come when the model is there already
                _remove({final})
            raise
    _remove(before - {final})


@contextlib.contextmanager
def as_file(model: onnx.ModelProto) -> Iterator[Path]:
    """Yield a file of a model that is too large for a message, or has its weights in files; it goes with the block."""
    with _temporary_files(), tempfile.TemporaryDirectory(prefix="tetris_onnx_", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        if in_files(model):
            path.write_bytes(gathered(model, Path(folder)).SerializeToString())
        else:
            save(model, path)
        yield path


def needs_file(model: onnx.ModelProto) -> bool:
    """Whether a model cannot be handed over as one message."""
    return in_files(model) or size_of(model) >= _MAX_PROTO_BYTES


def is_large(model: onnx.ModelProto) -> bool:
    """Whether a model is not to be in memory several times."""
    return in_files(model) or size_of(model) > IN_MEMORY


def size_of(model: onnx.ModelProto) -> int:
    """Bytes of a model with all of its values; those of a large one to within some for each weight."""
    weights = sum(stored_bytes(tensor) for tensor in model.graph.initializer)
    if weights < IN_MEMORY and not in_files(model):
        return int(model.ByteSize())
    return weights + int(without_initializers(model).ByteSize())  # protobuf would make a copy to tell


def _claim(link: Callable[[Path], None], path: Path) -> Path:
    """Give a new file of weights a name that no other file has.

    Nor had: where there is a model, another run may be about to remove its weights, by their name.
    """
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            final = path.with_name(f"{path.name}.data")
            link(final)
            return final
    final = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data")
    link(final)
    return final


def _own_data(path: Path) -> set[Path]:
    """The files of weights that `save` made for the model at ``path``."""
    if not path.is_file():
        return set()
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # it is no model
        return set()
    names = {tensor.external_data[0].value for tensor in model.graph.initializer if is_external(tensor)}
    pattern = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.data")
    return {path.with_name(name) for name in names if pattern.fullmatch(name)}


def _remove(files: set[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


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
        try:
            graph = gs.import_onnx(model)
        except Exception as error:  # it raises many types for what the checker lets pass
            raise ModelError(f"not a valid ONNX model ({_first_line(error)})") from None
        _check_attributes(graph)
        defer_external(graph)
        tensors = graph.tensors()
        for tensor in tensors.values():
            if isinstance(tensor, gs.Constant) and isinstance(tensor.dtype, int):
                tensor.values = tensor.values  # read now, and known by numpy's name for its type
    shapes = infer_shapes(model)
    for name, tensor in tensors.items():
        if isinstance(tensor, gs.Variable):
            if isinstance(tensor.dtype, onnx.TypeProto):  # which onnx-graphsurgeon reads and cannot write
                raise ModelError(
                    f"value {name!r} is of a type that cannot be rewritten (an optional, a map or the like)"
                )
            if name in shapes:
                tensor.dtype, tensor.shape = shapes[name][0], list(shapes[name][1])
                size = math.prod(d for d in tensor.shape if isinstance(d, int)) * tensor.dtype.itemsize
                if size > _MOST_VALUE_BYTES:
                    raise ModelError(f"value {name!r} has the sizes {tensor.shape}: {size} bytes are too many")
            elif tensor.shape is not None:  # declared only: a dimension without a size comes as None
                tensor.shape = [UNKNOWN if d is None else d for d in tensor.shape]
    _name_nodes(graph)
    return graph


def to_proto(graph: gs.Graph, like: onnx.ModelProto, weights: TensorFile | None = None) -> onnx.ModelProto:
    """The graph as a model that keeps what graphs do not hold (metadata, producer, documentation) from ``like``.

    Large weights are written to the file ``weights``, if there is one, and the model refers to it.
    """
    with G_LOGGER.suppress(G_LOGGER.ERROR), _moved(graph, weights):
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


def open_weights() -> TensorFile:
    """A file for the weights of models too large to have several of them in memory. It lives as long as the object."""
    with _temporary_files():
        folder = tempfile.TemporaryDirectory(prefix="tetris_onnx_", ignore_cleanup_errors=True)
        path = Path(folder.name) / "weights.data"
        # Unbuffered: sessions read what was written.
        weights = TensorFile(path.open("wb", buffering=0), path)
        weakref.finalize(weights, folder.cleanup)
        return weights


@contextlib.contextmanager
def _temporary_files() -> Iterator[None]:
    """Say of an error in the block where temporary files go."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"cannot write to the folder of temporary files, {tempfile.gettempdir()}: {error.strerror or error} "
            "(the variable TMPDIR names another one)"
        ) from None


@contextlib.contextmanager
def _moved(graph: gs.Graph, weights: TensorFile | None) -> Iterator[None]:
    """Let the large constants of ``graph`` be in a file while the block lasts."""
    if weights is None:
        yield
        return
    before = []
    for constant in graph.tensors().values():
        if isinstance(constant, gs.Constant) and isinstance(constant._values, (np.ndarray, Deferred)):
            values = values_of(constant)
            if values.nbytes >= WORTH_A_FILE:
                tensor = onnx.TensorProto(data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype))
                tensor.dims.extend(values.shape)
                with _temporary_files():
                    weights.add(tensor, values.tobytes())
                before.append((constant, constant._values))
                constant.values = gs.ir.tensor.LazyValues(tensor)
    try:
        yield
    finally:
        for constant, kept in before:
            constant.values = kept


def _check_attributes(graph: gs.Graph) -> None:
    """Make tensors of the empty lists of Constants, and refuse others: written again, an empty list has no type.

    Also refuse our operators where they are not what their specification says.
    """
    bodies = [body for function in graph.functions for body in (function, *function.subgraphs(recursive=True))]
    for part in (graph, *graph.subgraphs(recursive=True), *bodies):
        for node in part.nodes:
            wrong = malformed(node)
            if wrong:
                raise ModelError(f"node {node.name!r} ({node.op}) {wrong}")
            empty = [name for name, value in node.attrs.items() if isinstance(value, list) and not value]
            if node.op == "Constant" and empty in (["value_ints"], ["value_floats"]):
                dtype = np.int64 if empty == ["value_ints"] else np.float32
                node.attrs = {"value": gs.Constant(f"{node.name}/value", np.zeros(0, dtype))}
            elif empty:
                name = node.name or (node.outputs[0].name if node.outputs else "")
                raise ModelError(f"node {name!r} ({node.op}) has an empty list as attribute {empty[0]!r}")


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
