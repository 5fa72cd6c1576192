"""A model, a provider and a number of threads in, an onnxruntime session out, with every failure as one line.

Models with our ops run through the op library, all others through onnxruntime as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from tetris_onnx import runtime
from tetris_onnx.data.calibration import Samples
from tetris_onnx.errors import TetrisError
from tetris_onnx.graph.io import ModelError, as_file, needs_file
from tetris_onnx.graph.layers import DOMAIN

ModelSource: TypeAlias = str | Path | onnx.ModelProto

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DEVICES = {"cpu": "cpu", "cuda": "cuda"}  # whose memory a provider works in
CUDA_GRAPH = {"enable_cuda_graph": "1"}
_FATAL = 4  # onnxruntime's log level: what it says is in the exception too


class SessionError(TetrisError, ValueError):
    """A model that onnxruntime cannot load or run, or a provider that it does not have."""


def model_name(model: ModelSource) -> str:
    """What to call a model in a message."""
    return "the model" if isinstance(model, onnx.ModelProto) else str(model)


def uses_our_ops(model: onnx.ModelProto) -> bool:
    """Whether a model has ops of our domain."""
    return any(opset.domain == DOMAIN for opset in model.opset_import)


def open_session(
    model: ModelSource,
    provider: str = "cpu",
    threads: int | None = None,
    profile: Path | None = None,
    provider_options: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Any:
    """An onnxruntime session of ``model`` on ``provider`` ("cpu" or "cuda").

    ``threads``: of one operator (None: onnxruntime's own choice); operators run one after another. ``profile``: prefix
    of the file that the session's ``end_profiling`` writes. ``provider_options``: onnxruntime's own, of ``provider``.
    ``name``: what errors call the model. Raises `SessionError`.
    """
    ort = runtime.import_onnxruntime()
    if provider not in PROVIDERS:
        raise SessionError(f"no provider {provider!r}; choose one of {', '.join(PROVIDERS)}")
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise SessionError(
            f"this onnxruntime has no {PROVIDERS[provider]}: pip install 'tetris-onnx[gpu]' instead of [cpu]"
        )
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    providers: list[Any] = list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))
    if provider_options:
        providers[0] = providers[0], dict(provider_options)
    if provider == "cuda":
        runtime.preload_cuda()
    name = name or model_name(model)
    try:
        if isinstance(model, onnx.ModelProto):
            ours = uses_our_ops(model)
        else:
            if not Path(model).is_file():
                raise SessionError(f"{name}: no such file")
            ours = uses_our_ops(onnx.load(model, load_external_data=False))
        create = runtime.InferenceSession if ours else ort.InferenceSession
        if not isinstance(model, onnx.ModelProto):
            session = create(str(model), sess_options=options, providers=providers)
        elif not needs_file(model):
            session = create(model.SerializeToString(), sess_options=options, providers=providers)
        else:
            with as_file(model) as path:
                session = create(str(path), sess_options=options, providers=providers)
    except (SessionError, ModelError, runtime.OpLibraryMissingError):
        raise
    except Exception as error:  # onnxruntime, onnx and protobuf raise their own types, with no common base
        raise SessionError(f"{name}: cannot be loaded ({_one_line(error)})") from None
    if PROVIDERS[provider] not in session.get_providers():
        raise SessionError(f"{PROVIDERS[provider]} does not start on this machine; `tetris-onnx doctor` says more")
    return session


def take_turns(models: Sequence[ModelSource], provider: str = "cpu") -> list[Any]:
    """Sessions of all ``models`` of which one is open at a time: running another one closes it. For large models."""
    opened: dict[int, Any] = {}
    return [_Turn(i, model, provider, opened) for i, model in enumerate(models)]


class _Turn:
    """What `compare` needs of an onnxruntime session. ``opened`` holds the one that is open, by its number."""

    def __init__(self, number: int, model: ModelSource, provider: str, opened: dict[int, Any]) -> None:
        self._number, self._model, self._provider, self._opened = number, model, provider, opened
        session = self._session()
        self._inputs, self._outputs = _values(session.get_inputs()), _values(session.get_outputs())

    def get_inputs(self) -> list[SimpleNamespace]:
        return self._inputs

    def get_outputs(self) -> list[SimpleNamespace]:
        return self._outputs

    def run(self, names: Sequence[str] | None, feed: Samples) -> Sequence[NDArray]:
        return self._session().run(names, feed)

    def _session(self) -> Any:
        if self._number not in self._opened:
            self._opened.clear()
            self._opened[self._number] = open_session(self._model, self._provider)
        return self._opened[self._number]


def _values(nodes: Sequence[Any]) -> list[SimpleNamespace]:
    """The inputs or outputs of a session, as they are without it: onnxruntime's own objects keep it alive."""
    return [SimpleNamespace(name=node.name, type=node.type, shape=node.shape) for node in nodes]


def run(session: Any, feed: Samples, name: str) -> Sequence[NDArray]:
    """All outputs of one run. Raises `SessionError` with ``name`` and what onnxruntime said."""
    try:
        return session.run(None, feed)
    except Exception as error:  # see open_session
        raise SessionError(f"{name}: does not run ({_one_line(error)})") from None


def resident(session: Any, feed: Samples, name: str, provider: str) -> Callable[[], None]:
    """A function that runs a session on inputs and into outputs that stay in the memory of ``provider``'s device.

    Each call returns when the run is over. The memory is the same each time, as CUDA graphs need it (`CUDA_GRAPH`).
    Calls raise `SessionError`, and so does this.
    """
    ort = runtime.import_onnxruntime()
    binding, options = session.io_binding(), ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")  # the first run finds the outputs' sizes: it is not captured
    try:
        for key, value in feed.items():
            there = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), DEVICES[provider], 0)
            binding.bind_ortvalue_input(key, there)
        for output in session.get_outputs():
            binding.bind_output(output.name, DEVICES[provider], 0)
        session.run_with_iobinding(binding, options)
        outputs = binding.get_outputs()
        binding.clear_binding_outputs()
        for output, value in zip(session.get_outputs(), outputs, strict=True):
            binding.bind_ortvalue_output(output.name, value)
    except Exception as error:  # see open_session
        raise SessionError(f"{name}: does not run on {provider} ({_one_line(error)})") from None

    def turn() -> None:
        try:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:
            raise SessionError(f"{name}: does not run on {provider} ({_one_line(error)})") from None

    return turn


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # Without where it is in onnxruntime: "[ONNXRuntimeError] : 1 : FAIL : /.../model.cc:256 onnxruntime::Model(...) ".
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S*onnxruntime/\S+\.(cc|h):\d+ [^()]*\([^)]*\)+ ", "", text)
    return text if len(text) <= 300 else text[:300] + "..."
