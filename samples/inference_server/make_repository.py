"""Make a model repository for NVIDIA's Triton Inference Server from an ONNX file, the op library included.

    python samples/inference_server/make_repository.py fashion_mnist_bs.onnx -o models

writes

    models/fashion_mnist_bs/config.pbtxt    inputs and outputs, dynamic batching, instances, where the op library is
    models/fashion_mnist_bs/1/model.onnx
    models/fashion_mnist_bs/libtetris_onnx_ops.so

The server hands the library's path to onnxruntime as it is, so it has to be the path inside the server's container:
``--mount`` says where the repository will be there. A dense model gets the same files without the library.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

import tetris_onnx
from tetris_onnx.graph.layers import DOMAIN

TYPES = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.BOOL: "TYPE_BOOL",
}


class RepositoryError(ValueError):
    """A model that cannot be served, or a folder that cannot be written."""


def tensors(model: onnx.ModelProto) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """The inputs (without those that an initializer sets) and the outputs."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants], list(model.graph.output)


def sizes(value: onnx.ValueInfoProto) -> list[int]:
    """The shape, -1 for a size that is open. Raises `RepositoryError` for what is no tensor of a known rank."""
    tensor = value.type.tensor_type
    if tensor.elem_type not in TYPES or not tensor.HasField("shape"):
        raise RepositoryError(f"{value.name!r} is no tensor of numbers with a known number of axes")
    return [dim.dim_value if dim.dim_value > 0 else -1 for dim in tensor.shape.dim]


def config(
    model: onnx.ModelProto, name: str, library: str | None, batch: int, delay_us: int, instances: int, threads: int
) -> str:
    """The text of config.pbtxt. ``batch``: samples that the server may put together; 1 where the model fixes its batch.

    Raises `RepositoryError`.
    """
    inputs, outputs = tensors(model)
    open_batch = all(sizes(value)[:1] == [-1] for value in (*inputs, *outputs))
    # With batching, the server adds the first axis itself; without, max_batch_size is 0 and shapes are whole.
    batched = open_batch and batch > 1

    def block(key: str, values: Sequence[onnx.ValueInfoProto]) -> str:
        rows = []
        for value in values:
            dims = ", ".join(map(str, sizes(value)[1 if batched else 0 :]))
            kind = TYPES[value.type.tensor_type.elem_type]
            rows.append(f"  {{ name: {json.dumps(value.name)} data_type: {kind} dims: [ {dims} ] }}")
        return f"{key} [\n" + ",\n".join(rows) + "\n]\n"

    text = f'name: {json.dumps(name)}\nbackend: "onnxruntime"\nmax_batch_size: {batch if batched else 0}\n'
    text += block("input", inputs) + block("output", outputs)
    if batched:
        text += f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}\n"
    text += f"instance_group [ {{ count: {instances} kind: KIND_CPU }} ]\n"
    text += f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{threads}" }} }}\n'
    if library is not None:
        text += f"model_operations {{ op_library_filename: [ {json.dumps(library)} ] }}\n"
    return text


def make_repository(
    model: Path, folder: Path, mount: str, batch: int, delay_us: int, instances: int, threads: int
) -> Path:
    """Write the model's folder in ``folder`` and return it. Raises `RepositoryError`, `OSError`."""
    proto = onnx.load(model, load_external_data=False)
    name = re.sub(r"[^\w.-]", "_", model.stem)
    target = folder / name
    if target.exists():
        raise RepositoryError(f"{target} exists; remove it, or give another folder")
    ours = any(opset.domain == DOMAIN for opset in proto.opset_import)
    source = Path(tetris_onnx.get_library_path()) if ours else None
    library = None if source is None else f"{mount.rstrip('/')}/{name}/{source.name}"
    text = config(proto, name, library, batch, delay_us, instances, threads)
    (target / "1").mkdir(parents=True)
    shutil.copyfile(model, target / "1" / "model.onnx")
    beside = model.with_name(f"{model.name}.data")  # the weights of a model above 2 GB
    if beside.exists():
        shutil.copyfile(beside, target / "1" / beside.name)
    if source is not None:
        shutil.copy(source, target / source.name)
    (target / "config.pbtxt").write_text(text, encoding="utf-8")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the model repository")
    parser.add_argument("--mount", default="/models", help="where the server sees the repository (default /models)")
    parser.add_argument("--batch", type=int, default=16, help="samples put together at most (default 16)")
    parser.add_argument("--delay-us", type=int, default=500, help="that a sample waits for others (default 500)")
    parser.add_argument("--instances", type=int, default=1, help="copies of the model that run at a time (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="of each instance (default 1)")
    a = parser.parse_args(arguments)
    if min(a.batch, a.instances, a.threads) < 1 or a.delay_us < 0:
        parser.error("--batch, --instances and --threads are at least 1, --delay-us at least 0")
    if not a.model.is_file():
        parser.error(f"{a.model}: no such file")
    try:
        made = make_repository(a.model, a.output, a.mount, a.batch, a.delay_us, a.instances, a.threads)
    except (RepositoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{made}: serve it with tritonserver --model-repository={a.mount}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
