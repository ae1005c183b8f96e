"""The radix cache backend ``rksc``: SGLang's unified radix cache, timed.

SGLang's own tree core (Rust) stays underneath; RKSC's data lives beside it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import (
        BasePrefixCache,
        EvictParams,
        EvictResult,
        InsertParams,
        InsertResult,
        MatchPrefixParams,
        MatchResult,
    )

BACKEND = "rksc"


class RkscRadixCache(UnifiedRadixCache):
    """What is exact is SGLang's; this class adds the time spent in match, insert and evict."""

    def __init__(self, params: Any) -> None:
        self.calls = {"match": 0, "insert": 0, "evict": 0}
        self.nanoseconds = dict.fromkeys(self.calls, 0)
        super().__init__(params)

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        start = time.perf_counter_ns()
        result = super().match_prefix(params)
        self._timed("match", start)
        return result

    def insert(self, params: InsertParams) -> InsertResult:
        start = time.perf_counter_ns()
        result = super().insert(params)
        self._timed("insert", start)
        return result

    def evict(self, params: EvictParams) -> EvictResult:
        start = time.perf_counter_ns()
        result = super().evict(params)
        self._timed("evict", start)
        return result

    def _timed(self, operation: str, start: int) -> None:
        self.calls[operation] += 1
        self.nanoseconds[operation] += time.perf_counter_ns() - start

    def timings(self) -> dict[str, dict[str, int]]:
        return {
            operation: {"calls": calls, "microseconds": self.nanoseconds[operation] // 1000}
            for operation, calls in self.calls.items()
        }


def create_cache(ctx: TreeCacheBuildContext) -> BasePrefixCache:
    """Factory for ``register_radix_cache_backend``.

    Where SGLang itself would not build its unified radix cache (radix cache disabled, or a model
    with nothing but sliding windows), its own choice stands and RKSC has nothing to add.
    """
    if ctx.disable_radix_cache or (ctx.is_hybrid_swa and ctx.full_tokens_per_layer == 0):
        return default_radix_cache_factory(ctx)
    return create_unified_radix_cache(ctx, cache_class=RkscRadixCache)
