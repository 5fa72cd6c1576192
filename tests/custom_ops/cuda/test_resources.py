"""What the compiler made of the CUDA kernels, as build.py recorded it: a regression shows without a GPU."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zlib
from importlib import metadata
from pathlib import Path

import pytest

from tests.custom_ops.cuda.stand_in import CUDA, build

PREBUILT = CUDA / "prebuilt"


def rows() -> list[dict[str, str]]:
    lines = (PREBUILT / "resources.csv").read_text().splitlines()
    return list(csv.DictReader(lines[1:]))


ROWS = {(row["variant"], int(row["sm"])): row for row in rows()}
VARIANTS = {v.name: v for v in build.variants()}


def test_prebuilt_is_up_to_date() -> None:
    first = (PREBUILT / "resources.csv").read_text().splitlines()[0]
    assert first == f"# triton {build.TRITON_VERSION}, source {build.source_hash()}", (
        "kernels.py or build.py changed: run custom_ops/cuda/build.py (triton 3.6.0, no GPU) and commit prebuilt/"
    )
    with tarfile.open(PREBUILT / "kernels.tar.xz") as archive:
        names = archive.getnames()
        table = archive.extractfile("kernels.inc").read().decode()  # type: ignore[union-attr]
        size = archive.getmember("kernels.bin").size
    assert names == ["kernels.bin", "kernels.inc", "signatures.h"]
    assert build.source_hash() in table
    images = re.findall(r'\{"(\w+)", "(\w+)", (\d+), (\d+), (\d+), (\d+), (\d+)\}', table)
    assert {(name, int(sm)) for name, _, sm, *_ in images} == {
        (name, sm) for name in VARIANTS for sm in (*build.ARCHITECTURES, build.PTX)
    }
    assert {(name, int(sm), int(length)) for name, _, sm, *_, length in images if sm != "0"} == {
        (*key, int(row["bytes"])) for key, row in ROWS.items()
    }
    assert max(int(offset) + int(length) for *_, offset, length in images) == size


def test_sizes() -> None:
    """What the repository grows by, and what the wheel, which is a zip file."""
    archive = PREBUILT / "kernels.tar.xz"
    assert archive.stat().st_size < 3 << 20
    with tarfile.open(archive) as opened:
        images = opened.extractfile("kernels.bin").read()  # type: ignore[union-attr]
    assert len(zlib.compress(images, 6)) < 10 << 20


@pytest.mark.parametrize("key", ROWS, ids=lambda key: f"{key[0]}-sm{key[1]}")
def test_resources(key: tuple[str, int]) -> None:
    name, sm = key
    row, variant = ROWS[key], VARIANTS[name]
    registers, threads = int(row["registers"]), 32 * int(row["warps"])
    assert registers * threads <= 65536
    # Spills: none to speak of. (On sm_100 a few words of stack are of the tensor memory; six registers that are spilled
    # once, where a program reads its float32 addend before the sums, do no harm.)
    reads_addend = variant.type == "tf32" and variant.layout == "nhwc" and sm in (80, 120)
    assert int(row["stack"]) <= (24 if reads_addend else 16)
    assert int(row["shared"]) <= build.SHARED_MEMORY[sm]
    # Neighboring threads touch neighboring values: pixels, or channels where they are last.
    sides = {
        "block_sparse_conv": {"nhwc": f"load {variant.bm} store {variant.bm}", "nchw": f"store {variant.bn}"},
        "sum_splits": {"nhwc": "load 16 load 32 store 32", "nchw": "load 16 store 16"},
        "channels_last": {"nhwc": "load 32 store 32", "nchw": "load 64 store 32"},
        "max_pool": {"nhwc": "load 64 store 64"},
    }
    assert row["neighbors"] == sides[variant.kernel].get(variant.layout, f"store {variant.bn}")
    if variant.kernel != "block_sparse_conv":
        assert registers <= 64
        return
    # Several taps read their pixels through L1, where each thread reads 16 bytes; other loads of 16 bytes pass it by.
    pixel_bytes = variant.bn * variant.bk * build.ITEM_SIZES[variant.type]
    assert ("LDGSTS.E.128" in row["async_load"].split()) == (variant.taps != 1 and pixel_bytes >= 16 * threads)
    # Asynchronous loads of 16 bytes, and of less only where a tile has less than that for each thread.
    item = build.ITEM_SIZES[variant.type]
    least = min(16, min(variant.bm, variant.bn) * variant.bk * item // threads)
    widths = {int(found) if (found := load.split(".")[-1]).isdigit() else 32 for load in row["async_load"].split()}
    assert max(widths) == 128
    assert min(widths) >= 8 * least
    matrix = row["matrix"]
    if variant.type == "f32":
        assert matrix == ""  # full float32 has no tensor core instruction
    elif sm == 90 and (variant.bm >= 64 or variant.swap):
        assert re.match(r"HGMMA\.64x", matrix)
    elif sm == 100 and (variant.bm >= 64 or variant.swap):
        assert matrix.startswith("UTC")
    else:
        assert matrix.startswith("HMMA")
    if variant.type in ("tf32", "bf16") and not matrix.startswith("UTC"):
        assert ("TF32" if variant.type == "tf32" else "BF16") in matrix


def test_rebuilding_gives_the_same(tmp_path: Path) -> None:
    """In a process of its own: in this one Triton may be set to interpret."""
    if importlib.util.find_spec("triton") is None or metadata.version("triton") != build.TRITON_VERSION:
        pytest.skip(f"rebuilding needs triton {build.TRITON_VERSION}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = "conv_f16_t9_64x128x64_nchw|conv_tf32_t1_32x16x32_split"
    command = [sys.executable, str(CUDA / "build.py"), "--output", str(tmp_path), "--only", names]
    subprocess.run(command, env=environment, check=True)
    rebuilt = list(csv.DictReader((tmp_path / "resources.csv").read_text().splitlines()[1:]))
    # Not sm_100: its register allocation differs from run to run.
    compared = [row for row in rebuilt if row["sm"] != "100"]
    assert len(compared) == 6
    for row in compared:
        assert row == ROWS[row["variant"], int(row["sm"])]
