"""The speed-up of single layers over density and block size: figure 1(a) of the TETRIS paper, on the CPU.

    python custom_ops/bench/sweep.py custom_ops/bench/vgg16.txt -o sweep.csv --plot sweep.png

Every layer of the shapes file is timed at every density and block size against onnxruntime's dense layer; all of one
layer and block size take turns, so that whatever slows the machine slows all of them. The times are those of the
operator alone, from onnxruntime's profiler: without the conversions of layout around a single dense convolution, which
a network of dense layers does not have. A few output pixels of each case are checked against numpy.

The table (-o, .csv) holds a row for each case and sums over the layers; `fraction` = speed-up x density: 1 is a time
exactly proportional to the kept blocks. Cases that the file already holds are not measured again: stop the program
whenever you like (or let --limit do it), and start it again to go on.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import operator
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from one_layer import RandomLayer, dense_model, random_layer  # beside this file
from shapes import Layer, read_layers
from tetris_onnx import runtime
from tetris_onnx.timing.processor import cpu_name

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.27, 0.35, 0.5, 0.65, 0.8, 1.0)
BLOCK_SIZES = (8, 16, 32, 64)
ROUNDS = 7
TOLERANCE = 1e-4  # of the largest output: the order of float32 sums


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    layer: str
    batch: int
    threads: int
    block_size: int
    asked: float  # the density asked for
    density: float  # the one that the layer's grid of blocks allows
    dense_ms: float
    sparse_ms: float
    speedup: float
    fraction: float

    @property
    def key(self) -> tuple[str, int, int, int, float]:
        """What was asked for."""
        return (self.layer, self.batch, self.threads, self.block_size, self.asked)


class Profiled:
    """A session that knows how long each run of its operator took."""

    def __init__(self, model: bytes, x: NDArray[np.float32], profile: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
        # One pool for all sessions: a session's own threads would go on spinning into the next one's time.
        options.use_per_session_threads = False
        self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.y = self.session.run(None, {"x": x})[0]
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
        self.binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(self.y))

    def run(self) -> None:
        """Run the layer once more."""
        self.session.run_with_iobinding(self.binding)

    def milliseconds(self) -> float:
        """Median time of the operator, without the first run. Ends the session."""
        events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))
        times = [
            event["dur"] / 1e3
            for event in events
            if event.get("cat") == "Node"
            and event["name"].endswith("_kernel_time")
            and not event["args"]["op_name"].startswith("Reorder")  # the conversions of layout
        ]
        return statistics.median(times[1:])


def check(sparse: RandomLayer, x: NDArray[np.float32], y: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Compare a corner and some other pixels of the output with numpy; ends the program where they differ."""
    layer, weight = sparse.layer, sparse.dense_weight()
    if not layer.is_conv:
        rows = rng.choice(layer.outputs, min(64, layer.outputs), replace=False)
        pairs = [(y[:, rows], x @ weight[rows].T + sparse.constants["bias"][rows])]
    else:
        padded = np.pad(x, [(0, 0), (0, 0), (layer.pad,) * 2, (layer.pad,) * 2])
        last = np.array(y.shape[2:]) - 1
        pairs = []
        for row, column in [(0, 0), tuple(last), *(tuple(rng.integers(0, last + 1)) for _ in range(4))]:
            top, left = row * layer.stride, column * layer.stride
            patch = padded[:, :, top : top + layer.kernel, left : left + layer.kernel]
            expected = np.einsum("nchw,mchw->nm", patch, weight, optimize=True) + sparse.constants["bias"]
            pairs.append((y[:, :, row, column], expected))
    for found, expected in pairs:
        error = np.abs(found - np.maximum(expected, 0)).max() / np.abs(y).max()
        if not error <= TOLERANCE:
            raise SystemExit(f"{layer.name}: wrong by {error:.1e} of the largest output")


def measure(
    layer: Layer, block_size: int, densities: Sequence[float], batch: int, threads: int, rounds: int
) -> list[Case]:
    """One layer with one block size at all densities, which take turns with the dense layer.

    `threads` is what the caller has set for all sessions of the process.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, layer.inputs, *layer.map_size), dtype=np.float32)
    with tempfile.TemporaryDirectory(prefix="tetris-onnx-") as folder:
        sessions, reached = [], []
        for density in densities:
            sparse = random_layer(layer, block_size, density, rng)
            sessions.append(Profiled(sparse.sparse_model(batch), x, Path(folder) / f"{density}"))
            reached.append(sparse.density)
            check(sparse, x, sessions[-1].y, rng)
        weight = rng.standard_normal(sparse.weight_shape, dtype=np.float32)
        dense = Profiled(dense_model(layer, weight, sparse.constants["bias"], batch), x, Path(folder) / "dense")
        for _, session in itertools.product(range(rounds), [dense, *sessions]):
            session.run()
        base = dense.milliseconds()
        times = [session.milliseconds() for session in sessions]
    return [
        Case(layer.name, batch, threads, block_size, asked, density, base, ms, base / ms, base / ms * density)
        for asked, density, ms in zip(densities, reached, times, strict=True)
    ]


def with_sums(cases: Iterable[Case], layers: Sequence[Layer]) -> list[Case]:
    """The cases, and for each density and block size their sum over the layers (where all of them are there)."""
    by_name = {layer.name: layer for layer in layers}
    key = operator.attrgetter("batch", "threads", "block_size", "asked")
    rows: list[Case] = []
    for (batch, threads, block, asked), group in itertools.groupby(sorted(cases, key=key), key):
        found = {case.layer: case for case in group}
        rows += (found[name] for name in by_name if name in found)
        sums = {"sum": list(by_name)}
        convolutions = [name for name in by_name if by_name[name].is_conv]
        if 0 < len(convolutions) < len(by_name):
            sums["convolutions"] = convolutions
        for title, names in sums.items():
            if not set(names) <= set(found):
                continue
            dense, sparse = (sum(getattr(found[n], field) for n in names) for field in ("dense_ms", "sparse_ms"))
            # The speed-up that a time proportional to the density would give every layer is 1 / density.
            density = sum(found[n].dense_ms * found[n].density for n in names) / dense
            ratio = dense / sparse
            rows.append(Case(title, batch, threads, block, asked, density, dense, sparse, ratio, ratio * density))
    return rows


def read_table(path: Path) -> list[Case]:
    """The layers' rows of a table."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    kinds = {"str": str, "int": int, "float": float}
    return [
        Case(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields(Case)})  # type: ignore[arg-type]
        for row in csv.DictReader(lines)
        if row["layer"] not in ("sum", "convolutions")
    ]


def write_table(path: Path, cases: Iterable[Case], notes: Sequence[str]) -> None:
    """Write the rows under comments that say what they belong to; whole or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {note}\n" for note in notes)
        writer = csv.DictWriter(file, [field.name for field in fields(Case)], lineterminator="\n")
        writer.writeheader()
        for case in cases:
            values = asdict(case)
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()})
    unfinished.replace(path)


def plot(path: Path, cases: Sequence[Case], title: str) -> None:
    """Speed-up over density: the sums, then each layer; a line for each block size, and the ideal."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib (the table is written)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(case.layer for case in cases))
    names.sort(key=lambda name: ["sum", "convolutions"].index(name) if name in ("sum", "convolutions") else 2)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 2.8 * rows + 0.6), squeeze=False)
    blocks = sorted({case.block_size for case in cases})
    ideal = np.geomspace(min(case.density for case in cases), 1, 50)
    for ax, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            ax.axis("off")
            continue
        ax.plot(ideal, 1 / ideal, color="0.6", linestyle="--", label="1 / density")
        for block in blocks:
            points = sorted((c.density, c.speedup) for c in cases if c.layer == name and c.block_size == block)
            ax.plot(*zip(*points, strict=True), marker=".", label=f"{block}x{block}")
        ax.set(xscale="log", yscale="log", title=name, xlim=(ideal[0] * 0.9, 1.1))
        for axis, ticks in ((ax.xaxis, (0.05, 0.1, 0.27, 0.5, 1)), (ax.yaxis, (1, 2, 4, 8, 16))):
            axis.set_major_locator(matplotlib.ticker.FixedLocator(ticks))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.supxlabel("density (kept blocks / all blocks)")
    figure.supylabel("speed-up over dense onnxruntime")
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def print_sums(cases: Iterable[Case]) -> None:
    """The sums, a line for each density, a column for each block size."""
    sums = {(case.asked, case.block_size): case for case in cases if case.layer == "sum"}
    blocks = sorted({block for _, block in sums})
    print("speed-up of the sum over all layers (fraction of ideal)")
    print(f"{'density':>8} " + " ".join(f"{f'{block}x{block}':>14}" for block in blocks))
    for asked in sorted({asked for asked, _ in sums}):
        found = [sums.get((asked, block)) for block in blocks]
        print(f"{asked:>8g} " + " ".join(f"{c.speedup:>7.2f} ({c.fraction:.2f})" if c else " " * 14 for c in found))


def main() -> None:
    """Measure, write the table, print the sums, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", type=Path, help="file of layers, one a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the table (.csv); what it holds is kept")
    parser.add_argument("--plot", type=Path, help="draw it too (.png, .svg, .pdf); needs matplotlib")
    parser.add_argument("--densities", type=_numbers, default=DENSITIES, help="between 0 and 1: 0.1,0.27,1")
    parser.add_argument("--block-sizes", type=_numbers, default=BLOCK_SIZES, help="8,16,32,64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed runs of each case")
    parser.add_argument("--layers", help="only the layers whose name holds this")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop after so many, to be gone on with")
    arguments = parser.parse_args()
    blocks = [int(block) for block in arguments.block_sizes]
    if not all(0 < density <= 1 for density in arguments.densities) or min(blocks) < 1:
        parser.error("densities lie between 0 and 1, block sizes are positive")
    network = read_layers(arguments.shapes)
    layers = [layer for layer in network if (arguments.layers or "") in layer.name]
    if not layers:
        parser.error(f"{arguments.shapes} has no layer of that name")
    onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)
    notes = (
        f"{cpu_name()}, {os.cpu_count()} cores; onnxruntime {onnxruntime.__version__}, Python "
        f"{platform.python_version()}",
        shlex.join(["python", "custom_ops/bench/sweep.py", *sys.argv[1:]]),
    )
    cases = {case.key: case for case in read_table(arguments.output)} if arguments.output.exists() else {}
    if strangers := {case.layer for case in cases.values()} - {layer.name for layer in network}:
        parser.error(f"{arguments.output} is the table of another network: it holds {min(strangers)}")
    begin = time.perf_counter()
    left = 0
    for layer, block in itertools.product(layers, blocks):
        case = (layer.name, arguments.batch, arguments.threads, block)
        missing = [density for density in arguments.densities if (*case, density) not in cases]
        if missing and arguments.limit and time.perf_counter() - begin > arguments.limit:
            left += 1
        elif missing:
            found = measure(layer, block, missing, arguments.batch, arguments.threads, arguments.rounds)
            cases |= {case.key: case for case in found}
            print(f"{layer.name}, {block}x{block}: " + " ".join(f"{c.speedup:.2f}" for c in found), file=sys.stderr)
            write_table(arguments.output, with_sums(cases.values(), network), notes)
    rows = [
        case
        for case in with_sums(cases.values(), network)
        if (case.batch, case.threads) == (arguments.batch, arguments.threads)
    ]
    print_sums(rows)
    if arguments.plot:
        title = f"{arguments.shapes.stem}, batch {arguments.batch}, threads {arguments.threads}: {notes[0]}"
        plot(arguments.plot, rows, title)
    if left:
        sys.exit(f"the time is up: {left} of {len(layers) * len(blocks)} left; the same command goes on")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    main()
