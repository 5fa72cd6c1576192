"""The command line of the samples that repeat the paper's experiments, and what those on images have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import numpy as np
import onnx
import typer
from experiments import STEPS, Settings, Subject, run
from image_data import ImageDataError, Images, load_images, load_sample
from numpy.typing import NDArray
from tables import TableError

from tetris_onnx.data.calibration import CalibrationError, Data, model_inputs
from tetris_onnx.graph import io
from tetris_onnx.graph.io import ModelError

if TYPE_CHECKING:
    from torch import nn

Output: TypeAlias = Annotated[Path, typer.Option("--output", "-o", help="Folder for tables and plots.")]
Quick: TypeAlias = Annotated[bool, typer.Option("--quick", help="Fewer settings and data: minutes on two cores.")]
Steps: TypeAlias = Annotated[str, typer.Option(help="Some of the steps only, in this order.")]
Sparsity: TypeAlias = Annotated[str | None, typer.Option(help="Of the pruned layers: 0.5,0.7,0.9")]
BlockSizes: TypeAlias = Annotated[str | None, typer.Option(help="Rows and columns of a block: 1,8,16,32,64")]
Recovery: TypeAlias = Annotated[str | None, typer.Option(help="none, refit, retrain")]
Seconds: TypeAlias = Annotated[float | None, typer.Option(help="Of timing each pair of models.")]
ALL_STEPS = ",".join(STEPS)


@dataclass(frozen=True)
class Recipe:
    """A small classifier of images, and where its weights and images come from."""

    name: str
    module: Callable[[bool], nn.Module]  # makes the untrained network; True: a small one, for the quick mode
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    carried: Path | None = None  # a model of it in the repository, trained on the repository's images
    epochs: tuple[int, int] = (30, 20)  # of training the dense network: quick, full
    batch: tuple[int, int] = (32, 128)


def image_command(recipe: Recipe, fast: Settings) -> None:
    """Run the command line of a sample on images; ``fast``: the settings of its quick mode."""

    def main(
        model: Annotated[Path | None, typer.Option(help="ONNX file; without, one is trained (PyTorch).")] = None,
        data: Annotated[
            Path | None, typer.Option(help="IDX files, CIFAR-10 batches or .npz; without, the repository's images.")
        ] = None,
        output: Output = Path("results"),
        quick: Quick = False,
        steps: Steps = ALL_STEPS,
        sparsity: Sparsity = None,
        block_sizes: BlockSizes = None,
        recovery: Recovery = None,
        seconds: Seconds = None,
        mean: Annotated[str | None, typer.Option(help="Of each channel, of pixels from 0 to 1.")] = None,
        std: Annotated[str | None, typer.Option(help="The same: what the model expects.")] = None,
        epochs: Annotated[int | None, typer.Option(min=1, help="Of training the dense network.")] = None,
        retrain_epochs: Annotated[int | None, typer.Option(min=1, help="Of retraining a pruned network.")] = None,
        calibration: Annotated[int, typer.Option(min=1, help="Unlabeled images to recover with, at most.")] = 1024,
        training: Annotated[int, typer.Option(min=8, help="Labeled images to train with, at most.")] = 60000,
        test: Annotated[int, typer.Option(min=1, help="Images to test with, at most.")] = 10000,
    ) -> None:
        chosen = replace(recipe, mean=_floats(mean) or recipe.mean, std=_floats(std) or recipe.std)
        settings = choose(fast if quick else Settings(), sparsity, block_sizes, recovery, seconds)
        settings = replace(settings, epochs=retrain_epochs or settings.epochs)
        chosen = replace(chosen, epochs=(epochs or chosen.epochs[0], epochs or chosen.epochs[1]))
        most = (min(calibration, 256), min(training, 5000), min(test, 1000)) if quick else (calibration, training, test)

        def subject() -> Subject:
            return _image_subject(chosen, model, data, output, quick, most)

        start(subject, settings, output, steps)

    typer.run(main)


def start(subject: Callable[[], Subject], settings: Settings, output: Path, steps: str) -> None:
    """Run the experiments; what does not fit ends in one line."""
    names = steps.split(",")
    if unknown := set(names) - set(STEPS):
        raise typer.BadParameter(f"no step {min(unknown)!r}; there are {', '.join(STEPS)}")
    try:
        output.mkdir(parents=True, exist_ok=True)
        run(subject(), settings, output, names)
    except (CalibrationError, ImageDataError, ModelError, TableError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def choose(
    settings: Settings, sparsity: str | None, block_sizes: str | None, recovery: str | None, seconds: float | None
) -> Settings:
    """The settings with what the user asks for."""
    if sparsity is not None:
        settings = replace(settings, sparsities=_floats(sparsity), speed_sparsities=_floats(sparsity))
    if block_sizes is not None:
        sizes = tuple(int(size) for size in block_sizes.split(","))
        settings = replace(settings, block_sizes=sizes, speed_sizes=tuple(size for size in sizes if size > 1))
    if recovery is not None:
        settings = replace(settings, recoveries=tuple(recovery.split(",")))
    return settings if seconds is None else replace(settings, seconds=seconds)


def _floats(text: str | None) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",")) if text else ()


def _image_subject(
    recipe: Recipe, file: Path | None, data: Path | None, folder: Path, quick: bool, most: tuple[int, int, int]
) -> Subject:
    """The network with its images, scaled as it takes them."""
    unlabeled: NDArray[np.float32] | None = None
    if data is None:
        train, test, unlabeled = load_sample()
        typer.echo(
            "no --data: Fashion-MNIST images of this repository, 500 to train and 500 to test; figures are rough"
        )
    else:
        train, test = load_images(data)
    rng = np.random.default_rng(0)  # some files are sorted by class
    train, test = train[rng.permutation(len(train))], test[rng.permutation(len(test))[: most[2]]]

    def ready(images: Images) -> Images:
        return images.fitted(recipe.shape).normalized(recipe.mean, recipe.std)

    train, test = ready(train), ready(test)
    if unlabeled is not None:
        calibration = ready(Images(unlabeled, np.zeros(len(unlabeled), np.int64))).pixels
    else:
        calibration = train.pixels
    train = train[slice(most[1])]
    if file is None:
        file = recipe.carried if data is None and recipe.carried is not None else folder / "model.onnx"
        if not file.exists():
            _train(recipe, train, quick, file)
        typer.echo(f"the dense model is {file}")
    model = io.raise_opset(io.load(file))
    (spec, *_) = model_inputs(model)
    return Subject(
        recipe.name,
        model,
        {spec.name: calibration[: most[0]]},
        Data(str(data or "Fashion-MNIST"), {spec.name: test.pixels}, test.labels),
        train,
        lambda: recipe.module(quick),
    )


def _train(recipe: Recipe, images: Images, quick: bool, file: Path) -> None:
    """Train the dense network, and export it."""
    if find_spec("torch") is None:
        raise ModelError("no model: give one (--model FILE.onnx), or install PyTorch to train one (pip install torch)")
    import torch
    from train import export, train

    torch.manual_seed(0)
    network = recipe.module(quick).to(memory_format=torch.channels_last)
    which = 0 if quick else 1
    pixels, labels = torch.from_numpy(images.pixels), torch.from_numpy(images.labels)
    train(network, pixels, labels, recipe.epochs[which], min(recipe.batch[which], len(labels)), bfloat16=False)
    export(network.to(memory_format=torch.contiguous_format), file, recipe.shape)
    onnx.checker.check_model(str(file))
