"""What the tests of the Space share: its modules on the path, a server of its own, clients that load it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DEMO = Path(__file__).parents[1] / "spaces_demo"


@contextlib.contextmanager
def running_server(timeout: float = 180) -> Iterator[str]:
    """The address of a demo started as its users start it; host and port come from Gradio's variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        environment = {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_TEMP_DIR": folder}
        command = [sys.executable, str(DEMO / "app.py")]
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + timeout
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/config", timeout=5):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"The demo did not start:\n{log.read()[-3000:]}")
                time.sleep(0.3)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def expected_particles(seed: int) -> np.ndarray:
    """The last particles of the request that client ``seed`` of :func:`load` makes, computed here."""
    from space import playground

    return playground.flow(playground.checked(**request_of(seed))).particles[-1]


def request_of(seed: int) -> dict[str, Any]:
    """Requests that differ in the distribution, the noise level and the seed."""
    names = ("ring", "moons", "spiral", "clusters", "checkers")
    return {"distribution": names[seed % 5], "tau": (0.0, 1.0)[seed % 2], "seed": seed, "particles": 60, "steps": 12}


def load(url: str, clients: int, seconds: float) -> dict[str, Any]:
    """``clients`` threads that ask for ``seconds``, each for its own particles, and compare every answer."""
    from gradio_client import Client

    expected = [expected_particles(k) for k in range(clients)]
    outcome: dict[str, Any] = {"requests": 0, "failed": [], "wrong": [], "latencies": []}
    lock, ready = threading.Lock(), threading.Barrier(clients)

    def work(k: int) -> None:
        connection = None
        with contextlib.suppress(Exception):
            connection = Client(url, verbose=False, httpx_kwargs={"timeout": 120})
        ready.wait(300)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.monotonic()
            try:
                answer = connection.predict(api_name="/playground", **request_of(k))
            except Exception as error:  # whatever it is, it counts
                with lock:
                    outcome["failed"].append(f"client {k}: {error!r}")
                continue
            right = answer["seed"] == k and np.allclose(answer["particles"], expected[k], atol=1e-9)
            with lock:
                outcome["requests"] += 1
                outcome["latencies"].append(time.monotonic() - start)
                if not right:
                    outcome["wrong"].append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


if __name__ == "__main__":  # the load test of the issue: python tests/space_helpers.py 20 30
    with running_server() as address:
        result = load(address, int(sys.argv[1]), float(sys.argv[2]))
    waits = np.array(result["latencies"])
    print(f"{result['requests']} answers, {len(result['failed'])} failed, {len(result['wrong'])} wrong,")
    print(f"median {np.median(waits):.2f} s, 95 % {np.quantile(waits, 0.95):.2f} s", *result["failed"][:3], sep="\n")
