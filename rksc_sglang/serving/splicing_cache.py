"""SGLang's radix cache with slots of a request's own behind its exact prefix.

A *load* fills fresh slots with KV that was computed behind another context: copied, keys rotated to
their new positions, shifted by what the context makes of all tokens alike. SGLang's load-back
protocol carries it (``init_load_back``: the cache gives a request more prefix at admission). The
slots are the request's, are freed with it, and never enter the tree. An index of what the tree
holds is kept in step with it.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    InitLoadBackParams,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from rksc_sglang.asks.content_index import ContentIndex, Run
from rksc_sglang.asks.context_shift import Spliced
from rksc_sglang.asks.reuse import Reuse
from rksc_sglang.serving.internal import InternalState
from rksc_sglang.serving.joined import Joint
from rksc_sglang.serving.radix_cache import RkscRadixCache, namespace_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from rksc_sglang.serving.splice_state import SpliceState

logger = logging.getLogger(__name__)


class Copy(Protocol):
    """Fills ``target`` slots with the KV at ``source``, its keys moved by ``delta`` positions.

    ``head`` and ``donor_head`` are the slots of the tokens before it, in both contexts; without a
    head the run is not shifted.
    """

    def __call__(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        delta: int,
        head: torch.Tensor | None,
        donor_head: torch.Tensor,
    ) -> None: ...


class Load(NamedTuple):
    """What a request gets behind its exact prefix, in this order.

    Attributes:
        state: of the request that it is for; holds the private slots, which come first.
        run: where KV is copied from, and from which of the run's tokens to which; None for none.
        head_tokens: how many of the run's tokens before ``first`` are computed anew.
        head: [head_tokens] int64 slots of these, behind the request's context.
        similarity: of the request's context and the run's.
        leader: admitted before, into the same pass, which computes exactly the tokens at positions
            ``ahead`` of the prompt: those in front of the run, its head among them. ``head`` and
            ``similarity`` are known after it. Without a run: of a prefix that both have.
    """

    state: SpliceState
    run: Run | None = None
    first: int = 0
    stop: int = 0
    head_tokens: int = 0
    head: torch.Tensor | None = None
    similarity: float | None = None
    leader: Req | None = None
    ahead: slice = slice(0, 0)

    @property
    def tokens(self) -> int:
        return len(self.state.private) + self.led + self.stop - self.first

    @property
    def copied(self) -> slice:
        """Of the run's tokens."""
        return slice(self.first, self.stop)

    @property
    def recomputed(self) -> slice:
        """Of the run's tokens, those that are its head."""
        return slice(self.first - self.head_tokens, self.first)

    @property
    def delta(self) -> int:
        """Positions by which keys move, new minus old."""
        return self.run.start - self.run.donor_start if self.run is not None else 0

    @property
    def led(self) -> int:
        """Tokens that the leader computes."""
        return self.ahead.stop - self.ahead.start


class SplicingRadixCache(RkscRadixCache):
    """Adds loads, private slots and the content index to the exact cache.

    Attributes:
        index: what is cached where; None until :meth:`enable_splicing`, and after a failure.
        loads: request id -> what its next admission shall load.
        active: request id -> its splice, while it waits for a stage or owns private slots.
        joints: of the pass that is being put together.
        reuse: how often prefixes were asked for, since the tree was empty.
    """

    def __init__(self, params: Any) -> None:
        self.index: ContentIndex | None = None
        self.loads: dict[str, Load] = {}
        self.active: dict[str, SpliceState] = {}
        self.joints: list[Joint] = []
        self.reuse = Reuse()
        self._copy: Copy | None = None
        self._appended: dict[str, torch.Tensor] = {}
        self.index_nanoseconds = 0
        self.indexed_tokens = 0
        self.index_version = 0  # changes whenever a search may find something else
        super().__init__(params, observed=True)

    def enable_splicing(self, index: ContentIndex, copy: Copy) -> None:
        """Begin to index what is inserted, and allow loads."""
        self.index = index
        self._copy = copy
        self.tree_core.on_device_free = self._unindex

    # The index, in step with the tree

    def insert(self, params: InsertParams) -> InsertResult:
        result = super().insert(params)
        if self.index is not None and params.key is not None:
            self._guarded("index", self._index, params.key, result)
        return result

    def reset(self) -> None:
        super().reset()
        if self.index is not None:
            self.index_version += 1
            self.index.clear()
            self.reuse.clear()

    def _index(self, key: RadixKey, result: InsertResult) -> None:
        assert self.index is not None
        if result.prefix_len >= len(key):
            return
        start = time.perf_counter_ns()
        slots = self.path_device_indices(result.last_device_node).cpu().numpy()
        tokens = np.frombuffer(key.raw_token_ids(), dtype=np.int64)[: len(slots)]
        self.index.insert(namespace_of(key), tokens, slots, result.prefix_len)
        self.index_version += 1
        self.index_nanoseconds += time.perf_counter_ns() - start
        self.indexed_tokens += len(slots) - result.prefix_len

    def _unindex(self, slots: torch.Tensor) -> None:
        if self.index is not None:
            self.index_version += 1
            self._guarded("index", self.index.remove, slots.cpu().numpy())

    def _guarded(self, where: str, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception:
            # An index that missed something could name slots that hold other text by now.
            logger.exception("RKSC: the content index failed; nothing is spliced from here on")
            self.index = None
            self.on_error(where)

    # Loads

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any] | None:
        req = params.req
        load = self.loads.pop(req.rid, None) if req is not None else None
        if load is None:
            return super().init_load_back(params)
        slots = self._fill(load, req)
        if slots is None:
            self.free_private(load.state)
            load.state.give_up("the memory or the donor is gone")
            return 0, req.last_node
        load.state.private = slots[:0]  # they are in the row of the request from here on
        if load.leader is None:
            load.state.took(load)
        self._appended[req.rid] = slots
        req.skip_radix_cache_insert |= load.run is not None or load.leader is None
        return len(slots), req.last_node

    def load_back_is_cache_owned(self) -> bool:
        return False

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        tail = self._appended.get(req.rid)
        if tail is None:
            return super().prefix_device_indices(req)
        root = self.root_node_handle(req.extra_key)
        path = self.tree_core.collect_full_device_indices(req.last_node, root)
        return torch.cat([path, tail])[: req.prefix_len]

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        self._appended.pop(req.rid, None)
        super().on_release(req, checkpointed=checkpointed)

    def _fill(self, load: Load, req: Req) -> torch.Tensor | None:
        """The slots of a load, filled; None where memory or the donor is not there (any more)."""
        try:
            if load.run is None:
                return load.state.private if load.leader is None else self._follow(load, req)
            donor = self._donor(load.run, req)
            if donor is None:
                return None
            node, slots = donor
            lock = self.lock(node)  # making room for the copy must not evict it
            try:
                filled = self._copied(load, slots)
                if filled is not None and load.leader is not None:
                    self._join(load, req, filled, slots, self.lock(node))
                return filled
            finally:
                self.unlock(lock)
        except Exception:
            logger.exception("RKSC: the splice for %s failed; it is computed", req.rid)
            self.on_error("splice")
            return None

    def _donor(self, run: Run, req: Req) -> tuple[Any, torch.Tensor] | None:
        """The donor's node in the tree, and the run's slots there."""
        assert self.index is not None
        path = self.index.path(int(run.slots[-1]), self.page_size)
        key = RadixKey(array("q", path.tobytes()), req.extra_key, cache_salt=req.cache_salt)
        match = super().match_prefix(MatchPrefixParams(key=key))
        slots = self.path_device_indices(match.last_device_node)
        donor = slots[run.donor_start : run.donor_start + len(run.slots)].cpu().numpy()
        if not np.array_equal(donor, run.slots):
            return None
        return match.last_device_node, torch.from_numpy(run.slots)

    def _follow(self, load: Load, req: Req) -> torch.Tensor | None:
        """Slots that are filled with the leader's KV in the pass."""
        slots = self._make_room(load.led)
        if slots is not None:
            self.joints.append(Joint(req, load, slots))
        return slots

    def _make_room(self, count: int) -> torch.Tensor | None:
        evict_from_tree_cache(self, count)
        return self.token_to_kv_pool_allocator.alloc(count)

    def _copied(self, load: Load, donor: torch.Tensor) -> torch.Tensor | None:
        assert self._copy is not None
        slots = self._make_room(load.tokens - len(load.state.private))
        if slots is None:
            return None
        donor = donor.to(slots.device)
        head = load.head.to(slots.device) if load.head is not None else None
        try:
            self._copy(
                donor[load.copied],
                slots[load.led :],
                load.delta,
                head,
                donor[load.recomputed],
            )
        except BaseException:
            self.token_to_kv_pool_allocator.free(slots)
            raise
        return torch.cat([load.state.private, slots])

    def _join(
        self, load: Load, req: Req, slots: torch.Tensor, donor: torch.Tensor, lock: Any
    ) -> None:
        """What is in front of the copy follows in the pass."""
        own, target = slots[: load.led], slots[load.led :]
        donor_head = donor[load.recomputed].to(slots.device)
        run = Spliced(own[:0], donor_head, target, load.delta)
        self.joints.append(Joint(req, load, own, run, lock))

    # Private slots: computed by a stage of a request behind something spliced

    def claim_kv_row(self, req: Req) -> bool:
        stage = getattr(req, "rksc", None)
        if (
            isinstance(stage, InternalState)
            and stage.parent is not None
            and not stage.refused
            and req.skip_radix_cache_insert
            and not stage.parent.stopped
            and not isinstance(req.finished_reason, FINISH_ABORT)
        ):
            self._hand_over(req, stage.parent)
            return True
        return super().claim_kv_row(req)

    def _hand_over(self, req: Req, parent: SpliceState) -> None:
        """The stage's row ends, and what it held behind the exact prefix is the parent's."""
        kv = req.kv
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        parent.private = row[kv.cache_protected_len : req.owned_kv_len()].to(torch.int64, copy=True)
        parent.private_start = kv.cache_protected_len
        self.unlock(req.lock)
        req.lock = None
        self.on_release(req, checkpointed=False)
        self.req_to_token_pool.free(req)
        kv.mark_kv_released()

    def free_private(self, state: SpliceState, count: int | None = None) -> None:
        """Give back the first ``count`` private slots of a request, or all."""
        count = len(state.private) if count is None else count
        if count:
            self.token_to_kv_pool_allocator.free(state.private[:count])
        state.private = state.private[count:]
        state.private_start += count

    def release_aborted_request(self, handle: CacheRequestHandle) -> None:
        self.loads.pop(handle.rid, None)
        state = self.active.pop(handle.rid, None)
        if state is not None:
            state.give_up("aborted")
            self.free_private(state)
        super().release_aborted_request(handle)
