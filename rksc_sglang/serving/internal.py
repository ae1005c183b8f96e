"""Requests that the scheduler makes for itself: they run like any other, and answer nobody."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from rksc_sglang.serving.splice_state import SpliceState

#: Seconds without work before a measurement of our own may run: bursts have shorter gaps.
IDLE_SECONDS = 1.0
#: Seconds between two looks at a server beyond which nothing is known of what came in meanwhile:
#: its process was stopped. SGLang's idle loop sleeps for up to 1.
BLIND_SECONDS = 1.5


class Quiet:
    """For how long a server has been seen to have no work."""

    def __init__(self) -> None:
        self._since = self._looked = time.monotonic()

    def look(self) -> float:
        """Called again and again while there is none; gives the seconds."""
        now = time.monotonic()
        if now - self._looked > BLIND_SECONDS:
            self._since = now
        self._looked = now
        return now - self._since

    def end(self) -> None:
        """There is work."""
        self._since = self._looked = time.monotonic()


@dataclass(eq=False)
class InternalState:
    """``req.rksc`` of a request of our own.

    Attributes:
        parent: the splice that this request is a stage of, None for measurements.
        purpose: for logs: "stage", "shadow" or "probe".
        refused: by the gate, in the pass that computed it: what it holds is of no use.
    """

    purpose: str
    parent: SpliceState | None = None
    refused: bool = False


class ModelFacts(NamedTuple):
    """What each request of SGLang's knows of its model.

    Attributes:
        tokenizer: for its stop tokens; requests that share a batch ask for each other's.
    """

    vocab_size: int
    tokenizer: Any


def is_internal(req: Req) -> bool:
    return isinstance(getattr(req, "rksc", None), InternalState)


def make_internal_req(
    rid: str,
    tokens: Sequence[int],
    state: InternalState,
    *,
    model: ModelFacts,
    extra_key: str | None = None,
    cache_salt: str | None = None,
    priority: int | None = None,
) -> Req:
    """A prefill of ``tokens`` in a namespace, finished with its first greedy token.

    Args:
        rid: begins with the id of the request that it works for, so that aborting one aborts both.
    """
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    params.normalize(None)
    req: Any = Req(
        rid,
        "",
        array("q", tokens),
        params,
        vocab_size=model.vocab_size,
        extra_key=extra_key,
        cache_salt=cache_salt,
        priority=priority,
    )
    req.rksc = state
    req.tokenizer = model.tokenizer
    req.time_stats.set_wait_queue_entry_time()
    return req
