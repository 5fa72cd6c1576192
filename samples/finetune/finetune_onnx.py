"""Fine-tune a pruned ONNX classifier with plain PyTorch, without the code that made it.

Reads a network whose pruned weights are zero, such as ``tetris-onnx optimize --dump-passes FOLDER`` writes after its
pass prune_blocks (with what recovery and refinement have made of the rest), runs its nodes in PyTorch, and trains all
weights that are not zero: towards the labels and towards the outputs of the dense network (Hinton et al., *Distilling
the Knowledge in a Neural Network*, 2015), on mirrored and shifted images, with Adam and a cosine schedule. Writes the
same graph with the new weights, to which ``tetris-onnx optimize --plan`` applies the plan.

For networks of convolutions, products, residual Adds and pooling; others are named in an error. Needs PyTorch 2.5 or
newer beside tetris-onnx. Data are .npz files with the images under the name of the model's input, and ``labels``.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from tetris_onnx.graph import io
from tetris_onnx.planner import prepare

_WARM_UP = 0.05  # share of the steps in which the learning rate grows
_TEMPERATURE = 4.0
_TRAINED = ("Conv", "Gemm", "MatMul")


class Network:
    """The nodes of an ONNX graph, run by PyTorch."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
        names = self.constants.keys()
        self.input = next(value.name for value in graph.input if value.name not in names)
        self._nodes, self._output = list(graph.node), graph.output[0].name
        used = [name for node in graph.node if node.op_type in _TRAINED for name in node.input[1:] if name in names]
        self.weights = {name: self.constants[name] for name in used}
        # A MatMul's bias is an Add's constant.
        products = {node.output[0] for node in graph.node if node.op_type == "MatMul"}
        for node in graph.node:
            if node.op_type == "Add" and products.intersection(node.input):
                self.weights |= {name: self.constants[name] for name in node.input if name in names}

    def __call__(self, x: Tensor) -> Tensor:
        """The first output for a batch of images."""
        values = {**self.constants, self.input: x}
        for node in self._nodes:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            values[node.output[0]] = _run(node.op_type, attributes, [values[name] for name in node.input if name])
        return values[self._output]

    def accuracy(self, images: NDArray, labels: NDArray) -> float:
        """The share of the images that are classified as their labels say."""
        with torch.no_grad():
            parts = [self(torch.from_numpy(part)).argmax(1) for part in np.array_split(images, -(-len(images) // 250))]
        return float((torch.cat(parts).numpy() == labels).mean())


def _run(kind: str, attributes: dict[str, Any], inputs: list[Tensor]) -> Tensor:
    """One node. Raises ValueError for operators and attributes that this sample does not know."""
    x = inputs[0]
    if kind == "Conv" and inputs[1].dim() == 4 and attributes.get("auto_pad", b"NOTSET") == b"NOTSET":
        top, left, bottom, right = attributes.get("pads", [0] * 4)
        bias = inputs[2] if len(inputs) > 2 else None
        strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
        x = functional.pad(x, (left, right, top, bottom))
        return functional.conv2d(x, inputs[1], bias, strides, 0, dilations, attributes.get("group", 1))
    if (
        kind == "Gemm"
        and not attributes.get("transA", 0)
        and {attributes.get(k, 1.0) for k in ("alpha", "beta")} == {1.0}
    ):
        product = x @ (inputs[1].T if attributes.get("transB", 0) else inputs[1])
        return product + inputs[2] if len(inputs) > 2 else product
    if kind == "Slice":
        starts, ends = inputs[1].tolist(), inputs[2].tolist()
        axes = inputs[3].tolist() if len(inputs) > 3 else list(range(len(starts)))
        steps = inputs[4].tolist() if len(inputs) > 4 else [1] * len(starts)
        where = [slice(None)] * x.dim()
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            where[axis] = slice(start, end, step)
        return x[tuple(where)]
    if kind == "Pad" and attributes.get("mode", b"constant") == b"constant":
        pads = inputs[1].tolist()
        half = len(pads) // 2
        return functional.pad(x, [n for axis in reversed(range(half)) for n in (pads[axis], pads[half + axis])])
    if kind == "MaxPool" and not any(attributes.get("pads", [])) and not attributes.get("ceil_mode", 0):
        return functional.max_pool2d(x, attributes["kernel_shape"], attributes.get("strides", [1, 1]))
    simple = {
        "Relu": lambda: functional.relu(x),
        "Add": lambda: x + inputs[1],
        "MatMul": lambda: x @ inputs[1],
        "GlobalAveragePool": lambda: x.mean((2, 3), keepdim=True),
        "Flatten": lambda: x.flatten(attributes.get("axis", 1)),
        "Identity": lambda: x,
    }
    if kind not in simple:
        raise ValueError(f"this sample does not know such a {kind}: train the network in the code that made it")
    return simple[kind]()


def vary(images: Tensor, shift: int) -> Tensor:
    """Images [N, C, H, W] mirrored at random and shifted by up to ``shift`` pixels, edges repeated."""
    mirrored = torch.rand(len(images)) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    height, width = images.shape[2:]
    down, right = torch.randint(0, 2 * shift + 1, (2,)).tolist()
    padded = functional.pad(images, (shift,) * 4, "replicate")
    return padded[:, :, down : down + height, right : right + width]


def fine_tune(
    network: Network,
    teacher: Network,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    learning_rate: float,
    labels_share: float,
    batch_size: int,
    shift: int,
) -> None:
    """Train ``network`` in place; weights that are zero stay zero. ``labels_share`` of the loss is of the labels."""
    weights = list(network.weights.values())
    masks = [weight != 0 if weight.dim() > 1 else torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, learning_rate)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / (_WARM_UP * steps), (1 + math.cos(math.pi * k / steps)) / 2)
    )
    for epoch in range(epochs):
        start, total = time.process_time(), 0.0
        for batch in torch.randperm(len(images))[: steps // epochs * batch_size].split(batch_size):
            inputs = vary(images[batch], shift)
            logits = network(inputs)
            with torch.no_grad():
                wanted = functional.log_softmax(teacher(inputs) / _TEMPERATURE, 1)
            ours = functional.log_softmax(logits / _TEMPERATURE, 1)
            loss = (
                (1 - labels_share)
                * _TEMPERATURE**2
                * functional.kl_div(ours, wanted, reduction="batchmean", log_target=True)
            )
            loss = loss + labels_share * functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for weight, mask in zip(weights, masks, strict=True):
                if weight.grad is not None:
                    weight.grad *= mask
            optimizer.step()
            schedule.step()
            total += loss.item() * epochs / steps
        print(f"epoch {epoch + 1}/{epochs}: loss {total:.4f}, {time.process_time() - start:.0f} s of CPU", flush=True)
    for weight in weights:
        weight.requires_grad_(False)


def main(
    pruned: Annotated[Path, typer.Argument(help="ONNX file with zeros where it is pruned.")],
    dense: Annotated[Path, typer.Option(help="ONNX file of the dense network.")],
    train: Annotated[Path, typer.Option(help=".npz with the model's input and labels.")],
    test: Annotated[Path, typer.Option(help="The same, to score with.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")],
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="At the start.")] = 1e-3,
    labels_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the loss; the rest is the dense network.")
    ] = 0.5,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    shift: Annotated[int, typer.Option(min=0, help="Pixels that images are shifted by at most.")] = 3,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the result depends on their number.")] = 1,
) -> None:
    """Fine-tune a pruned ONNX classifier."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    model = onnx.load(pruned)
    source = io.raise_opset(onnx.load(dense))
    network, teacher = Network(model), Network(io.to_proto(prepare(io.to_graph(source)), source))
    data, scored = np.load(train), np.load(test)
    images, labels = data[network.input], data["labels"]
    print(f"dense: {teacher.accuracy(scored[network.input], scored['labels']):.2%}")
    print(f"pruned: {network.accuracy(scored[network.input], scored['labels']):.2%}", flush=True)
    fine_tune(
        network,
        teacher,
        torch.from_numpy(images),
        torch.from_numpy(labels.astype(np.int64)),
        epochs,
        learning_rate,
        labels_share,
        batch_size,
        shift,
    )
    print(f"fine-tuned: {network.accuracy(scored[network.input], scored['labels']):.2%}")
    for tensor in model.graph.initializer:
        if tensor.name in network.weights:
            tensor.CopyFrom(numpy_helper.from_array(network.weights[tensor.name].numpy(), tensor.name))
    onnx.save(model, output)


if __name__ == "__main__":
    typer.run(main)
