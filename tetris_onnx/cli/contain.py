"""Running a command in a child process, so that no file can take the command down with it.

onnx and onnxruntime are C++, and a hostile model can crash them or ask for more memory than there is. The child then
dies; the parent says so in one line and removes the child's temporary files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2)
# Interruptions of a user who does not want to wait for the child to clean up.
_PATIENCE = 3


def contained(command: Callable[[], int], limit_memory: bool = True) -> int:
    """Run ``command`` in a child process and return its exit code; 1 where it crashed, 130 where it was interrupted.

    ``limit_memory``: let it have no more than the machine has left. In this process, where the system has no fork.
    """
    if not hasattr(os, "fork"):
        return command()
    folder = tempfile.mkdtemp(prefix="tetris_onnx_")
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid != 0:
            return _wait(pid)
        # In the child; it ends as any program does, with what modules do at exit.
        _die_with_parent()
        if limit_memory:
            _limit_memory()
        tempfile.tempdir = folder
        for number in _heeded():
            signal.signal(number, _interrupt)
        return command()
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _heeded() -> list[signal.Signals]:
    """The signals that stop a command: not those that this process was started to ignore (nohup, for one)."""
    numbers = (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop the command, once: what is done on the way out is not to be interrupted again."""
    for each in _heeded():
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _wait(pid: int) -> int:
    """Wait for the child, and hand interruptions on to it."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number if len(received) < _PATIENCE else signal.SIGKILL)

    before = {each: signal.signal(each, forward) for each in _heeded()}
    try:
        status = os.waitpid(pid, 0)[1]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    if received:
        return 130
    print(f"error: {_explain(number)}", file=sys.stderr)
    return 1


def _explain(number: int) -> str:
    if number == signal.SIGKILL:
        return "the process was killed from outside, most likely because the machine ran out of memory"
    name = signal.Signals(number).name
    return (
        f"onnx or onnxruntime crashed on this model ({name}); nothing was written. "
        "The file is damaged or hostile, or this is a bug: please report it with the model"
    )


def _die_with_parent() -> None:
    """Let the system end this process with its parent (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _limit_memory() -> None:
    """Make an allocation of more than the machine has left fail, which is an error like others (Linux)."""
    if sys.platform != "linux":
        return
    import resource

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        # Others may give theirs back: a busy moment is not to fail a command that needs little.
        total = max(sizes["MemAvailable"] + sizes["SwapFree"], total // 2)
    with contextlib.suppress(OSError, ValueError):  # the limit of a container
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or soft > total:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (total, hard))
