"""The conditions of ``benchmarks.throughput``: which server, which form of a program, with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import requests
import sglang as sgl

from benchmarks.load import Meter
from benchmarks.programs import Mechanisms, Outcome, Program, Settings
from benchmarks.throughput_summary import BEST, NO_KV, RKSC, SGLANG
from benchmarks.throughput_tasks import Task
from rksc_sglang.server_process import ServerProcess

_STOCK = ("--rksc-mode", "off")
#: The guard works when its server is idle, which here is when another one is timed.
_BALANCED = ("--rksc-mode", "balanced", "--rksc-guard-share", "0")
NO_ROOT_FIRST = "rksc_no_root_first"
SERVERS = {
    NO_KV: (*_STOCK, "--disable-radix-cache"),
    SGLANG: _STOCK,
    BEST: (*_STOCK, "--schedule-policy", "lpm"),
    RKSC: _BALANCED,
    NO_ROOT_FIRST: (*_BALANCED, "--no-rksc-root-first"),
}
OURS = (RKSC, NO_ROOT_FIRST)
#: The servers of each part; each is a condition of the same name.
PARTS = {
    "speed": (SGLANG, BEST, RKSC),
    "no_kv": (NO_KV, RKSC),
    "ablations": (RKSC, NO_ROOT_FIRST),
    "growth": (SGLANG, BEST, RKSC),
    "open": (SGLANG, BEST, RKSC),
    "accuracy": (BEST, RKSC),
    "paper": (NO_KV, SGLANG, BEST, RKSC),
}
NOTHING = Mechanisms(share="exact", exit="off", skip=None, stop=False)
#: Every branch keeps its full length there.
PAPER = Mechanisms(share="similar", exit="paper", skip="paper", stop=False)


@dataclass(frozen=True)
class Condition:
    name: str
    server: str
    mechanisms: Mechanisms

    def solve(
        self,
        program: Program,
        settings: Settings,
        task: Task,
        endpoint: Any,
        options: Mapping[str, Any],
    ) -> Outcome:
        chosen = replace(settings, lengths=task.lengths)
        asked: tuple[Any, ...] = (task.text, chosen)
        run: Callable[..., Any] = program.solve_plain.run
        if self.server != BEST:
            run, asked = program.solve.run, (*asked, self.mechanisms)
        return run(*asked, **options, backend=endpoint).ret_value


def conditions_of(part: str, mechanisms: Mechanisms) -> list[Condition]:
    """One a server, and in the ablations rksc without each mechanism that it has.

    Args:
        mechanisms: all that there is to be had of the servers with RKSC.
    """
    ours = PAPER if part == "paper" else mechanisms
    found = [Condition(name, name, ours if name in OURS else NOTHING) for name in PARTS[part]]
    if part == "ablations":
        for name, without in (
            ("splice", replace(ours, share="exact")),
            ("exit", replace(ours, exit="off")),
            ("skip", replace(ours, skip=None)),
            ("stop", replace(ours, stop=False)),
        ):
            if without != ours:
                found.append(Condition(f"rksc_no_{name}", RKSC, without))
    return found


class UncommittedEndpoint(sgl.RuntimeEndpoint):
    """Does not compute a prefix before it is forked: without a radix cache that is in vain."""

    def commit_lazy_operations(self, s: Any) -> None:
        pass


class Server:
    """A running server, with what talks to it."""

    def __init__(self, name: str, process: ServerProcess) -> None:
        endpoint = UncommittedEndpoint if name == NO_KV else sgl.RuntimeEndpoint
        self.process = process
        self.endpoint = endpoint(process.url, chat_template_name="chatml")
        self.meter = Meter(process.url)

    def status(self) -> dict[str, Any]:
        """Of RKSC; a server without it has none."""
        answer = requests.get(self.process.url + "/rksc/status", timeout=60)
        answer.raise_for_status()
        return answer.json()

    def mechanisms(self) -> Mechanisms:
        """All that is calibrated for the model of a server with RKSC."""
        verify = self.status()["ranks"][0]["verify"] or {}
        return Mechanisms(
            share="similar",
            exit="layer" if verify.get("exit") else "off",
            skip="calibrated" if verify.get("skip") else None,
        )
