"""samples/finetune: reads the network, trains with the dropped blocks at zero, and its export fits the plan."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tetris_onnx import Config, optimize  # noqa: E402
from tetris_onnx.accuracy.compare import compare  # noqa: E402
from tetris_onnx.torch import apply_masks, remove_masks  # noqa: E402

SAMPLES = Path(__file__).parents[2] / "samples"
MODEL = SAMPLES / "fashion_mnist" / "fashion_mnist.onnx"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", SAMPLES / "finetune" / "finetune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_network_is_the_one_in_the_file(script: ModuleType, tmp_path: Path) -> None:
    script.export(script.load_network(MODEL), tmp_path / "again.onnx")
    assert compare(MODEL, tmp_path / "again.onnx", samples=2).relative < 1e-5


@pytest.mark.parametrize("distill", [False, True])
def test_training_lowers_the_loss_and_the_export_fits_the_plan(
    script: ModuleType, tmp_path: Path, distill: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    plan = optimize(MODEL, Config(sparsity=0.7)).plan
    with np.load(SAMPLES / "fashion_mnist" / "test.npz") as arrays:
        images, labels = torch.from_numpy(arrays["image"][:256]), torch.from_numpy(arrays["label"][:256])
    network = script.load_network(MODEL)
    matches = apply_masks(network, plan)
    assert matches["/features/features.2/Conv_output_0"] == "features.2"
    teacher = script.load_network(MODEL).eval() if distill else None
    script.fine_tune(network, teacher, images, labels, epochs=3, learning_rate=0.01, batch_size=32)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    remove_masks(network)
    script.export(network, tmp_path / "tuned.onnx")
    result = optimize(tmp_path / "tuned.onnx", plan=plan)
    found = compare(tmp_path / "tuned.onnx", result.model, samples=2)
    assert found.relative < 1e-4, "the plan prunes nothing that is not zero already"


NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 12, 12] x) => (float[N, 4] y)
<int64[2] first = {0, 0}, int64[2] last = {100, 100}, int64[2] axes = {2, 3}, int64[2] steps = {2, 2},
 int64[8] pads = {0, 4, 0, 0, 0, 4, 0, 0}>
{
  s = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, ws)
  r = Relu (s)
  a = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], group = 2> (r, wa, ba)
  skip = Slice (r, first, last, axes, steps)
  wide = Pad (skip, pads)
  t = Add (a, wide)
  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (t)
  g = GlobalAveragePool (p)
  f = Flatten (g)
  m = MatMul (f, wm)
  h = Add (m, bm)
  y = Gemm <transB = 1> (h, wy, by)
}
"""


@pytest.fixture
def onnx_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SAMPLES / "finetune"))
    return importlib.import_module("finetune_onnx")


def test_an_onnx_file_is_trained_towards_labels_and_the_dense_network(onnx_script: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = onnx.parser.parse_model(NETWORK)
    shapes = {
        "ws": (8, 3, 3, 3),
        "wa": (16, 4, 3, 3),
        "ba": (16,),
        "wm": (16, 12),
        "bm": (12,),
        "wy": (4, 12),
        "by": (4,),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) / 3
        dense.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(dense, tmp_path / "dense.onnx")
    x = rng.standard_normal((256, 3, 12, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(dense.SerializeToString(), providers=["CPUExecutionProvider"])
    labels = session.run(None, {"x": x})[0].argmax(1)
    with torch.no_grad():
        found = onnx_script.Network(dense)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-4)

    pruned = onnx.ModelProto()
    pruned.CopyFrom(dense)
    keep = rng.random(shapes["wa"]) < 0.5
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in dense.graph.initializer}
    weight = constants["wa"] * keep
    next(t for t in pruned.graph.initializer if t.name == "wa").CopyFrom(
        onnx.numpy_helper.from_array(weight.astype(np.float32), "wa")
    )
    onnx.save(pruned, tmp_path / "pruned.onnx")
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    before = onnx_script.Network(pruned).accuracy(x, labels)
    paths = [tmp_path / name for name in ("pruned.onnx", "dense.onnx", "data.npz", "data.npz", "tuned.onnx")]
    onnx_script.main(*paths, epochs=6, learning_rate=3e-3, labels_share=0.5, batch_size=16, shift=0, seed=0, threads=1)
    tuned = onnx.load(tmp_path / "tuned.onnx")
    # Half of the wrong answers at least (13 of 256 images before, 2 when this was written).
    assert 1 - onnx_script.Network(tuned).accuracy(x, labels) < 0.5 * (1 - before)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in tuned.graph.initializer}
    assert not weights["wa"][~keep].any() and (weights["wa"][keep] != weight[keep]).mean() > 0.9
    assert all((weights[name] != 0).any() for name in ("bm", "by", "ba"))


def test_an_operator_that_is_not_known_is_named(onnx_script: ModuleType) -> None:
    with pytest.raises(ValueError, match="does not know such a Softsign"):
        onnx_script._run("Softsign", {}, [torch.ones(1)])
