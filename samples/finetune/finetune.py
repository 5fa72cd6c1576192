"""Fine-tune the pruned Fashion-MNIST sample with plain PyTorch: from labels, or without any from the dense network.

Reads the sample's network (``../fashion_mnist/fashion_mnist.onnx``) and a plan that ``tetris-onnx optimize
--save-plan`` made for it, trains with the weights that the plan drops held at zero, and exports the result, to which
``tetris-onnx optimize --plan`` then applies the same plan.

With --distill the targets are the dense network's outputs instead of labels (Hinton et al., *Distilling the Knowledge
in a Neural Network*, 2015): any images of the right kind will do.

Needs PyTorch 2.5 or newer beside tetris-onnx and the Fashion-MNIST images (see ../fashion_mnist/train.py).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import torch
import typer
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from tetris_onnx import Plan
from tetris_onnx.torch import apply_masks, remove_masks

SAMPLE = Path(__file__).resolve().parents[1] / "fashion_mnist"
sys.path.insert(0, str(SAMPLE))
from train import DEBIAN_FOLDER, FashionVGG, accuracy, augment, export, load_split  # noqa: E402

TEMPERATURE = 4.0


def load_network(path: Path) -> FashionVGG:
    """The sample's network with the weights of an export of it."""
    network = FashionVGG()
    load_weights(network, onnx.load(path))
    return network


def load_weights(network: nn.Module, model: onnx.ModelProto) -> None:
    """Give a network the weights of an export of it, where names are kept. Raises ValueError for another network."""
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    known = network.state_dict()
    missing = [name for name in known if name not in weights and not name.endswith("num_batches_tracked")]
    strange = [name for name, value in weights.items() if name not in known or value.shape != known[name].shape]
    if missing or strange:
        raise ValueError(f"the model is no export of this network: {[*missing, *strange][0]!r} is missing or differs")
    network.load_state_dict(weights, strict=False)


def fine_tune(
    network: nn.Module,
    teacher: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    learning_rate: float,
    batch_size: int = 128,
) -> None:
    """Train ``network`` in place: SGD, cosine schedule; towards ``labels``, or towards ``teacher`` where there is one.

    Nothing here knows of masks: the weights that `apply_masks` has pruned stay zero by themselves.
    """
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        start = time.perf_counter()
        order = torch.randperm(len(images))
        total_loss = 0.0
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            inputs = augment(images[batch])
            logits = network(inputs)
            if teacher is None:
                loss = functional.cross_entropy(logits, labels[batch])
            else:
                with torch.no_grad():
                    wanted = functional.log_softmax(teacher(inputs) / TEMPERATURE, 1)
                ours = functional.log_softmax(logits / TEMPERATURE, 1)
                loss = TEMPERATURE**2 * functional.kl_div(ours, wanted, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}: loss {total_loss / max(steps, 1):.4f}, {seconds:.0f} s", flush=True)


def main(
    plan: Annotated[Path, typer.Option(help="Plan of the sample's network (optimize --save-plan).")],
    output: Annotated[Path, typer.Option(help="ONNX file to write.")],
    distill: Annotated[bool, typer.Option("--distill", help="No labels: learn from the dense network.")] = False,
    data: Annotated[Path, typer.Option(help="Folder with the four Fashion-MNIST .gz files.")] = DEBIAN_FOLDER,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    images: Annotated[int, typer.Option(min=128, help="Training images to use.")] = 60000,
    learning_rate: Annotated[float, typer.Option(help="At the start.")] = 0.01,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the result depends on their number.")] = 1,
) -> None:
    """Fine-tune the pruned Fashion-MNIST sample and export it."""
    if not (data / "train-images-idx3-ubyte.gz").is_file():
        typer.echo(f"error: no Fashion-MNIST in {data}: see samples/fashion_mnist/README.md", err=True)
        raise typer.Exit(1)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    train_images, train_labels = load_split(data, "train")
    chosen = np.random.default_rng(seed).permutation(len(train_images))[:images]
    test_images, test_labels = load_split(data, "t10k")

    network = load_network(SAMPLE / "fashion_mnist.onnx")
    teacher = load_network(SAMPLE / "fashion_mnist.onnx").eval() if distill else None
    print(f"dense: {accuracy(network, test_images, test_labels):.2%} of all {len(test_labels):,} test images")
    apply_masks(network, Plan.load(plan))
    print(f"masked: {accuracy(network, test_images, test_labels):.2%}", flush=True)
    fine_tune(
        network,
        teacher,
        torch.from_numpy(train_images[chosen]),
        torch.from_numpy(train_labels[chosen]),
        epochs,
        learning_rate,
    )
    print(f"fine-tuned: {accuracy(network, test_images, test_labels):.2%}")
    remove_masks(network)
    export(network, output)


if __name__ == "__main__":
    typer.run(main)
