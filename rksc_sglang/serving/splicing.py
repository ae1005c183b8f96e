"""Splicing at admission: what a waiting request takes over, computes first, or waits for.

A request that may be spliced stays in SGLang's waiting queue. Each time the prefill adder looks at
it, one of these happens: a *stage* is admitted for it (an internal request that computes the
prompt up to where the next run's head ends; exact, and in the tree, as long as nothing was spliced
in front of it); or it waits for a stage, or for a donor that is being computed; or it is admitted
with what it takes over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.managers.schedule_policy import AddReqResult

from rksc_sglang.asks.content_index import Run
from rksc_sglang.asks.plan import Compute, Planner, Take
from rksc_sglang.serving.donors import Donors
from rksc_sglang.serving.internal import InternalState, ModelFacts, make_internal_req
from rksc_sglang.serving.splice_state import SpliceState
from rksc_sglang.serving.splicing_cache import Load, SplicingRadixCache, namespace_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from rksc_sglang.asks.cost import CostModel
    from rksc_sglang.asks.profile import Thresholds
    from rksc_sglang.asks.signature import Signatures
    from rksc_sglang.serving.doubt import Doubt
    from rksc_sglang.serving.guard import Guard
    from rksc_sglang.serving.joined import JoinedPass

logger = logging.getLogger(__name__)


class Splicer:
    """Decides for one scheduler.

    Args:
        cache: splicing enabled.
        signatures: of all its slots.
        planner: the shipped settings.
        thresholds: where a request does not say.
        model: whose requests these are.
        donors: that are not cached yet.
        count: called with a counter's name.

    Attributes:
        joined: passes that requests share; None where they share none, as here.
    """

    joined: JoinedPass | None = None

    def __init__(
        self,
        cache: SplicingRadixCache,
        signatures: Signatures,
        planner: Planner,
        thresholds: Thresholds,
        model: ModelFacts,
        donors: Donors,
        count: Callable[[str], None],
    ) -> None:
        self.cache = cache
        self.signatures = signatures
        self.planner = planner
        self.thresholds = thresholds
        self.model = model
        self.donors = donors
        self.count = count
        self.measure_copy: Callable[[], float] = lambda: 0.0  # seconds to take over one token's KV
        self.guard: Guard | None = None
        self.cost: CostModel | None = None  # not measured yet: nothing is refused for its cost
        self.doubt: Doubt | None = None

    def arrived(self, req: Req) -> None:
        """Called once for a request that may be spliced."""
        tokens = np.asarray(req.origin_input_ids, dtype=np.int64)
        self.cache.reuse.note(namespace_of(req), tokens)

    def prepare(self, req: Req, leaders: Iterable[Req]) -> Req | AddReqResult | None:
        """Called when the adder looks at a request that SGLang has just matched.

        Returns:
            A stage to admit in its place, ``CONTINUE`` where it must wait, None to admit the
            request itself, with what it loads.
        """
        state: SpliceState | None = req.rksc.splice
        self.cache.loads.pop(req.rid, None)
        if state is None or state.stopped or self.cache.index is None:
            return None
        if req.output_ids:  # retracted: what it had is gone, the rest is computed
            return None
        if req.retracted_stain:  # the same, before its first token was taken
            state.give_up("retracted")
            return None
        if state.stage is not None:
            if not state.stage.finished():
                return AddReqResult.CONTINUE
            state.stage = None
        if self.guard is not None and not self.guard.allows(namespace_of(req)):
            self.abandon(req, "the guard has ended sharing for this tenant")
            return None
        if state.exact_tokens is None:
            state.exact_tokens = req.prefix_len
        self._reconcile(req, state)
        return self._next(req, state, leaders)

    def _reconcile(self, req: Req, state: SpliceState) -> None:
        """The exact prefix may have grown or shrunk since the private slots were computed."""
        if not len(state.private):
            return
        if req.prefix_len < state.private_start:
            self.cache.free_private(state)
            state.give_up("the context was evicted")
        else:
            overlap = min(req.prefix_len - state.private_start, len(state.private))
            self.cache.free_private(state, overlap)

    def _spliceable(self, req: Req) -> tuple[np.ndarray, int]:
        """A prompt's tokens, and from where on they are computed in any case."""
        tokens = np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64)
        limit = self.planner.limit(len(tokens))
        if req.return_logprob and req.logprob_start_len >= 0:
            limit = min(limit, req.logprob_start_len)
        return tokens, limit

    def _next(
        self, req: Req, state: SpliceState, leaders: Iterable[Req]
    ) -> Req | AddReqResult | None:
        assert self.cache.index is not None
        tokens, limit = self._spliceable(req)
        ready = req.prefix_len + len(state.private)
        runs = self._find(req, state, tokens[:limit], ready)
        if runs and state.tau > 0 and not len(state.private):
            often = self.cache.reuse.often(namespace_of(req), tokens, ready)
            state.skip_until = max(state.skip_until, often)
        start = max(ready, state.skip_until)
        if not len(state.private) and not state.refusals:
            stretches = list(self.planner.stretches(runs, start, limit))
            if self._better_is_coming(req, state, leaders, stretches, start):
                return AddReqResult.CONTINUE
            if stretches and state.tau > 0 and self._is_wanted(req, stretches):
                runs = []
        step = self.planner.next_step(runs, ready, limit) if ready >= state.skip_until else None
        if isinstance(step, Take):
            load = self._gate(req, state, step, ready)
            if load is not None:
                state.refusals = 0
                return self._take(req, state, load, runs, limit)
            self.count("gate_refusals")
            state.refusals += 1
            state.skip_until = self.planner.again(step, ready, state.refusals)
            if state.skip_until >= step.options[0][1]:
                state.refusals = 0
        ahead = self.planner.stretches(runs, max(ready, state.skip_until), limit)
        stage = self._next_stage(state, ahead, self._extra_passes(state))
        if stage is not None:
            return self._stage(req, state, stage)
        self._admit(req, state, None)
        return None

    def _extra_passes(self, state: SpliceState) -> float:
        """Passes that the next stage of a request is expected to add."""
        return 1.0

    def _later(self, state: SpliceState) -> float:
        """The same, for who waits: is computed in a later pass than those that came with it."""
        return 1.0 + self._extra_passes(state)

    def _next_stage(
        self, state: SpliceState, stretches: Iterable[Compute], passes: float = 1.0
    ) -> int | None:
        """Where the next stage must end for the first of the stretches ahead that pays."""
        # Who asks for splices of any similarity wants to see them, whatever they cost.
        cost = self.cost if state.tau > 0 else None
        for stretch in stretches:
            if cost is None or cost.saved(stretch.gain, passes) > 0:
                return stretch.stop
        return None

    def _find(self, req: Req, state: SpliceState, tokens: np.ndarray, ready: int) -> list[Run]:
        assert self.cache.index is not None
        place = (self.cache.index_version, ready)
        if state.nothing_at == place:  # it waits in the queue and nothing has changed
            return []
        runs = self.cache.index.find(
            namespace_of(req),
            tokens,
            self.planner.search_from(ready),
            min_length=self.planner.min_tokens,
        )
        if runs and not state.stages and not self._pays(req, state, runs, ready, len(tokens)):
            runs = []
        state.nothing_at = None if runs else place
        return runs

    def _pays(self, req: Req, state: SpliceState, runs: list[Run], ready: int, limit: int) -> bool:
        """Whether what could be taken over is worth that the answer may be discarded for it."""
        risk = self._risk(req, state)
        if not risk:
            return True  # each stage is weighed by itself
        uncached = len(req.full_untruncated_fill_ids) - ready
        stretches = self.planner.stretches(runs, ready, limit)
        if self.cost is None:
            return sum(stretch.gain for stretch in stretches) > risk * uncached
        saved, passes = 0.0, self._extra_passes(state)
        for stretch in stretches:
            seconds = self.cost.saved(stretch.gain, passes if stretch.stop > ready else 0.0)
            if seconds > 0:  # else it will be computed
                saved, passes = saved + seconds, 1.0
        return saved > risk * self.cost.prefill(uncached)

    def _risk(self, req: Req, state: SpliceState) -> float:
        """That the answer will be discarded."""
        return self.doubt.risk(req, state) if self.doubt is not None else 0.0

    def _least(self, req: Req, risk: float, ready: int, passes: float) -> float:
        """Tokens behind their heads from which on taking them over pays for so many passes."""
        uncached = len(req.full_untruncated_fill_ids) - ready
        if self.cost is None:
            return risk * uncached
        return self.cost.least(passes, risk * self.cost.prefill(uncached))

    def _gate(self, req: Req, state: SpliceState, step: Take, ready: int) -> Load | None:
        """The option whose donor's context is the most similar, None if none is enough."""
        # The whole head is compared: single tokens differ in how much their context shows.
        length = self.planner.head
        head = state.private[-length:]
        if len(head) < length:
            exact = self.cache.path_device_indices(req.last_node)
            head = torch.cat([exact[ready - length : req.prefix_len], head.to(exact.device)])
        ends = [ready - run.start for run, _ in step.options]
        donors = [run.slots[e - length : e].tolist() for (run, _), e in zip(step.options, ends)]
        similarities = self.signatures.similarity(head.tolist(), donors)
        loads = [
            Load(state, run, end, stop - run.start, length, head, similarity)
            for (run, stop), end, similarity in zip(step.options, ends, similarities)
            if state.accepts(similarity)
        ]
        return max(loads, key=lambda load: load.similarity or 0.0, default=None)

    def _take(
        self, req: Req, state: SpliceState, load: Load, runs: list[Run], limit: int
    ) -> Req | AddReqResult | None:
        assert load.run is not None
        # At least a page is computed in between: its last token is where the next gate looks.
        after = load.run.start + load.stop + self.planner.page_size
        stage = self._next_stage(state, self.planner.stretches(runs, after, limit))
        if stage is not None:
            return self._stage(req, state, stage, load)
        self._admit(req, state, load)
        return None

    def _admit(self, req: Req, state: SpliceState, load: Load | None) -> None:
        """Let the request itself be admitted, with its load."""
        if load is None and len(state.private):
            load = Load(state)
        if load is not None:
            self._promise(req, load)
        # SGLang counts what its stages computed as computed, not as cached.
        req.already_computed = state.staged_tokens

    def _promise(self, req: Req, load: Load) -> None:
        """SGLang calls this a host hit: prefix that the cache will provide at admission."""
        self.cache.loads[req.rid] = load
        req.host_hit_length = load.tokens
        req.num_matched_prefix_tokens = req.prefix_len + load.tokens

    def _stage(self, req: Req, state: SpliceState, stop: int, load: Load | None = None) -> Req:
        state.stages += 1
        stage = make_internal_req(
            f"{req.rid}-rksc-{state.stages}",
            req.full_untruncated_fill_ids[:stop],
            InternalState("stage", state),
            model=self.model,
            extra_key=req.extra_key,
            cache_salt=req.cache_salt,
            priority=req.priority,
        )
        stage.init_next_round_input(self.cache)
        if load is None and len(state.private):
            load = Load(state)
        if load is not None:
            self._promise(stage, load)
        return stage

    def join(self, req: Req, stage: Req, room: int | None, slots: int) -> Req | None:
        """What may be admitted behind a stage, and share its pass; None where that must wait."""
        return None

    def follow(
        self, req: Req, leaders: Iterable[Req], least: int, room: int | None, slots: int
    ) -> bool:
        """Whether a request may read a prefix in the pass that computes it for another request."""
        return False

    def settle(self, req: Req, candidate: Req, admitted: bool, load: Load | None) -> None:
        """Called after the adder tried to admit a request, or a stage in its place.

        Args:
            load: that it was promised.
        """
        state: SpliceState | None = req.rksc.splice
        if not admitted:
            self.cache.loads.pop(candidate.rid, None)
            return
        if load is not None and load.run is None and load.leader is not None:
            self.count("joined_prefixes")
        if state is not None and candidate is req:
            self.cache.active.pop(req.rid, None)
            if state.spliced_tokens:
                self.count("spliced_requests")
        elif state is not None:
            state.stage = candidate
            state.staged_tokens += candidate.extend_end - candidate.prefix_len
            self.cache.active[state.rid] = state
            self.count("stages")

    def to_dict(self) -> dict[str, Any]:
        """For the status page."""
        cache = self.cache
        return {
            **asdict(self.thresholds),
            "vocab_size": self.model.vocab_size,
            "head": self.planner.head,
            "tail": self.planner.tail,
            "min_tokens": self.planner.min_tokens,
            "signature_bytes_per_slot": self.signatures.bytes_per_slot,
            "waiting_stages": len(cache.active),
            "indexed_tokens": len(cache.index) if cache.index is not None else 0,
            "index_bytes": cache.index.nbytes if cache.index is not None else 0,
            "index_microseconds_per_token": cache.index_nanoseconds
            / 1000
            / max(cache.indexed_tokens, 1),
            "cost": asdict(self.cost) if self.cost is not None else None,
            "guard": self.guard.to_dict() if self.guard is not None else None,
        }

    def abandon(self, req: Req, reason: str) -> None:
        """Serve a request exactly, whatever had been prepared for it."""
        self.cache.loads.pop(req.rid, None)
        req.host_hit_length = 0
        state: SpliceState | None = req.rksc.splice
        if state is not None:
            self.cache.free_private(state)
            state.give_up(reason)

    def release_memory(self) -> None:
        """Nothing runs and nothing fits: what waiting requests own must not be the reason."""
        for state in self.cache.active.values():
            if state.stage is None or state.stage.finished():
                self.cache.free_private(state)
                state.give_up("memory pressure")

    def _better_is_coming(
        self,
        req: Req,
        state: SpliceState,
        leaders: Iterable[Req],
        stretches: list[Compute],
        start: int,
    ) -> bool:
        """Whether a request that is being computed will be a donor that is worth waiting for.

        Args:
            stretches: what can be taken over already, from ``start`` on.
        """
        least = self._least(req, self._risk(req, state), req.prefix_len, self._later(state))
        there = sum(stretch.gain for stretch in stretches)
        length = self.planner.head + there + max(self.planner.min_tokens, least)
        return self.donors.is_coming(req, leaders, length, start)

    def _is_wanted(self, req: Req, stretches: list[Compute]) -> bool:
        """Whether those that wait gain more than a request loses that takes nothing over.

        They can take over only what is computed behind an exact context.

        Args:
            stretches: what the request could take over, at least one.
        """
        there = sum(stretch.gain for stretch in stretches)
        tokens = -there
        for common in self.donors.common(req, stretches[0].stop):
            tokens += max(common - self.planner.head - there, 0)
            if tokens > 0 and (self.cost is None or self.cost.saved(tokens, 1.0) > 0):
                return True
        return False
