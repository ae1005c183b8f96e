"""The radix cache backend ``rksc``: SGLang's unified radix cache, timed.

SGLang's own tree core (Rust) stays underneath; RKSC's data lives beside it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from rksc_sglang.config import RkscConfig

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

BACKEND = "rksc"


def _timed(operation: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, with its calls and nanoseconds added to the cache's counts."""

    @functools.wraps(method)
    def timed(self: RkscRadixCache, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter_ns()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.calls[operation] += 1
            self.nanoseconds[operation] += time.perf_counter_ns() - start

    return timed


class RkscRadixCache(UnifiedRadixCache):
    """What is exact is SGLang's; this class adds the time spent in match, insert and evict."""

    def __init__(self, params: Any) -> None:
        self.calls = {"match": 0, "insert": 0, "evict": 0}
        self.nanoseconds = dict.fromkeys(self.calls, 0)
        super().__init__(params)

    match_prefix = _timed("match", UnifiedRadixCache.match_prefix)
    insert = _timed("insert", UnifiedRadixCache.insert)
    evict = _timed("evict", UnifiedRadixCache.evict)
    evict_for_alloc = _timed("evict", UnifiedRadixCache.evict_for_alloc)

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
    config = RkscConfig.from_env()
    if config is None or not config.approximate:
        return create_unified_radix_cache(ctx, cache_class=RkscRadixCache)
    from rksc_sglang.serving.splicing_cache import SplicingRadixCache

    return create_unified_radix_cache(ctx, cache_class=SplicingRadixCache)
