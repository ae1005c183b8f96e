"""Root-first fan-out: siblings that arrive together compute their shared prefix once.

Stock SGLang's cache-agnostic schedule policies (``fcfs`` is the default) admit siblings into one
prefill batch, where each computes the shared prefix for itself. Here the first of them is admitted
and the others stay in the waiting queue until its prefix is in the radix tree: one pass later, or
one chunk later for a chunked prefill.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from rksc_sglang.compat import has_extension

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)


def is_publishing(req: Req) -> bool:
    """Whether the request is computing prompt KV that the tree will hold but does not hold yet.

    SGLang moves ``prefix_len`` up to ``extend_end`` at the moment it publishes an extend. What
    decodes in a mixed batch has an ``extend_end``, too, and publishes at its end.
    """
    return (
        not req.finished()
        and not req.output_ids
        and not req.skip_radix_cache_insert
        and req.extend_end is not None
        and req.prefix_len < req.extend_end
    )


def usable_tokens(req: Req) -> int:
    """Leading tokens of a prompt that a cache may provide."""
    # The last prompt token is always computed, and so is what the client wants logprobs of.
    usable = len(req.full_untruncated_fill_ids) - 1
    if req.return_logprob and req.logprob_start_len >= 0:
        usable = min(usable, req.logprob_start_len)
    return usable


def tokens_worth_waiting_for(req: Req, min_tokens: int, page_size: int) -> int | None:
    """How long a cached prefix must become for the wait to pay, None if it cannot.

    The request has been matched against the tree: its first ``prefix_len`` tokens are cached.
    """
    # Whole pages only: a tail that fills no page is not shared.
    wanted = -(-(req.prefix_len + min_tokens) // page_size) * page_size
    return wanted if wanted <= usable_tokens(req) else None


def will_publish(leader: Req, req: Req, wanted: int) -> bool:
    """Whether the tree will hold the first ``wanted`` tokens of ``req`` once ``leader`` is done."""
    ours, theirs = req.full_untruncated_fill_ids, leader.full_untruncated_fill_ids
    return (
        wanted <= len(theirs)
        # One token tells most unrelated prompts apart, also behind a common chat template.
        and ours[wanted - 1] == theirs[wanted - 1]
        and ours[:wanted] == theirs[:wanted]
        and req.extra_key == leader.extra_key
        and req.cache_salt == leader.cache_salt
    )


class RootFirstPrefillAdder(PrefillAdder):
    """SGLang's prefill admission, which lets a request wait for a prefix that is on its way.

    Subclass attributes are set by :func:`make_adder_class`.
    """

    sglang_asks = has_extension("admission")
    min_tokens: int | None  # None: off
    awaits: Callable[[Req], bool]
    on_held: Callable[[Req], None]
    on_error: Callable[[str], None]

    def add_one_req(
        self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
    ) -> AddReqResult:
        if not self.sglang_asks and self.should_hold(req):
            # CONTINUE without admission: the scheduler looks at the next request in the queue.
            return AddReqResult.CONTINUE
        return super().add_one_req(req, has_chunked_req, truncation_align_size)

    def should_hold(self, req: Req) -> bool:
        """Whether the request shall stay in the waiting queue."""
        if self.min_tokens is None:
            return False
        try:
            held = self.awaits(req) or self._waits_for_prefix(req)
            if held:
                self.on_held(req)
            return held
        except Exception:
            logger.exception("RKSC root-first failed for %s: admitted at once", req.rid)
            self.on_error("root_first")
            return False

    def _waits_for_prefix(self, req: Req) -> bool:
        """Whether a prefix of the request is on its way into the tree."""
        assert self.min_tokens is not None
        wanted = tokens_worth_waiting_for(req, self.min_tokens, self.page_size)
        return wanted is not None and any(
            will_publish(leader, req, wanted) for leader in self._leaders()
        )

    def _admitted_leaders(self) -> Iterable[Req]:
        """Those that this pass computes for the tree, an unfinished chunked request among them."""
        return (req for req in self.can_run_list if not req.skip_radix_cache_insert)

    def _leaders(self) -> Iterable[Req]:
        # Admitted in this pass ...
        yield from self._admitted_leaders()
        # ... or, under the overlap schedule, still in the forward pass of the last one.
        if self.running_batch is not None:
            yield from filter(is_publishing, self.running_batch.reqs)


def make_adder_class(
    min_tokens: int | None,
    awaits: Callable[[Req], bool],
    on_held: Callable[[Req], None],
    on_error: Callable[[str], None],
    base: type[RootFirstPrefillAdder] = RootFirstPrefillAdder,
    **attributes: Any,
) -> type[RootFirstPrefillAdder]:
    """The class for ``Scheduler.get_prefill_adder_class``, which constructs it anew each pass."""
    return type(
        base.__name__,
        (base,),
        {
            "min_tokens": min_tokens,
            "awaits": staticmethod(awaits),
            "on_held": staticmethod(on_held),
            "on_error": staticmethod(on_error),
            **attributes,
        },
    )
