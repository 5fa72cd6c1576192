"""The base of all errors that this package raises on purpose: one ``except`` catches them.

Each module has its own kinds, which are also the usual types of Python (`ValueError` for input that makes no sense,
`FileNotFoundError` for a missing op library, ...). Their messages are one line: what is wrong and what to do.
"""

from __future__ import annotations


class TetrisError(Exception):
    """Something that tetris-onnx cannot do, or will not; the message says why."""
