"""Compile the CUDA kernels ahead of time, for the op library to hold. Needs triton 3.6.0, no GPU.

    python custom_ops/cuda/build.py

writes, into custom_ops/cuda/prebuilt:
  kernels.tar.xz  kernels.bin (all images, one after the other), kernels.inc (the table of them, C++), signatures.h
  resources.csv   what the compiler made of each: registers, spilled bytes, shared memory, tensor core instruction,
                  along which side of a tile neighboring threads load and store;
                  tests/custom_ops/cuda/test_resources.py holds rules against it: a regression shows without a GPU

Each variant is compiled for several GPU architectures, and once to PTX for those that have no image of their own, which
the driver compiles when it loads it. Only plain sm_80 PTX is portable to all later GPUs: the wgmma of sm_90a is not.
"""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import hashlib
import io
import itertools
import lzma
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRITON_VERSION = "3.6.0"  # newer ones write PTX that current drivers refuse

ARCHITECTURES = (80, 90, 100, 120)
PTX = 0  # in the place of an architecture: sm_80 PTX
PTX_VERSION = 80  # CUDA 12.0, the oldest driver that the library accepts
# Shared memory that one program may use. The sm_80 image also runs on sm_86 and sm_89, which have less than sm_80.
SHARED_MEMORY = {80: 101376, 90: 232448, 100: 232448, 120: 101376, PTX: 101376}

# Parameter types by kernel: what conv.cc passes. p: pointer, i: int32, f: float32.
SIGNATURES = {
    "block_sparse_conv": "p" * 9 + "i" * 25 + "ff",
    "sum_splits": "p" * 5 + "i" * 6 + "ff",
    "channels_last": "p" * 3 + "i" * 4,
    "max_pool": "p" * 2 + "i" * 12,
}
# What the kernels may assume to be a multiple of 16 (bytes for pointers). conv.cc keeps it so.
DIVISIBLE = {
    "block_sparse_conv": (
        "x_ptr",
        "w_ptr",
        "bias_ptr",
        "tile_begin_ptr",
        "channel_tile_ptr",
        "row_order_ptr",
        "output_channel_ptr",
        "C",
        "w_tap",
    ),
    "sum_splits": ("partial_ptr", "bias_ptr", "output_channel_ptr"),
    "channels_last": ("y_ptr", "channel_ptr", "packed"),
    "max_pool": (),
}
# Element types: what the tensors hold, and how a product of them is computed.
TRITON_TYPES = {"f16": "fp16", "bf16": "bf16", "tf32": "fp32", "f32": "fp32"}
ITEM_SIZES = {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time choices; those that are no convolution have `kernel`, `type`, `layout` only."""

    kernel: str
    type: str
    layout: str  # of the output: nchw, nhwc, split; for channels_last, of the input
    taps: int = 0
    bm: int = 0
    bn: int = 0
    bk: int = 0
    warps: int = 4

    @property
    def name(self) -> str:
        """Unique and readable."""
        if self.kernel == "block_sparse_conv":
            return f"conv_{self.type}_t{self.taps}_{self.bm}x{self.bn}x{self.bk}_{self.layout}"
        return f"{self.kernel}_{self.type}_{self.layout}"

    @property
    def swap(self) -> bool:
        """Whether pixels are the M side of the matrix instruction."""
        return self.bm < 64 <= self.bn and self.type != "f32"

    def stages(self, architecture: int) -> int:
        """How many steps' tiles are in flight."""
        tile = (self.bm + self.bn) * self.bk * ITEM_SIZES[self.type]
        return max(2, min(4, SHARED_MEMORY[architecture] // 1024 * 1024 // tile))


def variants() -> Iterator[Variant]:
    """All that is built. Tiles of 64 rows and more are for blocks of 64 rows and more, tiles of 32 for smaller ones."""
    for kind in ("f16", "bf16", "tf32"):
        bk = 64 if ITEM_SIZES[kind] == 2 else 32
        for taps, layout in itertools.product((9, 1), ("nchw", "nhwc")):
            for bm, bn in ((64, 16), (64, 64), (64, 128), (64, 256), (128, 128)):
                if bn < 256 or taps == 9:
                    warps = 4 if bm * bn <= 64 * 128 else 8
                    yield Variant("block_sparse_conv", kind, layout, taps, bm, bn, bk, warps)
            for bn in (64, 128):
                yield Variant("block_sparse_conv", kind, layout, taps, 32, bn, 32)
        for bm, k in ((64, bk), (32, 32)):
            for layout in ("nchw", "nhwc", "split"):
                yield Variant("block_sparse_conv", kind, layout, 0, bm, 64, k)
            for taps in (1, 9):
                for bn in (16, 64):
                    yield Variant("block_sparse_conv", kind, "split", taps, bm, bn, k)
    for layout in ("nchw", "nhwc", "split"):
        yield Variant("block_sparse_conv", "f32", layout, 0, 32, 64, 32)
    for kind in ("f16", "bf16", "f32"):
        for layout in ("nchw", "nhwc"):
            yield Variant("sum_splits", kind, layout)
        yield Variant("max_pool", kind, "nhwc")
    for kind in ("i16", "i32", "tf32"):
        for layout in ("nchw", "nhwc"):
            yield Variant("channels_last", kind, layout)


def constants(variant: Variant, architecture: int) -> dict[str, Any]:
    """The kernel's compile-time parameters."""
    if variant.kernel == "block_sparse_conv":
        return {
            "TAPS": variant.taps,
            "BM": variant.bm,
            "BN": variant.bn,
            "BK": variant.bk,
            "SWAP": variant.swap,
            "LAST": variant.layout == "nhwc",
            "SPLIT": variant.layout == "split",
            "PRECISION": "ieee" if variant.type == "f32" else "tf32",
            "STAGES": variant.stages(architecture),
        }
    if variant.kernel == "sum_splits":
        return {"LAST": variant.layout == "nhwc", "BR": 32, "BP": 16}
    if variant.kernel == "max_pool":
        return {"BC": 64, "BP": 16}
    return {"LAST": variant.layout == "nhwc", "ROUND": variant.type == "tf32", "BC": 32, "BP": 64}


def compile_variant(variant: Variant, architecture: int) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import kernels

    def hook(backend: Any, stages: dict[str, Any], *_: Any) -> None:
        make_ptx = stages["ptx"]
        stages["ptx"] = lambda source, metadata: cache_pixels(make_ptx(source, metadata), variant)

    triton.knobs.runtime.add_stages_inspection_hook = hook
    function = getattr(kernels, variant.kernel)
    chosen = constants(variant, architecture)
    element = "*" + TRITON_TYPES.get(variant.type, variant.type)
    if variant.kernel == "channels_last":  # moves values as they are
        element = "*i16" if variant.type == "i16" else "*i32"
    types = {"x_ptr": element, "w_ptr": element, "y_ptr": element, "bias_ptr": "*fp32", "partial_ptr": "*fp32"}
    types["addend_ptr"] = element
    if variant.layout == "split":
        types["y_ptr"] = "*fp32"
    signature = {}
    for name, kind in parameters(function, chosen):
        signature[name] = types.get(name, {"p": "*i32", "i": "i32", "f": "fp32", "c": "constexpr"}[kind])
    positions = {name: position for position, name in enumerate(function.arg_names)}
    attributes = {(positions[name],): [["tt.divisibility", 16]] for name in DIVISIBLE[variant.kernel]}
    options = {"num_warps": variant.warps, "num_stages": chosen.get("STAGES", 2)}
    if architecture == PTX:
        options["ptx_version"] = PTX_VERSION
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=chosen, attrs=attributes),
        target=GPUTarget("cuda", architecture or 80, 32),
        options=options,
    )
    check(variant, architecture, compiled)
    return compiled


def cache_pixels(ptx: str, variant: Variant) -> str:
    """Let the convolution's loads of x go through the L1 cache, from which the next taps get most of their pixels.

    Triton lets all 16-byte asynchronous loads pass it by (cp.async.cg). Without it each tap of each tile is read from
    the L2 cache again, which would bound a 3 x 3 convolution; weights are used once by each program and stay out of L1.
    """
    if variant.kernel != "block_sparse_conv" or variant.taps == 1:
        return ptx
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # type: ignore[index]
    parts = ptx.split("cp.async.commit_group;")
    groups = [i for i, part in enumerate(parts) if "cp.async.c" in part and "shared.global" in part]
    expected = [
        max(1, side * variant.bk * ITEM_SIZES[variant.type] // 16 // threads) for side in (variant.bn, variant.bm)
    ]
    for number, i in enumerate(groups):
        # In the order of the source: x, then w, whose loads have one mask for all.
        found = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*, (\S+);", parts[i])
        if len(found) != expected[number % 2] or (number % 2 == 1 and len(set(found)) != 1):
            raise SystemExit(f"{variant.name}: group {number} has {len(found)} loads, expected {expected[number % 2]}")
        if number % 2 == 0:
            parts[i] = parts[i].replace("cp.async.cg.shared.global", "cp.async.ca.shared.global")
    if not groups or len(groups) % 2:
        raise SystemExit(f"{variant.name}: {len(groups)} groups of asynchronous loads, expected pairs")
    return "cp.async.commit_group;".join(parts)


def neighbors(ttgir: str) -> str:
    """For each plain load and store of a tile: the size of the side along which neighboring threads lie."""
    orders = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{.*order = \[(\d)", ttgir, re.M))
    found = re.findall(r"tt\.(load|store) .*: tensor<(\d+)x(\d+)x!tt\.ptr<\w+>, (#\w+)>", ttgir)
    return " ".join(sorted({f"{access} {sizes[int(orders[layout])]}" for access, *sizes, layout in found}))


def parameters(function: Any, constants: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each parameter's name and kind: p, i, f, or c for a compile-time constant."""
    for name in function.arg_names:
        if name in constants:
            yield name, "c"
        elif name.endswith("_ptr"):
            yield name, "p"
        else:
            yield name, "f" if name in ("low", "high") else "i"


def check(variant: Variant, architecture: int, compiled: Any) -> None:
    """Raise if the launch would not fit what was compiled."""
    text = compiled.asm["ptx"]
    declared = re.findall(r"\.param \.(\w+)", text[text.index(".entry") :].split("{")[0])
    # Triton adds two pointers of its own: to global scratch and to profiling memory, none of which is used.
    words = {"p": "u64", "i": "u32", "f": "f32"}
    expected = [words[kind] for kind in SIGNATURES[variant.kernel] + "pp"]
    if declared != expected:
        raise SystemExit(f"{variant.name}: parameters {declared}, the launch passes {expected}")
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise SystemExit(f"{variant.name}: needs scratch memory, which the launch does not give")
    if metadata.shared > SHARED_MEMORY[architecture]:
        raise SystemExit(f"{variant.name} for {architecture}: {metadata.shared} bytes of shared memory, too many")


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers, spills and instructions of an image, from the disassembler that comes with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], **run).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], **run).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    matrix = sorted(set(re.findall(r"\b((?:HGMMA|HMMA|UTC\w*MMA)[\w.]*)", code)))
    loads = sorted(set(re.findall(r"\b(LDGSTS[\w.]*)", code)))
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "matrix": " ".join(matrix),
        "async_load": " ".join(loads),
    }


def source_hash() -> str:
    """Of all that decides what is built; comments and layout do not."""
    kernels = ast.parse((HERE / "kernels.py").read_text())
    choices = [(v, a, constants(v, a)) for v in variants() for a in (*ARCHITECTURES, PTX)]
    text = repr((ast.dump(kernels), choices, SIGNATURES, DIVISIBLE, TRITON_VERSION, PTX_VERSION))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_archive(path: Path, contents: dict[str, bytes]) -> None:
    """A tar.xz without times or owners: equal contents make equal files."""
    with (
        lzma.open(path, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def build(folder: Path, chosen: list[Variant]) -> None:
    """Compile everything and write the files."""
    import triton

    images = bytearray()
    index: dict[bytes, int] = {}  # equal images are stored once
    table: list[str] = []
    report: list[dict[str, Any]] = []
    start = time.perf_counter()
    for number, variant in enumerate(chosen):
        for architecture in (*ARCHITECTURES, PTX):
            compiled = compile_variant(variant, architecture)
            if architecture == PTX:
                image = re.sub(rb"\s*//[^\n]*", b"", compiled.asm["ptx"].encode()) + b"\0"
            else:
                image = compiled.asm["cubin"]
                report.append(
                    {
                        "variant": variant.name,
                        "sm": architecture,
                        "warps": compiled.metadata.num_warps,
                        "shared": compiled.metadata.shared,
                        **resources(image),
                        "neighbors": neighbors(compiled.asm["ttgir"]),
                        "bytes": len(image),
                    }
                )
            if image not in index:
                images += bytes(-len(images) % 64)
                index[image] = len(images)
                images += image
            table.append(
                f'{{"{variant.name}", "{variant.kernel}", {architecture}, {compiled.metadata.num_warps}, '
                f"{compiled.metadata.shared}, {index[image]}, {len(image)}}},\n"
            )
        print(f"{number + 1}/{len(chosen)} {variant.name} {time.perf_counter() - start:.0f} s", flush=True)
    header = f"// Written by build.py with triton {triton.__version__}; source {source_hash()}.\n"
    tiles = "".join(
        f'{{"{v.name}", Type::{v.type}, Layout::{v.layout}, {v.taps}, {v.bm}, {v.bn}, {v.bk}}},\n'
        for v in chosen
        if v.kernel == "block_sparse_conv"
    )
    text = f"{header}constexpr Image kImages[] = {{\n{''.join(table)}}};\nconstexpr Tile kTiles[] = {{\n{tiles}}};\n"
    signatures = (
        f"{header}#pragma once\n\nnamespace tetris::cuda {{\n"
        + "".join(f'inline constexpr char k_{name}[] = "{kinds}";\n' for name, kinds in SIGNATURES.items())
        + "}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"kernels.bin": bytes(images), "kernels.inc": text.encode(), "signatures.h": signatures.encode()}
    write_archive(folder / "kernels.tar.xz", contents)
    with (folder / "resources.csv").open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}, source {source_hash()}\n")
        writer = csv.DictWriter(file, list(report[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(report)
    size = (folder / "kernels.tar.xz").stat().st_size
    print(f"{len(table)} images, {len(images)} bytes, {size} packed, {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Build."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "prebuilt")
    parser.add_argument("--only", help="only the variants whose name matches this regular expression")
    arguments = parser.parse_args()
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a third of the size
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    sys.path.insert(0, str(HERE))
    import triton

    if triton.__version__ != TRITON_VERSION:
        raise SystemExit(f"triton {triton.__version__} is installed, but the kernels are built with {TRITON_VERSION}")
    build(arguments.output, [v for v in variants() if re.search(arguments.only or "", v.name)])


if __name__ == "__main__":
    main()
