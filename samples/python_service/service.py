"""A small HTTP service for ONNX models, dense or block-sparse: batching, health, Prometheus metrics.

    python samples/python_service/service.py --model dense=model.onnx --model sparse=model_bs.onnx --port 8000

POST /models/NAME/predict takes one sample or several of the model's one float32 input: raw little-endian values
(application/octet-stream), answered in kind, or JSON {"inputs": [...]}, answered by {"outputs": [...]}.
GET /health/live, /health/ready, /models and /metrics say how the service is.

Samples of requests that arrive within a moment of each other run as one batch: while a batch runs, the next one
gathers, so that a busy service fills its batches without making anyone wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import tetris_onnx

RAW = "application/octet-stream"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Options:
    """How requests are put together."""

    batch: int = 16  # samples of one run at most (one larger request runs alone)
    delay: float = 0.0  # seconds that a sample waits for others although nothing runs
    threads: int = 1  # of one run
    waiting: int = 256  # requests that may wait for a model; more are refused with 503


class Metrics:
    """What Prometheus asks for, by model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_model = {"labelnames": ["model"], "registry": self.registry}
        self.requests = Counter("requests", "Answers.", ["model", "status"], registry=self.registry)
        self.latency = Histogram("request_seconds", "From request to answer.", buckets=SECONDS, **by_model)
        self.runs = Histogram("run_seconds", "One run of the model.", buckets=SECONDS, **by_model)
        self.batches = Histogram("batch_samples", "Samples of one run.", buckets=(1, 2, 4, 8, 16, 32, 64), **by_model)
        self.waiting = Gauge("requests_waiting", "Requests that wait for a run.", **by_model)


class Model:
    """One model, and the requests that wait for it."""

    def __init__(self, name: str, path: Path, options: Options, metrics: Metrics) -> None:
        """Raises ValueError for a model that does not have one float32 input with an open batch."""
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        self.name = name
        self.session = tetris_onnx.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or isinstance(inputs[0].shape[0], int):
            raise ValueError(f"{path}: a model with one float32 input and an open batch is served, this one is not")
        self.input = inputs[0].name
        self.shape = [d if isinstance(d, int) else 1 for d in inputs[0].shape[1:]]
        self._options = options
        self._metrics = metrics
        self._queue: asyncio.Queue[tuple[NDArray[np.float32], asyncio.Future]] = asyncio.Queue(options.waiting)
        self._runner = ThreadPoolExecutor(1, thread_name_prefix=name)
        self.warm_up()

    def warm_up(self) -> None:
        """Run once, so that the first request does not pay for it."""
        self.session.run(None, {self.input: np.zeros([1, *self.shape], np.float32)})

    async def predict(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first output for ``samples`` [n, ...], run together with what else waits. `asyncio.QueueFull`: busy."""
        answer: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((samples, answer))
        self._metrics.waiting.labels(self.name).set(self._queue.qsize())
        return await answer

    async def serve(self) -> None:
        """Gather and run batches for ever."""
        loop = asyncio.get_running_loop()
        left: tuple[NDArray[np.float32], asyncio.Future] | None = None
        while True:
            gathered = [left or await self._queue.get()]
            left = None
            if self._options.delay:
                await asyncio.sleep(self._options.delay)
            count = len(gathered[0][0])
            while not self._queue.empty():
                following = self._queue.get_nowait()
                if count + len(following[0]) > self._options.batch:
                    left = following
                    break
                gathered.append(following)
                count += len(following[0])
            self._metrics.waiting.labels(self.name).set(self._queue.qsize())
            batch = np.concatenate([samples for samples, _ in gathered])
            start = time.perf_counter()
            try:
                result = (await loop.run_in_executor(self._runner, self.session.run, None, {self.input: batch}))[0]
            except Exception as error:  # onnxruntime raises its own types: the requests fail, the service goes on
                for _, answer in gathered:
                    if not answer.done():
                        answer.set_exception(RuntimeError(f"the model does not run: {error}"))
                continue
            self._metrics.runs.labels(self.name).observe(time.perf_counter() - start)
            self._metrics.batches.labels(self.name).observe(len(batch))
            parts = np.split(result, np.cumsum([len(samples) for samples, _ in gathered])[:-1])
            for (_, answer), part in zip(gathered, parts, strict=True):
                if not answer.done():  # whoever asked may have gone
                    answer.set_result(part)


def parse_samples(body: bytes, content_type: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """What a request holds, [n, *shape]. Raises ValueError saying what is expected."""
    wanted = f"float32 samples of shape {list(shape)}, one after the other"
    if content_type.startswith(RAW):
        size = 4 * int(np.prod(shape, dtype=np.int64))
        if not body or len(body) % size:
            raise ValueError(f"{len(body)} bytes: expected {wanted}, {size} bytes each")
        return np.frombuffer(body, "<f4").reshape(-1, *shape)
    try:
        values = np.asarray(json.loads(body)["inputs"], np.float32)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'expected {{"inputs": [...]}} with {wanted}, or raw values as {RAW}') from None
    if list(values.shape) == list(shape):
        values = values[None]
    if list(values.shape[1:]) != list(shape) or not len(values):
        raise ValueError(f"inputs of shape {list(values.shape)}: expected {wanted}")
    return values


def create_app(models: Mapping[str, Path], options: Options) -> FastAPI:
    """The service of ``models``, by name."""
    metrics = Metrics()
    served: dict[str, Model] = {}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for name, path in models.items():
            served[name] = await asyncio.to_thread(Model, name, path, options, metrics)
        tasks = [asyncio.create_task(model.serve()) for model in served.values()]
        yield
        for task in tasks:
            task.cancel()
        served.clear()

    app = FastAPI(title="Block-sparse models", lifespan=lifespan)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        if len(served) < len(models):
            raise HTTPException(503, "the models are not loaded")
        return {"status": "ready"}

    @app.get("/models")
    async def listing() -> dict[str, list[int]]:
        return {name: model.shape for name, model in served.items()}

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/models/{name}/predict")
    async def predict(name: str, request: Request) -> Response:
        if name not in served:
            raise HTTPException(404, f"no model {name!r}; there are {', '.join(served)}")
        kind = request.headers.get("content-type", "")
        status = 200
        start = time.perf_counter()
        try:
            outputs = await served[name].predict(parse_samples(await request.body(), kind, served[name].shape))
        except ValueError as error:
            status = 400
            raise HTTPException(status, str(error)) from None
        except asyncio.QueueFull:
            status = 503
            raise HTTPException(status, f"{options.waiting} requests are waiting already") from None
        except RuntimeError as error:
            status = 500
            raise HTTPException(status, str(error)) from None
        finally:
            metrics.requests.labels(name, str(status)).inc()
            metrics.latency.labels(name).observe(time.perf_counter() - start)
        if kind.startswith(RAW):
            return Response(np.ascontiguousarray(outputs, "<f4").tobytes(), media_type=RAW)
        return Response(json.dumps({"outputs": outputs.tolist()}), media_type="application/json")

    return app


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FILE", help="may be repeated")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16, help="samples of one run at most (default 16)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="to wait for others when nothing runs (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="of one run (default 1)")
    a = parser.parse_args()
    models = {}
    for text in a.model:
        name, separator, path = text.partition("=")
        if not separator or not name or "/" in name or not Path(path).is_file():
            parser.error(f"--model {text}: expected NAME=FILE with a file that exists")
        models[name] = Path(path)
    if min(a.batch, a.threads) < 1 or a.delay_ms < 0:
        parser.error("--batch and --threads are at least 1, --delay-ms at least 0")
    app = create_app(models, Options(a.batch, a.delay_ms / 1e3, a.threads))
    uvicorn.run(app, host=a.host, port=a.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
