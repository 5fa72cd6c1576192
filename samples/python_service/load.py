"""Put the service under load on loopback: two of its models in turns, in one run.

    python samples/python_service/load.py --url http://127.0.0.1:8000 dense sparse --connections 4 --samples 1,16

Each connection sends its next request when the last one is answered. The models take turns of some seconds, so that
whatever slows the machine slows both. Client and service share its cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

HEADERS = {"Content-Type": "application/octet-stream"}


class LoadError(RuntimeError):
    """A service that does not answer, or not as it should."""


@dataclass(frozen=True)
class Load:
    """What one model did under load."""

    model: str
    samples: int  # of one request
    connections: int
    requests_per_second: float
    samples_per_second: float
    median_ms: float
    p99_ms: float


def shape_of(address: str, model: str) -> list[int]:
    """The shape of one sample. Raises `LoadError`."""
    try:
        connection = http.client.HTTPConnection(address, timeout=10)
        connection.request("GET", "/models")
        models = json.loads(connection.getresponse().read())
        connection.close()
    except (OSError, ValueError) as error:
        raise LoadError(f"{address}: no service answers ({error})") from None
    if model not in models:
        raise LoadError(f"{address} has no model {model!r}; it has {', '.join(models)}")
    return models[model]


def turn(address: str, model: str, body: bytes, connections: int, seconds: float) -> list[float]:
    """The seconds that each request took, of those answered within ``seconds``. Raises `LoadError`."""
    times: list[list[float]] = [[] for _ in range(connections)]
    failures: list[str] = []
    end = time.perf_counter() + seconds

    def work(own: list[float]) -> None:
        connection = http.client.HTTPConnection(address, timeout=30)
        try:
            while (start := time.perf_counter()) < end:
                connection.request("POST", f"/models/{model}/predict", body, HEADERS)
                answer = connection.getresponse()
                content = answer.read()
                if answer.status != 200:
                    raise LoadError(f"status {answer.status}: {content.decode()[:200]}")
                own.append(time.perf_counter() - start)
        except (OSError, http.client.HTTPException, LoadError) as error:
            failures.append(str(error))
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(own,)) for own in times]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise LoadError(failures[0])
    return [value for own in times for value in own]


def measure(
    address: str, models: Sequence[str], samples: int, connections: int, rounds: int, seconds: float
) -> list[Load]:
    """Each model's load over ``rounds`` turns of ``seconds``, after one that is not counted. Raises `LoadError`."""
    rng = np.random.default_rng(0)
    bodies = [rng.random([samples, *shape_of(address, m)], dtype=np.float32).tobytes() for m in models]
    times: list[list[float]] = [[] for _ in models]
    for i in range(rounds + 1):
        for model, body, own in zip(models, bodies, times, strict=True):
            found = turn(address, model, body, connections, seconds if i else seconds / 4)
            own += found if i else []
    loads = []
    for model, own in zip(models, times, strict=True):
        if not own:
            raise LoadError(f"{model}: no request was answered in {seconds:g} s")
        rate = len(own) / (rounds * seconds)
        median, p99 = (1e3 * float(np.quantile(own, q)) for q in (0.5, 0.99))
        loads.append(Load(model, samples, connections, rate, rate * samples, median, p99))
    return loads


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of the service's models; the first is what others are held to")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--samples", default="1,16", help="of one request; a list measures each (default 1,16)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each model (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn (default 2)")
    a = parser.parse_args(arguments)
    sizes = [int(part) for part in a.samples.split(",") if part.isdigit()]
    if not sizes or min(*sizes, a.connections, a.rounds) < 1 or not 0 < a.seconds < math.inf:
        parser.error("--samples, --connections, --rounds and --seconds are positive numbers")
    address = urlsplit(a.url).netloc
    print(f"{'model':12} {'samples':>7} {'requests/s':>10} {'samples/s':>10} {'median ms':>9} {'99 % ms':>8} {'':>6}")
    try:
        for size in sizes:
            loads = measure(address, a.models, size, a.connections, a.rounds, a.seconds)
            for load in loads:
                ratio = load.samples_per_second / loads[0].samples_per_second
                print(
                    f"{load.model:12} {load.samples:7} {load.requests_per_second:10.1f} "
                    f"{load.samples_per_second:10.1f} {load.median_ms:9.2f} {load.p99_ms:8.2f} {ratio:5.2f}x"
                )
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
