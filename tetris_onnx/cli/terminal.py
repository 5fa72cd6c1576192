"""What the commands share on the terminal: progress bars on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from tetris_onnx.errors import TetrisError

# Tables in a pipe or a log file are not cut to 80 columns.
_PIPE_WIDTH = 160


@contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, gone when the work is done; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def percent_of(stage: str, progress: Callable[[str, int, int], None]) -> Callable[[float], None]:
    """A callback for a share of the work done, out of one for steps."""
    return lambda share: progress(stage, min(100, round(100 * share)), 100)


def open_console() -> Console:
    """Where results are printed."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def print_json(value: object) -> None:
    """Print a value of JSON types to stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def describe_error(error: Exception) -> str:
    """What to say of an error, in one line."""
    if hasattr(error, "format_message"):  # a usage error of typer, which has its own copy of click in later versions
        return f"{' '.join(error.format_message().split())} (see tetris-onnx --help)"
    text = " ".join(str(error).split())
    if isinstance(error, TetrisError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text} (unexpected: run again with --debug to see where, and please report it)"
