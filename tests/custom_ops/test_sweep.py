"""custom_ops/bench/sweep.py: the table has every case and right sums, and grows over several calls."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "custom_ops" / "bench"
# Uneven channels, a stride, more columns than the grid of blocks divides, a product.
SHAPES = "a 20 12 7 9 3 2 1  # stride 2\n\nb 8 20 4 5 1 1 0\nfc 10 24\n"


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shapes = folder / "net.txt"
    shapes.write_text(SHAPES)
    table = folder / "table.csv"
    command = [sys.executable, BENCH / "sweep.py", shapes, "-o", table, "--rounds", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def rows(folder: Path) -> dict[tuple[str, str, str, str], dict[str, str]]:
    lines = (folder / "table.csv").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "onnxruntime" in lines[0]
    found = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    keyed = {(row["layer"], row["threads"], row["block_size"], row["asked"]): row for row in found}
    assert len(keyed) == len(found)
    return keyed


def test_a_table_grows_and_its_sums_are_right(tmp_path: Path) -> None:
    first = sweep(tmp_path, "--densities", "0.5,1", "--block-sizes", "8", "--layers", "b")
    assert first.returncode == 0, first.stderr
    assert [key[0] for key in rows(tmp_path)] == ["b", "b"], "no sum without all layers"
    kept = rows(tmp_path)["b", "1", "8", "0.5"]

    second = sweep(tmp_path, "--densities", "0.5,1", "--block-sizes", "8,32")
    assert second.returncode == 0, second.stderr
    table = rows(tmp_path)
    names = ("a", "b", "fc", "sum", "convolutions")
    assert set(table) == {(n, "1", b, d) for n in names for b in ("8", "32") for d in ("0.5", "1")}
    assert table["b", "1", "8", "0.5"] == kept, "what is there is not measured again"
    assert "density            8x8          32x32" in second.stdout

    # The grid of b is 1 x 3 blocks of 8, the last 4 wide: 2 blocks, of 12 or 16 channels of 20, are nearest to half.
    assert table["b", "1", "8", "0.5"]["density"] in ("0.6", "0.8")
    assert float(table["fc", "1", "32", "0.5"]["density"]) == 1, "one block is the least"
    for block in ("8", "32"):
        for field in ("dense_ms", "sparse_ms"):
            parts = {name: float(table[name, "1", block, "0.5"][field]) for name in names}
            # Four digits are written.
            assert parts["sum"] == pytest.approx(parts["a"] + parts["b"] + parts["fc"], rel=2e-3)
            assert parts["convolutions"] == pytest.approx(parts["a"] + parts["b"], rel=2e-3)


def test_it_stops_in_time_and_says_so(tmp_path: Path) -> None:
    result = sweep(tmp_path, "--densities", "1", "--block-sizes", "8", "--limit", "1e-9")
    assert result.returncode == 1
    assert "3 of 3 left; the same command goes on" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--densities", "0"), "densities lie between 0 and 1"),
        (("--densities", "half"), "invalid"),
        (("--layers", "z"), "has no layer of that name"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = sweep(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "table.csv").exists()


def test_another_networks_table_is_left_alone(tmp_path: Path) -> None:
    assert sweep(tmp_path, "--densities", "1", "--block-sizes", "8").returncode == 0
    table = (tmp_path / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(table.replace("fc,", "fc7,"))
    result = sweep(tmp_path, "--densities", "1", "--block-sizes", "8")
    assert result.returncode == 2
    assert "is the table of another network: it holds fc7" in result.stderr
    assert (tmp_path / "table.csv").read_text() == table.replace("fc,", "fc7,")
