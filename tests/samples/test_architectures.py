"""The table of architectures: its networks leave no Gather, its rows hold what they should."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from models import Net

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "architectures"
sys.path.insert(0, str(SAMPLE))
import architectures  # noqa: E402


def small() -> onnx.ModelProto:
    net = Net()
    a = net.op("Relu", net.conv(net.input("x", ["N", 16, 12, 12]), (16, 64)))
    net.output(net.conv(net.op("Add", a, net.conv(a, (64, 64))), (64, 64)))
    return net.build()


def test_rows(tmp_path: Path) -> None:
    row = architectures.prune("small", small(), 0.7, tmp_path)
    assert (row["layers"], row["pruned"], row["gathers"], row["precision"]) == ("3", "2", "0", "float32")
    assert float(row["error"]) < 1e-5
    row |= architectures.timed("small", tmp_path, 0.05)
    table = tmp_path / "table.csv"
    architectures.write_table(table, [row])
    assert list(architectures.read_table(table)["small"]) == architectures.COLUMNS
    assert float(row["speedup"]) > 0 and float(row["ms_2"]) > 0


def test_a_quantized_model_is_pruned_in_int8(tmp_path: Path) -> None:
    quantized = architectures.quantize(small())
    assert any(node.op_type == "DequantizeLinear" for node in quantized.graph.node)
    row = architectures.prune("small", quantized, 0.7, tmp_path)
    assert (row["precision"], row["pruned"], row["gathers"]) == ("int8", "2", "0")


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        ("predicted 0.1 ms block-sparse against 0.05 ms dense", "not faster"),
        ("it is the first layer and has only 3 x 64 channels; kept whole", "first layer"),
        ("it is depthwise", "depthwise"),
    ],
)
def test_reasons_are_counted_by_kind(reason: str, short: str) -> None:
    assert architectures.reason_class(reason) == short


@pytest.mark.parametrize("name", ["MobileNetV3-like", "U-Net-like, ConvTranspose", "YOLO-like"])
def test_networks_are_exported_as_they_compute(name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    import networks
    import onnxruntime

    network = networks.NETWORKS[name]
    model = networks.export(network)
    torch.manual_seed(1)
    x = torch.randn(network.shape)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": x.numpy()})
    assert all(np.isfinite(value).all() and value.std() > 1e-3 for value in found)


def test_the_products_of_a_transformer_are_pruned(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    import networks

    small_bert = networks.Network(lambda: networks.Bert(1, 128, 4, words=50), (1, 128), words=50)
    row = architectures.prune("bert", networks.export(small_bert), 0.7, tmp_path)
    # Queries, keys, values, their mix, up and down are; the first word's class, one row of two layers, need not be.
    assert int(row["pruned"]) >= 6 and row["gathers"] == "0"
    assert float(row["error"]) < 1e-5
    counts = [node.op_type for node in onnx.load(tmp_path / "bert_bs.onnx").graph.node]
    assert counts.count("BlockSparseGemm") == int(row["pruned"])
    assert counts.count("MatMul") == 2  # of two activations each
