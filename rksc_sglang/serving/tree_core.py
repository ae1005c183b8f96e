"""The tree core behind RKSC's radix cache: SGLang's own, with an eye on evictions.

SGLang's Rust core knows the stock eviction policies only; RKSC's run in SGLang's Python core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.tree_core_registry import (
    create_tree_core,
    get_tree_core_factory,
    register_tree_core_backend,
)

from rksc_sglang.rsbcm.policy import POLICIES, RkscStrategy

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

#: Name of the core in SGLang's registry of tree cores.
TREE_CORE = "rksc"


def register_tree_core() -> None:
    """Make the core known to SGLang in this process; may be repeated."""
    if get_tree_core_factory(TREE_CORE) is None:
        register_tree_core_backend(TREE_CORE, create_rksc_tree_core)


def with_stock_policy(params: Any) -> Any:
    """SGLang's construction arguments, with LRU in the place of a policy of RKSC's."""
    if params.eviction_policy not in POLICIES:
        return params
    return replace(params, eviction_policy="lru", eviction_policy_config=None)


def create_rksc_tree_core(params: Any, components: Any) -> Any:
    """Factory for ``register_tree_core_backend``.

    The core has SGLang's methods and, beside them, ``on_device_free``, called with the slots that
    an eviction frees. Where the policy is RKSC's, the cache sets ``eviction_strategy``.
    """
    ours = params.eviction_policy in POLICIES
    core = create_tree_core("python" if ours else "rust", with_stock_policy(params), components)

    class Observed(type(core)):  # type: ignore[misc]
        on_device_free: Callable[[torch.Tensor], None] | None = None
        #: Tokens that the eviction under way has still to free; the cache sets it.
        wanted = 0

        @property
        def _strategy(self) -> RkscStrategy | None:
            strategy = getattr(self, "eviction_strategy", None)  # the Rust core shows none
            return strategy if isinstance(strategy, RkscStrategy) else None

        def evict_device_start(self, *args: Any, **kwargs: Any) -> None:
            if self._strategy is not None:
                self._strategy.begin(self.evictable_device_leaves)
            super().evict_device_start(*args, **kwargs)

        def evict_device_next_node(self, *args: Any, **kwargs: Any) -> Any:
            return self._observe(super().evict_device_next_node(*args, **kwargs))

        def evict_device_leaf(self, node_id: int, *args: Any, **kwargs: Any) -> Any:
            trims = self._strategy if self._strategy is not None and self._strategy.trim else None
            if trims is not None:
                self._keep_head(self.node_by_id(node_id), trims)
            result = super().evict_device_leaf(node_id, *args, **kwargs)
            if trims is not None:
                self.wanted -= result.tracker.get(ComponentType.FULL, 0)
            return self._observe(result)

        def _keep_head(self, leaf: UnifiedTreeNode, strategy: RkscStrategy) -> None:
            """Split a leaf that is about to be evicted, so that no more of it goes than must."""
            pages = -(-strategy.portion(leaf, self.wanted) // self.page_size)
            keep = len(leaf.key) - pages * self.page_size
            if keep < strategy.trim:
                return
            used = leaf.last_access_time
            head, _ = self._split_node(leaf.key, leaf, keep)
            head.last_access_time = leaf.last_access_time = used
            strategy.split(head, leaf)

        def _observe(self, result: Any) -> Any:
            if self.on_device_free is not None:
                for slots in result.device_frees.get(ComponentType.FULL, ()):
                    self.on_device_free(slots)
            return result

    core.__class__ = Observed
    return core
