"""Hostile files: mutates small models, plans, samples and config files, and runs the commands on them.

    python tests/fuzz/fuzz_models.py --count 10000 --seed 0 [--keep FOLDER]

Every run has to end in a result, or in one line that says what is wrong; never in a crash, in an error of a type that
nobody expected, out of memory or time, and never with half a file. Files run in worker processes with limits: a crash
ends a worker, and counts. ``--keep`` stores the files that failed. Exit code 1 where one did.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import typer
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from models import Net  # noqa: E402
from tetris_onnx import optimize  # noqa: E402
from tetris_onnx.cli import main as cli  # noqa: E402
from tetris_onnx.config import Config, LayerRule  # noqa: E402

SECONDS = 20  # of processor time, for one file
GIGABYTES = 4  # of private memory
_WORKER_FILES = 200
# Every layer that can be pruned is: it is named by a rule, so that no prediction keeps it dense.
CONFIG = 'block_size = "8x8"\n[layers."*"]\nsparsity = 0.5\n'
# Outcomes that are right; all others are failures.
GOOD = ("done", "refused")

INTEGERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e38, -1e38, 1e-45, float("inf"), float("-inf"), float("nan"))
STRINGS = (
    "",
    "x",
    "y",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "\x00",
    "é\u2028",
    "x" * 5000,
    "%s",
    "[red]",
    "C:\\x",
)


@dataclass(frozen=True)
class Case:
    """One file to try, and the command to try it with."""

    number: int
    seed: int  # that its mutations are drawn from


@dataclass(frozen=True)
class Outcome:
    number: int
    kind: str  # one of GOOD, "unexpected", "crash", "timeout", "half a file", "several lines"
    text: str


# Seeds


def plain_network() -> onnx.ModelProto:
    """A bit of everything that is found in a network of convolutions."""
    net = Net()
    x = net.input("x", ["N", 16, 8, 8])
    a = net.op("Relu", net.batchnorm(net.conv(x, (16, 32)), 32))
    b = net.op("Clip", net.conv(a, (32, 32)), net.constant(np.float32(0)), net.constant(np.float32(6)))
    a = net.op("Add", a, b)
    c = net.op("Concat", net.conv(a, (32, 16), kernel=1), net.op("Sigmoid", a), axis=1)
    c = net.op("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2])
    c = net.op("Flatten", c)
    net.output(net.op("Softmax", net.gemm(c, (768, 10)), out="y", axis=1))
    return net.build()


def shape_network() -> onnx.ModelProto:
    """Shapes that are computed, weights behind constants, a Resize."""
    net = Net()
    x = net.input("x", ["N", 16, "H", "W"])
    weight = net.op("Transpose", net.constant(net.weight_values(16, 32, 3, 3)), perm=[1, 0, 2, 3])
    a = net.op("Conv", x, weight, pads=[1, 1, 1, 1])
    a = net.op("Resize", a, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    a = net.op("GlobalAveragePool", net.conv(a, (32, 32), strides=[2, 2]))
    size = net.op("Slice", net.op("Shape", a), net.constant([0]), net.constant([1]))
    a = net.op("Reshape", a, net.op("Concat", size, net.constant([-1]), axis=0))
    filled = net.op("ConstantOfShape", net.constant([32, 20]), value=numpy_helper.from_array(np.float32([0.5])))
    a = net.op("MatMul", a, net.op("Add", filled, net.random(32, 20)))
    scale = net.op("Expand", net.constant(np.float32([2])), net.constant([20]))
    net.output(net.op("Mul", net.op("Tanh", a), net.op("Tile", scale, net.constant([1])), out="y"))
    return net.build()


def attention_network() -> onnx.ModelProto:
    """A block of a transformer, over products with constants."""
    net = Net()
    x = net.input("x", ["N", 12, 32])
    heads = [net.constant([0, 0, 4, 8])]
    parts = []
    for _ in range(3):
        a = net.op("Add", net.matmul(x, (32, 32)), net.random(32))
        parts.append(net.op("Transpose", net.op("Reshape", a, *heads), perm=[0, 2, 1, 3]))
    q, k, v = parts
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=3)
    a = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    a = net.op("Add", x, net.matmul(net.op("Reshape", a, net.constant([0, 0, 32])), (32, 32)))
    a = net.op("LayerNormalization", a, net.random(32), net.random(32), axis=-1)
    net.output(net.op("Add", a, net.matmul(net.op("Relu", net.matmul(a, (32, 64))), (64, 32)), out="y"))
    return net.build()


def branching_network() -> onnx.ModelProto:
    """An If with a layer in each branch, a function, float16, several inputs and outputs."""
    net = Net()
    x = net.input("x", ["N", 32])
    net.input("flag", [], TensorProto.BOOL)
    weight = net.constant(net.weight_values(32, 32))
    branches = {}
    for name, op in (("then_branch", "Add"), ("else_branch", "Mul")):
        nodes = [helper.make_node("MatMul", [x, weight], [f"{name}_m"])]
        nodes.append(helper.make_node(op, [f"{name}_m", x], [f"{name}_y"]))
        value = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["N", 32])
        branches[name] = helper.make_graph(nodes, name, [], [value])
    a = net.op("If", "flag", **branches)
    a = net.op("Double", net.gemm(a, (32, 64)), domain="local")
    half = net.op("Cast", a, to=TensorProto.FLOAT16)
    half = net.op("MatMul", half, net.constant(net.weight_values(32, 64).T.astype(np.float16)))
    net.output(half, TensorProto.FLOAT16)
    net.output(net.op("Relu", a, out="y"))
    model = net.build()
    body = [helper.make_node("Add", ["v", "v"], ["w"])]
    model.functions.append(helper.make_function("local", "Double", ["v"], ["w"], body, [helper.make_opsetid("", 17)]))
    return model


def seeds() -> list[onnx.ModelProto]:
    """The models that are mutated: small networks, and their block-sparse forms."""
    dense = [plain_network(), shape_network(), attention_network(), branching_network()]
    config = Config(block_size=(8, 8), workers=1, layers=(LayerRule("*", sparsity=0.5),))
    return dense + [optimize(model, config).model for model in (dense[0], dense[2])]


# Mutations


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, parts cut out, doubled or moved, the end cut off."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not content:
            break
        at, length = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + length] = bytes(rng.randrange(256) for _ in range(length))
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        elif kind == 4:
            other = rng.randrange(len(content))
            content[at : at + length] = content[other : other + length]
        else:
            # A varint where most likely none was.
            content[at : at + 1] = b"\xff" * rng.choice((4, 9)) + b"\x01"
    if rng.random() < 0.1:
        del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


def mutate_fields(model: onnx.ModelProto, rng: random.Random) -> None:
    """Change some fields to other values of their type: numbers, names, types, sizes, whole nodes."""
    names = [value for node in model.graph.node for value in (*node.input, *node.output)] or ["x"]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        messages = list(_messages(model))
        kinds = sorted({type(message).__name__ for message in messages})
        kind = rng.choice(kinds)  # kinds alike: there are many more dimensions than graphs
        message = rng.choice([m for m in messages if type(m).__name__ == kind])
        _mutate_message(message, rng, names)


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if _repeated(field) else [value]:
                yield from _messages(inner)


def _repeated(field: object) -> bool:
    repeated = getattr(field, "is_repeated", None)
    return bool(repeated) if repeated is not None else field.label == field.LABEL_REPEATED  # type: ignore[attr-defined]


def _mutate_message(message: Message, rng: random.Random, names: Sequence[str]) -> None:
    present = [field for field, _ in message.ListFields()]
    fields = present if present and rng.random() < 0.8 else list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    if rng.random() < 0.08:
        message.ClearField(field.name)
        return
    if field.message_type is not None:
        _mutate_children(message, field, rng)
        return
    new = _value(field, getattr(message, field.name), rng, names)
    if not _repeated(field):
        with contextlib.suppress(ValueError, TypeError):
            setattr(message, field.name, new())
        return
    values = getattr(message, field.name)
    at = rng.randrange(len(values) + 1)
    with contextlib.suppress(ValueError, TypeError):
        if at == len(values) or rng.random() < 0.2:
            values.insert(at, new())
        elif rng.random() < 0.2:
            del values[at]
        else:
            values[at] = new()


def _mutate_children(message: Message, field: object, rng: random.Random) -> None:
    value = getattr(message, field.name)  # type: ignore[attr-defined]
    if not _repeated(field):
        value.SetInParent()
        return
    kind = rng.randrange(5)
    if not value or kind == 0:
        value.add()
    elif kind == 1:
        del value[rng.randrange(len(value))]
    elif kind == 2:
        value.add().CopyFrom(value[rng.randrange(len(value))])
    elif kind == 3:
        value[rng.randrange(len(value))].CopyFrom(value[rng.randrange(len(value))])
    else:
        order = list(value)
        rng.shuffle(order)
        copies = [type(v).FromString(v.SerializePartialToString()) for v in order]
        del value[:]
        value.extend(copies)


def _value(field: object, old: object, rng: random.Random, names: Sequence[str]) -> Callable[[], object]:
    if field.enum_type is not None:  # type: ignore[attr-defined]
        return lambda: rng.choice([v.number for v in field.enum_type.values] + [99])  # type: ignore[attr-defined]
    cpp = field.cpp_type  # type: ignore[attr-defined]
    if cpp in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):  # type: ignore[attr-defined]
        return lambda: rng.choice(FLOATS)
    if cpp == field.CPPTYPE_STRING:  # type: ignore[attr-defined]
        if field.type == field.TYPE_BYTES:  # type: ignore[attr-defined]
            return lambda: _bytes(old if isinstance(old, bytes) else b"", rng)
        if field.name == "op_type":  # type: ignore[attr-defined]
            return lambda: rng.choice(_OPERATORS)
        return lambda: rng.choice(names) if rng.random() < 0.6 else rng.choice(STRINGS)
    near = old if isinstance(old, int) else 4
    return lambda: rng.choice(INTEGERS) if rng.random() < 0.5 else near + rng.choice((-2, -1, 1, 2))


_OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas()})


def _bytes(old: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return old[: rng.randrange(len(old) + 1)]
    if kind == 1:
        return old + bytes(rng.choice((1, 4, 4096)))
    if kind == 2:
        number = struct.pack("<q", rng.choice(INTEGERS))
        return (number * (len(old) // 8 + 1))[: len(old)]
    return mutate_bytes(old, rng)


def mutate_arrays(file: bytes, rng: random.Random) -> bytes:
    """An .npz with bytes of its members changed (and the archive right), or with bytes of the archive changed."""
    if rng.random() < 0.3:
        return mutate_bytes(file, rng)
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(list(members))
        kind = rng.randrange(6)
        if kind == 0:
            del members[name]
        elif kind == 1:
            members[name] = members[rng.choice(list(members))]
        elif kind == 2:
            header = rng.choice((b"(4294967296, 4294967296)", b"(-1,)", b"(0,)", b"(9223372036854775807,)", b"()"))
            members[name] = members[name].replace(b"(32,)", header).replace(b"(64, 16, 8, 8)", header)
        elif kind == 3:
            members[name] = members[name].replace(b"<f4", rng.choice((b"|O ", b"<U9", b"<f8", b"<i1", b">i8")))
        else:
            members[name] = mutate_bytes(members[name], rng)
        members = members or {"x": b""}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def files(case: Case, models: Sequence[onnx.ModelProto]) -> dict[str, bytes]:
    """The files of a case: the model, and those that a command may take with it. One of them is hostile."""
    rng = random.Random(case.seed)
    model = onnx.ModelProto()
    model.CopyFrom(models[rng.randrange(len(models))])
    found = {"model.onnx": b"", "fuzz.toml": CONFIG.encode()}
    kind = rng.random()
    if kind < 0.85:
        structural = rng.random() < 0.75
        if structural:
            mutate_fields(model, rng)
        found["model.onnx"] = model.SerializePartialToString()
        if not structural or rng.random() < 0.05:
            found["model.onnx"] = mutate_bytes(found["model.onnx"], rng)
        return found
    found["model.onnx"] = models[0].SerializeToString()
    if kind < 0.9:
        found["fuzz.toml"] = mutate_bytes(found["fuzz.toml"], rng)
    elif kind < 0.95:
        found["plan.npz"] = mutate_arrays(_PLAN, rng)
    else:
        found["samples.npz"] = mutate_arrays(_SAMPLES, rng)
    return found


def _plan() -> bytes:
    layer = {"out_perm": np.arange(32), "in_perm": np.arange(32), "block_size": np.array([8, 8])}
    arrays = {f"0.{name}": value for name, value in layer.items()} | {"0.keep": np.eye(4, dtype=bool)}
    file = io.BytesIO()
    np.savez(file, format=np.array("tetris-onnx plan 1"), layers=np.array(["conv2"]), **arrays)
    return file.getvalue()


def _samples() -> bytes:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    np.savez(file, x=rng.standard_normal((64, 16, 8, 8), np.float32), label=np.arange(64) % 10)
    return file.getvalue()


_PLAN, _SAMPLES = _plan(), _samples()


def command(case: Case, folder: Path, names: Container[str]) -> list[str]:
    """The command line of a case, for the files ``names`` in ``folder``."""
    rng = random.Random(case.seed + 1)
    model, config = str(folder / "model.onnx"), ["--config", str(folder / "fuzz.toml")]
    optimizing = ["optimize", model, "-o", str(folder / "out.onnx"), "--reorder"]
    if "plan.npz" in names:
        return [*optimizing[:-1], "--plan", str(folder / "plan.npz")]
    if "samples.npz" in names:
        samples = str(folder / "samples.npz")
        if rng.random() < 0.3:
            return [*optimizing, "none", *config, "--calibration", samples]
        return ["compare", model, model, "--data", samples]
    return rng.choice(
        (
            ["inspect", model, *config],
            [*optimizing, "none", *config],
            [*optimizing, "none", *config, "--precision", "bf16"],
            [*optimizing, rng.choice(("none", "greedy")), *config, "--gathers", rng.choice(("keep", "absorb"))],
            ["compare", model, model, "--samples", "1"],
        )
    )


# Running


def attempt(case: Case, models: Sequence[onnx.ModelProto], folder: Path) -> Outcome:
    """Run one case in this process."""
    given = files(case, models)
    for name, data in given.items():
        (folder / name).write_bytes(data)
    out, err = io.StringIO(), io.StringIO()
    args = command(case, folder, given)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(args)
    text = f"{args[0]}: {err.getvalue()}"
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("note: ")]
    left = sorted({path.name for path in folder.iterdir()} - given.keys())
    wrote = code == 0 and args[0] == "optimize"
    if "unexpected: " in text:
        return Outcome(case.number, "unexpected", text)
    if left != (["out.onnx"] if wrote else []) or any(
        (folder / name).read_bytes() != data for name, data in given.items()
    ):
        return Outcome(case.number, "half a file", f"{text}; files {left}")
    if code != 0 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        return Outcome(case.number, "several lines", text)
    return Outcome(case.number, "done" if code == 0 else "refused", text)


def _work(cases: Sequence[Case], models: Sequence[onnx.ModelProto], folder: Path, report: int) -> None:
    """A worker: runs ``cases`` one after another and sends what came out."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.disable()  # pytest's would tell of each crash
    limit = GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]  # (made for each call otherwise)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)  # (what C++ prints before it aborts)
    for case in cases:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its default: the end of the process
        with tempfile.TemporaryDirectory(dir=folder) as own:
            outcome = attempt(case, models, Path(own))
        data = pickle.dumps(outcome)
        os.write(report, struct.pack("<I", len(data)) + data)


def fuzz(
    cases: Sequence[Case], models: Sequence[onnx.ModelProto], progress: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """The outcome of every case, in order."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="tetris_onnx_fuzz_") as folder:
        while len(outcomes) < len(cases):
            batch = cases[len(outcomes) : len(outcomes) + _WORKER_FILES]
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                code = 1
                try:
                    _work(batch, models, Path(folder), writer)
                    code = 0
                finally:
                    os._exit(code)
            os.close(writer)
            received = 0
            with os.fdopen(reader, "rb") as stream:
                while header := stream.read(4):
                    outcome = pickle.loads(stream.read(struct.unpack("<I", header)[0]))
                    outcomes.append(outcome)
                    received += 1
                    if progress is not None:
                        progress(outcome)
            status = os.waitpid(pid, 0)[1]
            if received < len(batch):
                case = batch[received]
                died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                kind = "timeout" if died == signal.SIGPROF else "crash"
                how = signal.Signals(died).name if died else f"exit code {os.waitstatus_to_exitcode(status)}"
                outcomes.append(Outcome(case.number, kind, f"{command(case, Path(), files(case, models))[0]}: {how}"))
                if progress is not None:
                    progress(outcomes[-1])
    return outcomes


def make_cases(count: int, seed: int) -> list[Case]:
    """``count`` cases of a seed. The first ones are the same for any count."""
    rng = random.Random(seed)
    return [Case(number, rng.getrandbits(48)) for number in range(count)]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this one in the open, with its traceback")
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    args = parser.parse_args()
    models = seeds()
    cases = make_cases(args.count if args.only is None else args.only + 1, args.seed)
    if args.only is not None:
        folder = args.keep or Path(tempfile.mkdtemp())
        given = files(cases[args.only], models)
        for name, data in given.items():
            (folder / name).write_bytes(data)
        line = command(cases[args.only], folder, given)
        print(" ".join(line))
        return cli.run(["--debug", *line])
    start = time.monotonic()
    counts: Counter[str] = Counter()

    def show(outcome: Outcome) -> None:
        counts[outcome.kind] += 1
        if outcome.kind not in GOOD:
            print(f"{outcome.number}: {outcome.kind}: {' '.join(outcome.text.split())[:300]}", flush=True)
            if args.keep is not None:
                folder = args.keep / f"{args.seed}_{outcome.number}"
                folder.mkdir(parents=True, exist_ok=True)
                for name, data in files(cases[outcome.number], models).items():
                    (folder / name).write_bytes(data)
        elif outcome.number % 250 == 249:
            print(f"{outcome.number + 1} files, {time.monotonic() - start:.0f} s", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # and tell what came out so far
        fuzz(cases, models, show)
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    print(f"{sum(counts.values())} files, seed {args.seed}: {kinds}", flush=True)
    return int(any(kind not in GOOD for kind in counts))


if __name__ == "__main__":
    sys.exit(main())
