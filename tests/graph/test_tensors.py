"""What a tensor claims is checked before anything is read or allocated by it; files it names are in its folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import Net, relative_error, run
from tetris_onnx.graph import io, tensors
from tetris_onnx.graph.constants import constant_value
from tetris_onnx.graph.io import ModelError


def model() -> onnx.ModelProto:
    net = Net()
    net.output(net.op("Relu", net.gemm(net.input("x", ["N", 16]), (16, 32)), out="y"))
    return net.build()


def weight(of: onnx.ModelProto) -> TensorProto:
    return of.graph.initializer[0]


def _float_data(tensor: TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.float_data.extend([0.0] * 5)


def _packed(tensor: TensorProto) -> None:
    tensor.data_type = TensorProto.INT4


BAD: dict[str, tuple[Callable[[TensorProto], object], str]] = {
    "too few bytes": (lambda t: setattr(t, "raw_data", t.raw_data[:-1]), "holds 2047 bytes, not 2048"),
    "too many bytes": (lambda t: setattr(t, "raw_data", t.raw_data + b"0"), "holds 2049 bytes, not 2048"),
    "too few values": (_float_data, "holds 5 values, not 512"),
    "negative size": (lambda t: t.dims.append(-1), "which cannot be"),
    "size without bounds": (lambda t: t.dims.append(2**62), "which cannot be"),
    "product without bounds": (lambda t: t.dims.extend([2**31, 2**31]), "which cannot be"),
    "no type": (lambda t: setattr(t, "data_type", 0), "element type 0"),
    "unknown type": (lambda t: setattr(t, "data_type", 127), "element type 127"),
    "negative type": (lambda t: setattr(t, "data_type", -1), "element type -1"),
    "strings as bytes": (lambda t: setattr(t, "data_type", TensorProto.STRING), "strings as raw data"),
    "four bits": (_packed, "holds 2048 bytes, not 256"),
    "segment": (lambda t: t.segment.SetInParent(), "a part of another one"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_lie_are_refused(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    bad = model()
    change(weight(bad))
    (tmp_path / "m.onnx").write_bytes(bad.SerializeToString())
    with pytest.raises(ModelError, match=message) as error:
        io.load(tmp_path / "m.onnx")
    assert str(error.value).startswith(f"{tmp_path / 'm.onnx'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", list(TensorProto.DataType.values())[1:])
def test_every_type_of_onnx_has_a_size(kind: int) -> None:
    if kind == TensorProto.STRING:
        tensor = helper.make_tensor("t", kind, [3], ["a", "b", "c"])
    else:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        tensor = numpy_helper.from_array(np.zeros((3, 5), dtype), "t")
        assert tensors.stored_bytes(tensor) == len(tensor.raw_data)
    tensors.check_tensors(helper.make_model(helper.make_graph([], "g", [], [], [tensor])))


def test_tensors_are_checked_wherever_they_are(tmp_path: Path) -> None:
    bad = numpy_helper.from_array(np.zeros(4, np.float32), "bad")
    bad.dims[0] = 5
    node = helper.make_node("Constant", [], ["c"], value=bad)
    body = helper.make_graph([node], "b", [], [])
    function = helper.make_function("d", "F", [], ["c"], [node], [helper.make_opsetid("", 17)])
    sparse = onnx.SparseTensorProto(values=bad, dims=[9])
    whole = [
        helper.make_model(helper.make_graph([node], "g", [], [])),
        helper.make_model(helper.make_graph([helper.make_node("If", ["f"], ["c"], then_branch=body)], "g", [], [])),
        helper.make_model(helper.make_graph([], "g", [], []), functions=[function]),
        helper.make_model(helper.make_graph([], "g", [], [], sparse_initializer=[sparse])),
    ]
    for each in whole:
        with pytest.raises(ModelError, match="holds 16 bytes, not 20"):
            tensors.check_tensors(each)


def test_declared_types_that_are_none(tmp_path: Path) -> None:
    for kind in (-1, 99):
        bad = model()
        bad.graph.value_info.append(helper.make_tensor_value_info("m", kind, [1]))
        (tmp_path / "m.onnx").write_bytes(bad.SerializeToString())
        with pytest.raises(ModelError, match=f"value 'm' has the element type {kind}"):
            io.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("old", [b"node_y", b"const1", b"Relu"])
def test_names_that_are_no_text(tmp_path: Path, old: bytes) -> None:
    data = model().SerializeToString()
    assert old in data
    (tmp_path / "m.onnx").write_bytes(data.replace(old, old[:-1] + b"\x80"))
    with pytest.raises(ModelError, match="is no text: the file is damaged"):
        io.load(tmp_path / "m.onnx")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A model whose first weight is in ``w.data`` beside it, for the tests to say otherwise."""
    folder = tmp_path / "folder"
    folder.mkdir()
    made = model()
    (folder / "w.data").write_bytes(weight(made).raw_data)
    (tmp_path / "secret").write_bytes(weight(made).raw_data)
    weight(made).ClearField("raw_data")
    tensors.refer(weight(made), "w.data", 0, 2048)
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    io.load(folder / "m.onnx")
    return folder / "m.onnx"


def refer(path: Path, **entries: str) -> None:
    made = onnx.load(path, load_external_data=False)
    for entry in weight(made).external_data:
        entry.value = entries.pop(entry.key, entry.value)
    path.write_bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../secret"}, "not a file in the model's folder"),
        ({"location": "a/../../secret"}, "not a file in the model's folder"),
        ({"location": "..\\secret"}, "not a file in the model's folder"),
        ({"location": "/etc/passwd"}, "not a file in the model's folder"),
        ({"location": "C:\\secret"}, "not a file in the model's folder"),
        ({"location": ""}, "not a file in the model's folder"),
        ({"location": "w.data\0x"}, "not a file in the model's folder"),
        ({"location": "missing"}, "no such file beside the model"),
        ({"location": "."}, "no such file beside the model"),
        ({"offset": "1"}, "the file is damaged"),
        ({"offset": "-1"}, "the file is damaged"),
        ({"offset": str(2**63)}, "the file is damaged"),
        ({"length": "2044"}, "the file is damaged"),
        ({"length": str(2**62)}, "the file is damaged"),
        ({"length": "many"}, "no number"),
        ({"offset": "0x10"}, "no number"),
    ],
)
def test_files_elsewhere_or_of_another_size_are_refused(outside: Path, entries: dict[str, str], message: str) -> None:
    refer(outside, **entries)
    with pytest.raises(ModelError) as error:
        io.load(outside)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_links_are_refused(outside: Path) -> None:
    (outside.parent / "link").symlink_to(outside.parent.parent / "secret")
    (outside.parent / "folder").symlink_to(outside.parent.parent)
    for location in ("link", "folder/secret"):
        refer(outside, location=location)
        with pytest.raises(ModelError, match="a symbolic link: put the file itself into the folder"):
            io.load(outside)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_are_not_waited_for(outside: Path) -> None:
    os.mkfifo(outside.parent / "pipe")
    refer(outside, location="pipe")
    with pytest.raises(ModelError, match="no such file"):
        io.load(outside)
    with pytest.raises(ModelError, match="not a regular file"):
        io.load(outside.parent / "pipe")


def test_the_folder_may_be_reached_by_a_link(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(outside.parent)
    assert weight(io.load(tmp_path / "way" / "m.onnx")).raw_data


def test_the_same_bytes_many_times_stay_where_they_are(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "IN_MEMORY", 10_000)
    made = onnx.load(outside, load_external_data=False)
    for i in range(20):
        made.graph.initializer.add().CopyFrom(weight(made))
        made.graph.initializer[-1].name = f"copy{i}"
    outside.write_bytes(made.SerializeToString())
    loaded = io.load(outside)
    assert all(tensors.is_external(t) for t in loaded.graph.initializer if t.name.startswith("copy"))
    x = {"x": np.ones((2, 16), np.float32)}
    assert relative_error(run(model(), x), run(tensors.inlined(loaded), x)) == 0


def test_a_model_in_memory_needs_its_weights() -> None:
    made = model()
    weight(made).ClearField("raw_data")
    tensors.refer(weight(made), "w.data", 0, 2048)
    layer = io.to_graph(made).nodes[0]
    with pytest.raises(ModelError, match="load it with its external data"):
        tensors.values_of(layer.inputs[1])


def test_one_message_is_written_in_parts(tmp_path: Path) -> None:
    made = model()
    made.doc_string = "d" * 300
    with (tmp_path / "m.onnx").open("wb") as file:
        tensors.write_whole(made, file)
    assert onnx.load(tmp_path / "m.onnx") == made


GROWING = {
    "ConstantOfShape": ([np.array([2**14, 2**15])], {}),
    "Expand": ([np.zeros(1, np.float32), np.array([2**29])], {}),
    "Tile": ([np.zeros(1024, np.float32), np.array([2**19])], {}),
    "Pad": ([np.zeros(4, np.float32), np.array([2**29, 0])], {}),
    "Gather": ([np.zeros((1, 2**20), np.float32), np.zeros(2**9, np.int64)], {"axis": 0}),
    "Add": ([np.zeros((2**15, 1), np.float32), np.zeros((1, 2**14), np.float32)], {}),
}


@pytest.mark.parametrize("op", GROWING)
def test_constants_do_not_grow_without_bounds(op: str) -> None:
    values, attributes = GROWING[op]
    net = Net()
    net.output(net.op(op, *(net.constant(v) for v in values), out="y", **attributes))
    graph = io.to_graph(net.build())
    assert constant_value(graph, graph.outputs[0]) is None


def test_constants_that_grow_little_are_folded() -> None:
    net = Net()
    small = net.op("Expand", net.constant(np.float32([[1], [2]])), net.constant([3, 2, 2]))
    padded = net.op("Pad", net.op("Tile", small, net.constant([1, 1, 3])), net.constant([0, 1, 0, 0, 1, 0]))
    net.output(net.op("Gather", padded, net.constant([1, 1]), axis=1, out="y"))
    graph = io.to_graph(net.build())
    value = constant_value(graph, graph.outputs[0])
    assert value is not None and value.shape == (3, 2, 6) and (value == 1).all()


def test_many_constants_share_the_bound() -> None:
    net = Net()
    shape = net.constant([2**13, 2**13])
    parts = [net.op("ConstantOfShape", shape) for _ in range(8)]
    net.output(net.op("Concat", *parts, axis=0, out="y"))
    graph = io.to_graph(net.build())
    known: dict = {}
    for node in graph.nodes:
        constant_value(graph, node.outputs[0], known)
    assert sum(value.size for value in known.values() if value is not None) <= 2**28


def test_empty_lists() -> None:
    net = Net()
    net.nodes.append(helper.make_node("Constant", [], ["c"]))
    net.nodes[-1].attribute.append(onnx.AttributeProto(name="value_ints", type=onnx.AttributeProto.INTS))
    net.output(net.op("Reshape", net.input("x", [1]), "c", out="y"), shape=[])
    made = net.build()
    again = io.to_proto(io.to_graph(made), made)
    x = {"x": np.ones(1, np.float32)}
    assert relative_error(run(made, x), run(again, x)) == 0
    bad = model()
    bad.graph.node[1].attribute.append(onnx.AttributeProto(name="pads", type=onnx.AttributeProto.INTS))
    with pytest.raises(ModelError, match="empty list as attribute 'pads'"):
        io.to_graph(bad)


def test_values_without_bounds() -> None:
    net = Net()
    a = net.input("x", ["N", 64])
    for _ in range(40):
        a = net.op("Concat", a, a, axis=1)
    net.output(a)
    with pytest.raises(ModelError, match="bytes are too many"):
        io.to_graph(net.build())


@pytest.mark.parametrize("domain", ["", "com.example"])
def test_cycles(tmp_path: Path, domain: str) -> None:
    net = Net()
    x = net.input("x", [2, 4])
    net.op("Magic" if domain else "Sum", x, "b", out="a", domain=domain)
    net.output(net.op("Relu", "a", out="b"), shape=[2, 4])
    (tmp_path / "m.onnx").write_bytes(net.build().SerializeToString())
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        io.load(tmp_path / "m.onnx")
