"""Commands in a child process: a crash is one line, an interruption leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in a process of their own")

# Runs a command that was made to do something else.
SCRIPT = """
import os, signal, sys, tempfile, time
import tetris_onnx.planner
from tetris_onnx.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
def instead(*args, **options):
    {body}
tetris_onnx.planner.inspect = instead
sys.argv = ["tetris-onnx", "inspect", "model.onnx"]
main()
"""


def start(body: str, folder: Path) -> subprocess.Popen[str]:
    """``tetris-onnx inspect``, doing ``body``. Its temporary files are in ``folder``."""
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def wait_for(path: Path) -> None:
    for _ in range(2000):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} did not appear")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed on this model (SIGSEGV); nothing was written"),
        ("os.abort()", "crashed on this model (SIGABRT)"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "killed from outside, most likely because the machine ran out of memory",
        ),
        ("bytearray(2**46)", "there is not enough memory for this"),
    ],
)
def test_a_crash_is_one_line_and_leaves_no_files(tmp_path: Path, body: str, message: str) -> None:
    body = f"open(os.path.join(tempfile.mkdtemp(), 'f'), 'w').close(); {body}"
    code, out, err = finish(start(body, tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["kill", "Ctrl-C in a terminal"]
)
def test_interrupted(tmp_path: Path, number: int, whole_group: bool) -> None:
    marker = tmp_path / "started"
    body = (
        f"open(os.path.join(tempfile.mkdtemp(), 'f'), 'w').close(); open({str(marker)!r}, 'w').close(); time.sleep(60)"
    )
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    wait_for(marker)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert finish(process) == (130, "", "")
    assert list(tmp_path.iterdir()) == [marker]


def test_the_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("needs prctl")
    marker, ended = tmp_path / "started", tmp_path / "ended"
    body = f"""open({str(marker)!r}, 'w').close()
    try:
        time.sleep(60)
    finally:
        open({str(ended)!r}, 'w').close()"""
    process = start(body, tmp_path)
    wait_for(marker)
    process.kill()
    process.communicate()
    wait_for(ended)


def test_a_reader_that_stops_is_no_error(tmp_path: Path) -> None:
    body = "print('x' * 200000, flush=True); return []"
    process = start(body, tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(200) == 1
