"""Traces of requests as the cache sees them, for replays under other eviction policies.

One JSON object a line: a request whose prompt is in the tree, a request that ended, a report of
branches. Text is not in it, token ids are.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rksc_sglang.rsbcm.life_cycle import State

Tenant = tuple[str | None, str | None]  # extra_key, cache_salt


class Start(NamedTuple):
    """A request's prompt, int64 token ids, was computed; ``time`` in seconds."""

    time: float
    rid: str
    tokens: array
    tenant: Tenant = (None, None)
    program: str | None = None
    group: str | None = None
    branch: int = 0
    verifies: bool = False


class Finish(NamedTuple):
    """A request ended; ``mass`` is the attention mass of prompt and output, where it is known."""

    time: float
    rid: str
    output: array
    mass: Sequence[float] | None = None


class Report(NamedTuple):
    """What became of a group's branches, by number."""

    time: float
    tenant: Tenant
    group: str
    states: Mapping[int, State]


class End(NamedTuple):
    """A program is over."""

    time: float
    tenant: Tenant
    program: str


Event = Start | Finish | Report | End


class TraceWriter:
    """Writes events to a file, which is whole after each of them."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.began = time.monotonic()
        self.started: set[str] = set()

    @property
    def now(self) -> float:
        return round(time.monotonic() - self.began, 3)

    def start(self, rid: str, tokens: Sequence[int], tenant: Tenant, **names: object) -> None:
        """The first time that a request's whole prompt is in the tree; later calls do nothing.

        Args:
            names: what else :class:`Start` has.
        """
        if rid not in self.started:
            self.started.add(rid)
            self._write(start=rid, tokens=list(tokens), tenant=tenant, **names)

    def finish(self, rid: str, output: Sequence[int], mass: Sequence[float] | None) -> None:
        if rid in self.started:
            self.started.remove(rid)
            rounded = None if mass is None else [float(f"{value:.2g}") for value in mass]
            self._write(finish=rid, output=list(output), mass=rounded)

    def report(self, tenant: Tenant, group: str, states: Mapping[int, str]) -> None:
        self._write(report=group, tenant=tenant, states=states)

    def end(self, tenant: Tenant, program: str) -> None:
        self._write(end=program, tenant=tenant)

    def _write(self, **event: object) -> None:
        json.dump({"time": self.now, **event}, self.file, separators=(",", ":"))
        self.file.write("\n")
        self.file.flush()


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """Raises ValueError for a line that is no event."""
    for line in lines:
        raw = json.loads(line)
        if "start" in raw:
            yield Start(
                raw["time"],
                raw["start"],
                array("q", raw["tokens"]),
                tuple(raw["tenant"]),
                raw["program"],
                raw["group"],
                raw["branch"],
                raw["verifies"],
            )
        elif "finish" in raw:
            yield Finish(raw["time"], raw["finish"], array("q", raw["output"]), raw["mass"])
        elif "report" in raw:
            states = {int(branch): state for branch, state in raw["states"].items()}
            yield Report(raw["time"], tuple(raw["tenant"]), raw["report"], states)
        elif "end" in raw:
            yield End(raw["time"], tuple(raw["tenant"]), raw["end"])
        else:
            raise ValueError(f"no event of a trace: {line[:80]}")
