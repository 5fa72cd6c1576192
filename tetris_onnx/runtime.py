"""The op library in an onnxruntime session: where it is, how to register it.

A model that tetris-onnx wrote also runs without it (each block-sparse op carries its definition), only slower.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetris_onnx.errors import TetrisError

if TYPE_CHECKING:
    import onnx
    import onnxruntime


# In session options that the op library has been registered with: onnxruntime refuses it a second time.
_REGISTERED = "tetris_onnx.registered"


class RuntimeMissingError(TetrisError, ImportError):
    """onnxruntime is not installed."""


class OpLibraryMissingError(TetrisError, FileNotFoundError):
    """The op library is not where it should be."""


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises RuntimeMissingError saying what to install; a broken one raises its own error."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise RuntimeMissingError(
            "onnxruntime is not installed: pip install 'tetris-onnx[cpu]' (or 'tetris-onnx[gpu]' for CUDA)"
        ) from None
    return onnxruntime


def get_library_path() -> str:
    """Path of the op library (libtetris_onnx_ops), for onnxruntime's register_custom_ops_library in any language.

    The environment variable TETRIS_ONNX_LIBRARY names another one (a sanitizer build, say).
    Raises OpLibraryMissingError if there is none.
    """
    override = os.environ.get("TETRIS_ONNX_LIBRARY")
    if override:
        path = Path(override)
        if not path.is_file():
            raise OpLibraryMissingError(f"TETRIS_ONNX_LIBRARY names {override}, which is not a file")
        return str(path)
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    # An editable installation leaves this file in the source tree and puts the built library into site-packages.
    folders = [Path(__file__).parent, *(Path(entry) / "tetris_onnx" for entry in sys.path)]
    for folder in folders:
        path = folder / f"libtetris_onnx_ops{suffix}"
        if path.is_file():
            return str(path)
    raise OpLibraryMissingError(
        f"libtetris_onnx_ops{suffix} not found: install the package (pip install .), or name the library in the "
        "environment variable TETRIS_ONNX_LIBRARY"
    )


def register(session_options: onnxruntime.SessionOptions) -> None:
    """Make the block-sparse ops known to sessions created with these options. Options may be given again."""
    import_onnxruntime()
    with contextlib.suppress(RuntimeError):  # there is no such entry: they are new
        if session_options.get_session_config_entry(_REGISTERED):
            return
    session_options.register_custom_ops_library(get_library_path())
    session_options.add_session_config_entry(_REGISTERED, "1")


def preload_cuda() -> None:
    """Load CUDA's libraries from their pip packages, where they are installed so; else the system's are found later."""
    preload = getattr(import_onnxruntime(), "preload_dlls", None)  # from onnxruntime 1.21
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints, onnxruntime says again where it matters
            preload()


def InferenceSession(
    path_or_bytes: str | bytes | os.PathLike[str] | onnx.ModelProto,
    sess_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
    provider_options: Sequence[Mapping[str, Any]] | None = None,
) -> onnxruntime.InferenceSession:
    """An onnxruntime.InferenceSession with the block-sparse ops registered; the arguments are onnxruntime's own.

    The model may also be an onnx.ModelProto (of less than 2 GB). `sess_options` is registered with the op library in
    place. `providers` defaults to CUDA where onnxruntime offers it, then the CPU.
    """
    ort = import_onnxruntime()
    options = sess_options if sess_options is not None else ort.SessionOptions()
    register(options)
    if providers is None:
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [provider for provider in wanted if provider in ort.get_available_providers()]
    if any("CUDAExecutionProvider" in (provider, provider[0]) for provider in providers):
        preload_cuda()
    if not isinstance(path_or_bytes, (str, bytes, os.PathLike)):
        path_or_bytes = path_or_bytes.SerializeToString()
    model = path_or_bytes if isinstance(path_or_bytes, bytes) else os.fspath(path_or_bytes)
    return ort.InferenceSession(model, options, providers=providers, provider_options=provider_options)
