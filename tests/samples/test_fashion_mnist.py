"""The files of samples/fashion_mnist fit together: the model, its calibration images and its labelled test images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

SAMPLE = Path(__file__).parents[2] / "samples" / "fashion_mnist"
MODEL = SAMPLE / "fashion_mnist.onnx"


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(MODEL)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(SAMPLE / name) as arrays:
        return dict(arrays)


def signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]


def test_model_is_valid_and_has_a_dynamic_batch(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    assert [signature(value) for value in model.graph.input] == [
        ("image", onnx.TensorProto.FLOAT, ["batch", 1, 28, 28])
    ]
    assert [signature(value) for value in model.graph.output] == [("logits", onnx.TensorProto.FLOAT, ["batch", 10])]
    assert model.ir_version <= 9, "onnxruntime 1.18 reads IR versions up to 10, some tools of its time up to 9"


def test_model_is_one_small_file(model: onnx.ModelProto) -> None:
    assert MODEL.stat().st_size < 5_000_000
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_model_has_what_the_sample_is_to_show(model: onnx.ModelProto) -> None:
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    convs = [weights[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]
    gemms = [weights[node.input[1]] for node in model.graph.node if node.op_type == "Gemm"]
    assert convs == [[m, c, 3, 3] for m, c in ((32, 1), (64, 32), (64, 64), (128, 64), (128, 128), (128, 128))]
    assert gemms == [[128, 1152], [10, 128]]

    # An exporter in its default mode folds BatchNormalization; then there is nothing for fuse_batchnorm to do.
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    batch_norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert [producers[node.input[0]] for node in batch_norms] == ["Conv"] * 3
    consumers = [n.op_type for norm in batch_norms for n in model.graph.node if norm.output[0] in n.input]
    assert consumers == ["Relu"] * 3
    assert {"MaxPool", "Flatten"} <= set(producers.values())


def test_accuracy_on_the_test_images() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    test = load("test.npz")
    session = onnxruntime.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": test["image"]})
    # 0.92 is the promise of the sample, not what was measured (README.md), so that an image or two that another
    # machine's rounding tips over cannot fail the test; a wrong preprocessing or a damaged file falls far below.
    assert (logits.argmax(1) == test["label"]).mean() >= 0.92


def test_test_images_are_labelled_evenly() -> None:
    test = load("test.npz")
    assert sorted(test) == ["image", "label"]
    assert (test["image"].dtype, test["image"].shape) == (np.float32, (1000, 1, 28, 28))
    assert (test["label"].dtype, test["label"].shape) == (np.int64, (1000,))
    assert np.bincount(test["label"]).tolist() == [100] * 10


def test_calibration_images_fit_the_model_input(model: onnx.ModelProto) -> None:
    calibration = load("calibration.npz")
    assert list(calibration) == [value.name for value in model.graph.input]  # no labels
    assert (calibration["image"].dtype, calibration["image"].shape) == (np.float32, (256, 1, 28, 28))


def test_calibration_images_are_pixels_and_none_is_a_test_image() -> None:
    calibration, test = load("calibration.npz")["image"], load("test.npz")["image"]
    for images in (calibration, test):
        assert (images.min(), images.max()) == (0, 1)
        assert len({image.tobytes() for image in images}) == len(images)
    assert not {image.tobytes() for image in calibration} & {image.tobytes() for image in test}
