"""Prune with calibration samples: each layer is reordered, pruned and refitted to what it sees, in node order.

The layers pruned before it have changed a layer's inputs. Its importance, its blocks and its new weights all come from the
same second moments of those inputs (algorithms.refit), and its outputs are fitted to those of the dense network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tetris_onnx.algorithms.refit import MomentSums
from tetris_onnx.graph.layers import Layer, conv_window

# Positions per layer that the moments are taken from: enough for 4608 features, and more of one image say little new.
_MAX_ROWS = 65536
_CHUNK_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class NewWeights:
    """What a refit gives a layer."""

    weight: NDArray  # [out, in, *kernel]
    bias: NDArray  # [out]


def layer_moments(layer: Layer, data: NDArray, output: NDArray, seed: int) -> MomentSums:
    """Moments of a layer's features (from its input ``data``) and the dense ``output``, over samples and positions.

    At most `_MAX_ROWS` positions, drawn evenly over the samples.
    """
    features = int(np.prod(layer.weight_shape[1:]))
    sums = MomentSums(features, layer.weight_shape[0])
    rng = np.random.default_rng(seed)
    samples = len(data)
    positions = int(np.prod(output.shape[2:])) if layer.is_conv else int(np.prod(output.shape[1:-1]))
    each = min(positions, max(1, -(-_MAX_ROWS // samples)))
    step = max(1, _CHUNK_BYTES // (4 * features * each))
    for start in range(0, samples, step):
        rows, targets = [], []
        for i in range(start, min(start + step, samples)):
            chosen = np.sort(rng.choice(positions, each, replace=False)) if each < positions else np.arange(positions)
            if layer.is_conv:
                rows.append(patches(layer, data[i], output.shape[2:], chosen))
                targets.append(output[i].reshape(len(output[i]), -1)[:, chosen].T)
            else:
                rows.append(data[i].reshape(-1, features)[chosen])
                targets.append(output[i].reshape(-1, layer.weight_shape[0])[chosen])
        sums.add(np.concatenate(rows), np.concatenate(targets))
    return sums


def patches(layer: Layer, image: NDArray, out_shape: tuple[int, ...], chosen: NDArray[np.int64]) -> NDArray:
    """What a convolution multiplies at the output positions ``chosen`` (flat): [positions, in * taps], channel by channel.

    ``image`` [in, D1, ..., Dk] without padding.
    """
    window = conv_window(layer.node)
    assert window is not None
    kernel, axes = window["kernel_shape"], len(window["kernel_shape"])
    ahead, behind = window["pads"][:axes], window["pads"][axes:]
    padded = np.pad(image, [(0, 0), *zip(ahead, behind, strict=True)])
    where = np.unravel_index(chosen, out_shape)
    taps = []
    for tap in np.ndindex(*kernel):
        at = tuple(
            w * s + t * d for w, s, t, d in zip(where, window["strides"], tap, window["dilations"], strict=True)
        )
        taps.append(padded[(slice(None), *at)])  # [in, positions]
    return np.stack(taps, axis=-1).transpose(1, 0, 2).reshape(len(chosen), -1)
