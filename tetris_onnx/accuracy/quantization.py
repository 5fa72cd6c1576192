"""The ranges of the int8 layers' inputs, from samples: with them a run need not look for the range of its values.

Bytes stand for 256 evenly spaced values of a range. The range of everything that the samples show keeps outliers and
spaces the rest widely; one that cuts the outermost values off has finer steps and errors at the outliers. Which is
better depends on the network, so several shares to cut off are given here, for the caller to measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from tetris_onnx.data.calibration import Samples, batches, model_inputs
from tetris_onnx.graph.layers import DOMAIN, GEMM, OUR_OPS
from tetris_onnx.graph.outputs import with_outputs
from tetris_onnx.session import open_session, run

# By the name of a node: the least and the largest value of its input that has a byte of its own.
InputRanges: TypeAlias = Mapping[str, tuple[float, float]]

# Shares of a layer's values that are cut off at each end; of the first, none.
CUT_SHARES = (0.0, 1e-4, 1e-3)
# Values of a layer's input that the shares are estimated from, in all samples together.
_VALUES = 1 << 18


def input_ranges(model: onnx.ModelProto, samples: Samples) -> dict[float, InputRanges]:
    """The ranges of what the block-sparse layers of ``model`` read, for each of `CUT_SHARES`.

    Only the channels that a layer's kept blocks read count. ``model`` is in float32; ``samples``: one array per model
    input. Values are those of every sample, one batch in memory at a time. Raises `SessionError`, or `CalibrationError`
    for samples that do not fill the batches of the model.
    """
    inputs = model_inputs(model)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in OUR_OPS]
    given = {spec.name for spec in inputs}
    shown = sorted({node.input[0] for node in nodes} - given)
    channels = {node.name: _used_channels(node, model.graph) for node in nodes}
    session = open_session(with_outputs(model, shown)) if shown else None
    parts = list(batches(samples, inputs, 1))
    rng = np.random.default_rng(0)
    ends = {node.name: (0.0, 0.0) for node in nodes}  # bytes have one for 0
    seen: dict[str, list[NDArray[np.float32]]] = {node.name: [] for node in nodes}
    for _, feed in parts:
        values = dict(feed)
        if session is not None:
            values |= dict(zip(shown, run(session, feed, "the model"), strict=True))
        for node in nodes:
            x = np.take(values[node.input[0]], channels[node.name], axis=_channel_axis(node)).astype(np.float32).ravel()
            x = x[np.isfinite(x)]
            if x.size == 0:
                continue
            low, high = ends[node.name]
            ends[node.name] = min(low, float(x.min())), max(high, float(x.max()))
            seen[node.name].append(x[rng.integers(x.size, size=max(1, _VALUES // len(parts)))])
    return {share: {name: _cut(share, ends[name], parts) for name, parts in seen.items()} for share in CUT_SHARES}


def _cut(share: float, ends: tuple[float, float], seen: list[NDArray[np.float32]]) -> tuple[float, float]:
    """``ends`` without the outermost ``share`` of the values at each."""
    if share == 0 or not seen:
        return ends
    low, high = np.quantile(np.concatenate(seen), (share, 1 - share))
    return min(float(low), 0.0), max(float(high), 0.0)


def _used_channels(node: onnx.NodeProto, graph: onnx.GraphProto) -> NDArray[np.int64]:
    """The input channels, in the order of X, that a kept block reads."""
    constants = {t.name: t for t in graph.initializer if t.name in node.input}
    blocks, index, perm = (numpy_helper.to_array(constants[node.input[i]]) for i in (1, 2, 3))
    width = blocks.shape[2]
    used = np.zeros(len(perm), bool)
    for column in np.unique(index[:, 1]):
        used[perm[column * width : (column + 1) * width]] = True
    return np.flatnonzero(used)


def _channel_axis(node: onnx.NodeProto) -> int:
    """The axis of X that counts channels: a Gemm's last one, a convolution's second unless X is channels-last."""
    last = node.op_type == GEMM or any(a.name == "input_transpose" and list(a.ints)[1] != 1 for a in node.attribute)
    return -1 if last else 1
