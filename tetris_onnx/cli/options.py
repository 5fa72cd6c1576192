"""Options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tetris_onnx.config import GATHERS, IMPORTANCES, PRECISIONS, REORDERS, TARGETS
from tetris_onnx.data.image_options import LAYOUTS

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Provider = Annotated[str, typer.Option(metavar="cpu|cuda", help="What onnxruntime runs on.")]
Shape = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=1x3x224x224", help="Shape of an input that the model leaves open."),
]
Mean = Annotated[
    str | None, typer.Option(metavar="M[,M,M]", help="For images: subtracted from pixel * scale, per channel.")
]
Std = Annotated[str | None, typer.Option(metavar="S[,S,S]", help="For images: what the difference is divided by.")]
Scale = Annotated[str, typer.Option(metavar="X", help="For images: what pixels from 0 to 255 are multiplied by.")]
Layout = Annotated[
    str | None,
    typer.Option(metavar="|".join(LAYOUTS), help="For images.", show_default="as the input's shape tells"),
]
ImageSize = Annotated[str | None, typer.Option(metavar="HxW", help="For images, where the model leaves it open.")]
Bgr = Annotated[bool, typer.Option("--bgr", help="For images: channels in the order blue, green, red.")]
BlockSize = Annotated[
    str | None,
    typer.Option(metavar="ROWSxCOLS", help="Out x in channels of a block.", show_default="32x32, for cuda 64x64"),
]
Precision = Annotated[
    str | None, typer.Option(metavar="|".join(PRECISIONS), help="Of pruned layers.", show_default="float32")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of the sessions that will run the result: which layers gain.", show_default="1"),
]
Target = Annotated[
    str | None,
    typer.Option(metavar="|".join(TARGETS), help="The provider that will run the result.", show_default="cpu"),
]
Reorder = Annotated[
    str | None,
    typer.Option(metavar="|".join(REORDERS), help="How to search for channel orders.", show_default="exact"),
]
Importance = Annotated[
    str | None,
    typer.Option(metavar="|".join(IMPORTANCES), help="What a weight is worth.", show_default="auto"),
]
Augment = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="COPIES",
        help="Varied copies of each image of --calibration to learn from.",
        show_default="1 of up to 128 images, 64 with --allocation",
    ),
]
Refine = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="PASSES",
        help="Gradient steps on all layers together, towards the dense outputs, in passes over --calibration.",
        show_default="as many as take a minute or two",
    ),
]
Gathers = Annotated[
    str | None,
    typer.Option(metavar="|".join(GATHERS), help="What becomes of the channel reorderings.", show_default="absorb"),
]
Calibration = Annotated[
    Path | None, typer.Option(help=".npz or folder of images, unlabeled: layers are refitted to what they see.")
]
