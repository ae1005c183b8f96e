"""Splices of a single pass: what is in front of a run is computed in the pass that reads the run.

A stage and its *follower* (the request itself, or its next stage) are admitted together. The
follower has slots of its own for what the stage computes: in each layer, between the writing of KV
and attention, the stage's KV is copied there and the run is shifted by it. In the last layer the
gate judges. Whom it refuses gives no answer, and is looked at again: what the stage computed is
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
    """A follower whose load waits for its stage.

    Attributes:
        load: of the follower; ``load.stage`` computes what is in front of the run.
        own: [n] int64 slots of the follower for the n tokens that the stage computes.
        run: its head as the stage computes it, known when the pass begins, and the copy.
        lock: keeps the donor in the tree.
        judged: by the gate.
    """

    follower: Req
    load: Load
    own: torch.Tensor
    run: Spliced
    lock: Any
    judged: bool = False

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
            self._shifts = self.shift.of([joint.run for joint in self._joints])
            self.backend.on_kv_written = self._on_kv_written
        except Exception:
            self._fail()

    def _meet(self, joint: Joint) -> torch.Tensor:
        """The slots that the stage computes; those of the head are noted."""
        stage = joint.load.stage
        assert stage is not None
        row = self.cache.req_to_token_pool.req_to_token[stage.kv.req_pool_idx, : stage.extend_end]
        head = row[-len(joint.run.donor_head) :].long()
        joint.run = joint.run._replace(head=head)
        return row[stage.prefix_len :].long()

    def _on_kv_written(self, layer: int) -> None:
        try:
            assert self._shifts is not None
            k_cache, v_cache = self.pool.k_buffer[layer], self.pool.v_buffer[layer]
            for cache in (k_cache, v_cache):
                cache[self._own] = cache[self._computed]
            self._shifts.add([k_cache], [v_cache])
            if layer == len(self.pool.k_buffer) - 1:
                for joint in self._joints:
                    self.judge(joint)
                    joint.judged = True
        except Exception:
            self._fail()

    def _fail(self) -> None:
        logger.exception("RKSC: splices failed in mid-pass; their requests are looked at again")
        self.backend.on_kv_written = None
        self.cache.on_error("splice")

    def end(self) -> None:
        """The pass has been launched."""
        self.backend.on_kv_written = None
        for joint in self._joints:
            self.cache.unlock(joint.lock)
            if not joint.judged:
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
