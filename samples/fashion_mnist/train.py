"""Train the Fashion-MNIST sample: a VGG-like network, exported to ONNX with its calibration and test images.

Writes three files beside this script (or into --output):

- ``fashion_mnist.onnx``: ``image`` [batch, 1, 28, 28] float32 in [0, 1] -> ``logits`` [batch, 10] float32;
- ``calibration.npz``: 256 training images without labels, ``image`` [256, 1, 28, 28] float32;
- ``test.npz``: 1,000 test images, ``image`` [1000, 1, 28, 28] float32 and ``label`` [1000] int64.

The network is one that block pruning has something to say about: every layer but the first convolution and the last
classifier has several blocks of 32x32 (16 along its input channels for the second convolution) along both axes;
the second convolution of each stage is followed by a BatchNormalization, which stays a node of its own in the file so
that fusing it is left to the optimizer; a Flatten carries the channel order into the first fully-connected layer.

Needs PyTorch 2.5 or newer beside tetris-onnx (``pip install "torch>=2.5"``). One core takes about 15 minutes with
--bfloat16 where the CPU computes in bfloat16 (AVX512-BF16, AMX), and about twice that without.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper_experiments"))
from image_data import read_idx

# Where the Debian and Ubuntu package dataset-fashion-mnist puts the four files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
OPSET = 17


def load_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load ``train`` or ``t10k``: images [N, 1, 28, 28] float32 in [0, 1] and labels [N] int64."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return images[:, None].astype(np.float32) / np.float32(255), labels.astype(np.int64)


def pick_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Pick `count` indices at random, every class equally often (give or take one), in random order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # rank[i]: how many of i's class come before i in `order`
    for label in range(CLASSES):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return order[np.argsort(rank[order], kind="stable")][:count]


class FashionVGG(nn.Module):
    """Six 3x3 convolutions in three stages (32-64, 64-128, 128-128) and two fully-connected layers: 51 M MACs."""

    def __init__(self) -> None:
        """Build the layers with PyTorch's default initialization."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for first, second in ((32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(channels, first, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(first, second, 3, padding=1, bias=False), nn.BatchNorm2d(second), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            channels = second
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(channels * 3 * 3, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, CLASSES)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [N, 10] of images [N, 1, 28, 28] in [0, 1]."""
        return self.classifier(self.flatten(self.features(image)))


def augment(images: Tensor) -> Tensor:
    """Mirror each image [N, C, H, W] with probability 1/2 and shift the batch by up to two pixels each way."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    top, left = (int(offset) for offset in torch.randint(0, 5, (2,)))
    height, width = images.shape[2:]
    return functional.pad(images, (2, 2, 2, 2))[:, :, top : top + height, left : left + width]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch_size: int, bfloat16: bool) -> None:
    """Train `model` in place: SGD with Nesterov momentum, one learning-rate cycle, cross-entropy."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        start = time.perf_counter()
        order = torch.randperm(len(images))
        total_loss = 0.0
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            inputs = augment(images[batch]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                logits = model(inputs)
            loss = functional.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1:2d}/{epochs}: loss {total_loss / steps:.4f}, {seconds:.0f} s", flush=True)


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Compute the share of `images` whose largest logit is at their label."""
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(batch).argmax(1) for batch in torch.from_numpy(images).split(500)])
    return float((predicted.numpy() == labels).mean())


def export(model: nn.Module, path: Path, shape: tuple[int, ...] = (1, 28, 28)) -> None:
    """Export `model` with a dynamic batch axis, as it is: no constant folding, BatchNormalization in its place."""
    torch.onnx.export(
        model.eval(),
        (torch.zeros(1, *shape),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=OPSET,
        # EVAL, the default, folds each BatchNormalization into the convolution before it.
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
    )


def main(
    data: Annotated[Path, typer.Option(help="Folder with the four Fashion-MNIST .gz files.")] = DEBIAN_FOLDER,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(__file__).parent,
    epochs: Annotated[int, typer.Option(min=1)] = 15,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the result depends on their number.")] = 1,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Train in mixed precision.")] = False,
) -> None:
    """Train the Fashion-MNIST sample and export it with its calibration and test images."""
    splits = ("train", "t10k")
    names = [f"{split}-{kind}-ubyte.gz" for split in splits for kind in ("images-idx3", "labels-idx1")]
    missing = [name for name in names if not (data / name).is_file()]
    if missing:
        typer.echo(
            f"error: {data} has no {', '.join(missing)}: install the Debian package dataset-fashion-mnist, or download "
            "the four files from https://github.com/zalandoresearch/fashion-mnist and give their folder as --data",
            err=True,
        )
        raise typer.Exit(1)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)

    train_images, train_labels = load_split(data, "train")
    test_images, test_labels = load_split(data, "t10k")
    model = FashionVGG()
    model.to(memory_format=torch.channels_last)
    train(model, torch.from_numpy(train_images), torch.from_numpy(train_labels), epochs, batch_size, bfloat16)

    model.to(memory_format=torch.contiguous_format)
    calibration = pick_per_class(train_labels, 256, seed)
    test = pick_per_class(test_labels, 1000, seed)
    export(model, output / "fashion_mnist.onnx")
    np.savez_compressed(output / "calibration.npz", image=train_images[calibration])
    np.savez_compressed(output / "test.npz", image=test_images[test], label=test_labels[test])
    print(f"accuracy on all {len(test_labels):,} test images: {accuracy(model, test_images, test_labels):.2%}")
    print(f"accuracy on the {len(test):,} of test.npz: {accuracy(model, test_images[test], test_labels[test]):.2%}")


if __name__ == "__main__":
    typer.run(main)
