"""The experiments of the TETRIS paper (Ji et al., NeurIPS 2018) on one network: tables (CSV) and plots (PNG).

`run` makes, in a folder:

- ``accuracy.csv``: every block size, with and without reordering, at every sparsity, and what is left of the accuracy:
  pruned by magnitude (``none``), with the kept weights refitted to unlabeled samples (``refit``), and retrained with
  labels while the pruned weights stay zero (``retrain``); see samples/accuracy_table. Figures 1b, 4 and 5;
- ``speed.csv``: the time of the whole network, dense and block-sparse. Figures 1a, 6 and 7;
- ``gathers.csv``: the time with the Gathers left in the graph (``--gathers keep``) against absorbed ones;
- a plot of each.

Rows that are there already are not made again: an interrupted run goes on with the same command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import typer
from numpy.typing import NDArray
from onnx import numpy_helper

SAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(SAMPLES / name) for name in ("accuracy_table", "fashion_mnist", "finetune")]
import accuracy_table as at  # noqa: E402
from image_data import Images  # noqa: E402
from plots import draw  # noqa: E402
from tables import Table, fingerprint  # noqa: E402

from tetris_onnx import Config, LayerPlan, Plan, optimize, save  # noqa: E402
from tetris_onnx.data.calibration import Data, Samples  # noqa: E402
from tetris_onnx.graph import io  # noqa: E402
from tetris_onnx.planner import prepare, survey  # noqa: E402
from tetris_onnx.timing.bench import bench  # noqa: E402

if TYPE_CHECKING:
    from torch import nn

STEPS = ("accuracy", "models", "speed", "plots")
SPEED_KEY = ["provider", "threads", "sparsity", "block_size", "reorder"]
SPEED = [*SPEED_KEY, "dense_ms", "sparse_ms", "speedup", "low", "high"]
GATHERS = [*SPEED_KEY, "gathers", "keep_ms", "absorb_ms", "cost", "low", "high"]
LEARNING_RATE = 0.01


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, and what it is tried on."""

    name: str
    model: onnx.ModelProto
    calibration: Samples | None
    test: Data  # without labels, only how far the outputs are off can be told
    training: Images | None = None  # what it can be retrained on
    module: Callable[[], nn.Module] | None = None  # makes the PyTorch network that the model is an export of
    rates: Config | None = None  # the sparsity of each layer, instead of one for all


@dataclass(frozen=True)
class Settings:
    """What to try; by default all that the paper shows."""

    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    block_sizes: tuple[int, ...] = (1, 8, 16, 32, 64)
    recoveries: tuple[str, ...] = ("none", "refit", "retrain")
    epochs: int = 3  # of retraining
    speed_sizes: tuple[int, ...] = (8, 16, 32, 64)
    speed_sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    seconds: float = 2.0  # of timing each pair of models


def run(subject: Subject, settings: Settings, folder: Path, steps: Sequence[str] = STEPS) -> None:
    """Make the tables and plots of ``subject`` in ``folder``, or only some ``steps`` of it."""
    folder.mkdir(parents=True, exist_ok=True)
    base = at.prunable(subject.model, max(settings.block_sizes), rates=subject.rates)
    if subject.rates is not None:
        mean = (_mean_sparsity(subject.model, base),)
        settings = replace(settings, sparsities=mean, speed_sparsities=mean)
    experiment = _Experiment(subject, settings, folder, base)
    if "accuracy" in steps:
        experiment.accuracy()
    if "models" in steps:
        experiment.models()
    if "speed" in steps:
        experiment.speed()
    if "plots" in steps:
        for path in draw(folder, subject.name):
            typer.echo(f"wrote {path}")


@dataclass(frozen=True)
class _Experiment:
    subject: Subject
    settings: Settings
    folder: Path
    base: Config

    def accuracy(self) -> None:
        """The table of accuracies."""
        subject, settings = self.subject, self.settings
        title = at.describe(subject.name, subject.model, subject.calibration, subject.test)
        table = Table(self.folder / "accuracy.csv", at.COLUMNS, at.KEY, title, self.base.seed)
        recoveries = list(settings.recoveries)
        if "retrain" in recoveries and (reason := self.why_no_training()):
            typer.echo(f"no retraining: {reason}")
            recoveries.remove("retrain")
        rows = [v for v in at.variants(settings.sparsities, settings.block_sizes, recoveries) if v.cells not in table]
        for i, variant in enumerate(rows):
            start = time.perf_counter()
            if variant.recovery == "refit" or variant.block_size is None:
                pruned, retained = at.prune(subject.model, self.base, variant, subject.calibration)
            else:
                config = variant.config(self.base)
                pruned, retained, _ = at.prune_blocks(subject.model, config, None, self.plan(variant))
            if variant.recovery == "retrain":
                pruned = self.retrained(variant, pruned)
            row = variant.cells | at.score(subject.model, pruned, retained, subject.test)
            table.add(row)
            typer.echo(f"{i + 1}/{len(rows)} {_summary(row)}, {time.perf_counter() - start:.1f} s")

    def plan(self, variant: at.Variant) -> Plan:
        """The blocks to keep by magnitude; found once, kept in a file."""
        path = self.file("plans", variant, "npz")
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            at.prune_blocks(self.subject.model, variant.config(self.base), None)[2].save(path)
        return Plan.load(path)

    def file(self, kind: str, variant: at.Variant, suffix: str) -> Path:
        """Where what belongs to a variant is kept."""
        name = f"{fingerprint(self.subject.model)}_{variant.sparsity:g}_{variant.block_size}_{variant.reorder}"
        return self.folder / kind / f"{name}.{suffix}"

    def why_no_training(self) -> str:
        """Why the network cannot be retrained; nothing if it can."""
        if self.subject.module is None:
            return "there is no PyTorch definition of this network here (see samples/finetune for how to do it)"
        if self.subject.training is None:
            return "it takes labeled images"
        if find_spec("torch") is None:
            return "PyTorch is not installed (pip install torch)"
        from finetune import load_weights

        try:
            load_weights(self.subject.module(), self.subject.model)
        except ValueError as error:
            return str(error)
        return ""

    def retrained(self, variant: at.Variant, pruned: onnx.ModelProto) -> onnx.ModelProto:
        """The model trained with the weights that ``pruned`` lacks held at zero, from the dense weights on."""
        import torch
        from finetune import fine_tune, load_weights

        from tetris_onnx.torch import apply_masks, remove_masks

        assert self.subject.module is not None and self.subject.training is not None
        torch.manual_seed(self.base.seed)
        network = self.subject.module()
        load_weights(network, self.subject.model)
        if variant.block_size is None:
            _mask_weights(network, pruned, self.base)
        else:
            apply_masks(network, self.plan(variant))
        images, labels = (torch.from_numpy(x) for x in (self.subject.training.pixels, self.subject.training.labels))
        batch = max(8, min(128, len(labels) // 16))
        with redirect_stdout(None):  # one line per row says enough
            fine_tune(network, None, images, labels, self.settings.epochs, LEARNING_RATE, batch)
        remove_masks(network)
        return with_weights(self.subject.model, network)

    def timed(self) -> Iterator[tuple[at.Variant, str]]:
        """What is timed: variants and providers."""
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        for provider in ("cpu", "cuda") if cuda else ("cpu",):
            for variant in at.variants(self.settings.speed_sparsities, self.settings.speed_sizes, ["none"]):
                if variant.block_size is not None:
                    yield variant, provider

    def models(self) -> None:
        """The block-sparse models to time, as files."""
        (self.folder / "models").mkdir(exist_ok=True)
        dense = self.folder / "models" / f"{fingerprint(self.subject.model)}.onnx"
        if not dense.exists():
            save(self.subject.model, dense)
        for variant, provider in self.timed():
            for gathers in self.gathers(variant):
                path = self.file("models", variant, f"{provider}.{gathers}.onnx")
                if path.exists():
                    continue
                config = replace(variant.config(self.base), gathers=gathers, target=provider)
                result = optimize(self.subject.model, config, self.plan(variant))
                path.with_suffix(".txt").write_text(str(result.report.gathers))
                save(result.model, path)
                typer.echo(f"wrote {path.name}: {result.report.gathers} Gathers")

    def gathers(self, variant: at.Variant) -> tuple[str, ...]:
        """What becomes of the Gathers; without reordering there are none."""
        return ("absorb", "keep") if variant.reorder != "none" else ("absorb",)

    def speed(self) -> None:
        """The tables of times."""
        about = f"{self.subject.name} ({fingerprint(self.subject.model)}), batch 1"
        speed = Table(self.folder / "speed.csv", SPEED, SPEED_KEY, about)
        gathers = Table(self.folder / "gathers.csv", GATHERS, SPEED_KEY, about)
        dense = self.folder / "models" / f"{fingerprint(self.subject.model)}.onnx"
        for variant, provider in self.timed():
            for threads in (1, 2) if provider == "cpu" else (1,):
                cells = {"provider": provider, "threads": threads} | variant.cells
                absorb, keep = (self.file("models", variant, f"{provider}.{how}.onnx") for how in ("absorb", "keep"))
                if cells not in speed:
                    speed.add(
                        cells | self.ratio(dense, absorb, provider, threads, ("dense_ms", "sparse_ms", "speedup"))
                    )
                    typer.echo(_summary(speed.rows[-1]))
                if keep.exists() and cells not in gathers:
                    row = self.ratio(keep, absorb, provider, threads, ("keep_ms", "absorb_ms", "cost"), less=1.0)
                    gathers.add(cells | row | {"gathers": keep.with_suffix(".txt").read_text()})
                    typer.echo(_summary(gathers.rows[-1]))

    def ratio(
        self, a: Path, b: Path, provider: str, threads: int, names: Sequence[str], less: float = 0.0
    ) -> dict[str, Any]:
        """Times of two models and their ratio with its 95 % interval, less a number."""
        for path in (a, b):
            if not path.exists():
                raise typer.BadParameter(f"{path} is missing: it is made by the step models")
        data = self.subject.test.samples
        found = bench(a, b, threads=threads, provider=provider, seconds=self.settings.seconds, data=data)
        assert found.speedup is not None and found.interval is not None
        values = [*(timing.median_ms for timing in found.timings), found.speedup - less]
        low, high = (each - less for each in found.interval)
        return {name: f"{v:.4g}" for name, v in zip([*names, "low", "high"], [*values, low, high], strict=True)}


def _mean_sparsity(model: onnx.ModelProto, config: Config) -> float:
    """The share of the weights of all pruned layers that the config prunes."""
    pruned = [c for c in survey(prepare(io.to_graph(model)), config) if not c.why_dense]
    sizes = [c.layer.weight.size for c in pruned]
    return round(sum(c.options.sparsity * size for c, size in zip(pruned, sizes, strict=True)) / sum(sizes), 3)


def with_weights(model: onnx.ModelProto, network: nn.Module) -> onnx.ModelProto:
    """The model with the weights of the network that it is an export of."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    weights = network.state_dict()
    for tensor in result.graph.initializer:
        values: NDArray = weights[tensor.name].detach().numpy()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), tensor.name))
    return result


def _mask_weights(network: nn.Module, pruned: onnx.ModelProto, base: Config) -> None:
    """Keep at zero the single weights that are zero in ``pruned``: `apply_masks` finds the layers, then theirs."""
    import torch

    from tetris_onnx.torch import apply_masks

    layers = [c.layer for c in survey(prepare(io.to_graph(pruned)), base) if not c.why_dense]
    shapes = {layer.name: layer.weight_shape[:2] for layer in layers}
    whole = (LayerPlan(name, *map(np.arange, shape), (1, 1), np.ones(shape, bool)) for name, shape in shapes.items())
    matches = apply_masks(network, Plan(tuple(whole)))
    for layer in layers:
        chain = network.get_submodule(matches[layer.name]).parametrizations["weight"]
        chain[0].mask = torch.from_numpy((layer.weight != 0).astype(np.float32))


def _summary(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if value not in (None, ""))
