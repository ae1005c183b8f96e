"""The conditions of ``benchmarks.throughput``: which server, which form of a program, with what.

Each has a server of its own, also where two differ in their requests alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests
import sglang as sgl

from benchmarks.load import Meter
from benchmarks.programs import Mechanisms, Outcome, Program, Settings
from benchmarks.throughput_summary import BEST, NO_KV, RKSC, SGLANG
from benchmarks.throughput_tasks import Task
from rksc_sglang.cgee.profile import profile_for
from rksc_sglang.server_process import ServerProcess

_STOCK = ("--rksc-mode", "off")
#: The guard works when its server is idle, which here is when another one is timed.
_BALANCED = ("--rksc-mode", "balanced", "--rksc-guard-share", "0")
NO_ROOT_FIRST = "rksc_no_root_first"
#: What of the mechanisms a condition does without, where it differs in requests.
WITHOUT: dict[str, dict[str, Any]] = {
    "rksc_no_splice": {"share": "exact"},
    "rksc_no_exit": {"exit": "off"},
    "rksc_no_skip": {"skip": None},
    "rksc_no_stop": {"stop": False},
}
SERVERS = {
    NO_KV: (*_STOCK, "--disable-radix-cache"),
    SGLANG: _STOCK,
    BEST: (*_STOCK, "--schedule-policy", "lpm"),
    RKSC: _BALANCED,
    NO_ROOT_FIRST: (*_BALANCED, "--no-rksc-root-first"),
    **dict.fromkeys(WITHOUT, _BALANCED),
}
OURS = (RKSC, NO_ROOT_FIRST, *WITHOUT)
#: The conditions of each part.
PARTS = {
    "speed": (SGLANG, BEST, RKSC),
    "no_kv": (NO_KV, RKSC),
    "ablations": OURS,
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
        if self.name != BEST:
            run, asked = program.solve.run, (*asked, self.mechanisms)
        return run(*asked, **options, backend=endpoint).ret_value


def conditions_of(part: str, mechanisms: Mechanisms) -> list[Condition]:
    """Those of a part, but for those without what there is not.

    Args:
        mechanisms: all that there is to be had of the servers with RKSC.
    """
    ours = PAPER if part == "paper" else mechanisms
    found = [
        Condition(name, replace(ours, **WITHOUT.get(name, {})) if name in OURS else NOTHING)
        for name in PARTS[part]
    ]
    return [one for one in found if one.name not in WITHOUT or one.mechanisms != ours]


def mechanisms_of(profile: str | None, model: Path) -> Mechanisms:
    """All that is calibrated for a model.

    Args:
        profile: a file; None for the one that is shipped for the model.

    Raises:
        ExitProfileError: the file is no profile, or another model's.
    """
    parts = profile_for(profile, model)
    return Mechanisms(
        share="similar",
        exit="layer" if parts.exit else "off",
        skip="calibrated" if parts.skip else None,
    )


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
