"""samples/inference_server: the repository says what the model is; its config is one of NVIDIA's published schema."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from models import Net
from tetris_onnx import get_library_path

SOURCE = Path(__file__).parents[2] / "samples" / "inference_server" / "make_repository.py"


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


make = load("make_repository", SOURCE)


def schema() -> Any:
    """The messages of model_config.proto, without the rest of the client, which takes grpc."""
    found = importlib.util.find_spec("tritonclient")
    path = None if found is None else Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    if path is None or not path.is_file():
        pytest.skip("tritonclient, which brings the schema, is not installed")
    try:
        return load("model_config_pb2", path)
    except Exception as error:  # generated for another version of protobuf
        pytest.skip(f"tritonclient's schema cannot be read here: {error}")


def repository(model: Path, folder: Path, *options: str) -> Path:
    assert make.main([str(model), "-o", str(folder), *options]) == 0
    return folder / model.stem


def test_the_repository_of_the_block_sparse_sample(block_sparse_sample: Path, tmp_path: Path) -> None:
    folder = repository(block_sparse_sample, tmp_path, "--mount", "/srv/models/", "--batch", "8", "--instances", "2")
    library = Path(get_library_path())
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(["1/model.onnx", "config.pbtxt", library.name])
    assert (folder / "1" / "model.onnx").read_bytes() == block_sparse_sample.read_bytes()
    text = (folder / "config.pbtxt").read_text()
    assert f'op_library_filename: [ "/srv/models/{folder.name}/{library.name}" ]' in text

    # What the server does, as far as it goes without it: onnxruntime, the library beside the model, a whole batch.
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(folder / library.name))
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), options)
    assert session.run(None, {"image": np.zeros((8, 1, 28, 28), np.float32)})[0].shape == (8, 10)


def test_the_config_is_of_the_published_schema(block_sparse_sample: Path, tmp_path: Path) -> None:
    messages = schema()
    from google.protobuf import text_format

    folder = repository(block_sparse_sample, tmp_path, "--batch", "8", "--delay-us", "250", "--instances", "2")
    found = text_format.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())
    model = onnx.load(block_sparse_sample)
    assert (found.name, found.backend, found.max_batch_size) == (folder.name, "onnxruntime", 8)
    for ours, theirs in ((found.input, model.graph.input), (found.output, model.graph.output)):
        assert [value.name for value in ours] == [value.name for value in theirs]
        assert {messages.DataType.Name(value.data_type) for value in ours} == {"TYPE_FP32"}
    assert list(found.input[0].dims) == [1, 28, 28] and list(found.output[0].dims) == [10]
    assert found.dynamic_batching.max_queue_delay_microseconds == 250
    group = found.instance_group[0]
    assert (group.count, messages.ModelInstanceGroup.Kind.Name(group.kind)) == (2, "KIND_CPU")
    assert found.parameters["intra_op_thread_count"].string_value == "1"
    assert list(found.model_operations.op_library_filename) == [
        f"/models/{folder.name}/{Path(get_library_path()).name}"
    ]


def test_a_dense_model_needs_no_library(dense_sample: Path, tmp_path: Path) -> None:
    folder = repository(dense_sample, tmp_path)
    assert "model_operations" not in (folder / "config.pbtxt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "config.pbtxt"]


def test_a_fixed_batch_is_not_batched(tmp_path: Path) -> None:
    net = Net()
    net.output(net.gemm(net.input("x", [4, 8]), (8, 3)))
    onnx.save(net.build(), tmp_path / "fixed.onnx")
    text = (repository(tmp_path / "fixed.onnx", tmp_path / "models") / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in text and "dynamic_batching" not in text
    assert re.search(r'name: "x" data_type: TYPE_FP32 dims: \[ 4, 8 \]', text)


def test_what_is_there_is_not_overwritten(
    dense_sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository(dense_sample, tmp_path)
    assert make.main([str(dense_sample), "-o", str(tmp_path)]) == 1
    assert "exists; remove it, or give another folder" in capsys.readouterr().err
