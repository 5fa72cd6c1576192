"""The experiments of the TETRIS paper on LeNet, by one command: tables and plots of accuracy and speed.

python samples/lenet_mnist/lenet_mnist.py --quick                     # what the repository carries: minutes
python samples/lenet_mnist/lenet_mnist.py --data FOLDER_OF_MNIST      # trains LeNet first
python samples/lenet_mnist/lenet_mnist.py --data mnist.npz --model lenet5.onnx --mean 0.1307 --std 0.3081
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper_experiments"))
from command import Recipe, image_command
from experiments import Settings

if TYPE_CHECKING:
    from torch import nn

QUICK = Settings((0.5, 0.8), (1, 8, 32), epochs=8, speed_sizes=(8, 32), speed_sparsities=(0.8,), seconds=1.0)


def lenet(quick: bool = False) -> nn.Module:
    """LeNet as in Caffe: convolutions of 20 and 50 channels (5x5), linear layers of 500 and 10; always the same."""
    from torch import nn

    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(1, 20, 5), "relu1": nn.ReLU(), "pool1": nn.MaxPool2d(2)}
    layers |= {"conv2": nn.Conv2d(20, 50, 5), "relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2), "flatten": nn.Flatten()}
    layers |= {"fc1": nn.Linear(800, 500), "relu3": nn.ReLU(), "fc2": nn.Linear(500, 10)}
    return nn.Sequential(OrderedDict(layers))


RECIPE = Recipe("LeNet", lenet, (1, 28, 28), carried=Path(__file__).parent / "lenet.onnx")

if __name__ == "__main__":
    image_command(RECIPE, QUICK)
