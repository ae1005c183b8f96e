"""Splicing where requests may share a pass: what may be admitted behind a leader.

How such a pass runs is in :mod:`rksc_sglang.serving.joined`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from rksc_sglang.asks.plan import Take
from rksc_sglang.asks.root_first import usable_tokens
from rksc_sglang.serving.internal import is_internal
from rksc_sglang.serving.splicing import Splicer
from rksc_sglang.serving.splicing_cache import Load, namespace_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from rksc_sglang.serving.joined import Joint
    from rksc_sglang.serving.splice_state import SpliceState

#: What is expected of the gate before it has judged in mid-pass: refusals, of so many judged.
PRIOR = (4, 20)
#: What a stage adds to a pass that it shares, of a pass: rows of its own, and the shift by layer.
JOINING = 0.15


class JoiningSplicer(Splicer):
    """A splicer for an attention backend that tells when a layer's KV is written.

    Attributes:
        refused, judged: by the gate in mid-pass.
    """

    refused, judged = PRIOR

    def _joins(self, state: SpliceState) -> bool:
        """Whether the next stage of a request may share its pass: nothing was spliced before it."""
        return state.joins and not len(state.private)

    def _extra_passes(self, state: SpliceState) -> float:
        # Where a pass is shared, a refusal's.
        return JOINING + self.refused / self.judged if self._joins(state) else 1.0

    def join(self, req: Req, stage: Req, room: int | None, slots: int) -> Req | None:
        """What may be admitted behind a stage, and share its pass.

        Args:
            req: that the stage, which has just been admitted, is for.
            room: tokens that the pass may still compute, None for any number.
            slots: that are free or can be made so, and are promised to nobody.

        Returns:
            The request, with a load of which ``stage`` computes the head; or its next stage, with
            such a load; None where it must wait.
        """
        state: SpliceState = req.rksc.splice
        if (
            not self._joins(state)
            or stage.skip_radix_cache_insert  # it is not exact
            or stage.prefix_len != req.prefix_len
            or stage.extend_end < len(stage.full_untruncated_fill_ids)
        ):
            return None
        tokens, limit = self._spliceable(req)
        ready = stage.extend_end
        runs = self._find(req, state, tokens[:limit], ready)
        step = self.planner.next_step(runs, ready, limit)
        if not isinstance(step, Take):
            return None
        run, stop = step.options[0]
        load = Load(
            state,
            run,
            ready - run.start,
            stop - run.start,
            self.planner.head,
            leader=stage,
            ahead=slice(req.prefix_len, ready),
        )
        follower = self._take(req, state, load, runs, limit) or req
        length = len(follower.full_untruncated_fill_ids) - req.prefix_len
        # The donor stays until the pass has run; stage, load and the rest may need a page more.
        needed = length + run.donor_start + len(run.slots) + 3 * self.planner.page_size
        if not _fits(length - load.tokens, needed, room, slots):
            self.cache.loads.pop(follower.rid, None)
            return None
        return follower

    def follow(
        self, req: Req, leaders: Iterable[Req], least: int, room: int | None, slots: int
    ) -> bool:
        """Let a request read a prefix in the pass that computes it for another request.

        Args:
            leaders: admitted into the pass, with the tree as it is.
            least: tokens of the prompt that the prefix must have.
            room, slots: as of :meth:`join`.

        Returns:
            Whether the request may be admitted, with such a load. Not where more can be taken over
            behind the prefix once that, or a donor, is cached.
        """
        state: SpliceState | None = req.rksc.splice
        if (
            state is None
            or state.stage is not None
            or not self._joins(state)
            or req.output_ids
            or req.retracted_stain
        ):
            return False
        leaders = list(leaders)
        led = [(self._led(req, leader), leader) for leader in leaders]
        stop, leader = max(led, key=lambda pair: pair[0], default=(0, None))
        if leader is None or stop < least:
            return False
        tokens, limit = self._spliceable(req)
        if not state.stopped and stop < limit:
            runs = self._find(req, state, tokens[:limit], stop)
            stretches = list(self.planner.stretches(runs, stop, limit))
            stage = self._next_stage(state, stretches, self._later(state))
            if stage is not None or self._better_is_coming(req, state, leaders, stretches, stop):
                return False
        load = Load(state, leader=leader, ahead=slice(req.prefix_len, stop))
        length = len(tokens) - req.prefix_len
        if not _fits(length - load.led, length + 2 * self.planner.page_size, room, slots):
            return False
        self._promise(req, load)
        return True

    def _led(self, req: Req, leader: Req) -> int:
        """Where the prefix ends that a leader computes for a request in this pass; 0: nowhere."""
        if leader.prefix_len > req.prefix_len or namespace_of(leader) != namespace_of(req):
            return 0
        length = min(usable_tokens(req), leader.extend_end)
        ours, theirs = (
            np.frombuffer(one.full_untruncated_fill_ids, dtype=np.int64)[:length]
            for one in (req, leader)
        )
        length = min(len(ours), len(theirs))
        other = np.flatnonzero(ours[:length] != theirs[:length])
        stop = int(other[0]) if len(other) else length
        return stop - stop % self.planner.page_size

    def judge(self, joint: Joint) -> None:
        """The gate, for a follower whose stage has just computed the head."""
        assert joint.run is not None
        load, head = joint.load, joint.run.head.tolist()
        similarity = self.signatures.similarity(head, [joint.run.donor_head.tolist()])[0]
        self.judged += 1
        if load.state.accepts(similarity):
            load.state.took(load._replace(similarity=similarity))
            self.count("joined_splices")
            if not is_internal(joint.follower):
                self.count("spliced_requests")
        else:
            self.refused += 1
            joint.refuse()


def _fits(computed: int, needed: int, room: int | None, slots: int) -> bool:
    """Whether a pass may compute so many tokens more, and has the slots for them."""
    return (room is None or computed <= room) and needed <= slots
