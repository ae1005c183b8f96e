"""Eviction policies for SGLang's radix tree: ``rksc`` and, as published, ``rksc-paper``.

An SGLang eviction strategy gives each evictable leaf a priority; the lowest goes first, then its
parent is a leaf. All priorities of one walk are taken at its start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.evict_policy import EvictionStrategy

from rksc_sglang.rsbcm.attention_mass import SlotMass
from rksc_sglang.rsbcm.life_cycle import ORDINARY, LifeCycle

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode


class RkscStrategy(EvictionStrategy):
    """Life cycle first, then reuse, then recency weighed by what a node is worth.

    A node's rank is its branch's (:mod:`rksc_sglang.rsbcm.life_cycle`). Within a rank, nodes that
    were inserted once go before those that were used again. Within these, the value of a token is
    its worth over its age, and the worth is one plus the weighted ingredients below.

    Args:
        protected_threshold: uses from which on a node is protected, as SGLang's ``slru`` counts.
        mass: weight of the attention that the node's tokens get, relative to the tree's mean.
        depth: weight of the node's distance from the root, in nodes: shallow is worth more.
        cost: weight of the share of a recomputation that attention to the prefix is.
        fan_out: weight of the number of siblings.
        life_cycle: whether branches' fates count.
    """

    def __init__(
        self,
        protected_threshold: int = 2,
        mass: float = 0.0,
        depth: float = 0.0,
        cost: float = 0.0,
        fan_out: float = 0.0,
        life_cycle: bool = True,
    ) -> None:
        self.protected_threshold = protected_threshold
        self.weights = {"mass": mass, "depth": depth, "cost": cost, "fan_out": fan_out}
        self.life_cycle: LifeCycle | None = None
        self.uses_life_cycle = life_cycle
        self.slot_mass: SlotMass | None = None
        self.now = 0.0
        self._importance: Mapping[UnifiedTreeNode, float] = {}

    @property
    def uses_mass(self) -> bool:
        return self.weights["mass"] != 0

    def begin(self, leaves: Iterable[UnifiedTreeNode]) -> None:
        """A walk begins; these are the leaves that it may evict."""
        if self.life_cycle is not None:
            self.life_cycle.renew()
        self._importance = {}
        if self.uses_mass and self.slot_mass is not None:
            self._importance = self.slot_mass.of_nodes(leaves)
        self.now = max((leaf.last_access_time for leaf in leaves), default=0.0) + 1

    def importance(self, node: UnifiedTreeNode) -> float:
        """Attention mass per token, relative to the mean over all slots that have any."""
        if self.slot_mass is None:
            return 0.0
        if node not in self._importance:
            return self.slot_mass.of_nodes([node])[node]
        return self._importance[node]

    def get_priority(self, node: UnifiedTreeNode) -> tuple[float, ...]:
        counts = self.life_cycle is not None and self.uses_life_cycle
        rank = self.life_cycle.rank(node) if counts else ORDINARY  # type: ignore[union-attr]
        # Programs' own nodes are read again by each sibling, which says nothing of the future.
        protected = rank == ORDINARY and node.hit_count >= self.protected_threshold
        age = max(self.now - node.last_access_time, 1)
        return rank, protected, self._worth(node) / age

    def _worth(self, node: UnifiedTreeNode) -> float:
        weights, worth = self.weights, 1.0
        if weights["mass"]:
            worth += weights["mass"] * self.importance(node)
        if weights["depth"]:
            worth += weights["depth"] / depth_of(node)
        if weights["cost"]:
            start = sum(len(above.key) for above in ancestors(node))
            worth += weights["cost"] * start / (start + CONTEXT_OF_EQUAL_COST)
        if weights["fan_out"]:
            worth += weights["fan_out"] * (len(node.parent.children) - 1)
        return worth


class PaperStrategy(RkscStrategy):
    """``importance / (depth + 1)``, lowest first (arXiv 2606.09937, RSBCM).

    The importance is the attention mass; the root's children are at depth 1.
    """

    def __init__(self) -> None:
        super().__init__(mass=1.0, life_cycle=False)

    def get_priority(self, node: UnifiedTreeNode) -> tuple[float, ...]:
        return (self.importance(node) / (depth_of(node) + 1),)


#: Tokens of context at which attention to them costs about as much as all else that a token does.
CONTEXT_OF_EQUAL_COST = 4096

POLICIES: dict[str, type[RkscStrategy]] = {"rksc": RkscStrategy, "rksc-paper": PaperStrategy}


def register_policies() -> None:
    """Make ``--radix-eviction-policy`` take them in this process; may be repeated."""
    from sglang.srt.arg_groups.choices import (
        RADIX_EVICTION_POLICY_CHOICES,
        add_radix_eviction_policy_choices,
    )

    add_radix_eviction_policy_choices(
        [policy for policy in POLICIES if policy not in RADIX_EVICTION_POLICY_CHOICES]
    )


def make_strategy(policy: str, config: Mapping[str, Any] | None = None) -> RkscStrategy:
    """Raises ValueError, with the names that there are, for arguments that the policy lacks."""
    try:
        return POLICIES[policy](**(config or {}))
    except TypeError as error:
        raise ValueError(f"--radix-eviction-policy-config for {policy}: {error}") from error


def ancestors(node: UnifiedTreeNode) -> Iterable[UnifiedTreeNode]:
    """Above a node, without the root."""
    above = node.parent
    while above is not None and above.parent is not None:
        yield above
        above = above.parent


def depth_of(node: UnifiedTreeNode) -> int:
    """1 for a child of the root."""
    return 1 + sum(1 for _ in ancestors(node))
