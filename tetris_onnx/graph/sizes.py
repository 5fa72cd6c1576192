"""Which values have the same shape whatever the sizes of the model's inputs: a proof; shape inference only tries sizes.

A size is a number, or what it is computed from: a dimension of an input (or of a value that is not followed further),
then the windows that went over it, each of which makes ``(size + grow) // stride + 1`` of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from tetris_onnx.graph.channels import BROADCAST, ELEMENTWISE
from tetris_onnx.graph.layers import CONV_MAX_POOL, DOMAIN, OUR_OPS
from tetris_onnx.graph.shapes import UNKNOWN


@dataclass(frozen=True)
class Size:
    """A dimension that depends on the inputs."""

    origin: tuple[str, int] | str  # (value, axis), or the name that the model gives the dimension
    windows: tuple[tuple[int, int], ...] = ()  # (grow, stride)

    def under(self, grow: int, stride: int) -> Size:
        """The number of windows that fit, one every ``stride``; ``grow`` = pads - size of a window."""
        return self if (grow, stride) == (-1, 1) else replace(self, windows=(*self.windows, (grow, stride)))


Sizes = tuple[int | Size, ...]


def symbolic_sizes(graph: gs.Graph) -> dict[int, Sizes]:
    """The sizes of all values of known rank in the main graph, by the ``id`` of the value."""
    found: dict[int, Sizes] = {}
    for tensor in graph.inputs:
        if tensor.shape is not None:
            found[id(tensor)] = _own(tensor)
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                found[id(tensor)] = tuple(tensor.shape)
        for slot, tensor in enumerate(node.outputs):
            if tensor.shape is not None:
                known = _own(tensor)
                made = _made_by(node, found, known) if slot == 0 or node.op == "Split" else None
                if made is None or len(made) != len(known):
                    made = known
                # A number that shape inference found is as good as a proof: it is the same for every size.
                found[id(tensor)] = tuple(k if isinstance(k, int) else m for k, m in zip(known, made, strict=True))
    return found


def _own(tensor: gs.Tensor) -> Sizes:
    return tuple(
        d if isinstance(d, int) else Size((tensor.name, axis) if d == UNKNOWN else d)
        for axis, d in enumerate(tensor.shape)
    )


def _made_by(node: gs.Node, found: dict[int, Sizes], own: Sizes) -> Sizes | None:
    """The sizes of the first result of ``node`` (of each one of a Split); None where this cannot tell.

    ``own``: what is known of them without the node.
    """
    data = found.get(id(node.inputs[0])) if node.inputs else None
    ours = node.domain == DOMAIN and node.op in OUR_OPS
    if data is None or not (ours or node.domain in (None, "", "ai.onnx")):
        return None
    if node.op in ELEMENTWISE or node.op == "BatchNormalization":
        return data
    if node.op in BROADCAST:
        return _broadcast([found.get(id(t)) for t in node.inputs])
    if node.op in ("GlobalAveragePool", "GlobalMaxPool"):
        return (*data[:2], *[1] * (len(data) - 2))
    if node.op in ("Concat", "Split"):
        axis = node.attrs.get("axis", 0) % len(own)
        return (*data[:axis], own[axis], *data[axis + 1 :])
    if node.op in ("Conv", "MaxPool", "AveragePool") or (ours and len(node.attrs["weight_shape"]) > 2):
        sizes = _windows(node, data)
        if node.op == CONV_MAX_POOL and sizes is not None:
            sizes = (*sizes[:2], *(_under(s, -2, 2) for s in sizes[2:]))
        return sizes
    return None


def _windows(node: gs.Node, data: Sizes) -> Sizes | None:
    kernel = node.attrs.get("kernel_shape")
    if kernel is None:
        kernel = node.inputs[1].shape[2:] if node.op == "Conv" and node.inputs[1].shape is not None else None
    if kernel is None or node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or node.attrs.get("ceil_mode", 0):
        return None
    axes = len(kernel)
    if len(data) != axes + 2:
        return None
    strides, dilations = (node.attrs.get(name, [1] * axes) for name in ("strides", "dilations"))
    pads = node.attrs.get("pads", [0] * 2 * axes)
    sizes = [
        _under(size, pads[i] + pads[axes + i] - (kernel[i] - 1) * dilations[i] - 1, strides[i])
        for i, size in enumerate(data[2:])
    ]
    return (data[0], data[1], *sizes)  # (the channels are a number, that of the node's own output)


def _under(size: int | Size, grow: int, stride: int) -> int | Size:
    return size.under(grow, stride) if isinstance(size, Size) else (size + grow) // stride + 1


def _broadcast(operands: list[Sizes | None]) -> Sizes | None:
    shapes = [shape for shape in operands if shape is not None]
    if len(shapes) < len(operands):
        return None
    rank = max(len(shape) for shape in shapes)
    result: list[int | Size] = []
    for axis in range(-rank, 0):
        sizes = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        if len(sizes) > 1:
            return None
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)
