"""Model files: what is refused and how it is said, what is kept, and that nothing is half written."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import Net, op_counts, random_feed, relative_error, run
from tetris_onnx.graph import io, tensors
from tetris_onnx.graph.io import ModelError
from tetris_onnx.graph.layers import find_layers


def small(opset: int = 17) -> Net:
    net = Net(opset)
    x = net.input("x", ["N", 4, 8, 8])
    net.output(net.op("Relu", net.conv(x, (4, 8)), out="y"))
    return net


def roundtrip(model: onnx.ModelProto) -> onnx.ModelProto:
    return io.to_proto(io.to_graph(model), model)


class TestLoad:
    def test_reads_what_save_wrote(self, tmp_path: Path) -> None:
        model = small().build()
        io.save(model, tmp_path / "m.onnx")
        assert io.load(tmp_path / "m.onnx") == model
        assert io.load(str(tmp_path / "m.onnx")) == model

    @pytest.mark.parametrize("content", [b"", b"garbage", b"\x08", b"\x00" * 64, bytes(range(256))], ids=range(5))
    def test_other_files_are_refused_in_one_line(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        with pytest.raises(ModelError) as error:
            io.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    def test_truncated_files_are_refused(self, tmp_path: Path) -> None:
        data = small().build().SerializeToString()
        path = tmp_path / "m.onnx"
        for length in range(1, len(data) - 1, len(data) // 40):
            path.write_bytes(data[:length])
            with pytest.raises(ModelError) as error:
                io.load(path)
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("name", "message"), [("missing.onnx", "no such file"), (".", "a folder")])
    def test_missing_file_and_folder(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            io.load(tmp_path / name)

    def test_a_value_of_a_type_that_graphs_do_not_hold(self) -> None:
        model = small().build()
        model.graph.value_info.add(
            name=model.graph.node[0].output[0]
        ).type.optional_type.elem_type.tensor_type.elem_type = 1
        with pytest.raises(ModelError, match="'conv1' is of a type that cannot be rewritten"):
            io.to_graph(model)

    def test_a_model_that_breaks_the_rules(self, tmp_path: Path) -> None:
        net = small()
        net.nodes[-1].input[0] = "nowhere"
        path = tmp_path / "m.onnx"
        path.write_bytes(net.build().SerializeToString())
        with pytest.raises(ModelError, match="not a valid ONNX model"):
            io.load(path)

    def test_weights_of_another_size_than_declared(self, tmp_path: Path) -> None:
        model = small().build()
        model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ModelError):
            io.load(path)

    def test_operators_of_another_domain_are_let_in(self, tmp_path: Path) -> None:
        net = Net()
        net.output(net.op("Magic", net.input("x", [2, 2]), domain="com.example", out="y"), shape=[2, 2])
        io.save(net.build(), tmp_path / "m.onnx")
        assert op_counts(io.load(tmp_path / "m.onnx")) == {"Magic": 1}

    def test_what_onnxruntime_runs_although_it_is_not_quite_onnx(self, tmp_path: Path) -> None:
        """Nodes in any order, as onnxruntime's float16 converter leaves them, and an output whose shape is not told."""
        model = small().build()
        wanted = [node.op_type for node in model.graph.node]
        nodes = list(model.graph.node)[::-1]
        model.graph.ClearField("node")
        model.graph.node.extend(nodes)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        found = io.load(tmp_path / "m.onnx")
        assert [node.op_type for node in found.graph.node] == wanted == ["Conv", "Relu"]
        assert not found.graph.output[0].type.tensor_type.HasField("shape")
        assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]

    def test_external_data_is_read_and_its_absence_told(self, tmp_path: Path) -> None:
        model = small().build()
        onnx.save_model(
            onnx.ModelProto.FromString(model.SerializeToString()),
            tmp_path / "m.onnx",
            save_as_external_data=True,
            location="m.data",
            size_threshold=0,
        )
        feed = random_feed(model)
        assert relative_error(run(model, feed), run(io.load(tmp_path / "m.onnx"), feed)) == 0
        (tmp_path / "m.data").unlink()
        with pytest.raises(ModelError) as error:
            io.load(tmp_path / "m.onnx")
        assert "\n" not in str(error.value)


class TestSave:
    def test_replaces_the_file_and_leaves_nothing_beside_it(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(b"old")
        model = small().build()
        io.save(model, path)
        assert path.read_bytes() == model.SerializeToString()
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
        assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
        assert stat.S_IMODE(path.stat().st_mode) & 0o111 == 0

    def test_a_failure_keeps_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(b"old")
        with pytest.raises(RuntimeError), io.write_atomically(path) as file:
            file.write(b"half")
            raise RuntimeError
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    def test_a_full_disk_is_told_in_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"cannot write .*m\.onnx"), io.write_atomically(tmp_path / "m.onnx"):
            raise OSError(28, "No space left on device")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("large", [False, True])
    def test_a_disk_that_is_full(self, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        resource = pytest.importorskip("resource")
        path = tmp_path / "m.onnx"
        io.save(small().build(), path)
        before = path.read_bytes()
        if large:
            monkeypatch.setattr(io, "_MAX_PROTO_BYTES", 1000)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(ModelError, match=r"cannot write .*m\.onnx: File too large"):
                io.save(dense(), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    @pytest.mark.parametrize("large", [False, True])
    def test_no_such_folder(self, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if large:
            monkeypatch.setattr(io, "_MAX_PROTO_BYTES", 100)
        with pytest.raises(ModelError, match="cannot write"):
            io.save(small().build(), tmp_path / "no" / "m.onnx")

    def test_the_path_is_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "m.onnx").mkdir()
        with pytest.raises(ModelError, match="cannot write"):
            io.save(small().build(), tmp_path / "m.onnx")
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    def test_large_models_keep_their_weights_beside_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(io, "_MAX_PROTO_BYTES", 1000)
        net = Net()
        x = net.input("x", ["N", 32])
        net.output(net.gemm(x, (32, 64)))
        model = net.build()
        before = model.SerializeToString()
        io.save(model, tmp_path / "m.onnx")
        assert model.SerializeToString() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
        assert (tmp_path / "m.onnx").stat().st_size < 1000
        feed = random_feed(model)
        assert relative_error(run(model, feed), run(io.load(tmp_path / "m.onnx"), feed)) == 0


class TestWeightsBeside:
    """Models above 2 GB, made small: what is kept in files, and that a model and its weights belong together."""

    @pytest.fixture(autouse=True)
    def low_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(io, "_MAX_PROTO_BYTES", 3000)
        monkeypatch.setattr(io, "IN_MEMORY", 2000)
        monkeypatch.setattr(tensors, "IN_MEMORY", 2000)

    def test_a_model_is_the_same_through_files(self, tmp_path: Path) -> None:
        model = dense()
        io.save(model, tmp_path / "m.onnx")
        loaded = io.load(tmp_path / "m.onnx")
        assert [tensors.is_external(t) for t in loaded.graph.initializer] == [True, False, True, False]
        assert loaded.ByteSize() < 2000 < io.size_of(loaded)
        assert tensors.inlined(loaded) == model
        feed = random_feed(model)
        assert relative_error(run(model, feed), run(tensors.inlined(roundtrip(loaded)), feed)) == 0
        # And once more to another folder, from the files.
        (tmp_path / "other").mkdir()
        io.save(loaded, tmp_path / "other" / "again.onnx")
        assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["again.onnx", "again.onnx.data"]
        assert tensors.inlined(io.load(tmp_path / "other" / "again.onnx")) == model

    def test_weights_stay_in_files_through_the_graph(self, tmp_path: Path) -> None:
        io.save(dense(), tmp_path / "m.onnx")
        graph = io.to_graph(io.load(tmp_path / "m.onnx"))
        layer = find_layers(graph)[0]
        first = layer.weight
        assert first is not layer.weight, "read each time, not kept"
        np.testing.assert_array_equal(first, layer.weight)
        weights = io.open_weights()
        proto = io.to_proto(graph, io.load(tmp_path / "m.onnx"), weights)
        assert proto.ByteSize() < 2000
        assert tensors.inlined(proto).graph.initializer[0].raw_data == first.tobytes()
        folder = Path(weights.path).parent
        assert folder.is_dir()
        del weights
        assert not folder.exists()

    def test_new_weights_get_a_free_name_and_the_old_ones_go(self, tmp_path: Path) -> None:
        path, other = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
        other.write_bytes(b"not ours")
        for seed in range(2):
            io.save(dense(seed), path)
            (weights,) = {p for p in tmp_path.iterdir()} - {path, other}
            assert re.fullmatch(r"m\.onnx\.[0-9a-f]{8}\.data", weights.name)
            assert tensors.inlined(io.load(path)) == dense(seed)
        assert other.read_bytes() == b"not ours"
        io.save(small().build(), path)  # small enough for one file
        assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}

    @pytest.mark.parametrize("call", ["link", "fsync", "replace", "unlink"])
    @pytest.mark.parametrize("number", [1, 2])
    def test_a_failure_leaves_the_old_pair(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
    ) -> None:
        path = tmp_path / "m.onnx"
        io.save(dense(0), path)
        calls = 0

        def failing(*args: Any, **names: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(28, "No space left on device")
            original(*args, **names)

        original = getattr(os, call)
        monkeypatch.setattr(os, call, failing)
        with contextlib.suppress(ModelError):
            io.save(dense(1), path)
        monkeypatch.setattr(os, call, original)
        found = tensors.inlined(io.load(path))
        assert found in (dense(0), dense(1))

    def test_two_runs_to_one_output(self, tmp_path: Path) -> None:
        models = [dense(i) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                list(pool.map(lambda model: io.save(model, tmp_path / "m.onnx"), models))
                assert tensors.inlined(io.load(tmp_path / "m.onnx")) in models


def dense(seed: int = 0) -> onnx.ModelProto:
    """Two products with a bias, 6 kB of weights."""
    net = Net(seed=seed)
    x = net.gemm(net.input("x", ["N", 16]), (16, 32))
    net.output(net.op("Relu", net.gemm(x, (32, 32)), out="y"))
    return net.build()


class TestToProto:
    def test_keeps_what_a_graph_does_not_hold(self) -> None:
        net = small()
        net.inputs[0].doc_string = "an image"
        model = net.build()
        model.producer_name, model.producer_version = "maker", "1.2"
        model.domain, model.model_version, model.doc_string = "org.example", 7, "about it"
        model.graph.doc_string = "about the graph"
        model.metadata_props.add(key="classes", value="cat,dog")
        kept = roundtrip(model)
        assert (kept.producer_name, kept.producer_version) == ("maker", "1.2")
        assert (kept.domain, kept.model_version, kept.doc_string) == ("org.example", 7, "about it")
        assert kept.graph.doc_string == "about the graph"
        assert kept.metadata_props == model.metadata_props
        assert kept.graph.input == model.graph.input and kept.graph.output == model.graph.output

    def test_leaves_the_model_as_it_was(self) -> None:
        model = small().build()
        before = model.SerializeToString()
        graph = io.to_graph(model)
        for tensor in graph.tensors().values():
            tensor.name += "/renamed"
        graph.inputs[0].name = "x"
        assert model.SerializeToString() == before
        io.to_proto(io.to_graph(model), model)
        assert model.SerializeToString() == before

    def test_sizes_that_differ_do_not_get_one_name(self) -> None:
        # onnxruntime takes equal names for equal sizes and reuses memory by them.
        net = Net()
        x = net.input("x", [None, 8, None, None])
        a = net.op("Relu", net.conv(x, (8, 8), strides=[2, 2]))
        net.output(net.conv(net.op("Relu", a), (8, 8), strides=[2, 2]))
        model = roundtrip(net.build())
        names = [d.dim_param for v in model.graph.value_info for d in v.type.tensor_type.shape.dim if d.dim_param]
        assert len(names) == len(set(names))
        feed = {"x": np.ones((2, 8, 33, 17), np.float32)}
        assert relative_error(run(net.build(), feed), run(model, feed)) == 0

    def test_weights_among_the_inputs_are_no_longer_inputs(self) -> None:
        net = small(9)
        for initializer in net.initializers:
            net.input(initializer.name, list(initializer.dims))
        model = net.build(ir_version=3)
        result = roundtrip(io.raise_opset(model))
        assert [i.name for i in result.graph.input] == ["x"]
        onnx.checker.check_model(result, full_check=True)
        feed = random_feed(model)
        assert relative_error(run(model, feed), run(result, feed)) == 0

    def test_every_node_has_a_name_of_its_own(self) -> None:
        net = Net()
        x = net.input("x", ["N", 4])
        for out in ("a", "b", "c", "d"):
            x = net.op("Relu", x, out=out)
        net.output(x)
        for node, name in zip(net.nodes, ["b", "", "b", ""], strict=True):
            node.name = name
        names = [node.name for node in io.to_graph(net.build()).nodes]
        assert names[0] == "b" and names[3] == "d"
        assert len(set(names)) == 4 and all(names)

    def test_values_that_are_no_tensors(self) -> None:
        net = Net()
        x = net.input("x", ["N", 4])
        net.op("SequenceConstruct", x, x, out="s")
        model = net.build()
        model.graph.output.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["N", 4]))
        result = roundtrip(model)
        onnx.checker.check_model(result, full_check=True)
        assert result.graph.output == model.graph.output

    def test_sparse_initializers(self) -> None:
        net = Net()
        x = net.input("x", [2, 3])
        net.output(net.op("Add", x, "s", out="y"))
        model = net.build()
        values = numpy_helper.from_array(np.array([5.0, 7.0], np.float32), "s")
        indices = numpy_helper.from_array(np.array([1, 5], np.int64), "s_index")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2, 3]))
        result = roundtrip(model)
        assert len(result.graph.sparse_initializer) == 1
        feed = random_feed(model)
        assert relative_error(run(model, feed), run(result, feed)) == 0

    def test_initializers_read_in_a_subgraph_too(self) -> None:
        model = if_model()
        result = roundtrip(model)
        onnx.checker.check_model(result, full_check=True)
        for flag in (True, False):
            feed = {"x": np.ones((2, 4), np.float32), "flag": np.array(flag)}
            assert relative_error(run(model, feed), run(result, feed)) == 0


def if_model() -> onnx.ModelProto:
    """y = x + c where flag, else x * c, with the constant c in both graphs."""
    net = Net()
    x = net.input("x", ["N", 4])
    net.input("flag", [], TensorProto.BOOL)
    c = net.random(4, name="c")
    branches = {}
    for name, op in (("then_branch", "Add"), ("else_branch", "Mul")):
        node = helper.make_node(op, [x, c], [f"{name}_y"])
        branches[name] = helper.make_graph(
            [node], name, [], [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["N", 4])]
        )
    y = net.op("If", "flag", **branches)
    net.output(net.op("Add", y, c, out="y"))
    return net.build()


class TestOpset:
    @pytest.mark.parametrize("opset", range(7, 13))
    def test_older_models_compute_the_same_after_conversion(self, opset: int) -> None:
        net = Net(opset)
        x = net.input("x", ["N", 4, 9, 9])
        a = net.op("Relu", net.batchnorm(net.conv(x, (4, 8)), 8))
        a = net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
        a = net.op("Dropout", a)
        a = net.op("Flatten", a)
        net.output(net.op("Softmax", net.gemm(a, (128, 5)), out="y", axis=1))
        model = net.build(ir_version=4 if opset < 9 else 7)
        model.metadata_props.add(key="k", value="v")
        model.doc_string = "doc"
        before = model.SerializeToString()
        raised = io.raise_opset(model)
        assert model.SerializeToString() == before
        assert io.opset(raised) == io.MIN_OPSET
        assert raised.metadata_props == model.metadata_props and raised.doc_string == "doc"
        result = roundtrip(raised)
        onnx.checker.check_model(result, full_check=True)
        feed = random_feed(model)
        assert relative_error(run(model, feed), run(result, feed)) < 1e-6  # the same operators on other versions

    @pytest.mark.parametrize("opset", [13, 21])
    def test_newer_models_stay_as_they_are(self, opset: int) -> None:
        model = small(opset).build()
        assert io.raise_opset(model) is model

    def test_conversion_invents_no_names(self) -> None:
        model = small(9).build()
        model.graph.node[0].name = ""
        raised = io.raise_opset(model)
        assert [(node.op_type, node.name) for node in raised.graph.node] == [("Conv", ""), ("Relu", "node_y")]
        assert [node.name for node in io.to_graph(raised).nodes] == ["conv1", "node_y"]

    def test_what_cannot_be_converted_is_told_in_one_line(self) -> None:
        net = Net(9)
        net.output(net.op("Magic", net.input("x", [2, 2]), domain="com.example", out="y"))
        net.nodes.append(helper.make_node("NoSuchOperator", ["x"], ["z"]))
        with pytest.raises(ModelError, match=r"opset 9 .*export it again") as error:
            io.raise_opset(net.build())
        assert "\n" not in str(error.value)

    def test_the_domain_may_be_spelled_out(self) -> None:
        model = small().build()
        model.opset_import[0].domain = "ai.onnx"
        assert io.opset(model) == 17
        assert io.raise_opset(model) is model
        assert isinstance(io.to_graph(model), gs.Graph)
