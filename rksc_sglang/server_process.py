"""One SGLang server as a child process that never outlives its owner."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
_OWN_ERROR = "rksc: error: "


class ServerFailedError(Exception):
    """The server did not start, or ended by itself; the message is for the user."""


class ServerProcess:
    """``python -m rksc_sglang.launch_server``, from entering the context to leaving it.

    The server and its children are a process group of their own: Ctrl-C in the terminal does not
    reach them, leaving the context kills them all, and on Linux the kernel does so when the
    owner dies without leaving it. Enter it from the main thread: the kernel watches the thread.

    Args:
        args: flags for the server, without ``--host`` and ``--port``.
        log: file for the server's output.
        port: None takes a free one.
        env: added to this process's environment.
        module: what to run instead of the RKSC server.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        log: Path,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        module: str = "rksc_sglang.launch_server",
    ) -> None:
        self.args = list(args)
        self.log = log
        self.port = port or free_port()
        self.env = dict(env or {})
        self.module = module
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> ServerProcess:
        # Another server on this port would answer for ours.
        if not is_port_free(self.port):
            raise ServerFailedError(f"port {self.port} is in use: choose another with --port")
        command = [sys.executable, "-m", self.module, "--host", HOST, "--port", str(self.port)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command + self.args,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise ServerFailedError when the server has ended.

        SGLang's main process ends when any of its children does, so it stands for all of them.
        """
        assert self._process is not None, "not started"
        code = self._process.poll()
        if code is None:
            return
        lines = self.log.read_text(errors="replace").splitlines()
        for line in lines:
            if line.startswith(_OWN_ERROR):
                raise ServerFailedError(line.removeprefix(_OWN_ERROR))
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        tail = "".join(f"\n  {line[:200]}" for line in lines[-5:])
        raise ServerFailedError(f"the server {how}; the end of its log {self.log}:{tail}")

    def wait_ready(self, timeout: float = 600) -> None:
        """Return when the server answers requests.

        Raises:
            ServerFailedError: it ended, or ``timeout`` seconds were not enough.
        """
        deadline = time.monotonic() + timeout
        while not self._is_healthy():
            self.check()
            if time.monotonic() > deadline:
                raise ServerFailedError(
                    f"the server was not ready within {timeout:.0f} seconds; its log is {self.log}"
                )
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=30) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def signal(self, number: int) -> None:
        """Send a signal to the server and its children; in vain where they have ended."""
        assert self._process is not None, "not started"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Kill the server and its children, and wait until they are gone."""
        if self._process is None:
            return
        group = self._process.pid
        # ProcessLookupError: nobody is left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
            self._process.wait()
            # The children are not ours to wait for; their memory and port are needed again.
            for _ in range(100):
                os.killpg(group, 0)
                time.sleep(0.05)
        self._process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the server will: connections of an earlier one that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _die_with_parent() -> Callable[[], object] | None:
    """A preexec_fn: the kernel kills the child when its parent is gone, however it ended."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
