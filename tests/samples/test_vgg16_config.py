"""samples/vgg16/deep_compression.toml gives every layer of VGG16 the rate of its own, whichever exporter named it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tetris_onnx.config import load_config

CONFIG = Path(__file__).parents[2] / "samples" / "vgg16" / "deep_compression.toml"

CONV_SPARSITY = (0.42, 0.78, 0.66, 0.64, 0.47, 0.76, 0.58, 0.68, 0.73, 0.66, 0.65, 0.71, 0.64)
FC_SPARSITY = (0.96, 0.96, 0.77)
# Where torchvision's vgg16 has its convolutions and linear layers; ReLU, MaxPool2d and Dropout lie between.
CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
LINEARS = (0, 3, 6)

NAMINGS = {
    "torchscript": [f"/features/features.{i}/Conv" for i in CONVS]
    + [f"/classifier/classifier.{i}/Gemm" for i in LINEARS],
    "plain": [f"features.{i}" for i in CONVS] + [f"classifier.{i}" for i in LINEARS],
    "dynamo": ["node_conv2d"]
    + [f"node_conv2d_{i}" for i in range(1, 13)]
    + ["node_linear", "node_linear_1", "node_linear_2"],
}


@pytest.mark.parametrize("names", NAMINGS.values(), ids=NAMINGS)
def test_each_layer_gets_its_own_rate_from_exactly_one_pattern(names: list[str]) -> None:
    config = load_config(CONFIG)
    assert [config.for_layer(name).sparsity for name in names] == [*CONV_SPARSITY, *FC_SPARSITY]
    assert {config.for_layer(name).block_size for name in names} == {(32, 32)}

    matches = [[rule.pattern for rule in config.layers if fnmatchcase(name, rule.pattern)] for name in names]
    assert [len(patterns) for patterns in matches] == [1] * 16
    assert len({patterns[0] for patterns in matches}) == 16, "two layers share a pattern"


def test_every_pattern_serves_one_of_the_namings() -> None:
    assert load_config(CONFIG).unused_patterns(name for names in NAMINGS.values() for name in names) == ()


@pytest.mark.parametrize("name", ["/features/features.1/Relu", "features.1", "features.20", "node_conv2d_13", "fc"])
def test_a_layer_without_a_pattern_stays_dense(name: str) -> None:
    layer = load_config(CONFIG).for_layer(name)
    assert layer.sparsity == 0
    assert not layer.explicit
