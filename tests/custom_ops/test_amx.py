"""The AMX kernels: that they are used, and only where they can be; the emulator that the tests run them on.

What they compute is compared with the oracle in test_precision.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.custom_ops import models
from tests.custom_ops.test_precision import check, random_input

ROOT = Path(__file__).parents[2]
EXPORTED = "tetris_onnx_emulate_amx"

pytestmark = pytest.mark.usefixtures("amx")


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setenv("TETRIS_ONNX_ISA", "amx")
    try:
        models.session(models.make_model(models.random_op(rng, (1, 1), (1, 1)), [1, 1]))
    except Exception as error:
        if "this build and processor support" not in str(error):
            raise
        pytest.skip("the emulator brings AMX to processors with AVX512-BF16 and AVX512-VNNI")


def products(op: models.Op, x: models.Array, amx: ctypes.CDLL, threads: int = 1) -> int:
    """Checks a run and gives the number of AMX instructions that it took; no thread has tiles afterwards."""
    before = amx.tetris_onnx_amx_executed()
    check(op, x, threads)
    assert amx.tetris_onnx_amx_configured() == 0
    return int(amx.tetris_onnx_amx_executed() - before)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_each_kept_block_is_multiplied_once_for_each_tap_and_tile(
    amx: ctypes.CDLL, rng: np.random.Generator, precision: str
) -> None:
    """4 loads and 4 products for 32 x 32 blocks and 32 pixels; a block of 64 channels is two chunks of bfloat16."""
    for inputs, chunks in ((32, 1), (64, 2 if precision == "bfloat16" else 1)):
        op = models.random_op(rng, (32, inputs, 3, 3), (32, inputs), 1.0, pads=[1] * 4, precision=precision)
        # 63 positions: 7 rows of 8 pixels, and a zero between two of them.
        expected = 2 * (chunks * 9 * 8 + 4 + 4)  # and as many tiles cleared and stored
        # Configured and released in one or two work items.
        assert products(op, random_input(rng, 1, inputs, 7, 8), amx) - expected in (2, 4)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_small_products_are_left_to_vectors(amx: ctypes.CDLL, rng: np.random.Generator, precision: str) -> None:
    op = models.random_op(rng, (32, 64), (32, 32), 1.0, precision=precision)
    assert products(op, random_input(rng, 15, 64), amx) == 0
    assert products(op, random_input(rng, 16, 64), amx) > 0
    narrow = models.random_op(rng, (32, 64, 1, 1), (32, 6), 1.0, precision=precision)
    assert products(narrow, random_input(rng, 1, 64, 9, 9), amx) == 0


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["", "MaxPool"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_map_in_strips(amx: ctypes.CDLL, rng: np.random.Generator, precision: str, kind: str, threads: int) -> None:
    op = models.random_op(rng, (16, 256, 3, 3), (16, 32), 0.2, pads=[1] * 4, precision=precision)
    op = models.fused(op, kind) if kind else op
    assert products(op, random_input(rng, 1, 256, 101, 91), amx, threads) > 0


@pytest.mark.parametrize("name", ["", "avx512_bf16"])
def test_the_emulator_is_used_only_where_amx_is_asked_for(
    amx: ctypes.CDLL, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has AMX")
    monkeypatch.setenv("TETRIS_ONNX_ISA", name)
    op = models.random_op(rng, (32, 64, 3, 3), (32, 32), precision="bfloat16")
    before = amx.tetris_onnx_amx_executed()
    try:
        models.run(op, random_input(rng, 1, 64, 9, 9))
    except Exception as error:
        if "this build and processor support" not in str(error):
            raise
    assert amx.tetris_onnx_amx_executed() == before


def test_without_the_emulator_a_processor_without_amx_has_none() -> None:
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has AMX")
    code = (
        "import numpy as np; from tests.custom_ops import models;"
        "models.session(models.make_model(models.random_op(np.random.default_rng(0), (4, 4), (4, 4)), [1, 4]))"
    )
    environment = {**os.environ, "TETRIS_ONNX_ISA": "amx", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "TETRIS_ONNX_ISA is 'amx', but this build and processor support: scalar" in result.stderr


CONFIGURE = "c4e2784907"  # ldtilecfg [rdi]
RELEASE = "c4e27849c0"
ZERO_0 = "c4e27b49c0"
PRODUCT_012 = "c4e26a5cc1"  # tdpbf16ps tmm0, tmm1, tmm2
PRODUCT_001 = "c4e2725cc0"


def config(rows: int = 16, row_bytes: int = 64, palette: int = 1, right_rows: int = 16) -> str:
    sizes = [row_bytes] * 3 + [0] * 13
    return bytes([palette, *[0] * 15, *(b for s in sizes for b in (s, 0)), rows, rows, right_rows, *[0] * 13]).hex()


@pytest.mark.parametrize(
    ("code", "operand", "end"),
    [
        (CONFIGURE + ZERO_0 + PRODUCT_012.replace("5c", "5e") + RELEASE, config(), 0),
        (CONFIGURE + PRODUCT_012.replace("e26a5c", "e2685e") + RELEASE, config(), 0),
        (ZERO_0, config(), signal.SIGILL),
        (CONFIGURE + RELEASE + ZERO_0, config(), signal.SIGILL),
        (CONFIGURE + PRODUCT_001, config(), signal.SIGILL),
        (CONFIGURE + PRODUCT_012, config(right_rows=8), signal.SIGILL),
        (CONFIGURE, config(palette=2), signal.SIGSEGV),
        (CONFIGURE, config(rows=17), signal.SIGSEGV),
        (CONFIGURE, config(row_bytes=65), signal.SIGSEGV),
        (CONFIGURE, config(row_bytes=0), signal.SIGSEGV),
        ("0f0b", config(), signal.SIGILL),  # none of AMX
    ],
)
def test_the_emulator_ends_a_program_as_the_processor_would(
    amx: ctypes.CDLL, code: str, operand: str, end: int
) -> None:
    program = f"""
import ctypes, mmap
ctypes.CDLL({amx._name!r}).{EXPORTED}()
memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
memory.write(bytes.fromhex({code + "c3"!r}))
call = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
call(bytes.fromhex({operand!r}))
"""
    assert subprocess.run([sys.executable, "-S", "-c", program], capture_output=True).returncode == -end
