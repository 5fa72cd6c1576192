"""Within the columns of blocks that read a value, the channels that one row of blocks writes are side by side."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from models import (
    TOLERANCE,
    Net,
    block_sparse_nodes,
    random_feed,
    random_plan,
    relative_error,
    rewrite,
    run,
    weights_of,
)
from tetris_onnx.optimize import masked_dense, pipeline
from tetris_onnx.plan import Plan


def grouped(net: Net, block_size: tuple[int, int] = (8, 8), **options: object) -> tuple[onnx.ModelProto, Plan]:
    """The model after the pass, checked against the dense one with zeroed blocks."""
    model = net.build()
    plan = random_plan(model, block_size, **options)  # type: ignore[arg-type]
    before = rewrite(model, plan, until="absorb_gathers", target="cuda")
    result = rewrite(model, plan, target="cuda")
    feed = random_feed(model)
    assert relative_error(run(masked_dense(model, plan), feed), run(result, feed)) < TOLERANCE
    # The pass adds no Gather, and no layer that read its channels in a row has to gather them now.
    ours, theirs = layers(before), layers(result)
    assert [in_a_row(before, node) for node in ours] == [in_a_row(result, node) for node in theirs]
    return result, plan


def layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in block_sparse_nodes(model) if node.op_type.startswith("BlockSparse")]


def in_a_row(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    perm = weights_of(model)[node.input[3]]
    return bool((perm == np.arange(perm.size)).all())


def runs(model: onnx.ModelProto, writer: onnx.NodeProto, height: int) -> int:
    """How many runs of channels of the same row of blocks the writer's output has."""
    row_of = np.argsort(weights_of(model)[writer.input[4]]) // height
    return 1 + int((np.diff(row_of) != 0).sum())


def test_each_row_of_blocks_writes_one_run_into_each_column() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", [2, 32, 6, 6]), (32, 64)))
    a = net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    net.output(net.op("Relu", net.conv(a, (64, 32))))
    model = net.build()
    scattered = rewrite(model, random_plan(model, (8, 8)), until="absorb_gathers", target="cuda")
    result, _ = grouped(net)
    first, second = layers(result)
    assert in_a_row(result, second)
    # 8 rows of blocks, 8 columns: of 8 channels each, in a random order, about 1 is in each.
    assert runs(scattered, layers(scattered)[0], 8) > 50
    columns = np.argsort(weights_of(result)[first.input[4]]).reshape(8, 8) // 8
    assert (np.diff(columns, axis=1) >= 0).all()  # in each column, row by row


def test_the_residual_of_several_writers_and_readers() -> None:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", [2, 16, 6, 6]), (16, 32)))
    for _ in range(2):
        b = net.op("Relu", net.conv(a, (32, 16), kernel=1))
        a = net.op("Relu", net.op("Add", net.conv(b, (16, 32)), a))
    a = net.op("Flatten", net.op("GlobalAveragePool", a))
    net.output(net.gemm(a, (32, 24)))
    grouped(net)
    grouped(net, skip=["conv1"])  # a dense writer
    grouped(net, skip=["conv4"])  # a dense reader


def test_readers_with_blocks_of_other_widths() -> None:
    """The widths divide each other, or nothing is changed."""
    for width in (16, 12):
        net = Net()
        a = net.op("Relu", net.conv(net.input("x", [2, 16, 6, 6]), (16, 48)))
        net.output(net.op("Relu", net.conv(a, (48, 16))))
        net.output(net.op("Relu", net.conv(a, (48, 16))))
        model = net.build()
        plan = random_plan(model, (8, 8), fixed=["conv2.in", "conv3.in"])
        wider = random_plan(model, (8, width), fixed=["conv2.in", "conv3.in"])
        plan = Plan((*plan.layers[:2], wider.layers[2]))
        feed = random_feed(model)
        result = rewrite(model, plan, target="cuda")
        assert relative_error(run(masked_dense(model, plan), feed), run(result, feed)) < TOLERANCE
        assert in_a_row(result, layers(result)[2])
        before = rewrite(model, plan, until="absorb_gathers", target="cuda")
        changed = runs(result, layers(result)[0], 8) != runs(before, layers(before)[0], 8)
        assert changed == (width == 16)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_it_is_a_pass_of_the_cuda_target(target: str) -> None:
    assert ("group_channels" in [step.name for step in pipeline(Plan(()), target=target)]) == (target == "cuda")
    assert "group_channels" not in [step.name for step in pipeline(Plan(()), "keep", target=target)]
