"""Requests that are sent together are admitted together.

The branches of a fork reach the scheduler one after the other, within milliseconds. Stock SGLang
starts a pass for the first of them and computes the others in the next one. Here those whose
contract says how many come wait for the others, but no longer than a pass takes: waiting can save
one, and so never costs more than twice what the best choice would have.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from rksc_sglang.contract import Together

#: Of so many the outcome is remembered: what comes later with the same id waits for nobody.
REMEMBERED = 4096


@dataclass
class _Gathered:
    since: float  # seconds, of the first
    missing: int


class Gathering:
    """Who of those that were announced has arrived.

    Args:
        patience: seconds after the first from which on nobody waits for the others any more.
        count: called with a counter's name.
        clock: seconds.
    """

    def __init__(
        self,
        patience: Callable[[], float],
        count: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.patience, self.count, self.clock = patience, count, clock
        self._gathered: OrderedDict[Hashable, _Gathered] = OrderedDict()

    def arrived(self, namespace: Hashable, together: Together) -> None:
        """A request is there; a further one where all have been, or have been waited for, is too
        late to be waited for or to wait.
        """
        key = (namespace, together.id)
        gathered = self._gathered.get(key)
        if gathered is None:
            self._gathered[key] = _Gathered(self.clock(), together.count - 1)
            if len(self._gathered) > REMEMBERED:
                self._gathered.popitem(last=False)
        elif gathered.missing:
            gathered.missing -= 1
            if not gathered.missing:
                self.count("gathered_groups")

    def awaits(self, namespace: Hashable, together: Together) -> bool:
        """Whether a request that has arrived waits for others."""
        gathered = self._gathered.get((namespace, together.id))
        if gathered is None or not gathered.missing:
            return False
        if self.clock() - gathered.since < self.patience():
            return True
        gathered.missing = 0
        self.count("scattered_groups")
        return False
