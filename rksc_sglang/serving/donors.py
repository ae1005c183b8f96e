"""Which prompts that are not cached yet hold the same text as a request's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from rksc_sglang.asks.overlap import Windows
from rksc_sglang.serving.splicing_cache import namespace_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

#: Waiting requests that are compared with one.
MOST_COMPARED = 32


class Donors:
    """Compares prompts of one scheduler; each is hashed once.

    Args:
        waiting: gives SGLang's waiting queue.
    """

    def __init__(self, waiting: Callable[[], Iterable[Req]]) -> None:
        self.waiting = waiting
        self._windows: WeakKeyDictionary[Req, Windows] = WeakKeyDictionary()

    def is_coming(self, req: Req, leaders: Iterable[Req], length: float, start: int) -> bool:
        """Whether a leader computes about ``length`` tokens of a request, of those from start on.

        Args:
            leaders: being computed, for the tree.
        """
        return any(
            namespace_of(leader) == namespace_of(req)
            and self._of(req).shares(self._of(leader), length, start)
            for leader in leaders
        )

    def common(self, req: Req, start: int) -> Iterator[int]:
        """For each spliceable request that waits behind this one: tokens that both hold.

        Args:
            start: tokens of the request in front of this position do not count.
        """
        waiting = iter(self.waiting())
        any(other is req for other in waiting)  # who stands in front has been looked at
        for other in islice(waiting, MOST_COMPARED):
            splice = getattr(other.rksc, "splice", None)
            if splice is None or splice.stopped or splice.stages or other.output_ids:
                continue  # computes all, or has begun to take over something else
            if namespace_of(other) == namespace_of(req):
                yield self._of(req).common(self._of(other), start)

    def _of(self, req: Req) -> Windows:
        windows = self._windows.get(req)
        if windows is None:
            # Who waits may not have been matched yet: SGLang has nothing else of it.
            windows = Windows(np.asarray(req.origin_input_ids, dtype=np.int64))
            self._windows[req] = windows
        return windows
