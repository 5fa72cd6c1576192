"""Writes a model of any size, with its weights in a file beside it, in the memory of one layer.

    python tests/large_model.py large.onnx --gigabytes 3

A stack of matrix products and Relus. Random weights: what is to be seen is time and memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def write_large_model(path: Path, layers: int, width: int) -> None:
    """``layers`` products of ``width`` x ``width`` weights: 4 * layers * width^2 bytes, in PATH.data."""
    rng = np.random.default_rng(0)
    scale = np.float32(np.sqrt(2 / width))
    nodes, initializers, value, offset = [], [], "x", 0
    with path.with_name(f"{path.name}.data").open("wb") as file:
        for i in range(layers):
            weight = rng.standard_normal((width, width), np.float32) * scale
            file.write(weight.tobytes())
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, entry in (("location", f"{path.name}.data"), ("offset", offset), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(entry))
            offset += weight.nbytes
            initializers.append(tensor)
            # Both ways that a product is stored, with and without a bias.
            if i % 2:
                nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [f"m{i}"], f"layer{i}"))
            else:
                initializers.append(numpy_helper.from_array(rng.standard_normal(width, np.float32), f"b{i}"))
                inputs = [value, f"w{i}", f"b{i}"]
                nodes.append(helper.make_node("Gemm", inputs, [f"m{i}"], f"layer{i}", transB=1))
            nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}"], f"relu{i}"))
            value = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", width])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--width", type=int, default=4096)
    args = parser.parse_args()
    layers = round(args.gigabytes * 1e9 / (4 * args.width**2))
    write_large_model(args.path, layers, args.width)
    print(f"{args.path}: {layers} layers, {layers * 4 * args.width**2 / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
