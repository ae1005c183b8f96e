"""Real servers, started together on first use and shared by the session."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rksc_sglang.server_process import ServerProcess


@contextlib.contextmanager
def serving(logs: Path, **flags: Sequence[str]) -> Iterator[dict[str, str]]:
    """Start one server a keyword, together; gives their URLs."""
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(ServerProcess(flags[name], log=logs / f"{name}.log"))
            for name in flags
        }
        for server in running.values():
            server.wait_ready()
        yield {name: server.url for name, server in running.items()}


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
