"""The stored values of a model: checks that they are what the file says, and values that stay in files.

A `TensorProto` holds its values itself, or names a file beside the model, an offset and a length ("external data").
Files come from anywhere: what a tensor claims is checked before anything is read or allocated by it.

Inside tetris-onnx a model may keep its large weights in files while it is worked on. Such a tensor names its file by an
absolute path, which no file that `io.load` lets in does.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from tetris_onnx.errors import TetrisError

# Weights in files are read into the model up to this many bytes, and stay where they are beyond.
IN_MEMORY = 2**30
# Sizes of which a byte count fits into any integer type.
_MOST_ELEMENTS = 2**48
# A sparse tensor takes next to nothing in a file, whatever its size.
_MOST_SPARSE = 2**28
# Values of fewer bytes stay in the model even where the others go to a file.
WORTH_A_FILE = 1024
# onnxruntime maps whole pages.
_ALIGNMENT = 4096
_BITS = {TensorProto.STRING: 0} | {
    value: 4 for name, value in TensorProto.DataType.items() if name in ("UINT4", "INT4", "FLOAT4E2M1")
}
_BITS |= {value: 2 for name, value in TensorProto.DataType.items() if name in ("UINT2", "INT2")}
_BITS |= {value: 6 for name, value in TensorProto.DataType.items() if name.startswith("FLOAT6")}
# Numbers of the fields ModelProto.graph and GraphProto.initializer.
_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
# How many entries of the field that holds the values make one element.
_PARTS = {TensorProto.COMPLEX64: 2, TensorProto.COMPLEX128: 2}


class ModelError(TetrisError, ValueError):
    """A model that cannot be read, written or worked on; the message is one line that says why."""


class Deferred(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """Values of a `gs.Constant` that are computed, or read from a file, whenever they are asked for, and not kept.

    So a graph of large weights takes next to no memory; who needs one takes it with `values_of`.
    """

    def __init__(self, shape: Iterable[int], dtype: np.dtype, compute: Callable[[], NDArray]) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._compute = compute

    def load(self) -> NDArray:
        """The values."""
        return self._compute()

    @property
    def tensor(self) -> TensorProto:
        """The values as ONNX has them (what onnx-graphsurgeon writes)."""
        return numpy_helper.from_array(np.ascontiguousarray(self.load()))


def values_of(constant: gs.Constant) -> NDArray:
    """The values of a constant; those of a `Deferred` one are not kept in it."""
    values = constant._values
    return values.load() if isinstance(values, Deferred) else constant.values


def all_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the model stores: initializers and attributes, those of subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
        for attribute in function.attribute_proto:
            yield from _attribute_tensors(attribute)


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The subgraphs of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all subgraphs."""
    yield graph
    for node in graph.node:
        for body in bodies_of(node):
            yield from all_graphs(body)


def stored_bytes(tensor: TensorProto) -> int:
    """How many bytes the values of a tensor take. Raises `ModelError` for a type or sizes that cannot be."""
    _check_type(tensor.data_type, f"tensor {tensor.name!r}")
    count = 1
    for size in tensor.dims:
        if size < 0 or size > _MOST_ELEMENTS or (count := count * size) > _MOST_ELEMENTS:
            raise ModelError(f"tensor {tensor.name!r} has the sizes {_listing(tensor.dims)}, which cannot be")
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-count * bits // 8)


def is_external(tensor: TensorProto) -> bool:
    """Whether the values are in a file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def in_files(model: onnx.ModelProto) -> bool:
    """Whether weights of a model are in files."""
    return any(is_external(tensor) for tensor in model.graph.initializer)


def check_tensors(model: onnx.ModelProto) -> None:
    """Raise `ModelError` for a tensor that does not hold as many values as its sizes say."""
    for tensor in all_tensors(model):
        size = stored_bytes(tensor)
        if tensor.HasField("segment"):
            raise ModelError(f"tensor {tensor.name!r} is a part of another one, which onnx does not support")
        if is_external(tensor):
            continue
        if tensor.HasField("raw_data"):
            if tensor.data_type == TensorProto.STRING:
                raise ModelError(f"tensor {tensor.name!r} holds strings as raw data, which ONNX does not allow")
            # (raw_data is copied each time that it is asked for)
            found, expected, unit = len(tensor.raw_data), size, "bytes"
        else:
            found = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
            expected = math.prod(tensor.dims) * _PARTS.get(tensor.data_type, 1)
            if tensor.data_type in _BITS and tensor.data_type != TensorProto.STRING:
                expected = size  # several to an entry
            unit = "values"
        if found != expected:
            raise ModelError(
                f"tensor {tensor.name!r} of sizes {_listing(tensor.dims)} holds {found} {unit}, not {expected}: "
                "the file is damaged"
            )
    for graph in all_graphs(model.graph):
        for sparse in graph.sparse_initializer:
            if any(d < 0 for d in sparse.dims) or math.prod(sparse.dims) > _MOST_SPARSE:
                raise ModelError(
                    f"sparse tensor {sparse.values.name!r} has the sizes {_listing(sparse.dims)}: too many"
                )


def check_types(model: onnx.ModelProto) -> None:
    """Raise `ModelError` for a value declared to hold elements of a type that ONNX does not have."""
    for graph in all_graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type
            while kind.HasField("sequence_type") or kind.HasField("optional_type"):
                kind = kind.sequence_type.elem_type if kind.HasField("sequence_type") else kind.optional_type.elem_type
            for field in ("tensor_type", "sparse_tensor_type"):
                if kind.HasField(field) and getattr(kind, field).elem_type != TensorProto.UNDEFINED:
                    _check_type(getattr(kind, field).elem_type, f"value {value.name!r}")


def check_names(message: Any) -> None:
    """Raise `ModelError` for a string that is no text, anywhere in a message: protobuf lets any bytes through."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            for text in [value] if isinstance(value, (str, bytes)) else value:
                if not isinstance(text, str):
                    raise ModelError(f"the name {text[:40]!r} is no text: the file is damaged")
        elif field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                check_names(inner)


def _check_type(kind: int, what: str) -> None:
    if kind not in TensorProto.DataType.values() or kind == TensorProto.UNDEFINED:
        raise ModelError(f"{what} has the element type {kind}, which this version of onnx does not know")


def place_external(model: onnx.ModelProto, folder: Path) -> None:
    """Check where the values in files are, and read them; where they are many, let those of large weights be.

    Raises `ModelError` for a file that is not in the model's ``folder``, or not all there.
    """
    tensors = [tensor for tensor in all_tensors(model) if is_external(tensor)]
    large = sum(stored_bytes(tensor) for tensor in tensors) > IN_MEMORY
    initializers = {id(t) for t in model.graph.initializer} if large else set()
    inside = 0
    for tensor in tensors:
        if tensor.data_type == TensorProto.STRING:
            raise ModelError(f"tensor {tensor.name!r} has strings in a file, which ONNX does not allow")
        size = stored_bytes(tensor)
        path, offset = _locate(tensor, folder, size)
        refer(tensor, path, offset, size)
        if id(tensor) in initializers and size >= WORTH_A_FILE and tensor.data_type not in _BITS:
            continue
        inside += size
        if inside > IN_MEMORY:
            raise ModelError(f"the constants outside of its main graph take more than {IN_MEMORY} bytes")
        values = _read_bytes(tensor)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = values


def refer(tensor: TensorProto, path: Path | str, offset: int, length: int) -> None:
    """Let ``tensor`` have its values in a file."""
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", path), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def read_tensor(tensor: TensorProto) -> NDArray:
    """The values of a tensor, wherever they are. Raises `ModelError` where the file is gone."""
    if not is_external(tensor):
        return numpy_helper.to_array(tensor)
    if not Path(_entries(tensor).get("location", "")).is_absolute():
        raise ModelError(
            f"tensor {tensor.name!r} has its values in a file that is not loaded: "
            "give the path of the model, or load it with its external data"
        )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(_read_bytes(tensor), dtype).reshape(tuple(tensor.dims))


def defer_external(graph: gs.Graph) -> None:
    """Let the constants of ``graph`` that have their values in files read them when they are asked for."""
    for constant in graph.tensors().values():
        if not isinstance(constant, gs.Constant) or isinstance(constant._values, Deferred):
            continue
        tensor = getattr(constant._values, "tensor", None)
        if isinstance(tensor, TensorProto) and is_external(tensor):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            constant.values = Deferred(tensor.dims, dtype, partial(read_tensor, tensor))
            constant.data_location = None


class TensorFile:
    """A file that values are written to one after the other."""

    def __init__(self, file: IO[bytes], path: Path | str) -> None:
        self._file, self.path = file, path

    def add(self, tensor: TensorProto, values: bytes | memoryview) -> None:
        """Write the values of ``tensor`` and let it refer to them."""
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        self._file.write(values)
        tensor.ClearField("raw_data")
        refer(tensor, self.path, offset, len(values))


def split(model: onnx.ModelProto, file: TensorFile) -> onnx.ModelProto:
    """A copy of ``model`` whose large initializers are in ``file``. ``model`` is not changed, and not copied whole."""
    light = without_initializers(model)
    for tensor in model.graph.initializer:
        moved = light.graph.initializer.add()
        if stored_bytes(tensor) < WORTH_A_FILE or tensor.data_type == TensorProto.STRING:
            moved.CopyFrom(tensor)
            continue
        for field, value in tensor.ListFields():
            if field.name in ("name", "data_type", "doc_string"):
                setattr(moved, field.name, value)
        moved.dims.extend(tensor.dims)
        if is_external(tensor):
            file.add(moved, _read_bytes(tensor))
        elif tensor.HasField("raw_data"):
            file.add(moved, tensor.raw_data)
        else:
            file.add(moved, numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data)
    return light


def write_whole(model: onnx.ModelProto, file: IO[bytes]) -> None:
    """Write a model as one protobuf message, serialized one initializer at a time."""
    light = without_initializers(model)
    graph = light.graph.SerializeToString()
    light.ClearField("graph")
    inner = [len(graph), *(len(_field(_INITIALIZER, t.ByteSize())) + t.ByteSize() for t in model.graph.initializer)]
    file.write(light.SerializeToString())
    file.write(_field(_GRAPH, sum(inner)))
    file.write(graph)
    for tensor in model.graph.initializer:
        values = tensor.SerializeToString()
        file.write(_field(_INITIALIZER, len(values)))
        file.write(values)


def _field(number: int, length: int) -> bytes:
    """What protobuf writes before a message of ``length`` bytes in the field ``number``."""
    found = bytearray([number << 3 | 2])
    while length >= 128:
        found.append(length & 127 | 128)
        length >>= 7
    return bytes([*found, length])


def without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` that has none of its main graph's initializers."""
    light = onnx.ModelProto()
    for part, target in ((model, light), (model.graph, light.graph)):
        for field, value in part.ListFields():
            if field.name in ("graph", "initializer"):
                continue
            own = getattr(target, field.name)
            if isinstance(value, (int, float, str, bytes)):
                setattr(target, field.name, value)
            elif hasattr(own, "MergeFrom"):
                own.MergeFrom(value)
    return light


def gathered(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy of ``model`` whose files are in ``folder``: linked there, or copied where a link cannot be."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    names: dict[str, str] = {}
    for tensor in light.graph.initializer:
        if is_external(tensor):
            entries = _entries(tensor)
            source = entries["location"]
            if source not in names:
                names[source] = f"weights{len(names)}.data"
                try:
                    os.link(source, folder / names[source])
                except OSError:
                    shutil.copyfile(source, folder / names[source])
            refer(tensor, names[source], int(entries["offset"]), int(entries["length"]))
    return light


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all of its values inside."""
    if not in_files(model):
        return model
    whole = without_initializers(model)
    for tensor in model.graph.initializer:
        own = whole.graph.initializer.add()
        own.CopyFrom(tensor)
        if is_external(own):
            own.raw_data = _read_bytes(tensor)
            own.ClearField("external_data")
            own.ClearField("data_location")
    return whole


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    for part in all_graphs(graph):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in part.node:
            for attribute in node.attribute:
                yield from _attribute_tensors(attribute)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute)
        for body in bodies_of(node):
            yield from _graph_tensors(body)


def _attribute_tensors(attribute: onnx.AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for both in (*sparse, *attribute.sparse_tensors):
        yield from (both.values, both.indices)


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _locate(tensor: TensorProto, folder: Path, size: int) -> tuple[Path, int]:
    """The file of a tensor that is in a model file of ``folder``, and where its values begin there."""
    entries = _entries(tensor)
    location, name = entries.get("location", ""), tensor.name
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or ".." in parts or Path(location).is_absolute() or ":" in parts[0]:
        raise ModelError(f"tensor {name!r} has its values in {location!r}, which is not a file in the model's folder")
    root = folder.resolve()
    path = root / location
    if path.resolve() != path:
        raise ModelError(
            f"tensor {name!r} has its values in {location!r}, a symbolic link: put the file itself into the folder"
        )
    if not path.is_file():
        raise ModelError(f"tensor {name!r} has its values in {location!r}: there is no such file beside the model")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or size)
    except ValueError:
        raise ModelError(f"tensor {name!r} has an offset or length in {location!r} that is no number") from None
    if length != size or offset < 0 or offset + length > path.stat().st_size:
        raise ModelError(
            f"tensor {name!r} takes {size} bytes; bytes {offset} to {offset + length} of {location!r} "
            f"({path.stat().st_size} bytes) are not its values: the file is damaged, or of another model"
        )
    return path, offset


def _read_bytes(tensor: TensorProto) -> bytes:
    entries = _entries(tensor)
    path, length = entries["location"], int(entries["length"])
    try:
        with Path(path).open("rb") as file:
            file.seek(int(entries["offset"]))
            values = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    if len(values) != length:
        raise ModelError(f"{path}: the file has changed since it was opened")
    return values


def _listing(sizes: Iterable[int]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
