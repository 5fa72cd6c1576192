"""The commands: parse, call, print. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done (``optimize``: written and verified), 1 an error, 2 wrong usage, 130 interrupted. A command imports
what it needs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tetris_onnx.cli.contain import contained
from tetris_onnx.cli.options import (
    Augment,
    Bgr,
    BlockSize,
    Calibration,
    Gathers,
    ImageSize,
    Importance,
    Json,
    Layout,
    Mean,
    Model,
    Precision,
    Provider,
    Refine,
    Reorder,
    Scale,
    Shape,
    Std,
    Target,
    Threads,
)
from tetris_onnx.cli.running import with_accuracy, with_times
from tetris_onnx.cli.sweep import sweep
from tetris_onnx.cli.terminal import describe_error, open_console, percent_of, print_json, show_progress
from tetris_onnx.cli.usage import (
    UsageError,
    accuracy_data,
    check_image_options,
    check_outputs,
    read_both,
    read_data,
    refuse_together,
)
from tetris_onnx.config import (
    ALLOCATIONS,
    MEASURED_IMPORTANCES,
    Config,
    load_config_with,
    parse_block_size,
)
from tetris_onnx.data.image_options import parse_image_options

if TYPE_CHECKING:
    from tetris_onnx.reports.report import LayerReport

_NOT_CALIBRATED = (
    "nothing was refitted: at this sparsity the accuracy drops. Unlabeled samples bring most of it back: "
    "--calibration FILE.npz."
)
_MEASURE = " Measure it on labeled samples: --data FILE.npz."
_IF_TOO_LOW = (
    " If it is still too low: prune less (--sparsity), keep sensitive layers dense (--config), or fine-tune the model "
    "and apply the same plan to it (--save-plan, then --plan)."
)


app = typer.Typer(
    name="tetris-onnx",
    help="Make ONNX models block-sparse, and fast in onnxruntime.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The ``tetris-onnx`` command."""
    args = sys.argv[1:]
    if "--debug" in args:
        faulthandler.enable()
    # (CUDA reserves address space beyond any memory.)
    sys.exit(contained(lambda: run(args), limit_memory="cuda" not in args))


def run(args: Sequence[str]) -> int:
    """Run a command line and return its exit code; every error is one line on stderr."""
    debug = "--debug" in args
    try:
        words = [word for word in args if word != "--debug"] or ["--help"]
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")  # numpy's, of values that are not finite: what matters is in the report
            code = app(args=words, prog_name="tetris-onnx", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # whoever read our output has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError as error:
        return _fail("there is not enough memory for this", error, debug)
    except Exception as error:
        return _fail(describe_error(error), error, debug)


def _fail(text: str, error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {text}", file=sys.stderr)
    return int(getattr(error, "exit_code", 1))


def _version(value: bool) -> None:
    if value:
        try:
            print(f"tetris-onnx {metadata.version('tetris-onnx')}")
        except metadata.PackageNotFoundError:
            print("tetris-onnx (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Make ONNX models block-sparse, and fast in onnxruntime."""


@app.command()
def optimize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.", show_default=False)],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of each layer's weights to prune.", show_default="0.5"),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(ALLOCATIONS),
            help="How much to prune where: the same everywhere, or where it costs the least accuracy.",
            show_default="uniform",
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(metavar="X", help="Prune as much as makes the network X times faster, by prediction."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with the options of each layer."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Apply a plan saved by --save-plan instead of searching for one."),
    ] = None,
    block_size: BlockSize = None,
    calibration: Calibration = None,
    data: Annotated[
        Path | None,
        typer.Option(help=".npz or folder of images, with labels: measure the accuracy before and after."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", min=0.0, help="Prune as much as loses so many points of accuracy at most."),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = "1/255",
    layout: Layout = None,
    image_size: ImageSize = None,
    bgr: Bgr = False,
    bench: Annotated[bool, typer.Option(help="Time the model before and after.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time each layer before and after; those that lose stay dense.")
    ] = False,
    gathers: Gathers = None,
    target: Target = None,
    precision: Precision = None,
    threads: Threads = None,
    reorder: Reorder = None,
    importance: Importance = None,
    augment: Augment = None,
    refine: Refine = None,
    shape: Shape = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan (.npz).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report (.html, .json or .md).")] = None,
    dump_passes: Annotated[Path | None, typer.Option(help="Folder for the model after each pass.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the search.", show_default="0"),
    ] = None,
    memory: Annotated[
        float,
        typer.Option(metavar="GB", min=0.0, help="For the activations of calibration samples; more goes to a file."),
    ] = 4.0,
    json: Json = False,
) -> None:
    """Reorder and prune MODEL in blocks, verify the result and write it."""
    searched = {
        "--sparsity": sparsity,
        "--allocation": allocation,
        "--speedup": speedup,
        "--config": config,
        "--block-size": block_size,
        "--reorder": reorder,
        "--importance": importance,
        "--seed": seed,
    }
    if plan is not None:
        refuse_together("--plan", searched)
        refuse_together("--plan", {"--max-drop": max_drop})
    if max_drop is not None:
        refuse_together("--max-drop", {"--sparsity": sparsity, "--speedup": speedup})
        allocation = allocation or "global"
    if speedup is not None:
        refuse_together("--speedup", {"--sparsity": sparsity})
    images = parse_image_options(mean, std, scale, layout, image_size, bgr)
    options = config, sparsity, block_size, gathers, reorder, importance, seed, target, allocation, speedup
    chosen = replace(_config(*options, precision, threads, augment, refine), memory=int(min(memory, 1e9) * 1e9))
    if chosen.importance in MEASURED_IMPORTANCES and calibration is None:
        raise UsageError(
            f"importance {chosen.importance} is measured on samples: give --calibration FILE.npz, or use l1 or l2"
        )
    if measure and chosen.target != "cpu":
        raise UsageError(f"--measure times on the processor, but the target is {chosen.target}")
    check_outputs(model, {"-o": output, "--save-plan": save_plan, "--report": report})
    if dump_passes is not None and dump_passes.exists() and not dump_passes.is_dir():
        raise UsageError(f"--dump-passes {dump_passes}: not a folder")

    from tetris_onnx.data.calibration import parse_shapes
    from tetris_onnx.graph import io
    from tetris_onnx.optimize import optimize as run_optimize
    from tetris_onnx.plan import Plan
    from tetris_onnx.reports.report import check_report_path, print_report, to_json, write_report
    from tetris_onnx.runtime import get_library_path, import_onnxruntime

    shapes = parse_shapes(shape or [])
    import_onnxruntime()  # the verification at the end needs both
    get_library_path()
    if report is not None:
        check_report_path(report)
    loaded_plan = None if plan is None else Plan.load(plan)
    samples, labeled = read_both(model, calibration, data, images)
    searched_on = accuracy_data(max_drop, samples, labeled)
    with show_progress() as progress:
        result = run_optimize(
            model,
            chosen,
            plan=loaded_plan,
            calibration=samples,
            progress=progress,
            dump_passes=dump_passes,
            max_drop=max_drop,
            labeled=searched_on,
            measure=measure,
            weight_pictures=report is not None and report.suffix.lower() == ".html",
            shapes=shapes,
        )
        outcome = replace(result.report, model=str(model), output=str(output))
        if searched_on is not None:
            note = f"the plan was searched on {data}: its accuracy on other samples is a little lower"
            outcome = replace(outcome, notes=(*outcome.notes, note))
        if any(row.status == "block-sparse" for row in outcome.layers) and plan is None and calibration is None:
            note = _NOT_CALIBRATED + _MEASURE * (data is None) + _IF_TOO_LOW
            outcome = replace(outcome, notes=(*outcome.notes, note))
        # Everything that can fail comes before the first file is written.
        if labeled is not None:
            outcome = with_accuracy(outcome, model, result.model, labeled, progress)
        if bench:
            outcome = with_times(outcome, model, result.model, shapes, progress)
    io.save(result.model, output)
    if save_plan is not None:
        result.plan.save(save_plan)
    if report is not None:
        write_report(outcome, report, result.maps)
    if json:
        sys.stdout.write(to_json(outcome))
    else:
        print_report(outcome, open_console())


@app.command()
def inspect(
    model: Model,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of each layer's weights to prune.", show_default="0.5"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with the options of each layer."),
    ] = None,
    block_size: BlockSize = None,
    precision: Precision = None,
    threads: Threads = None,
    shape: Shape = None,
    json: Json = False,
) -> None:
    """List the layers of MODEL: shapes, which can be pruned, why not, and what pruning could win."""
    chosen = _config(config, sparsity, block_size, precision=precision, threads=threads)

    from tetris_onnx.data.calibration import parse_shapes
    from tetris_onnx.planner import OPEN_SIZES
    from tetris_onnx.planner import inspect as run_inspect
    from tetris_onnx.reports.report import count, layer_table, percent, threads_text, total_ms
    from tetris_onnx.timing.machine import load_machine

    machine = load_machine().name
    layers = run_inspect(model, chosen, shapes=parse_shapes(shape or []))
    times = total_ms(layers)
    unused = chosen.unused_patterns(row.node for row in layers)
    before, after = _predict(layers, chosen)
    prunable = sum(row.status == "prunable" for row in layers)
    if json:
        from dataclasses import asdict

        value = {
            "model": str(model),
            "layers": [asdict(row) for row in layers],
            "macs": before,
            "predicted_macs": after,
            "predicted_ms": times,
            "predicted_speedup": times[0] / times[1] if times else None,
            "machine": machine,
            "unused_patterns": unused,
        }
        print_json(value)
        return
    console = open_console()
    console.print(layer_table(layers, console.width))
    console.print(f"{prunable} of {len(layers)} layers can be pruned", highlight=False)
    if before is not None and after:
        console.print(
            f"multiplications {count(before)} -> {count(after)} ({percent(after / before)})",
            highlight=False,
        )
    if times:
        console.print(
            f"predicted {times[0]:.3g} ms -> {times[1]:.3g} ms in these layers: {times[0] / times[1]:.2f}x "
            f"({machine}, {threads_text(chosen.threads)})",
            highlight=False,
        )
        if any(row.predicted_ms and row.macs is None for row in layers):
            console.print(f"note: {OPEN_SIZES}", style="yellow", markup=False, highlight=False)
    for pattern in unused:
        console.print(f"note: no layer matches {pattern!r}", style="yellow", markup=False, highlight=False)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="An ONNX file.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(
            help=".npz with one array per input ('label' gives the accuracy), or folder of images.",
            show_default="random",
        ),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = "1/255",
    layout: Layout = None,
    image_size: ImageSize = None,
    bgr: Bgr = False,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Exit with 1 if the largest error / max|y| is above."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of random samples.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the random samples.")] = 0,
    shape: Shape = None,
    provider: Provider = "cpu",
    json: Json = False,
) -> None:
    """Run A and B on the same inputs and say how far their outputs are apart."""
    from tetris_onnx.accuracy.compare import CompareError, print_comparison
    from tetris_onnx.accuracy.compare import compare as run_compare
    from tetris_onnx.data.calibration import parse_shapes

    images = parse_image_options(mean, std, scale, layout, image_size, bgr)
    check_image_options(images, data)
    with show_progress() as progress:
        result = run_compare(
            a,
            b,
            read_data(a, data, images),
            samples=samples,
            seed=seed,
            shapes=parse_shapes(shape or []),
            provider=provider,
            progress=lambda done, total: progress("compare", done, total),
        )
    if json:
        print_json(result.to_dict())
    else:
        print_comparison(result, open_console())
    if tolerance is not None and not result.relative <= tolerance:
        raise CompareError(f"the models differ by {result.relative:.2e} of max|y|, more than --tolerance {tolerance:g}")


@app.command()
def bench(
    a: Annotated[Path, typer.Argument(metavar="A", help="An ONNX file.", show_default=False)],
    b: Annotated[
        Path | None,
        typer.Argument(metavar="[B]", help="Another one, timed in turns with A.", show_default=False),
    ] = None,
    threads: Annotated[str, typer.Option(metavar="N,...", help="Threads of one operator; a list runs each.")] = "1",
    provider: Provider = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Samples of one run.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.001, help="How long to measure, at least 5 rounds.")] = 5.0,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Number of turns of each model, instead of --seconds."),
    ] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Also the time of each layer.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(help=".npz with one array per input.", show_default="random"),
    ] = None,
    shape: Shape = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="With --provider cuda: capture a run, replay it.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    json: Json = False,
) -> None:
    """Time A, or A against B, in turns; print medians and their ratio."""
    from tetris_onnx.data.calibration import parse_shapes
    from tetris_onnx.timing.bench import bench as run_bench
    from tetris_onnx.timing.bench import parse_threads, print_bench

    shapes = parse_shapes(shape or [])
    results = []
    for n in parse_threads(threads):
        with show_progress() as progress:
            result = run_bench(
                a,
                b,
                threads=n,
                provider=provider,
                batch=batch,
                rounds=rounds,
                seconds=seconds,
                per_layer=per_layer,
                seed=seed,
                data=data,
                shapes=shapes,
                cuda_graph=cuda_graph,
                progress=percent_of("bench", progress),
            )
        results.append(result)
        if not json:
            print_bench(result, open_console())
    if json:
        print_json({"results": [result.to_dict() for result in results]})


@app.command()
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time some layers, to predict times better; kept in the cache folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Check versions, providers, the op library, instruction sets and GPU."""
    from tetris_onnx.doctor import diagnose, print_diagnosis

    diagnosis = diagnose(measure)
    if json:
        print_json(diagnosis.to_dict())
    else:
        print_diagnosis(diagnosis, open_console())
    if not diagnosis.usable:
        raise typer.Exit(1)


app.command()(sweep)  # behind the others in the list of --help


def _config(
    path: Path | None,
    sparsity: float | None,
    block_size: str | None,
    gathers: str | None = None,
    reorder: str | None = None,
    importance: str | None = None,
    seed: int | None = None,
    target: str | None = None,
    allocation: str | None = None,
    speedup: float | None = None,
    precision: str | None = None,
    threads: int | None = None,
    augment: int | None = None,
    refine: int | None = None,
) -> Config:
    """The config file's options with those of the command line on top."""
    if path is not None:
        refuse_together("--config", {"--sparsity": sparsity})
    values = {
        "sparsity": sparsity,
        "block_size": None if block_size is None else parse_block_size(block_size),
        "gathers": gathers,
        "reorder": reorder,
        "importance": importance,
        "seed": seed,
        "target": target,
        "allocation": "latency" if speedup is not None and allocation is None else allocation,
        "speedup": speedup,
        "precision": precision,
        "threads": threads,
        "augment": augment,
        "refine": refine,
    }
    return load_config_with(path, values)


def _predict(layers: Sequence[LayerReport], config: Config) -> tuple[int | None, int | None]:
    """Multiplications of one sample (now, pruned as ``config`` says); None where a shape is unknown."""
    before = after = 0.0
    for row in layers:
        if row.macs is None:
            return None, None
        before += row.macs
        after += row.macs * (1 - config.for_layer(row.node).sparsity * (row.status == "prunable"))
    return round(before), round(after)
