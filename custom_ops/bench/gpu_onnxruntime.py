"""Layers and whole networks in onnxruntime's CUDA provider, for gpu.py: dense with cuDNN, and with the op library.

Inputs and outputs stay in the GPU's memory, and a run is a replay of onnxruntime's own CUDA graph. The model of a
single layer holds it many times over, so that what a run costs besides does not count.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from gpu_library import ROOT  # beside this file; puts the root on the path
from onnx import TensorProto, helper, numpy_helper

from shapes import Layer
from tests.models import random_plan, rewrite
from tetris_onnx import session as sessions
from tetris_onnx.config import Config, load_config
from tetris_onnx.optimize import masked_dense
from tetris_onnx.plan import Plan
from tetris_onnx.runtime import OpLibraryMissingError, get_library_path, import_onnxruntime
from tetris_onnx.timing.profiling import placements

NUMPY_TYPES = {"f16": np.float16, "tf32": np.float32, "f32": np.float32}
ONNX_TYPES = {"f16": TensorProto.FLOAT16, "tf32": TensorProto.FLOAT, "f32": TensorProto.FLOAT}
_L2_BYTES = 120e6  # more than any GPU's L2 cache
_MOST_BYTES = 6e9  # of one model's inputs and outputs
_MOST_NODES = 64
_RUN_US = 2000.0  # that a run of a layer's model should take

Options = Mapping[str, str]


def why_not() -> str:
    """Why onnxruntime's CUDA provider cannot be timed here; "" where it can."""
    try:
        if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
            return "onnxruntime is not onnxruntime-gpu (pip install '.[gpu]')"
        get_library_path()
        relu = helper.make_node("Relu", ["x"], ["y"])
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
        graph = helper.make_graph([relu], "g", values[:1], values[1:])
        sessions.open_session(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "cuda"
        )
    except (ImportError, OpLibraryMissingError, sessions.SessionError) as error:
        return str(error)
    return ""


def check_ops() -> str:
    """Run the tests that need a GPU, of the whole ops. Returns pytest's last line; a failure ends the program."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed: the ops in onnxruntime were not checked"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "0", "tests/custom_ops/cuda"]
    if importlib.util.find_spec("xdist") is None:
        command = [word for word in command if word not in ("-n", "0")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"WRONG: {' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    return done.stdout.strip().splitlines()[-1]


def median_us(turn: Callable[[], None], seconds: float) -> float:
    """Of one run, which waits for its end."""
    turn()  # captures the graph
    turn()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        turn()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def layer_model(layer: Layer, kind: str, batch: int, inputs: int, nodes: int) -> onnx.ModelProto:
    """A model of ``nodes`` times the dense layer with Relu, over ``inputs`` inputs in turn.

    Each has a bias of its own: equal nodes would be computed once.
    """
    rng = np.random.default_rng(0)
    element = ONNX_TYPES[kind]
    kernel = (layer.kernel, layer.kernel) if layer.is_conv else ()
    shape = (layer.outputs, layer.inputs, *kernel)
    weight = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.prod(shape[1:]))
    constants = [numpy_helper.from_array(weight.astype(NUMPY_TYPES[kind]), "w")]
    made: list[onnx.NodeProto] = []
    for i in range(nodes):
        bias = rng.standard_normal(layer.outputs).astype(NUMPY_TYPES[kind])
        constants.append(numpy_helper.from_array(bias, f"b{i}"))
        names = [f"x{i % inputs}", "w", f"b{i}"]
        if layer.is_conv:
            window = {"strides": [layer.stride] * 2, "pads": [layer.pad] * 4}
            made.append(helper.make_node("Conv", names, [f"c{i}"], **window))
        else:
            made.append(helper.make_node("Gemm", names, [f"c{i}"], transB=1))
        made.append(helper.make_node("Relu", [f"c{i}"], [f"y{i}"]))
    x_shape = [batch, layer.inputs, *layer.map_size]
    size = [(s + 2 * layer.pad - layer.kernel) // layer.stride + 1 for s in layer.map_size]
    xs = [helper.make_tensor_value_info(f"x{i}", element, x_shape) for i in range(inputs)]
    ys = [helper.make_tensor_value_info(f"y{i}", element, [batch, layer.outputs, *size]) for i in range(nodes)]
    graph = helper.make_graph(made, layer.name, xs, ys, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class OnnxRuntime:
    """onnxruntime on the GPU, or for a rehearsal with ``gpu`` false on the processor."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._networks: dict[tuple[str, str], Network] = {}

    def options(self, kind: str, nhwc: bool) -> Options | None:
        """The provider's: all of cuDNN's algorithms are tried, and TF32 is used exactly where we use it."""
        if not self._gpu:
            return None
        return {
            **sessions.CUDA_GRAPH,
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "use_tf32": str(int(kind == "tf32")),
            "prefer_nhwc": str(int(nhwc)),
        }

    def dense_us(self, layer: Layer, kind: str, batch: int, about_us: float, seconds: float) -> dict[str, float]:
        """The dense layer by cuDNN or cuBLAS, NCHW and channels-last inside; ``about_us``: what it takes elsewhere."""
        if kind not in ONNX_TYPES:
            return {}
        item = np.dtype(NUMPY_TYPES[kind]).itemsize
        size = [(s + 2 * layer.pad - layer.kernel) // layer.stride + 1 for s in layer.map_size]
        in_bytes, out_bytes = (
            item * batch * channels * int(np.prod(shape))
            for channels, shape in ((layer.inputs, layer.map_size), (layer.outputs, size))
        )
        inputs = max(1, min(8, int(np.ceil(_L2_BYTES / in_bytes))))
        most = max(1, int((_MOST_BYTES - inputs * in_bytes) / out_bytes))
        nodes = max(1, min(most, _MOST_NODES, max(inputs, round(_RUN_US / about_us))))
        if not self._gpu:
            inputs = nodes = 2
        model = layer_model(layer, kind, batch, min(inputs, nodes), nodes)
        feed = {
            value.name: np.random.default_rng(1).standard_normal(shape, dtype=np.float32).astype(NUMPY_TYPES[kind])
            for value in model.graph.input
            for shape in [[d.dim_value for d in value.type.tensor_type.shape.dim]]
        }
        times: dict[str, float] = {}
        for name, nhwc in (("ort", False), ("ort_nhwc", True)):
            if nhwc and not (layer.is_conv and kind == "f16"):
                continue  # without float16 cuDNN gains nothing by it
            session = sessions.open_session(model, "cuda", provider_options=self.options(kind, nhwc))
            turn = sessions.resident(session, feed, layer.name, "cuda")
            times[name] = median_us(turn, seconds) / nodes
            del turn, session
        return times

    def network(self, name: str, kind: str, batch: int, seconds: float, tolerance: float) -> dict[str, Any]:
        """A whole network, dense and block-sparse, as users run it. A wrong result ends the program."""
        os.environ["TETRIS_ONNX_TF32"] = "0" if kind == "f32" else "1"
        key = name, kind
        if key not in self._networks:
            self._networks.clear()  # one at a time: VGG16 takes gigabytes
            self._networks[key] = Network(name, kind, small=not self._gpu)
        network = self._networks[key]
        feed = network.feed(batch)
        times: dict[str, float] = {}
        results = {}
        for label, model in (("dense", network.dense), ("sparse", network.sparse)):
            for nhwc in (False, True):
                options = self.options(kind, nhwc)
                if nhwc and (options is None or label == "sparse"):
                    continue
                session = sessions.open_session(model, "cuda", provider_options=options)
                turn = sessions.resident(session, feed, name, "cuda")
                times[f"{label}_nhwc" if nhwc else label] = median_us(turn, seconds)
                del turn, session
            results[label] = sessions.run(sessions.open_session(model, "cuda"), feed, name)[0].astype(np.float32)
        error = float(np.abs(results["sparse"] - results["dense"]).max() / np.abs(results["dense"]).max())
        if not error <= tolerance:
            raise SystemExit(f"WRONG: onnxruntime {name} {kind} batch {batch}: error {error:.2e}")
        (placed,) = placements([network.sparse], [feed], [name], "cuda")
        dense = min(us for label, us in times.items() if label != "sparse")
        row = {"dense_us": {k.replace("dense", "ort"): us for k, us in times.items() if k != "sparse"}, "error": error}
        row |= {"sparse_us": {"run": times["sparse"]}, "speedup": dense / times["sparse"]}
        return row | {"elsewhere": list(placed.elsewhere), "copies": list(placed.copies)}


class Network:
    """VGG16 at the rates of Deep Compression or ResNet-50 at 0.27 with random weights: dense and block-sparse."""

    def __init__(self, name: str, kind: str, small: bool) -> None:
        generator = _load(ROOT / "samples" / name / f"random_{name}.py")
        block = (64, 64)
        if small:
            generator.STAGES, generator.CLASSIFIER = ((1, 16),), (64, 10)
            generator.CONFIGURATION = ("M", 16, "M", 16, 16, "M", "M", "M")
            block = (8, 8)
        model = getattr(generator, name)()
        self.element = NUMPY_TYPES[kind]
        if kind == "f16":
            _to_float16(model)
        rates = ROOT / "samples" / name / "deep_compression.toml"
        config = load_config(rates) if name == "vgg16" else Config(sparsity=0.73)
        plan = _plan(model, config, block)
        self.sparse = rewrite(model, plan, target="cuda")
        self.dense = masked_dense(model, plan)

    def feed(self, batch: int) -> dict[str, np.ndarray]:
        """Random images."""
        image = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
        return {"input": image.astype(self.element)}


def _plan(model: onnx.ModelProto, config: Config, block: tuple[int, int]) -> Plan:
    """Random orders, random blocks, as many as ``config`` says; the first layer stays dense."""
    rng = np.random.default_rng(0)
    layers = []
    for layer in itertools.islice(random_plan(model, block), 1, None):
        options = config.for_layer(layer.layer)
        count = max(1, round((1 - options.sparsity) * layer.keep.size))
        keep = np.zeros(layer.keep.size, bool)
        keep[rng.choice(keep.size, count, replace=False)] = True
        layers.append(replace(layer, keep=keep.reshape(layer.keep.shape)))
    return Plan(tuple(layers))


def _to_float16(model: onnx.ModelProto) -> None:
    """In place; for graphs of floats only."""
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def _load(path: Path) -> ModuleType:
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
