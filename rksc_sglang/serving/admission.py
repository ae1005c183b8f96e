"""Prefill admission with splices: what the splicer decides, carried out by SGLang's adder.

Where passes can be joined (:mod:`rksc_sglang.serving.joined`) nobody waits for a shared prefix.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult

from rksc_sglang.asks.root_first import RootFirstPrefillAdder
from rksc_sglang.serving.internal import is_internal
from rksc_sglang.serving.splicing import Splicer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)


class SplicingPrefillAdder(RootFirstPrefillAdder):
    """Prefill admission with splicing, and with root-first fan-out where that is on."""

    splicer: Splicer
    _follower: Req | None = None  # has been promised what the pass computes for another request

    def add_one_req(
        self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
    ) -> AddReqResult:
        if is_internal(req):
            return super().add_one_req(req, has_chunked_req, truncation_align_size)
        if self.should_hold(req):
            return AddReqResult.CONTINUE
        step = None if req is self._follower else self._prepare(req)
        if isinstance(step, AddReqResult):
            self.on_held(req)
            return step
        candidate = req if step is None else step
        result, admitted = self._try(req, candidate, has_chunked_req, truncation_align_size)
        if admitted and candidate is not req and result is AddReqResult.CONTINUE:
            self._follower = self._join(req, candidate)
            if self._follower is not None:
                result, _ = self._try(req, self._follower, has_chunked_req, truncation_align_size)
        if result is AddReqResult.NO_TOKEN and not self.can_run_list and self._nothing_runs():
            self.splicer.release_memory()
        return result

    def _try(self, req: Req, candidate: Req, *args: Any) -> tuple[AddReqResult, bool]:
        """Admit a request, or a stage in its place, if it fits."""
        load = self.splicer.cache.loads.get(candidate.rid)
        result = super().add_one_req(candidate, *args)
        admitted = any(other is candidate for other in self.can_run_list)
        self.splicer.settle(req, candidate, admitted, load)
        return result, admitted

    def should_hold(self, req: Req) -> bool:
        # The prefix that a follower would wait for is its leader's.
        return req is not self._follower and super().should_hold(req)

    def _waits_for_prefix(self, req: Req) -> bool:
        if not super()._waits_for_prefix(req):
            return False
        leaders, least = self._admitted_leaders(), req.prefix_len + (self.min_tokens or 0)
        if not self.splicer.follow(req, leaders, least, self.rem_chunk_tokens, self.cur_rem_tokens):
            return True
        self._follower = req
        return False

    def _join(self, req: Req, stage: Req) -> Req | None:
        try:
            return self.splicer.join(req, stage, self.rem_chunk_tokens, self.cur_rem_tokens)
        except Exception:
            logger.exception("RKSC: %s cannot share the pass of its stage", req.rid)
            self.on_error("splice")
            req.rksc.splice.joins = False
            self.splicer.cache.loads.pop(req.rid, None)
            return None

    def _prepare(self, req: Req) -> Req | AddReqResult | None:
        try:
            return self.splicer.prepare(req, self._leaders())
        except Exception:
            logger.exception("RKSC: splicing failed for %s; it is computed", req.rid)
            self.on_error("splice")
            self.splicer.abandon(req, "an error inside RKSC")
            return None

    def _nothing_runs(self) -> bool:
        return self.running_batch is None or self.running_batch.is_empty()
