"""The tiles that the op library chooses: those that cuda_cost.py reckons with, and enough programs for a GPU."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.custom_ops.cuda import stand_in
from tests.custom_ops.cuda.stand_in import StandIn
from tetris_onnx.timing.cuda_cost import choose_tile

sys.path.insert(0, str(stand_in.OPS / "bench"))
import gpu_library
import gpu_tiles

from shapes import Layer, read_layers

LAYERS = {
    f"{network} {layer.name}": layer
    for network in gpu_tiles.NETWORKS
    for layer in read_layers(stand_in.OPS / "bench" / f"{network}.txt")
    if layer.inputs < 10000  # fc6: 100 million weights
}
PROCESSORS = 132


@pytest.fixture(scope="module")
def kernels(process_driver: StandIn, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    process_driver.reset()
    return gpu_library.compile_library(tmp_path_factory.mktemp("kernels"), "-O0")


def make(kernels: ctypes.CDLL, layer: Layer, kind: str, block: tuple[int, int]) -> gpu_library.Sparse:
    kernel = (layer.kernel, layer.kernel) if layer.is_conv else ()
    shape = (layer.outputs, layer.inputs, *kernel)
    block = min(block[0], layer.outputs), min(block[1], layer.inputs)
    last = (layer.is_conv, layer.is_conv)
    rng = np.random.default_rng(0)
    return gpu_library.Sparse(kernels, kind, shape, block, 0.27, rng, stride=layer.stride, pad=layer.pad, last=last)


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("vgg16 conv2_2", "f16", (64, 64)),
        ("vgg16 conv4_1", "tf32", (64, 64)),
        ("vgg16 conv4_1", "f16", (128, 64)),
        ("vgg16 conv5_1", "f16", (64, 64)),
        ("vgg16 fc8", "f16", (64, 64)),
        ("resnet50 conv3_3x3s2", "f16", (64, 64)),
        ("resnet50 conv4_reduce", "tf32", (64, 64)),
        ("resnet50 conv4_expand", "f16", (128, 64)),
        ("resnet50 conv5_3x3", "f16", (32, 32)),
        ("resnet50 conv5_3x3s2", "f16", (64, 64)),
    ],
)
def test_the_planner_reckons_with_what_the_library_chooses(
    kernels: ctypes.CDLL, driver: StandIn, name: str, kind: str, block: tuple[int, int]
) -> None:
    layer = LAYERS[name]
    sparse = make(kernels, layer, kind, block)
    shape = gpu_tiles.layer_shape(layer)
    fitted = min(block[0], layer.outputs), min(block[1], layer.inputs)
    for batch in (1, 8, 64):
        _, tile, splits = choose_tile(shape, sparse.density, fitted, 2 if kind == "f16" else 4, batch)
        assert sparse.plan(batch * int(np.prod(shape.output_size))) == (*tile, splits)


@pytest.mark.parametrize("name", LAYERS)
def test_batch_1_fills_the_gpu(name: str) -> None:
    """Three quarters of the multiprocessors, or so few steps that splitting costs more than it saves."""
    layer = LAYERS[name]
    (_, pixels), splits, programs = gpu_tiles.programs(layer, 1, 0.27, (64, 64))
    steps = 0.27 * layer.inputs / 64 * (layer.kernel**2 if layer.is_conv else 1)
    assert programs <= 3 * PROCESSORS  # and not many more, each with its start and its end
    assert programs >= 0.7 * PROCESSORS or steps / splits <= 10
    assert programs >= 0.35 * PROCESSORS or (steps / splits <= 10 and pixels == 16)
    _, _, at_8 = gpu_tiles.programs(layer, 8, 0.27, (64, 64))
    assert at_8 >= 0.4 * PROCESSORS or steps <= 10


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_tiles.py", "--batch", "8", "--block-size", "128x64"])
    gpu_tiles.main()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(LAYERS) + 1 + 2  # fc6, the head
    assert "| vgg16 conv5_1 | " in table[11]


def test_the_kinds_are_those_of_the_library() -> None:
    header = Path(stand_in.CUDA / "device.h").read_text()
    assert "enum class Type { " + ", ".join(gpu_library.KINDS) + " };" in header
