"""The server behind a frontend backend, as far as RKSC needs it."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.utils import http_request

from rksc_sglang.cgee.skip_gate import CalibratedGate
from rksc_sglang.contract import KEY, RequestContract


class ServerError(RuntimeError):
    """The server refused a request of RKSC's frontend, or did not answer."""


class Server:
    """HTTP calls to one SGLang server; remembers whether RKSC is on there."""

    def __init__(self, endpoint: RuntimeEndpoint) -> None:
        # Weak: Server objects are values of a dictionary that is keyed by the endpoint.
        self._endpoint = weakref.proxy(endpoint)
        self._lock = threading.Lock()
        self._has_rksc: bool | None = None
        self._verify: dict[str, Any] = {}
        self._follows_branches = False
        self._admits_together = False

    def has_rksc(self) -> bool:
        """Whether RKSC is on there; warns once for a server where it is not."""
        with self._lock:
            if self._has_rksc is None:
                answer = self._request("/rksc/status")
                self._has_rksc = answer.status_code == 200
                if self._has_rksc:
                    rank = answer.json()["ranks"][0]
                    self._verify = rank["verify"] or {}
                    self._admits_together = rank["features"]["root_first"]["on"]
                    self._follows_branches = bool((rank["eviction"] or {}).get("life_cycle"))
                else:
                    warnings.warn(
                        f"{self._endpoint.base_url} runs SGLang without RKSC: programs work as "
                        "on plain SGLang, running branches cannot be stopped early",
                        stacklevel=2,
                    )
            return self._has_rksc

    def admits_together(self) -> bool:
        """Whether requests that are sent together compute what their prompts share once."""
        return self.has_rksc() and self._admits_together

    def skip_gate(self) -> CalibratedGate | None:
        """The calibrated gate in the server's profile; None where there is none."""
        if not self.has_rksc() or not self._verify.get("skip"):
            return None
        gate = self._verify["skip"]["gate"]
        return CalibratedGate(tuple(gate["weights"]), gate["threshold"])

    def merge_threshold(self, signal: str) -> float | None:
        """The calibrated threshold in the server's profile; None where there is none."""
        if not self.has_rksc() or not self._verify.get("merge"):
            return None
        return self._verify["merge"]["thresholds"].get(signal)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send JSON, return the answer's JSON.

        Raises:
            ServerError: there was no answer, or no success; the message is the server's.
        """
        answer = self._request(path, dict(body))
        if answer.status_code != 200:
            raise ServerError(f"POST {path} answered {answer.status_code}: {answer.text}")
        return answer.json()

    def generate(
        self,
        text: str,
        contract: RequestContract,
        max_tokens: int = 1,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Any:
        """Continue a text greedily, by one token if not said otherwise; the answer's JSON.

        Args:
            options: further keys of SGLang's ``/generate``.

        Raises:
            ServerError: as :meth:`post`.
        """
        params: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "temperature": 0,
            "custom_params": {KEY: contract.to_dict()},
        }
        if stop:
            params["stop"] = list(stop)
        return self.post("/generate", {"text": text, "sampling_params": params, **options})

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt, without special tokens added around it."""
        answer = self.post("/tokenize", {"prompt": prompts, "add_special_tokens": False})
        return answer["tokens"]

    def report_states(self, group: str, states: Mapping[int, str]) -> list[int]:
        """Tell the server what became of a group's branches; returns those it aborted."""
        if not states or not self.has_rksc():
            return []
        if not self._follows_branches and "pruned" not in states.values():
            return []
        return self.post("/rksc/branches", {"group": group, "states": states})["aborted"]

    def report_end(self, program: str) -> None:
        """Tell the server that a program is over."""
        if self.has_rksc() and self._follows_branches:
            self.post("/rksc/branches", {"program": program})

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        endpoint = self._endpoint
        try:
            return http_request(
                endpoint.base_url + path,
                json=body,
                api_key=endpoint.api_key,
                verify=endpoint.verify,
            )
        except OSError as error:
            raise ServerError(f"{endpoint.base_url} does not answer: {error}") from error


_servers: weakref.WeakKeyDictionary[RuntimeEndpoint, Server] = weakref.WeakKeyDictionary()
_servers_lock = threading.Lock()


def server_of(backend: BaseBackend) -> Server | None:
    """The server behind ``backend``, None for backends of other APIs (OpenAI, Anthropic, ...)."""
    if not isinstance(backend, RuntimeEndpoint):
        return None
    with _servers_lock:
        if backend not in _servers:
            _servers[backend] = Server(backend)
            _watch_ends(backend, _servers[backend])
        return _servers[backend]


def _watch_ends(backend: RuntimeEndpoint, server: Server) -> None:
    """SGLang tells a backend of every program that ends, and every fork of it."""
    tell = backend.end_program

    def end_program(executor: Any) -> None:
        tell(executor)
        program = getattr(executor, "rksc_program", None)
        if program is not None:
            del executor.rksc_program  # its finalizer ends it once more
            try:
                server.report_end(program)
            except ServerError as error:
                warnings.warn(f"the end of a program was not reported: {error}", stacklevel=2)

    backend.end_program = end_program
