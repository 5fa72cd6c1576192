"""Random valid models: whatever the topology, the result is the masked dense model and no Gather is left.

``TETRIS_ONNX_EXAMPLES`` sets how many models are tried for each test (and then they are new ones every time).
"""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from models import Net, block_sparse_nodes, our_gathers, random_feed, random_plan, relative_error, rewrite, run
from tetris_onnx.algorithms.allocation import BudgetError
from tetris_onnx.config import Config, LayerRule
from tetris_onnx.graph import io
from tetris_onnx.graph.layers import CONV, MAX_POOL
from tetris_onnx.graph.quantized import without_rounding
from tetris_onnx.optimize import masked_dense, optimize
from tetris_onnx.plan import Plan
from tetris_onnx.runtime import InferenceSession

EXAMPLES = int(os.environ.get("TETRIS_ONNX_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=bool(EXAMPLES),
)
FEW = settings(SETTINGS, max_examples=EXAMPLES or 15)
# Up to a dozen layers in a row, each summing in another order than in the reference.
TOLERANCE = 1e-4

ACTIVATIONS = ("Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Tanh", "Elu", "Identity", "Abs")


class Value:
    """A value of the model that is written: its name and its shape (without the batch)."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape

    @property
    def channels(self) -> int:
        return self.shape[0]


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    """A model of convolutions that may end in matrix products, with forks, joins and reshapes in between."""
    net = Net(draw(st.sampled_from([13, 17, 18])), seed=draw(st.integers(0, 2**16)))
    axes = draw(st.sampled_from([2, 2, 2, 1, 3]))
    channels = st.integers(2, 12).map(lambda n: 4 * n)
    size = {1: 12, 2: 8, 3: 4}[axes]
    first = Value("x", (draw(channels), *[size] * axes))
    batch = draw(st.sampled_from(["N", 2]))
    net.input("x", [batch, *first.shape])
    values = [first]  # what may be read on

    def pick() -> Value:
        return values[draw(st.integers(max(0, len(values) - 3), len(values) - 1))]  # mostly the latest

    def add(name: str, *shape: int) -> None:
        values.append(Value(name, shape))

    def conv(v: Value) -> None:
        out, kernel = draw(channels), draw(st.sampled_from([1, 3]))
        stride = draw(st.sampled_from([1, 1, 2])) if v.shape[1] > 3 else 1
        kwargs = {"strides": [stride] * axes} if stride > 1 else {}
        if draw(st.booleans()) and kernel == 3:
            kwargs["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER"]))
        name = net.conv(v.name, (v.channels, out), kernel, draw(st.booleans()), axes=axes, **kwargs)
        add(name, out, *[-(-d // stride) for d in v.shape[1:]])

    def conv_of_form(v: Value) -> None:
        """The weight in a Constant node, behind an Identity or a Transpose."""
        out = draw(channels)
        weight = net.weight_values(out, v.channels, *[1] * axes)
        form = draw(st.sampled_from(["Constant", "Identity", "Transpose"]))
        if form == "Constant":
            w = net.op("Constant", value=onnx.numpy_helper.from_array(weight))
        elif form == "Identity":
            w = net.op("Identity", net.constant(weight))
        else:
            order = [1, 0, *range(2, 2 + axes)]
            w = net.op("Transpose", net.constant(np.ascontiguousarray(weight.transpose(order))), perm=order)
        add(net.op("Conv", v.name, w), out, *v.shape[1:])

    def depthwise(v: Value) -> None:
        add(net.conv(v.name, (v.channels, v.channels), group=v.channels, axes=axes), *v.shape)

    def grouped(v: Value) -> None:
        add(net.conv(v.name, (v.channels, v.channels), group=2, axes=axes), *v.shape)

    def transposed(v: Value) -> None:
        """A ConvTranspose, which nothing passes and which is not pruned."""
        if v.shape[1] <= 4:
            out, stride = draw(channels), draw(st.sampled_from([1, 2]))
            weight = net.constant(net.weight_values(v.channels, out, *[stride] * axes))
            add(
                net.op("ConvTranspose", v.name, weight, strides=[stride] * axes),
                out,
                *[stride * d for d in v.shape[1:]],
            )

    def quantized_pair(v: Value) -> str:
        kind = draw(st.sampled_from([np.uint8, np.int8]))
        step = [net.constant(np.float32(draw(st.sampled_from([0.01, 0.02])))), net.constant(np.array(10, kind))]
        return net.op("DequantizeLinear", net.op("QuantizeLinear", v.name, *step), *step)

    def quantized(v: Value) -> None:
        add(quantized_pair(v), *v.shape)

    def quantized_conv(v: Value) -> None:
        out, per_channel = draw(channels), draw(st.booleans())
        weight = net.weight_values(out, v.channels, *[1] * axes)
        scale = np.full(out if per_channel else (), np.abs(weight).max() / 127, np.float32)
        stored = net.constant(np.round(weight / scale.flat[0]).astype(np.int8))
        zero = net.constant(np.zeros(scale.shape, np.int8))
        w = net.op("DequantizeLinear", stored, net.constant(scale), zero, axis=0)
        add(net.op("Conv", quantized_pair(v), w), out, *v.shape[1:])

    def in_function(v: Value) -> None:
        """A convolution in a function of the model."""
        if not net.functions:
            imports = [onnx.helper.make_opsetid("", net.opset)]
            body = [onnx.helper.make_node("Conv", ["x", "w"], ["t"]), onnx.helper.make_node("Add", ["t", "x"], ["y"])]
            net.functions.append(onnx.helper.make_function("local", "residual", ["x", "w"], ["y"], body, imports))
        weight = net.weight(v.channels, v.channels, *[1] * axes)
        add(net.op("residual", v.name, weight, domain="local"), *v.shape)

    def in_branches(v: Value) -> None:
        """An If whose branches read a value from outside, one of them in a layer of its own."""
        infos = [onnx.helper.make_tensor_value_info(net.name("branch"), 1, [batch, *v.shape]) for _ in range(2)]
        then = onnx.helper.make_node("Sin", [v.name], [infos[0].name])
        weight = net.weight(v.channels, v.channels, *[1] * axes)
        other = onnx.helper.make_node("Conv", [v.name, weight], [infos[1].name])
        graphs = [
            onnx.helper.make_graph([node], info.name, [], [info])
            for node, info in zip((then, other), infos, strict=True)
        ]
        condition = net.constant(np.array(draw(st.booleans())))
        add(net.op("If", condition, then_branch=graphs[0], else_branch=graphs[1]), *v.shape)

    def activation(v: Value) -> None:
        add(net.op(draw(st.sampled_from(ACTIVATIONS if net.opset >= 14 else ACTIVATIONS[:2])), v.name), *v.shape)

    def clip(v: Value) -> None:
        add(net.op("Clip", v.name, net.constant(np.float32(-0.5)), net.constant(np.float32(0.75))), *v.shape)

    def per_channel(v: Value) -> None:
        op = draw(st.sampled_from(["Mul", "Add", "PRelu", "Sub", "Max"]))
        add(net.op(op, v.name, net.random(v.channels, *[1] * axes)), *v.shape)

    def normalization(v: Value) -> None:
        if draw(st.booleans()):
            add(net.batchnorm(v.name, v.channels), *v.shape)
        else:
            vectors = net.random(v.channels, low=0.5), net.random(v.channels)
            # (over a few values only: a large epsilon keeps rounding errors small)
            add(net.op("InstanceNormalization", v.name, *vectors, epsilon=0.1), *v.shape)

    def pool(v: Value) -> None:
        if v.shape[1] < 2:
            return
        op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
        stride = draw(st.sampled_from([1, 2]))
        name = net.op(op, v.name, kernel_shape=[2] * axes, strides=[stride] * axes)
        add(name, v.channels, *[(d - 2) // stride + 1 for d in v.shape[1:]])

    def join(v: Value) -> None:
        """With a value of the same shape, or one that a convolution brings to the same number of channels."""
        other = next((o for o in reversed(values[:-1]) if o.shape[1:] == v.shape[1:] and o is not v), None)
        if other is None:
            return
        name = other.name
        if other.channels != v.channels:
            name = net.conv(name, (other.channels, v.channels), 1, axes=axes)
        op = draw(st.sampled_from(["Add", "Mul", "Sub", "Max", "Sum"]))
        operands = [v.name, name] if draw(st.booleans()) else [name, v.name]
        add(net.op(op, *operands), *v.shape)

    def residual(v: Value) -> None:
        name = net.conv(v.name, (v.channels, v.channels), draw(st.sampled_from([1, 3])), axes=axes)
        add(net.op("Add", *([name, v.name] if draw(st.booleans()) else [v.name, name])), *v.shape)

    def conv_and_pool(v: Value) -> None:
        if min(v.shape[1:]) >= 2:
            name = net.conv(v.name, (v.channels, v.channels), axes=axes)
            for op in draw(st.permutations(["Relu", "MaxPool"])):
                name = net.op(op, name, **({"kernel_shape": [2] * axes, "strides": [2] * axes} if op != "Relu" else {}))
            add(name, v.channels, *[d // 2 for d in v.shape[1:]])

    def concat(v: Value) -> None:
        others = [o for o in values if o.shape[1:] == v.shape[1:]]
        other = others[draw(st.integers(0, len(others) - 1))]
        if v.channels + other.channels <= 64:
            add(
                net.op("Concat", v.name, other.name, axis=draw(st.sampled_from([1, -1 - axes]))),
                v.channels + other.channels,
                *v.shape[1:],
            )

    def concat_of_pixels(v: Value) -> None:
        if v.shape[1] <= 8:
            add(net.op("Concat", v.name, v.name, axis=2), v.channels, 2 * v.shape[1], *v.shape[2:])

    def split(v: Value) -> None:
        if v.channels < 2:
            return
        first_part = draw(st.integers(1, v.channels - 1))
        parts = net.ops("Split", [v.name, net.constant([first_part, v.channels - first_part])], 2, axis=1)
        add(parts[0], first_part, *v.shape[1:])
        add(parts[1], v.channels - first_part, *v.shape[1:])

    def squeeze_excite(v: Value) -> None:
        s = net.op("Relu", net.conv(net.op("GlobalAveragePool", v.name), (v.channels, 8), 1, axes=axes))
        s = net.op("Sigmoid", net.conv(s, (8, v.channels), 1, axes=axes))
        add(net.op("Mul", v.name, s), *v.shape)

    def resize(v: Value) -> None:
        if v.shape[1] <= 4:
            scales = net.constant(np.array([1, 1, *[2] * axes], np.float32))
            add(net.op("Resize", v.name, "", scales, mode="nearest"), v.channels, *[2 * d for d in v.shape[1:]])

    def pad(v: Value) -> None:
        if v.shape[1] <= 8:
            name = net.op("Pad", v.name, net.constant([0, 0, *[1] * axes, 0, 0, *[0] * axes]))
            add(name, v.channels, *[d + 1 for d in v.shape[1:]])

    def crop(v: Value) -> None:
        if v.shape[1] > 2:
            name = net.op("Slice", v.name, net.constant([1]), net.constant([100]), net.constant([2]))
            add(name, v.channels, v.shape[1] - 1, *v.shape[2:])

    def shuffle(v: Value) -> None:
        """ShuffleNet's: takes channels apart."""
        name = net.op("Reshape", v.name, net.constant([0, 2, v.channels // 2, *v.shape[1:]]))
        if v.channels % 2 == 0:
            name = net.op("Transpose", name, perm=[0, 2, 1, *range(3, 3 + axes)])
            add(net.op("Reshape", name, net.constant([0, *v.shape])), *v.shape)

    def channels_last(v: Value) -> None:
        """To NHWC, a matrix product or an operator there, and back."""
        name = net.op("Transpose", v.name, perm=[0, *range(2, 2 + axes), 1])
        out = v.channels
        if draw(st.booleans()):
            out = draw(channels)
            name = net.matmul(name, (v.channels, out))
            if draw(st.booleans()):
                name = net.op("Add", name, net.random(out))
        name = net.op("Relu", name)
        add(net.op("Transpose", name, perm=[0, 1 + axes, *range(1, 1 + axes)]), out, *v.shape[1:])

    def user_gather(v: Value) -> None:
        perm = net.rng.permutation(v.channels).tolist()
        add(net.op("Gather", v.name, net.constant(perm), axis=1), *v.shape)

    def output(v: Value) -> None:
        if v is not first and v.name not in {o.name for o in net.outputs}:
            net.output(v.name)

    steps = [
        conv,
        conv,
        conv,
        conv_of_form,
        depthwise,
        grouped,
        activation,
        activation,
        clip,
        per_channel,
        normalization,
    ]
    steps += [pool, join, join, concat, concat_of_pixels, split, squeeze_excite, resize, pad, crop, channels_last]
    steps += [residual, residual, conv_and_pool, shuffle, user_gather, output]
    steps += [grouped, transposed, quantized, quantized_conv, in_function, in_branches]
    conv(first)
    for step in draw(st.lists(st.sampled_from(steps), min_size=2, max_size=12)):
        v = pick()
        if step in (grouped, shuffle) and v.channels % 2:
            continue
        step(v)
    v = values[-1]
    if v is first:
        conv(v)
        v = values[-1]
    head = draw(st.sampled_from(["none", "flatten", "nhwc flatten", "pool", "mean"]))
    if head == "none":
        output(v)
        if not net.outputs:
            net.output(v.name)
        return finished(net, draw)
    name, length = v.name, int(np.prod(v.shape))
    if length > 2048:
        head = "pool"
    if head == "flatten":
        name = net.op("Flatten", name) if draw(st.booleans()) else net.op("Reshape", name, net.constant([0, -1]))
    elif head == "nhwc flatten":
        name = net.op("Transpose", name, perm=[0, *range(2, 2 + axes), 1])
        name = net.op("Reshape", name, net.constant([-1, length]))
    elif head == "pool":
        name, length = net.op("Flatten", net.op("GlobalAveragePool", name)), v.channels
    elif net.opset < 18:
        name, length = net.op("ReduceMean", name, axes=list(range(2, 2 + axes)), keepdims=0), v.channels
    else:
        name, length = net.op("ReduceMean", name, net.constant(list(range(2, 2 + axes))), keepdims=0), v.channels
    for _ in range(draw(st.integers(1, 3))):
        out = draw(channels)
        form = draw(st.sampled_from(["matmul", "matmul+add", "gemm", "gemm transB", "gemm alpha beta", "gemm C"]))
        weight = net.weight_values(out, length)
        if form.startswith("matmul"):
            name = net.op("MatMul", name, net.constant(np.ascontiguousarray(weight.T)))
            if form.endswith("add"):
                operands = [name, net.random(out)]
                name = net.op("Add", *(operands if draw(st.booleans()) else operands[::-1]))
        elif form == "gemm":
            name = net.op("Gemm", name, net.constant(np.ascontiguousarray(weight.T)), net.random(out))
        elif form == "gemm transB":
            name = net.op("Gemm", name, net.constant(weight), transB=1)
        elif form == "gemm alpha beta":
            shape = draw(st.sampled_from([(1, out), (out,), (1,), ()]))
            name = net.op("Gemm", name, net.constant(weight), net.random(*shape), transB=1, alpha=0.5, beta=2.0)
        else:
            name = net.op("Gemm", name, net.constant(weight), net.op("Neg", net.random(1, out)), transB=1)
        length = out
        if draw(st.booleans()):
            name = net.op(draw(st.sampled_from(["Relu", "Sigmoid", "Dropout"])), name)
        if draw(st.booleans()):
            name = net.op("Softmax", name, axis=-1) if draw(st.booleans()) else net.batchnorm(name, length)
    net.output(name)
    return finished(net, draw)


def finished(net: Net, draw: st.DrawFn) -> onnx.ModelProto:
    """The model, perhaps with its initializers among its inputs."""
    model = net.build()
    if draw(st.integers(0, 9)) == 0:
        for tensor in model.graph.initializer:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def plan_of(model: onnx.ModelProto, draw: st.DataObject) -> Plan:
    block = draw.draw(st.sampled_from([(4, 4), (8, 8), (16, 4), (5, 7)]), "block size")
    density = draw.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]), "density")
    names = [layer.layer for layer in random_plan(model)]
    ends = [f"{name}.{end}" for name in names for end in ("in", "out")]
    fixed = draw.draw(st.lists(st.sampled_from(ends), max_size=4), "identity") if ends else []
    skip = draw.draw(st.lists(st.sampled_from(names), max_size=2), "dense") if names else []
    return random_plan(model, block, density, draw.draw(st.integers(0, 99), "seed"), fixed, skip)


@pytest.mark.parametrize("gathers", ["absorb", "keep"])
@SETTINGS
@given(data=st.data())
def test_any_model(gathers: str, data: st.DataObject) -> None:
    model = data.draw(models(), "model")
    note(onnx.printer.to_text(model))
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString()
    source = io.raise_opset(model)  # (which inlines its functions)
    plan = plan_of(source, data)
    others = [layer.layer for layer in random_plan(source) if plan.get(layer.layer) is None]
    whole = data.draw(st.sets(st.sampled_from(others)), "whole") if others else set()
    target = data.draw(st.sampled_from(["cpu", "cpu", "cuda"]), "target") if gathers == "absorb" else "cpu"
    result = rewrite(source, plan, gathers, target=target, whole=sorted(whole))
    assert model.SerializeToString() == before
    ours = [node for node in block_sparse_nodes(result) if node.op_type != MAX_POOL]
    assert len(ours) == len(plan) + len(whole)
    onnx.checker.check_model(result, full_check=True)
    feed = random_feed(model)
    compared = without_rounding(result)  # a sum in another order can fall on the other side of a step
    expected = run(without_rounding(masked_dense(source, plan)), feed)
    assert relative_error(expected, run(compared, feed)) <= TOLERANCE
    if gathers == "absorb":
        assert our_gathers(result, source) <= 0
    if target == "cpu":
        assert not left_to_fuse(result)
        library = InferenceSession(compared.SerializeToString()).run(None, feed)
        assert relative_error(expected, library) <= TOLERANCE


@FEW
@given(data=st.data())
def test_any_option(data: st.DataObject) -> None:
    """The whole way, with the search: it verifies its result itself, and says what became of every layer."""
    model = data.draw(models(), "model")
    note(onnx.printer.to_text(model))
    block = data.draw(st.sampled_from([(4, 4), (8, 8), (16, 4)]), "block size")
    options = {
        "sparsity": data.draw(st.sampled_from([0.0, 0.3, 0.7, 0.95]), "sparsity"),
        "allocation": data.draw(st.sampled_from(["uniform", "uniform", "global"]), "allocation"),
        "importance": data.draw(st.sampled_from(["l1", "l2"]), "importance"),
        "reorder": data.draw(st.sampled_from(["exact", "greedy", "none"]), "reorder"),
        "gathers": data.draw(st.sampled_from(["absorb", "absorb", "keep"]), "gathers"),
        "precision": data.draw(st.sampled_from(["float32", "float32", "bf16", "int8"]), "precision"),
        "layers": (LayerRule("*", block_size=block),) if data.draw(st.booleans(), "whatever its time") else (),
    }
    before = model.SerializeToString()
    try:
        result = optimize(model, Config(workers=1, **options))
    except BudgetError:  # a sparsity that so few blocks cannot have
        return
    assert model.SerializeToString() == before
    onnx.checker.check_model(result.model, full_check=True)
    assert result.report.max_error <= TOLERANCE
    if options["gathers"] == "absorb":
        assert result.report.gathers == 0
    assert all(row.status == "block-sparse" or row.reason for row in result.report.layers)
    run(result.model, random_feed(model))


def left_to_fuse(model: onnx.ModelProto) -> list[str]:
    """Convolutions with one reader that should have gone in: an Add (where both shapes are numbers) or a MaxPool."""
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*model.graph.value_info, *model.graph.input)}
    constants = {tensor.name for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    found = []
    for node in model.graph.node:
        if node.op_type != CONV or node.output[0] in outputs:
            continue
        value = node.output[0]
        readers = [n for n in model.graph.node for name in n.input if name == value]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if len(readers) != 1:
            continue
        other = next((n for n in readers[0].input if n != value), value)
        plain = attributes["activation_min"] == -np.inf and attributes["activation_max"] == np.inf
        if readers[0].op_type == "Add" and plain and other in shapes and other not in constants:
            sizes = [[d.dim_value for d in shapes[name]] for name in (value, other)]
            if sizes[0] == sizes[1] and 0 not in sizes[0]:
                found.append(node.name)
        if readers[0].op_type == "MaxPool" and len(attributes["weight_shape"]) == 4:
            pool = {a.name: onnx.helper.get_attribute_value(a) for a in readers[0].attribute}
            if pool["kernel_shape"] == pool["strides"] == [2, 2]:
                found.append(node.name)
    return found
