"""The experiments of the TETRIS paper on VGG16, by one command: tables and plots of accuracy and speed.

    python samples/vgg16/vgg16.py --quick                                    # random weights: minutes
    python samples/vgg16/vgg16.py --model vgg16.onnx --calibration images.npz --data labeled.npz
    python samples/vgg16/vgg16.py --model vgg16.onnx --config samples/vgg16/deep_compression.toml ...

Any ONNX file of VGG16 will do. Without one, torchvision's trained weights are taken where torchvision is installed and
has them, else random weights: then only the error of the outputs, what is retained of the importance and the times say
something.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper_experiments"))
from command import ALL_STEPS, BlockSizes, Output, Quick, Recovery, Seconds, Sparsity, Steps, choose, start
from experiments import Settings, Subject
from random_vgg16 import vgg16

from tetris_onnx.config import load_config
from tetris_onnx.data.calibration import Data, load_samples, model_inputs, random_samples
from tetris_onnx.data.images import load_data
from tetris_onnx.graph import io

if TYPE_CHECKING:
    import onnx

QUICK = Settings((0.7,), (32, 64), ("none",), speed_sizes=(32, 64), speed_sparsities=(0.7,), seconds=3.0)
FULL = Settings(recoveries=("none", "refit"), seconds=5.0)
RANDOM_SAMPLES = 8


def main(
    model: Annotated[Path | None, typer.Option(help="ONNX file of VGG16.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Unlabeled samples (.npz), to recover with.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Samples to score with (.npz), with labels where there are.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with a sparsity for each layer.")] = None,
    output: Output = Path("results"),
    quick: Quick = False,
    steps: Steps = ALL_STEPS,
    sparsity: Sparsity = None,
    block_sizes: BlockSizes = None,
    recovery: Recovery = None,
    seconds: Seconds = None,
) -> None:
    """Make the tables and plots of VGG16."""
    settings = choose(QUICK if quick else FULL, sparsity, block_sizes, recovery, seconds)
    if calibration is None and "refit" in settings.recoveries:
        typer.echo("no recovery: it takes --calibration")
        settings = replace(settings, recoveries=tuple(kind for kind in settings.recoveries if kind != "refit"))
    rates = None if config is None else load_config(config)

    def subject() -> Subject:
        proto = io.raise_opset(io.load(model) if model is not None else _some_vgg16(output / "vgg16.onnx"))
        inputs = model_inputs(proto)
        samples = None if calibration is None else load_samples(calibration, inputs)
        if data is None:
            typer.echo("no --data: random inputs; the error of the outputs is shown, not the accuracy")
            test = Data("random inputs", random_samples(inputs, RANDOM_SAMPLES))
        else:
            test = load_data(data, inputs)
        return Subject("VGG16", proto, samples, test, rates=rates)

    start(subject, settings, output, steps)


def _some_vgg16(path: Path) -> onnx.ModelProto:
    """VGG16 as torchvision has it, with trained weights; with random ones where these cannot be had."""
    if path.exists():
        return io.load(path)
    if find_spec("torch") and find_spec("torchvision"):
        import torch
        import torchvision

        try:
            network = torchvision.models.vgg16(weights="DEFAULT").eval()
        except OSError as error:  # they are downloaded
            typer.echo(f"torchvision cannot get its weights ({error})")
        else:
            torch.onnx.export(network, (torch.zeros(1, 3, 224, 224),), str(path), input_names=["image"], dynamo=False)
            return io.load(path)
    typer.echo("no --model: random weights; times and retained importance are shown, accuracy would mean nothing")
    return vgg16()


if __name__ == "__main__":
    typer.run(main)
