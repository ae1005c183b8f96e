"""The radix cache backend ``rksc``: SGLang's unified radix cache, timed, with branches in it.

With an eviction policy of RKSC's it knows which branch computed what, and gives back what pruned
branches leave. What is cached, matched and locked is SGLang's.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from rksc_sglang.config import RkscConfig
from rksc_sglang.contract import RequestContract
from rksc_sglang.rsbcm.life_cycle import PRUNED, Branch, LifeCycle, State
from rksc_sglang.rsbcm.policy import POLICIES, RkscStrategy, make_strategy
from rksc_sglang.rsbcm.trace import Tenant, TraceWriter
from rksc_sglang.serving.tree_core import TREE_CORE, register_tree_core, with_stock_policy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

logger = logging.getLogger(__name__)

BACKEND = "rksc"


def namespace_of(key: RadixKey | Req) -> Tenant:
    """What is the same for requests of one tenant only."""
    return (key.extra_key, key.cache_salt)


def _timed(operation: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a method's calls and nanoseconds added to the cache's counts."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(self: RkscRadixCache, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter_ns()
            try:
                return method(self, *args, **kwargs)
            finally:
                self.calls[operation] += 1
                self.nanoseconds[operation] += time.perf_counter_ns() - start

        return timed

    return decorate


class RkscRadixCache(UnifiedRadixCache):
    """What is exact is SGLang's; this class adds times, and the branches' life cycle.

    Args:
        observed: the tree core shall tell ``on_device_free`` what evictions free.

    Attributes:
        strategy: RKSC's eviction policy, None with one of SGLang's.
        life_cycle: of branches; None with a policy of SGLang's, and after a failure.
        evicted_tokens: given back so far, pruned branches' among them.
        freed_tokens: of pruned branches, given back at once.
        trace: what happens is written there, where it was asked for.
        on_error: called with a place when something fails inside; serving goes on.
    """

    def __init__(self, params: Any, observed: bool = False) -> None:
        self.calls = {"match": 0, "insert": 0, "evict": 0}
        self.nanoseconds = dict.fromkeys(self.calls, 0)
        self.evicted_tokens = self.freed_tokens = 0
        self.strategy: RkscStrategy | None = None
        self.life_cycle: LifeCycle | None = None
        self.trace: TraceWriter | None = None
        self.on_error: Callable[[str], None] = lambda where: None
        register_tree_core()
        ours = params.eviction_policy in POLICIES
        if observed or ours:
            params = replace(params, tree_core_backend=TREE_CORE)
        super().__init__(params)
        if ours and not self.disable:
            self.life_cycle = LifeCycle(self.token_to_kv_pool_allocator.size)
            self.evict_by(make_strategy(params.eviction_policy, params.eviction_policy_config))

    def evict_by(self, strategy: RkscStrategy) -> None:
        """Give the tree core a policy, before anything was evicted."""
        strategy.life_cycle = self.life_cycle
        strategy.tail -= strategy.tail % self.page_size  # whole pages
        self.strategy = self.tree_core.eviction_strategy = strategy

    match_prefix = _timed("match")(UnifiedRadixCache.match_prefix)
    insert = _timed("insert")(UnifiedRadixCache.insert)

    @_timed("evict")
    def evict(self, params: EvictParams) -> Any:
        self._want(params)
        return self._count(super().evict(params))

    @_timed("evict")
    def evict_for_alloc(self, params: EvictParams, **kwargs: Any) -> Any:
        self._want(params)
        return self._count(super().evict_for_alloc(params, **kwargs))

    def _want(self, params: EvictParams) -> None:
        if self.strategy is not None:
            self.tree_core.wanted = params.num_tokens

    def _count(self, result: Any) -> Any:
        self.evicted_tokens += result.num_tokens_evicted
        return result

    def reset(self) -> None:
        super().reset()
        if self.life_cycle is not None:
            self.life_cycle.clear()

    # Branches

    def checkpoint_into_tree(self, req: Req, *, up_to: int, **kwargs: Any) -> None:
        known = req.kv.cache_protected_len
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        if self.life_cycle is not None:
            self._safely(self._claim, req, known)
        if self.trace is not None and up_to >= len(req.origin_input_ids):
            contract = _contract_of(req) or RequestContract()
            self.trace.start(
                req.rid,
                req.origin_input_ids,
                namespace_of(req),
                program=contract.program,
                group=contract.group,
                branch=contract.branch or 0,
                verifies=contract.verify is not None,
            )

    def _claim(self, req: Req, known: int) -> None:
        contract, branch = _contract_of(req), self._branch_of(req)
        if contract is not None and branch is not None:
            assert self.life_cycle is not None
            node = self.tree_core.node_by_id(req.last_node)
            path = split_path(node, req.kv.cache_protected_len, known)
            self.life_cycle.claim(branch, *path, verifies=contract.verify is not None)

    def _branch_of(self, req: Req) -> Branch | None:
        contract = _contract_of(req)
        if contract is None or contract.group is None:
            return None
        assert self.life_cycle is not None
        return self.life_cycle.branch(
            namespace_of(req), contract.group, contract.branch or 0, contract.program
        )

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        if self.life_cycle is not None:
            self._safely(self._free_late, req)
        if self.trace is not None:
            self.trace.finish(req.rid, req.output_ids, self._mass_of(req))

    def _mass_of(self, req: Req) -> list[float] | None:
        if self.strategy is None or self.strategy.slot_mass is None:
            return None
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : req.owned_kv_len()]
        return self.strategy.slot_mass.mass[row.long()].tolist()

    def _free_late(self, req: Req) -> None:
        """What a branch leaves that was pruned while it ran."""
        branch = self._branch_of(req)
        if branch is not None and branch.state == "pruned":
            self.free_pruned()

    def report_branches(self, tenant: Tenant, group: str, states: Mapping[int, State]) -> None:
        """Take note of what became of branches; what pruned ones left alone is given back."""
        if self.trace is not None:
            self.trace.report(tenant, group, states)
        if self.life_cycle is not None:
            self._safely(self.life_cycle.report, tenant, group, states)
            if "pruned" in states.values():
                self._safely(self.free_pruned)

    def end_program(self, tenant: Tenant, program: str) -> None:
        """Take note that a program is over."""
        if self.trace is not None:
            self.trace.end(tenant, program)
        if self.life_cycle is not None:
            self._safely(self.life_cycle.end, tenant, program)

    def free_pruned(self) -> None:
        """Evict the nodes of pruned branches that nothing stands on and nobody reads."""
        while self.life_cycle is not None:
            rank = self.life_cycle.rank
            dead = [n for n in self.tree_core.evictable_device_leaves if rank(n) == PRUNED]
            if not dead:
                return
            # They rank lowest: so many tokens are theirs. Behind them their parents are leaves.
            freed = self.evict(EvictParams(num_tokens=sum(len(node.key) for node in dead)))
            self.freed_tokens += freed.num_tokens_evicted
            if not freed.num_tokens_evicted:
                return

    def _safely(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception:
            logger.exception("RKSC: branches are not known to the cache from here on")
            assert self.strategy is not None
            self.strategy.life_cycle = self.life_cycle = None
            self.on_error("life_cycle")

    def timings(self) -> dict[str, dict[str, int]]:
        return {
            operation: {"calls": calls, "microseconds": self.nanoseconds[operation] // 1000}
            for operation, calls in self.calls.items()
        }


def _contract_of(req: Req) -> RequestContract | None:
    return getattr(getattr(req, "rksc", None), "contract", None)


def split_path(
    node: UnifiedTreeNode, end: int, known: int
) -> tuple[list[UnifiedTreeNode], list[UnifiedTreeNode]]:
    """The nodes above a node that ends ``end`` tokens from the root, and it.

    Returns:
        Those behind the first ``known`` tokens, and those that hold these.
    """
    behind: list[UnifiedTreeNode] = []
    before: list[UnifiedTreeNode] = []
    while node.parent is not None:
        end -= len(node.key)
        (behind if end >= known else before).append(node)
        node = node.parent
    return behind, before


def create_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Factory for ``register_radix_cache_backend``.

    Where SGLang itself would not build its unified radix cache (radix cache disabled, or a model
    with nothing but sliding windows), its own choice stands and RKSC has nothing to add.
    """
    if ctx.disable_radix_cache or (ctx.is_hybrid_swa and ctx.full_tokens_per_layer == 0):
        return default_radix_cache_factory(replace(ctx, params=with_stock_policy(ctx.params)))
    config = RkscConfig.from_env()
    if config is None or not config.approximate:
        return create_unified_radix_cache(ctx, cache_class=RkscRadixCache)
    from rksc_sglang.serving.splicing_cache import SplicingRadixCache

    return create_unified_radix_cache(ctx, cache_class=SplicingRadixCache)
