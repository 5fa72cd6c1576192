"""The command ``tetris-onnx sweep``: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tetris_onnx.cli.options import (
    Bgr,
    Calibration,
    ImageSize,
    Importance,
    Json,
    Layout,
    Mean,
    Model,
    Precision,
    Reorder,
    Scale,
    Shape,
    Std,
    Threads,
)
from tetris_onnx.cli.terminal import open_console, print_json, show_progress
from tetris_onnx.cli.usage import read_both
from tetris_onnx.config import ALLOCATIONS, load_config_with
from tetris_onnx.data.image_options import parse_image_options


def sweep(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FOLDER", help="For models and tables; goes on where it was.", show_default=False
        ),
    ],
    sparsity: Annotated[str, typer.Option(metavar="FIRST:LAST:STEP", help="Or a list: 0.5,0.7.")] = "0.3:0.9:0.1",
    block_size: Annotated[str, typer.Option(metavar="N,...", help="Out x in channels of a block: 16,32x64.")] = "32",
    config: Annotated[Path | None, typer.Option(help="TOML file with all other options.")] = None,
    calibration: Calibration = None,
    data: Annotated[
        Path | None, typer.Option(help=".npz or folder of images to compare on; with labels, by accuracy.")
    ] = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = "1/255",
    layout: Layout = None,
    image_size: ImageSize = None,
    bgr: Bgr = False,
    allocation: Annotated[
        str | None, typer.Option(metavar="|".join(ALLOCATIONS[:2]), help="See optimize.", show_default="uniform")
    ] = None,
    precision: Precision = None,
    reorder: Reorder = None,
    importance: Importance = None,
    seed: Annotated[int | None, typer.Option(help="Of the searches.", show_default="0")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Searches at a time.", show_default="one per core")] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Dask scheduler whose workers do the searches.")
    ] = None,
    threads: Threads = None,
    shape: Shape = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="To time each setting.")] = 3.0,
    json: Json = False,
) -> None:
    """Optimize MODEL with many settings and find those that no other beats in accuracy and time."""
    images = parse_image_options(mean, std, scale, layout, image_size, bgr)
    values = {
        "allocation": allocation,
        "precision": precision,
        "reorder": reorder,
        "importance": importance,
        "seed": seed,
        "threads": threads,
    }
    chosen = load_config_with(config, values)

    from tetris_onnx.data.calibration import parse_shapes
    from tetris_onnx.reports.sweep import NO_MATPLOTLIB, has_matplotlib, print_sweep, write_csv, write_plot
    from tetris_onnx.sweep import grid, parse_block_sizes, parse_sparsities
    from tetris_onnx.sweep import sweep as run_sweep

    settings = grid(parse_sparsities(sparsity), parse_block_sizes(block_size))
    with_plot = has_matplotlib()
    if not with_plot:
        print(f"note: {NO_MATPLOTLIB}", file=sys.stderr)
    samples, labeled = read_both(model, calibration, data, images)
    with show_progress() as progress:
        result = run_sweep(
            model,
            settings,
            output,
            chosen,
            calibration=samples,
            data=labeled,
            jobs=jobs,
            scheduler=scheduler,
            seconds=seconds,
            progress=progress,
            shapes=parse_shapes(shape or []),
        )
    write_csv(result, output / "sweep.csv")
    if with_plot:
        write_plot(result, output / "sweep.png")
    if json:
        print_json(result.to_dict())
    else:
        print_sweep(result, open_console())
