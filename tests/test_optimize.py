"""End to end on small models: the result is verified, nothing is changed, and a mistake leaves nothing behind."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from models import Net, block_sparse_nodes, op_counts, random_feed, relative_error, run
from tetris_onnx import runtime
from tetris_onnx.accuracy import verification
from tetris_onnx.accuracy.compare import compare
from tetris_onnx.accuracy.verification import VerificationError, verify
from tetris_onnx.config import Config, LayerRule
from tetris_onnx.data.calibration import CalibrationError, Data
from tetris_onnx.graph import io
from tetris_onnx.graph.io import ModelError
from tetris_onnx.passes import PassError
from tetris_onnx.plan import Plan, PlanError
from tetris_onnx.session import SessionError

# "import tetris_onnx.optimize as m" would find the function of the same name in the package.
pipeline = importlib.import_module("tetris_onnx.optimize")
optimize, masked_dense, Result = pipeline.optimize, pipeline.masked_dense, pipeline.Result

CONFIG = Config(block_size=(16, 16), workers=1)


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the op library is not built, the models run on the functions that they carry."""
    try:
        runtime.get_library_path()
    except runtime.OpLibraryMissingError:
        monkeypatch.setattr("tetris_onnx.session.uses_our_ops", lambda model: False)


def network(opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    net = Net(opset, seed)
    a = net.op("Relu", net.batchnorm(net.conv(net.input("x", ["N", 3, 12, 12]), (3, 32)), 32))
    a = net.op("Relu", net.op("Add", net.conv(net.op("Relu", net.conv(a, (32, 32))), (32, 32)), a))
    a = net.op("Flatten", net.op("MaxPool", a, kernel_shape=[3, 3], strides=[3, 3]))
    a = net.op("Relu", net.gemm(a, (512, 96)))
    net.output(net.op("Softmax", net.gemm(a, (96, 10)), axis=1), shape=["N", 10])
    model = net.build(ir_version=4 if opset < 13 else 8)
    model.metadata_props.add(key="classes", value="ten")
    return model


@pytest.fixture(scope="module")
def first() -> Result:
    """One run, for what needs no run of its own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_library(monkeypatch)
        return optimize(network(), CONFIG)


@pytest.mark.parametrize(("gathers", "opset"), [("absorb", 9), ("absorb", 13), ("absorb", 20), ("keep", 17)])
def test_a_model(gathers: str, opset: int) -> None:
    model = network(opset)
    before = model.SerializeToString()
    result = optimize(model, replace(CONFIG, gathers=gathers))
    assert model.SerializeToString() == before
    assert len(result.plan) == 3 and len(block_sparse_nodes(result.model)) == 4
    report = result.report
    assert [row.status for row in report.layers] == ["whole", *["block-sparse"] * 3, "dense"]
    assert 0 < report.max_error < 1e-5
    # Before, in and behind the residual block, and before the two products; one may be no reordering.
    assert report.gathers == op_counts(result.model)["Gather"]
    assert report.gathers == 0 if gathers == "absorb" else 4 <= report.gathers <= 5
    assert report.bytes_after == result.model.ByteSize() < report.bytes_before == len(before)
    assert {"load", "plan", "rewrite", "verify"} <= report.seconds.keys()
    onnx.checker.check_model(result.model, full_check=True)
    assert list(result.model.metadata_props) == list(model.metadata_props)
    reference = masked_dense(io.raise_opset(model), result.plan)
    feed = random_feed(model)
    assert relative_error(run(reference, feed), run(result.model, feed)) < 1e-5
    assert relative_error(run(model, feed), run(result.model, feed)) > 1e-3  # it is pruned


def test_a_file_and_a_second_run_give_the_same(tmp_path: Path, first: Result) -> None:
    path = tmp_path / "m.onnx"
    io.save(network(), path)
    before = path.read_bytes()
    result = optimize(path, CONFIG)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert result.report.model == str(path)
    assert result.model == first.model


def test_a_plan_from_before(tmp_path: Path, first: Result) -> None:
    first.plan.save(tmp_path / "plan.npz")
    again = optimize(network(), CONFIG, Plan.load(tmp_path / "plan.npz"))
    assert again.model == first.model
    tuned = optimize(network(seed=1), CONFIG, Plan.load(tmp_path / "plan.npz"))
    assert len(block_sparse_nodes(tuned.model)) == 4 and tuned.model != first.model


def test_a_plan_for_another_model(first: Result) -> None:
    net = Net()
    net.output(net.gemm(net.input("x", ["N", 64]), (64, 64)))
    with pytest.raises(PlanError, match="for another model"):
        optimize(net.build(), CONFIG, first.plan)


@pytest.mark.parametrize("gathers", ["absorb", "keep"])
def test_the_result_can_be_optimized_again(gathers: str, first: Result) -> None:
    once = optimize(network(), replace(CONFIG, gathers=gathers), first.plan)
    second = optimize(once.model, CONFIG)
    assert len(second.plan) == 0
    assert len(block_sparse_nodes(second.model)) == len(block_sparse_nodes(once.model))
    assert [row.reason for row in second.report.layers].count("it is block-sparse already") == 4
    feed = random_feed(network())
    assert relative_error(run(once.model, feed), run(second.model, feed)) < 1e-6


def test_dumps(tmp_path: Path, first: Result) -> None:
    result = optimize(network(), CONFIG, first.plan, dump_passes=tmp_path)
    dumps = sorted(tmp_path.iterdir())
    assert [d.name.split("_", 1)[1] for d in dumps] == [f"{s.name}.onnx" for s in pipeline.pipeline(result.plan)]
    assert io.load(dumps[-1]) == result.model
    assert not any(d.name.startswith(".") for d in dumps)


def test_no_layer_to_prune() -> None:
    net = Net()
    net.output(net.op("Relu", net.input("x", ["N", 4])))
    result = optimize(net.build(), CONFIG)
    assert len(result.plan) == 0 and result.report.layers == () and result.report.max_error == 0
    assert any("no layer was pruned" in note for note in result.report.notes)
    skipped = optimize(network(), Config(layers=(LayerRule("*", skip=True),)))
    assert {row.reason for row in skipped.report.layers} == {"the config skips it"}


def test_stages_are_told() -> None:
    seen: list[tuple[str, int, int]] = []
    optimize(network(), CONFIG, progress=lambda *step: seen.append(step))
    assert [s for s in dict.fromkeys(stage for stage, _, _ in seen)] == ["load", "plan", "search", "rewrite", "verify"]


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError):
        optimize(tmp_path / "m.onnx", CONFIG)
    with pytest.raises(ModelError, match="no such file"):
        optimize(tmp_path / "no.onnx", CONFIG)


def test_samples_may_be_arrays() -> None:
    x = np.random.default_rng(0).standard_normal((8, 3, 12, 12), np.float32)
    config = replace(CONFIG, refine=0, sweeps=1)
    with pytest.raises(CalibrationError, match="the arrays: no array 'x'; found y; the model has the input x: float32"):
        optimize(network(), config, calibration={"y": x})
    with pytest.raises(CalibrationError, match="the arrays: 3 labels for 8 samples"):
        optimize(network(), config, calibration=x, max_drop=1.0, labeled={"x": x, "label": np.arange(3)})
    result = optimize(network(), config, calibration=x)
    assert len(result.plan) and result.report.importance == "hessian"


def open_network() -> onnx.ModelProto:
    """Of any size from 6 x 6 on; a Reshape of 48 x 32 = 1,536 positions to rows of 96 takes no usual one."""
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 3, "H", "W"]), (3, 32)))
    a = net.conv(a, (32, 32))
    net.output(net.op("Reshape", a, net.constant([0, 32, 16, 96])), shape=["N", 32, 16, 96])
    return net.build()


def test_open_sizes_are_those_given_or_those_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, macs = open_network(), [27 * 32 * 1536, 9 * 32 * 32 * 1536]
    runs: list[object] = []
    real = verification.compare
    monkeypatch.setattr(verification, "compare", lambda *a, **k: runs.append(k.get("shapes")) or real(*a, **k))
    for options in ({"shapes": {"x": (1, 3, 48, 32)}}, {"calibration": {"x": np.ones((4, 3, 48, 32), np.float32)}}):
        runs.clear()
        result = optimize(model, CONFIG, **options)  # type: ignore[arg-type]
        assert [row.macs for row in result.report.layers] == macs
        # Samples are of one size: random inputs may be of another, where the model takes it.
        assert runs == ([{"x": (1, 3, 48, 32)}] if "shapes" in options else [None, None])
        assert not any("size of 224" in note for note in result.report.notes)
        dims = result.model.graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == ["N", 3, "H", "W"], "the result takes other sizes, too"
    with pytest.raises(CalibrationError, match="give a data file, or the shape"):
        optimize(model, CONFIG)
    with pytest.raises(CalibrationError, match=r"given for 'x' is 1x3x48x32, but its samples are 1x3x32x48"):
        wide = {"x": np.ones((4, 3, 32, 48), np.float32)}
        optimize(model, CONFIG, calibration=wide, shapes={"x": (1, 3, 48, 32)})


def recurrent_step(batch: int | str) -> onnx.ModelProto:
    """A step of a stream: a convolution of the new frames, and a state [2, batch, 64] of two layers."""
    net = Net()
    x, state = net.input("x", [batch, 32, 24]), net.input("state", [2, batch, 64])
    a = net.op("Relu", net.op("Conv", x, net.weight(64, 32, 3), pads=[1, 1], kernel_shape=[3]))
    a = net.op(
        "ReduceMean", net.op("Conv", a, net.weight(64, 64, 3), pads=[1, 1], kernel_shape=[3]), axes=[2], keepdims=0
    )
    last = net.op("Gather", state, net.constant(np.int64(1)), axis=0)
    net.output(net.op("Tanh", net.op("Add", a, last)), shape=[batch, 64])
    return net.build()


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize(
    "options",
    [{}, {"refine": 2}, {"allocation": "global"}, {"precision": "int8"}],
    ids=["refit", "refine", "global", "int8"],
)
def test_a_model_with_a_state(batch: int | str, options: dict) -> None:
    model, rng = recurrent_step(batch), np.random.default_rng(0)
    samples = {
        "x": rng.standard_normal((48, 32, 24), np.float32),
        "state": rng.standard_normal((2, 1, 64), np.float32),
    }
    result = optimize(model, replace(CONFIG, **options), calibration=samples)
    assert len(result.plan) == (1 if options.get("allocation") == "global" else 2)
    assert result.report.importance == "hessian"
    compared = compare(model, result.model, Data("the samples", samples))
    assert compared.samples == 48
    assert 1e-4 < compared.outputs[0].relative < 0.9
    assert len(optimize(model, CONFIG).plan) == 2, "random inputs, too"


@pytest.mark.parametrize("model", [b"bytes", None, 3])
def test_what_is_no_model_at_all(model: object) -> None:
    with pytest.raises(ModelError, match=r"expected the path of an ONNX file or an onnx\.ModelProto, found"):
        optimize(model, CONFIG)


def test_a_model_that_onnxruntime_does_not_load_is_told_before_the_search(tmp_path: Path) -> None:
    net = Net()
    net.output(net.op("Magic", net.gemm(net.input("x", ["N", 64]), (64, 64)), domain="com.example"), shape=["N", 64])
    (tmp_path / "m.onnx").write_bytes(net.build().SerializeToString())
    stages: list[str] = []
    with pytest.raises(SessionError, match=r"m\.onnx: cannot be loaded \(.*Magic"):
        optimize(tmp_path / "m.onnx", CONFIG, progress=lambda *step: stages.append(step[0]))
    assert set(stages) == {"load"}


def spoil(name: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[gs.Graph], None]) -> None:
    """Let a pass do something wrong behind what it does."""
    original = getattr(pipeline, name)

    def wrong(graph: gs.Graph, *args: object, **named: object) -> None:
        original(graph, *args, **named)
        change(graph)

    monkeypatch.setattr(pipeline, name, wrong)


def swap_two_channels(graph: gs.Graph) -> None:
    node = next(n for n in graph.nodes if n.domain == "ai.tetris")
    perm = np.array(node.inputs[3].values)
    perm[[0, 1]] = perm[[1, 0]]
    node.inputs[3] = gs.Constant("swapped", perm)


def nudge_a_bias(graph: gs.Graph) -> None:
    node = next(n for n in graph.nodes if n.domain == "ai.tetris")
    node.inputs[5] = gs.Constant("nudged", node.inputs[5].values + np.float32(1e-2))


@pytest.mark.parametrize("change", [swap_two_channels, nudge_a_bias])
def test_a_wrong_pass_is_found(
    change: Callable[[gs.Graph], None], monkeypatch: pytest.MonkeyPatch, first: Result
) -> None:
    spoil("absorb_gathers", monkeypatch, change)
    with pytest.raises(VerificationError, match="nothing was written"):
        optimize(network(), CONFIG, first.plan)


def test_a_pass_that_loses_a_value_is_found(monkeypatch: pytest.MonkeyPatch, first: Result) -> None:
    spoil("fold_gathers", monkeypatch, lambda graph: graph.nodes[3].outputs.clear())
    with pytest.raises(PassError, match="fold_gathers"):
        optimize(network(), CONFIG, first.plan)


def test_a_final_softmax_does_not_hide_an_error() -> None:
    """A saturated Softmax gives the same for very different logits."""
    net = Net()
    a = net.op("Mul", net.gemm(net.input("x", ["N", 64]), (64, 64)), net.constant(np.float32(1000)))
    net.output(net.op("Softmax", a, axis=1))
    model = net.build()
    wrong = onnx.ModelProto.FromString(model.SerializeToString())
    values = onnx.numpy_helper.to_array(wrong.graph.initializer[0]).copy()
    values[np.abs(values) < 0.01] = 0
    wrong.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, wrong.graph.initializer[0].name))
    for proto in (model, wrong):
        proto.graph.value_info.extend(onnx.shape_inference.infer_shapes(proto).graph.value_info)
    with pytest.raises(VerificationError):
        verify(wrong, model, 1e-4)


def test_a_sigmoid_of_next_to_nothing_is_no_error() -> None:
    """Its values are a few roundings of what is before it; relative to the largest of them, any difference is huge."""
    net = Net()
    a = net.op("Add", net.gemm(net.input("x", ["N", 64]), (64, 64)), net.constant(np.float32(-20)))
    net.output(net.op("Sigmoid", a))
    model = net.build()
    other = onnx.ModelProto.FromString(model.SerializeToString())
    values = onnx.numpy_helper.to_array(other.graph.initializer[0]) * np.float32(1 + 1e-6)
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, other.graph.initializer[0].name))
    for proto in (model, other):
        proto.graph.value_info.extend(onnx.shape_inference.infer_shapes(proto).graph.value_info)
    assert verify(other, model, 1e-6) < 1e-6
    values = values * np.float32(1.01)
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, other.graph.initializer[0].name))
    with pytest.raises(VerificationError):
        verify(other, model, 1e-6)


def test_no_temporary_files_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Result) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    optimize(network(), CONFIG, first.plan)
    assert list(tmp_path.iterdir()) == []


# The largest errors that may be expected of rounding in a network of five layers, and the least that shows it happened.
ROUNDING = {"bf16": (1e-4, 2e-2), "int8": (1e-3, 1e-1)}


@pytest.mark.parametrize("precision", ROUNDING)
def test_the_error_of_a_precision_is_reported(precision: str) -> None:
    result = optimize(network(), replace(CONFIG, precision=precision))
    assert result.report.max_error < 1e-5  # of the float32 form, verified as ever
    assert result.report.precision == precision
    assert result.report.rounding_error is not None
    most, mean = result.report.rounding_error
    low, high = ROUNDING[precision]
    missing = f"this processor has no kernels of {precision}: here the result computes in float32"
    if missing in result.report.notes:
        assert most == mean == 0
    else:
        assert low < most < high
        assert 0 < mean < most


@pytest.mark.parametrize("samples", [1, 40])
def test_with_samples_int8_has_fixed_ranges(samples: int) -> None:
    x = np.random.default_rng(1).standard_normal((samples, 3, 12, 12)).astype(np.float32)
    result = optimize(network(), replace(CONFIG, precision="int8"), calibration=Data("random", {"x": x}))
    ranges = [a.floats for node in block_sparse_nodes(result.model) for a in node.attribute if a.name == "input_range"]
    rounded = [node for node in block_sparse_nodes(result.model) for a in node.attribute if a.name == "precision"]
    assert len(ranges) == len(rounded) == 3
    for low, high in ranges:
        assert low <= 0 < high
    (note,) = (note for note in result.report.notes if "the range of each layer's input is fixed" in note)
    assert ("on 10 others" if samples == 40 else "on 1 of them") in note
    if "no kernels of int8" not in " ".join(result.report.notes):
        assert ROUNDING["int8"][0] < result.report.rounding_error[0] < ROUNDING["int8"][1]


def test_without_kernels_a_precision_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETRIS_ONNX_ISA", "scalar")
    report = optimize(network(), replace(CONFIG, precision="bf16")).report
    assert report.rounding_error == (0, 0)
    assert any("no kernels of bf16" in note for note in report.notes)


def test_a_precision_that_ruins_the_output_writes_nothing(first: Result) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(first.model)
    bias = next(t for t in broken.graph.initializer if t.dims == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 100, bias.name))
    with pytest.raises(VerificationError, match="precision bf16 changes the output"):
        pipeline.verify_precision(broken, first.model, "bf16")


def test_float32_has_no_rounding_error(first: Result) -> None:
    assert first.report.precision == "float32"
    assert first.report.rounding_error is None
