"""samples/python_service answers what the model answers, batches, counts, stays up; the load script measures it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from models import Net
from tetris_onnx import InferenceSession

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} is not installed (samples/python_service/requirements.txt)")

FOLDER = Path(__file__).parents[2] / "samples" / "python_service"
RAW = {"Content-Type": "application/octet-stream"}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"python_service_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


service, client = load("service"), load("load")


@pytest.fixture(scope="module")
def address(dense_sample: Path, block_sparse_sample: Path) -> Iterator[str]:
    """A running service with both models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = ["--model", f"dense={dense_sample}", "--model", f"sparse={block_sparse_sample}"]
    process = subprocess.Popen([sys.executable, FOLDER / "service.py", *models, "--port", str(port)])
    limit = time.monotonic() + 120
    while True:
        try:
            if get(f"127.0.0.1:{port}", "/health/ready")[0] == 200:
                break
        except OSError:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def ask(address: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection(address, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def get(address: str, path: str) -> tuple[int, bytes]:
    return ask(address, "GET", path)


def images(n: int) -> NDArray[np.float32]:
    return np.random.default_rng(n).random((n, 1, 28, 28), dtype=np.float32)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_it_answers_what_the_model_answers(
    address: str, name: str, dense_sample: Path, block_sparse_sample: Path
) -> None:
    session = InferenceSession(str({"dense": dense_sample, "sparse": block_sparse_sample}[name]))
    for n in (1, 3):
        x = images(n)
        expected = session.run(None, {"image": x})[0]
        status, content = ask(address, "POST", f"/models/{name}/predict", x.tobytes(), **RAW)
        assert status == 200
        tolerance = 1e-5 * float(np.abs(expected).max())  # another batch or number of threads: another order of sums
        np.testing.assert_allclose(np.frombuffer(content, "<f4").reshape(n, 10), expected, atol=tolerance)
        status, content = ask(address, "POST", f"/models/{name}/predict", json.dumps({"inputs": x.tolist()}).encode())
        assert status == 200
        np.testing.assert_allclose(json.loads(content)["outputs"], expected, atol=tolerance)


def test_bad_requests_are_told_what_is_expected(address: str) -> None:
    for path, body, headers, status, message in (
        ("/models/none/predict", b"", RAW, 404, "there are dense, sparse"),
        ("/models/dense/predict", b"123", RAW, 400, "3136 bytes each"),
        ("/models/dense/predict", b"", RAW, 400, "3136 bytes each"),
        ("/models/dense/predict", b"{", {}, 400, "inputs"),
        ("/models/dense/predict", b'{"inputs": [[1, 2]]}', {}, 400, "[1, 28, 28]"),
        ("/models/dense/predict", b'{"inputs": "x"}', {}, 400, "inputs"),
    ):
        found, content = ask(address, "POST", path, body, **headers)
        assert found == status and message in json.loads(content)["detail"]
    assert get(address, "/health/live")[0] == get(address, "/health/ready")[0] == 200


def test_the_load_script_measures_both_models(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--connections", "3", "--samples", "1,4", "--rounds", "1", "--seconds", "0.3"]
    assert client.main(["dense", "sparse", "--url", f"http://{address}", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["dense", "1"], ["sparse", "1"], ["dense", "4"], ["sparse", "4"]]
    for row in rows:
        assert float(row[2]) > 0
        assert float(row[3]) == pytest.approx(float(row[2]) * int(row[1]), rel=0.02, abs=0.5)  # digits that are shown
        assert 0 < float(row[4]) <= float(row[5])
    # The service has counted what was sent: at least all that was measured.
    text = get(address, "/metrics")[1].decode()
    counted = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert counted['requests_total{model="sparse",status="200"}'] >= 0.3 * (float(rows[1][2]) + float(rows[3][2])) - 2
    assert counted['batch_samples_count{model="sparse"}'] > 0
    assert counted['run_seconds_sum{model="sparse"}'] > 0

    assert client.main(["none", "--url", f"http://{address}"]) == 1
    assert "has no model 'none'; it has dense, sparse" in capsys.readouterr().err


@pytest.fixture
def small(tmp_path: Path) -> Path:
    net = Net()
    net.output(net.gemm(net.input("x", ["N", 8]), (8, 3)))
    onnx.save(net.build(), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


class Recorded:
    """A session that remembers the batches that it ran, and fails where it is told to."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.batches: list[int] = []
        self.broken = False

    def run(self, outputs: None, feed: dict[str, NDArray]) -> list[NDArray]:
        self.batches.append(len(feed["x"]))
        if self.broken:
            raise OSError("out of luck")
        return self._session.run(outputs, feed)


def test_requests_that_wait_run_together_and_a_failure_ends_nothing(small: Path) -> None:
    async def play() -> None:
        model = service.Model("small", small, service.Options(batch=4, waiting=6), service.Metrics())
        session = model.session = Recorded(model.session)
        rows = [np.full((n, 8), n, np.float32) for n in (1, 1, 2, 3, 6)]
        waiting = [asyncio.ensure_future(model.predict(row)) for row in rows]
        await asyncio.sleep(0)
        server = asyncio.create_task(model.serve())
        found = await asyncio.gather(*waiting)
        assert session.batches == [4, 3, 6]  # as many as fit; a larger request runs alone
        for row, answer in zip(rows, found, strict=True):
            np.testing.assert_allclose(answer, model.session.run(None, {"x": row})[0], rtol=1e-5)

        session.broken = True
        with pytest.raises(RuntimeError, match="out of luck"):
            await model.predict(rows[0])
        session.broken = False
        assert (await model.predict(rows[0])).shape == (1, 3)
        server.cancel()

        # Without anyone to serve them, the seventh request is one too many.
        full = [asyncio.ensure_future(model.predict(rows[0])) for _ in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(asyncio.QueueFull):
            await model.predict(rows[0])
        for future in full:
            future.cancel()

    asyncio.run(play())


def test_a_model_with_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.output(net.gemm(net.input("x", [4, 8]), (8, 3)))
    onnx.save(net.build(), tmp_path / "fixed.onnx")
    with pytest.raises(ValueError, match="an open batch"):
        service.Model("fixed", tmp_path / "fixed.onnx", service.Options(), service.Metrics())
