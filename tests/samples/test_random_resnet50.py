"""samples/resnet50: the network is ResNet-50 v1.5, its activations stay in bounds, and uniform.toml fits its names."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from tetris_onnx.config import load_config
from tetris_onnx.session import open_session

SAMPLE = Path(__file__).parents[2] / "samples" / "resnet50"


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    spec = importlib.util.spec_from_file_location("random_resnet50", SAMPLE / "random_resnet50.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.resnet50()


def test_it_is_resnet50(network: onnx.ModelProto) -> None:
    onnx.checker.check_model(network, full_check=True)
    assert Counter(node.op_type for node in network.graph.node) == {
        **{"Conv": 53, "Relu": 49, "Add": 16, "Gemm": 1},
        **{"MaxPool": 1, "GlobalAveragePool": 1, "Flatten": 1},
    }
    # torchvision's 25,557,032 without the 2 x 26,560 parameters of BatchNormalization, with a bias for each channel.
    assert sum(math.prod(t.dims) for t in network.graph.initializer) == 25_557_032 - 26_560
    inferred = onnx.shape_inference.infer_shapes(network)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
    weights = {t.name: t.dims for t in network.graph.initializer}
    multiplications = sum(
        math.prod(weights[node.input[1]]) * math.prod(shapes[node.output[0]][2:])
        for node in network.graph.node
        if node.op_type == "Conv"
    )
    # The stride in the 3x3 (v1.5): 4.09 G with the last layer; in the 1x1 it would be 3.8 G.
    assert multiplications + 2048 * 1000 == 4_089_184_256


def test_activations_stay_in_bounds_and_batches_are_free(network: onnx.ModelProto) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(network)
    sums = [node.output[0] for node in model.graph.node if node.op_type == "Add"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sums)
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    values = open_session(model, threads=1).run(None, {"input": x})
    assert values[0].shape == (2, 1000)
    # Neither growing nor vanishing over 16 sums, with room for other seeds.
    assert all(0.5 < value.std() < 50 for value in values)


def test_the_config_names_all_layers_but_first_and_last(network: onnx.ModelProto) -> None:
    config = load_config(SAMPLE / "uniform.toml")
    names = [node.name for node in network.graph.node if node.op_type in ("Conv", "Gemm")]
    assert [name for name in names if config.for_layer(name).skip] == ["/conv1/Conv", "/fc/Gemm"]
    assert {config.for_layer(name).sparsity for name in names if not config.for_layer(name).skip} == {0.73}
    assert config.unused_patterns(names) == ()
