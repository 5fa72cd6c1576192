"""Models of one block-sparse node, made directly, with random kept blocks and permutations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from tests import reference
from tetris_onnx import runtime

DOMAIN = "ai.tetris"
Array = npt.NDArray[Any]


_ORACLES: dict[str, Callable[..., Array]] = {
    "BlockSparseConv": reference.block_sparse_conv,
    "BlockSparseConvAdd": reference.block_sparse_conv_add,
    "BlockSparseConvMaxPool": reference.block_sparse_conv_max_pool,
    "BlockSparseGemm": reference.block_sparse_gemm,
}


@dataclasses.dataclass(frozen=True)
class Op:
    """One node of a block-sparse op: its weight, in the op's own inputs, and its attributes."""

    op_type: str
    blocks: Array
    block_index: Array
    input_perm: Array
    output_perm: Array
    bias: Array | None
    attributes: Mapping[str, Any]

    @property
    def constants(self) -> dict[str, Array]:
        names = ("blocks", "block_index", "input_perm", "output_perm", "bias")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def expected(self, x: Array, addend: Array | None = None) -> Array:
        """The oracle's answer; ``addend`` for BlockSparseConvAdd."""
        oracle = _ORACLES[self.op_type]
        arguments = {
            name: value
            for name, value in self.attributes.items()
            if name not in ("block_size", "kernel_shape", "group", "input_transpose", "output_transpose")
        }
        if "input_transpose" in self.attributes:
            x = x.transpose(self.attributes["input_transpose"])
        inputs = [x, self.blocks, self.block_index, self.input_perm, self.output_perm, self.bias]
        if "output_transpose" not in self.attributes:
            return oracle(*inputs, *([] if addend is None else [addend]), **arguments)
        perm = self.attributes["output_transpose"]
        y = oracle(*inputs, *([] if addend is None else [addend.transpose(np.argsort(perm))]), **arguments)
        return y.transpose(perm)


def random_op(
    rng: np.random.Generator,
    weight_shape: Sequence[int],
    block_size: tuple[int, int],
    density: float | str = 0.4,
    *,
    permuted: bool = True,
    bias: bool = True,
    **attributes: Any,
) -> Op:
    """A node with random kept blocks; `density` may be "one", for a single block. Edge blocks are padded with NaN.

    The specification says that the padding is zero and never used: NaN there shows any use.
    """
    outputs, inputs, *kernel = weight_shape
    bo, bi = block_size
    rows, columns = math.ceil(outputs / bo), math.ceil(inputs / bi)
    if density == "one":
        keep = np.zeros((rows, columns), bool)
        keep[rng.integers(rows), rng.integers(columns)] = True
    else:
        keep = rng.random((rows, columns)) < density
    index = np.argwhere(keep).astype(np.int64)
    blocks = rng.standard_normal((len(index), bo, bi, *kernel)).astype(np.float32)
    for block, (row, column) in zip(blocks, index, strict=True):
        block[outputs - row * bo :] = np.nan
        block[:, inputs - column * bi :] = np.nan
    return Op(
        "BlockSparseConv" if kernel else "BlockSparseGemm",
        blocks,
        index,
        rng.permutation(inputs) if permuted else np.arange(inputs),
        rng.permutation(outputs) if permuted else np.arange(outputs),
        rng.standard_normal(outputs).astype(np.float32) if bias else None,
        {"weight_shape": list(weight_shape), "block_size": list(block_size), **attributes},
    )


def with_attributes(op: Op, **attributes: Any) -> Op:
    return dataclasses.replace(op, attributes={**op.attributes, **attributes})


def without_attribute(op: Op, name: str) -> Op:
    return dataclasses.replace(op, attributes={key: value for key, value in op.attributes.items() if key != name})


def make_model(
    op: Op,
    x_shape: Sequence[int | str | None],
    *,
    name: str = "the_node",
    as_inputs: Sequence[str] = (),
    replace: Mapping[str, Array] | None = None,
    addend_shape: Sequence[int | str | None] | None = None,
) -> onnx.ModelProto:
    """A model of the one node, x -> y. `as_inputs` are not constant; `replace` changes constants as they are.

    BlockSparseConvAdd has a second input, addend, of `addend_shape` (None: of any).
    """
    constants = {**op.constants, **(replace or {})}
    slots = ["x", *constants]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x_shape))]
    if op.op_type == "BlockSparseConvAdd":
        slots.append("addend")
        inputs.append(helper.make_tensor_value_info("addend", TensorProto.FLOAT, addend_shape))
    node = helper.make_node(op.op_type, slots, ["y"], name=name, domain=DOMAIN, **op.attributes)
    inputs += [
        helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(constants[i].dtype), constants[i].shape)
        for i in as_inputs
    ]
    graph = helper.make_graph(
        [node],
        "one_node",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, key) for key, value in constants.items() if key not in as_inputs],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def session(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is in the exception
    options.enable_cpu_mem_arena = False  # each output an allocation of its own, so that the sanitizers see its ends
    return runtime.InferenceSession(model.SerializeToString(), options)


def run(op: Op, x: Array, threads: int = 1, addend: Array | None = None) -> Array:
    feed = {"x": x} if addend is None else {"x": x, "addend": addend}
    return session(make_model(op, x.shape), threads).run(None, feed)[0]


def check_surrounded_by_nan(op: Op, x: Array) -> None:
    """What lies before and after the input in memory makes no difference."""
    surrounded = np.full(x.size + 4096, np.nan, np.float32)
    inside = surrounded[2048 : 2048 + x.size].reshape(x.shape)
    inside[:] = x
    one_node = session(make_model(op, x.shape))
    binding = one_node.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, inside.ctypes.data)
    binding.bind_output("y", "cpu")
    one_node.run_with_iobinding(binding)
    y = binding.get_outputs()[0].numpy()
    np.testing.assert_array_equal(y, one_node.run(None, {"x": x})[0])
    assert not np.isnan(y).any()


def fused(op: Op, kind: str) -> Op:
    """`op` as BlockSparseConvAdd ("Add") or BlockSparseConvMaxPool ("MaxPool"), with the same weight."""
    attributes = {**op.attributes, **({"pool_shape": [2, 2]} if kind == "MaxPool" else {})}
    return dataclasses.replace(op, op_type=op.op_type + kind, attributes=attributes)


def transposes(rank: int, input_last: bool, output_last: bool) -> dict[str, list[int]]:
    """The attributes of a convolution over channels-last tensors; `rank` counts the spatial dimensions."""
    attributes = {}
    if input_last:
        attributes["input_transpose"] = [0, rank + 1, *range(1, rank + 1)]
    if output_last:
        attributes["output_transpose"] = [0, *range(2, rank + 2), 1]
    return attributes
