"""The table of measured tiles (tile_table.h): what is read, what is found in it, what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.custom_ops import models
from tests.custom_ops.cuda import stand_in
from tests.custom_ops.cuda.stand_in import StandIn

pytestmark = pytest.mark.usefixtures("shared_library")

HEADER = "sm,type,taps,height,rows,steps,pixels,tile_rows,tile_pixels,splits"


@pytest.fixture
def op(rng: np.random.Generator) -> models.Op:
    # 4 packed rows of 64; 64 input channels are 2 tiles of 32, so 18 steps.
    return models.random_op(rng, (256, 64, 3, 3), (64, 64), 1.0, pads=[1, 1, 1, 1])


def tile_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, op: models.Op, driver: StandIn, *lines: str
) -> tuple[int, int, int]:
    """What runs a map of 24 x 24 with a table of these lines: tile rows, tile pixels, splits."""
    path = tmp_path / "tiles.csv"
    path.write_text("\n".join(["# measured", HEADER, *lines, ""]))
    monkeypatch.setenv("TETRIS_ONNX_CUDA_TILES", str(path))
    driver.launches.clear()
    driver.execute = None
    models.run(op, np.ones((1, 64, 24, 24), np.float32))
    conv = next(launch for launch in driver.launches if launch.variant.kernel == "block_sparse_conv")
    return conv.variant.bm, conv.variant.bn, conv.arguments["splits"]


def test_the_own_table_is_valid_and_of_compiled_tiles() -> None:
    lines = [line for line in (stand_in.CUDA / "tiles.csv").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == HEADER
    known = {(v.type, v.taps, v.bm, v.bn) for v in stand_in.build.variants() if v.kernel == "block_sparse_conv"}
    for line in lines[1:]:
        sm, kind, taps, height, *_, rows, pixels, splits = line.split(",")
        assert (kind, int(taps), int(rows), int(pixels)) in known
        assert int(height) % int(rows) == 0 and int(splits) >= 1 and int(sm) >= 80


def test_a_measured_choice_is_taken(
    op: models.Op, driver: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rule = tile_with(monkeypatch, tmp_path, op, driver)
    assert by_rule == (64, 64, 1)
    here = "90,tf32,9,64,4,18,576"
    assert tile_with(monkeypatch, tmp_path, op, driver, f"{here},64,128,1") == (64, 128, 1)
    assert tile_with(monkeypatch, tmp_path, op, driver, f"{here},64,16,2") == (64, 16, 2)
    # Forcing a tile by hand goes before it.
    monkeypatch.setenv("TETRIS_ONNX_CUDA_TILE", "64x256x1")
    assert tile_with(monkeypatch, tmp_path, op, driver, f"{here},64,128,1") == (64, 256, 1)


@pytest.mark.parametrize(
    "other",
    [
        "80,tf32,9,64,4,18,576",  # another GPU
        "90,f16,9,64,4,18,576",
        "90,tf32,1,64,4,18,576",
        "90,tf32,9,128,4,18,576",
        "90,tf32,9,64,4,18,1700",  # too far away
        "90,tf32,9,64,6,30,576",  # each less than twice as much, but not both together
    ],
)
def test_choices_for_other_layers_are_not(
    op: models.Op, driver: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    assert tile_with(monkeypatch, tmp_path, op, driver, f"{other},64,128,1") == tile_with(
        monkeypatch, tmp_path, op, driver
    )


def test_the_nearest_choice_is_taken(
    op: models.Op, driver: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["90,tf32,9,64,4,18,1000,64,64,1", "90,tf32,9,64,4,20,620,64,128,1", "90,tf32,9,64,3,18,576,64,256,1"]
    assert tile_with(monkeypatch, tmp_path, op, driver, *lines) == (64, 128, 1)


def test_a_choice_that_this_library_has_not_compiled_is_left_alone(
    op: models.Op, driver: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rule = tile_with(monkeypatch, tmp_path, op, driver)
    assert tile_with(monkeypatch, tmp_path, op, driver, "90,tf32,9,64,4,18,576,64,512,1") == by_rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sm,type\n", "line 1: expected sm,type,taps"),
        (f"{HEADER}\n90,tf32,9\n", "line 2: expected ten values"),
        (f"# a\n{HEADER}\n90,int8,9,64,4,18,1,64,64,1\n", "line 3: expected type f16"),
        (f"{HEADER}\n90,tf32,9,64,4,18,576,64,64,0\n", "line 2: expected ten values"),
        (f"{HEADER}\n90,tf32,9,64,4,18,576,64,64,1,9\n", "line 2: expected ten values"),
        (f"{HEADER}\n90,{'x' * 50},9,64,4,18,576,64,64,1\n", "line 2: expected ten values"),
    ],
)
def test_malformed_tables(
    op: models.Op, driver: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (tmp_path / "bad.csv").write_text(text)
    monkeypatch.setenv("TETRIS_ONNX_CUDA_TILES", str(tmp_path / "bad.csv"))
    with pytest.raises(Exception, match=rf"BlockSparseConv node 'the_node': .*bad\.csv, {message}"):
        models.session(models.make_model(op, [1, 64, 8, 8]))


def test_a_missing_table(op: models.Op, driver: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRIS_ONNX_CUDA_TILES", "/nowhere/tiles.csv")
    with pytest.raises(Exception, match=r"TETRIS_ONNX_CUDA_TILES names '/nowhere/tiles\.csv', which cannot be read"):
        models.session(models.make_model(op, [1, 64, 8, 8]))
