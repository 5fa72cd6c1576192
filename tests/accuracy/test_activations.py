"""Activations of two versions of a network, against onnxruntime running the whole of each."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tetris_onnx.accuracy import activations as activations_module
from tetris_onnx.accuracy.activations import Activations, leave_to_system
from tetris_onnx.graph.layers import DOMAIN
from tetris_onnx.session import open_session

# A residual network with a fork, a flatten through a computed shape and a matrix product at the end.
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 6, 6] x) => (float[N, 5] y)
{
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
  ar = Relu (a)
  b = Conv <kernel_shape = [1, 1]> (ar, w2)
  s = Add (b, ar)
  c = Conv <kernel_shape = [3, 3], strides = [2, 2]> (s, w3)
  shape = Shape (c)
  zero = Constant <value_ints = [0]> ()
  first = Constant <value_ints = [1]> ()
  batch = Slice (shape, zero, first)
  rest = Constant <value_ints = [-1]> ()
  flat_shape = Concat <axis = 0> (batch, rest)
  flat = Reshape (c, flat_shape)
  y = MatMul (flat, w4)
}
"""
SHAPES = {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 4, 1, 1), "w3": (4, 4, 3, 3), "w4": (16, 5)}
LAYERS = ["a", "b", "c", "y"]


def network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in SHAPES.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return model


def values(model: onnx.ModelProto, names: list[str], x: NDArray) -> dict[str, NDArray]:
    """Any values of a model, from one run of the whole."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    known = {o.name for o in model.graph.output}
    extended.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in known)
    session = ort.InferenceSession(extended.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def with_weights(model: onnx.ModelProto, new: dict[str, NDArray], bias: dict[str, NDArray]) -> onnx.ModelProto:
    """The model with other weights by initializer name, and a bias added to the value of each layer in ``bias``."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for initializer in changed.graph.initializer:
        if initializer.name in new:
            initializer.CopyFrom(numpy_helper.from_array(new[initializer.name], initializer.name))
    nodes = list(changed.graph.node)
    del changed.graph.node[:]
    for node in nodes:
        for name, vector in bias.items():
            if name in node.output:
                node.output[0] = f"{name}_raw"
                changed.graph.node.append(node)
                shape = (-1, 1, 1) if node.op_type == "Conv" else (-1,)
                changed.graph.initializer.append(numpy_helper.from_array(vector.reshape(shape), f"{name}_bias"))
                node = helper.make_node("Add", [f"{name}_raw", f"{name}_bias"], [name])
        changed.graph.node.append(node)
    return changed


def our_convolutions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The outputs of all nodes of our operators that run from now on."""
    found: list[str] = []

    def spy(model: onnx.ModelProto) -> Any:
        found.extend(node.output[0] for node in model.graph.node if node.domain == DOMAIN)
        return open_session(model)

    monkeypatch.setattr(activations_module, "open_session", spy)
    return found


@pytest.mark.parametrize("whole", [(), ("a", "b", "c")])
@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("samples", [7, 16])
def test_each_layer_sees_the_pruned_input_and_the_dense_output(
    samples: int, memory: int, whole: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = our_convolutions(monkeypatch)
    model = network()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((samples, 3, 6, 6)).astype(np.float32)
    dense = values(model, LAYERS, x)
    inputs = {"a": "x", "b": "ar", "c": "s", "y": "flat"}
    weight_of = {"a": "w1", "b": "w2", "c": "w3", "y": "w4"}
    new: dict[str, NDArray] = {}
    bias: dict[str, NDArray] = {}
    with Activations(model, LAYERS, {"x": x}, memory, whole=whole) as activations:
        assert activations.count == samples
        for name in LAYERS:
            seen = activations.advance(name)
            data, output = seen.data, seen.output
            # What the pruned network adds behind b is not what the dense one does: the target is the sum.
            wanted = values(model, ["s"], x)["s"] if name == "b" else dense[name]
            # Rounding: onnxruntime fuses differently when the network is cut.
            np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-4)
            without_own_bias = {k: v for k, v in new.items()}
            pruned = with_weights(
                model, without_own_bias | ({"b1": np.zeros(4, np.float32)} if "w1" in new else {}), bias
            )
            expected = values(pruned, [inputs[name]], x)[inputs[name]] if inputs[name] != "x" else x
            np.testing.assert_allclose(data, expected, rtol=1e-4, atol=1e-4)
            if name == "b":  # its input is what is added, too
                assert seen.addend is not None
                np.testing.assert_allclose(seen.addend, data)
            else:
                assert seen.addend is None
            new[weight_of[name]] = rng.standard_normal(SHAPES[weight_of[name]]).astype(np.float32)
            bias[name] = rng.standard_normal(dense[name].shape[1]).astype(np.float32)
            activations.replace(name, new[weight_of[name]], bias[name])
    assert sorted(ours) == sorted(2 * whole)  # once in each network


def test_our_operator_takes_no_other_constants_names(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = our_convolutions(monkeypatch)
    model = network()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "b/blocks"))
    x = np.random.default_rng(1).standard_normal((4, 3, 6, 6)).astype(np.float32)
    with Activations(model, ["c"], {"x": x}, 10**9, whole=["a", "b", "c", "y"]) as activations:
        output = activations.advance("c").output
    np.testing.assert_allclose(output, values(model, ["c"], x)["c"], rtol=1e-4, atol=1e-4)
    assert ours == ["a", "c"]


def test_a_shortcut_counts_only_where_it_has_been_pruned_already() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y)
    {
      a = Conv <kernel_shape = [1, 1]> (x, wa)
      b = Conv <kernel_shape = [1, 1]> (x, wb)
      c = Conv <kernel_shape = [1, 1]> (a, wc)
      s = Add (c, b)
      y = Relu (s)
    }
    """
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    weights = {name: rng.standard_normal((4, 4, 1, 1)).astype(np.float32) for name in ("wa", "wb", "wc")}
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    x = rng.standard_normal((4, 4, 6, 6)).astype(np.float32)
    with Activations(model, ["a", "b"], {"x": x}, 10**9, dense=["c"]) as activations:
        assert [activations.changes(name) for name in "abc"] == [False, False, True]
        activations.advance("a")
        activations.replace("a", 0 * weights["wa"], np.zeros(4, np.float32))
        # c has still to be refitted: what b sees of it is not final.
        assert activations.advance("b").addend is None
        activations.replace("b", 2 * weights["wb"], np.ones(4, np.float32))
        seen = activations.advance("c")
        dense = values(model, ["s", "b"], x)
        assert seen.addend is not None
        np.testing.assert_allclose(seen.addend, 2 * dense["b"] + 1, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen.output, dense["s"], rtol=1e-4, atol=1e-4)
        assert not seen.data.any()


def test_each_node_runs_once_per_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import tetris_onnx.accuracy.activations as module

    ran: list[str] = []
    original = module.open_session

    def counting(part: onnx.ModelProto) -> object:
        ran.extend(node.output[0] for node in part.graph.node)
        return original(part)

    monkeypatch.setattr(module, "open_session", counting)
    x = np.zeros((4, 3, 6, 6), np.float32)
    with Activations(network(), LAYERS, {"x": x}, 10**9) as activations:
        for name in LAYERS:
            activations.advance(name)
    # The last layer's output is only wanted dense; all else that pruning touches runs twice.
    once = {"y"}
    counts = {name: ran.count(name) for name in set(ran)}
    assert counts.pop("a") == 2
    assert all(counts[name] == 1 for name in once & counts.keys())
    assert all(n <= 2 for n in counts.values()), counts


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of this process")
def test_arrays_in_files_can_leave_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with tempfile.TemporaryFile() as file:
        array = np.memmap(file, np.float32, "w+", shape=(16, 2**20))
    before = resident()
    array[:] = 3
    filled = resident()
    leave_to_system(array, np.ones(3))
    assert filled - before > 0.9 * array.nbytes and resident() - before < 0.1 * array.nbytes
    assert (array == 3).all()


def test_values_of_one_pass_share_the_memory() -> None:
    x = np.ones((16, 3, 6, 6), np.float32)
    in_files = []
    for spare in (0, 1):
        wanted = values(network(), ["ar", "b"], x)
        memory = x.nbytes + wanted["ar"].nbytes + wanted["b"].nbytes - 1 + spare
        with Activations(network(), ["b"], {"x": x}, memory) as activations:
            seen = activations.advance("b")
            in_files.append([isinstance(v, np.memmap) for v in (seen.data, seen.output)].count(True))
            np.testing.assert_allclose(seen.data, wanted["ar"], rtol=1e-5)
    assert in_files == [1, 0]
