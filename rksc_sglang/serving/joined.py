"""Passes in which requests read what others compute: of a prefix they share, or a run's context.

A *leader* and its *followers* are admitted together. A follower has slots of its own for what the
leader computes: in each layer, between the writing of KV and attention, the leader's KV is copied
there. Requests with a prefix in common need no pass of its own for it in this way, and the prefix
is as exact as if it had one.

The leader of a splice is a stage, its follower the request that the stage is for, or its next
stage. The run behind what the stage computes is shifted by it in each layer, and in the last one
the gate judges. Whom it refuses gives no answer, and is looked at again: what the stage computed is
cached by then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rksc_sglang.asks.context_shift import ContextShift, Shifts, Spliced
from rksc_sglang.serving.internal import InternalState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from rksc_sglang.attention_cpu import RkscCpuAttnBackend
    from rksc_sglang.serving.splicing_cache import Load, SplicingRadixCache

logger = logging.getLogger(__name__)

#: Why an answer is discarded.
REFUSED = "the gate refused what was spliced"


@dataclass(eq=False)
class Joint:
    """A follower whose load waits for its leader.

    Attributes:
        own: [n] int64 slots of the follower for the n tokens that the leader computes for it.
        run: of a splice: its head as the leader computes it, known when the pass begins, and the
            copy.
        lock: keeps the donor in the tree.
        complete: its slots are filled, and the gate has judged.
    """

    follower: Req
    load: Load
    own: torch.Tensor
    run: Spliced | None = None
    lock: Any = None
    complete: bool = False

    def refuse(self) -> None:
        """The follower gives no answer."""
        state = self.load.state
        state.joins = False
        if isinstance(self.follower.rksc, InternalState):
            self.follower.rksc.refused = True
        else:
            state.refused = True


class JoinedPass:
    """The followers of one forward pass after the other.

    Args:
        cache: of which admission fills the list of joints.
        backend: tells when a layer's KV is written.
        pool: of keys and values.
        shift: of runs, for this pool.
        judge: the gate; refuses a joint, or notes what was taken over.
    """

    def __init__(
        self,
        cache: SplicingRadixCache,
        backend: RkscCpuAttnBackend,
        pool: MHATokenToKVPool,
        shift: ContextShift,
        judge: Callable[[Joint], None],
    ) -> None:
        self.cache = cache
        self.backend = backend
        self.pool = pool
        self.shift = shift
        self.judge = judge
        self._joints: list[Joint] = []
        self._computed = self._own = torch.empty(0, dtype=torch.int64)
        self._shifts: Shifts | None = None

    def begin(self) -> None:
        """A pass begins: its requests have their slots."""
        if not self.cache.joints:
            return
        self._joints, self.cache.joints = self.cache.joints, []
        try:
            self._computed = torch.cat([self._meet(joint) for joint in self._joints])
            self._own = torch.cat([joint.own for joint in self._joints])
            runs = [joint.run for joint in self._joints if joint.run is not None]
            self._shifts = self.shift.of(runs) if runs else None
            self.backend.on_kv_written = self._on_kv_written
        except Exception:
            self._fail()

    def _meet(self, joint: Joint) -> torch.Tensor:
        """The slots that the leader computes for the follower; those of a head are noted."""
        leader = joint.load.leader
        assert leader is not None
        row = self.cache.req_to_token_pool.req_to_token[leader.kv.req_pool_idx]
        computed = row[joint.load.ahead].long()
        if joint.run is not None:
            head = row[: joint.load.ahead.stop][-len(joint.run.donor_head) :].long()
            joint.run = joint.run._replace(head=head)
        return computed

    def _on_kv_written(self, layer: int) -> None:
        try:
            k_cache, v_cache = self.pool.k_buffer[layer], self.pool.v_buffer[layer]
            for cache in (k_cache, v_cache):
                cache[self._own] = cache[self._computed]
            if self._shifts is not None:
                self._shifts.add([k_cache], [v_cache])
            if layer == len(self.pool.k_buffer) - 1:
                for joint in self._joints:
                    if joint.run is not None:
                        self.judge(joint)
                    joint.complete = True
        except Exception:
            self._fail()

    def _fail(self) -> None:
        logger.exception("RKSC: sharing failed in mid-pass; its requests are looked at again")
        self.backend.on_kv_written = None
        self.cache.on_error("splice")

    def end(self) -> None:
        """The pass has been launched."""
        self.backend.on_kv_written = None
        for joint in self._joints:
            if joint.lock is not None:
                self.cache.unlock(joint.lock)
            if not joint.complete:
                joint.refuse()
        self._joints = []

    def review(self, reqs: Iterable[Req]) -> list[Req]:
        """Of a batch that has run: the refused requests, which shall give no answer."""
        refused = []
        for req in reqs:
            splice = getattr(req.rksc, "splice", None)
            if splice is not None and splice.refused and splice.discard(req, REFUSED):
                refused.append(req)
        return refused
