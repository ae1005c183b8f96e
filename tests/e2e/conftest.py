"""Real servers, started together on first use and shared by the session."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import requests

READY_SECONDS = 300


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """``python -m rksc_sglang.launch_server`` in a process group of its own."""

    def __init__(self, log: Path, *flags: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rksc_sglang.launch_server", "--port", str(port), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> str:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(self.url + "/ready", timeout=5).status_code == 200:
                    return self.url
            time.sleep(0.5)
        raise RuntimeError(f"no server: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def serving(logs: Path, **flags: Sequence[str]) -> Iterator[dict[str, str]]:
    """Start one server a keyword, together; gives their URLs."""
    running = {name: Server(logs / f"{name}.log", *flags[name]) for name in flags}
    try:
        yield {name: server.wait_ready() for name, server in running.items()}
    finally:
        for server in running.values():
            server.stop()


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def server(smollm2: Path, logs: Path) -> Iterator[str]:
    """URL of an rksc server in mode exact that serves SmolLM2."""
    flags = ["--enable-metrics", "--chunked-prefill-size", "256"]
    with serving(logs, smollm2=flags) as urls:
        yield urls["smollm2"]


@pytest.fixture(scope="session")
def tiny_servers(tiny_model: Path, logs: Path) -> Iterator[dict[str, str]]:
    # A pool that a dozen requests outgrow, so that they evict, wait and retract.
    flags = ["--model-path", str(tiny_model), "--max-total-tokens", "1600"]
    flags += ["--chunked-prefill-size", "256", "--max-running-requests", "8"]
    with serving(logs, rksc=flags, stock=["--rksc-mode", "off", *flags]) as urls:
        yield urls


@pytest.fixture(scope="session")
def rksc_tiny(tiny_servers: dict[str, str]) -> str:
    """URL of an rksc server in mode exact that serves the tiny model from a small pool."""
    return tiny_servers["rksc"]


@pytest.fixture(scope="session")
def stock_tiny(tiny_servers: dict[str, str]) -> str:
    """URL of stock SGLang with the same flags as ``rksc_tiny``."""
    return tiny_servers["stock"]
