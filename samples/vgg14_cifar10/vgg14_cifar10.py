"""The experiments of the TETRIS paper on VGG14, by one command: tables and plots of accuracy and speed.

python samples/vgg14_cifar10/vgg14_cifar10.py --quick                       # what the repository carries: minutes
python samples/vgg14_cifar10/vgg14_cifar10.py --data cifar-10-batches-bin   # trains VGG14 first
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

# Output channels of the convolutions in units of the width; "M" is a 2x2 max pooling.
CONFIGURATION = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")
# The width of VGG16 is 64. Half of it trains on a processor in a quarter of the time, and has 3.7 million weights.
WIDTH, QUICK_WIDTH = 32, 16
QUICK = Settings((0.5, 0.7), (8, 32), epochs=8, speed_sizes=(8, 32), speed_sparsities=(0.7,), seconds=1.0)


def vgg14(quick: bool = False) -> nn.Module:
    """VGG16's thirteen convolutions, each with a BatchNormalization, for 32x32 pixels, and one classifier layer."""
    from torch import nn

    width = QUICK_WIDTH if quick else WIDTH
    features: list[nn.Module] = []
    channels = 3
    for entry in CONFIGURATION:
        if entry == "M":
            features.append(nn.MaxPool2d(2))
        else:
            out = int(entry) * width
            convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            features += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
    layers = {"features": nn.Sequential(*features), "flatten": nn.Flatten(), "classifier": nn.Linear(channels, 10)}
    return nn.Sequential(OrderedDict(layers))


RECIPE = Recipe(
    "VGG14", vgg14, (3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), epochs=(30, 24), batch=(32, 64)
)

if __name__ == "__main__":
    image_command(RECIPE, QUICK)
