"""Eviction policies for SGLang's radix tree: ``rksc`` and, as published, ``rksc-paper``.

An SGLang eviction strategy gives each evictable leaf a priority; the lowest goes first, then its
parent is a leaf. All priorities of one walk are taken at its start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sglang.srt.mem_cache.evict_policy import EvictionStrategy

from rksc_sglang.rsbcm.attention_mass import SlotMass
from rksc_sglang.rsbcm.life_cycle import ORDINARY, LifeCycle

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode


class RkscStrategy(EvictionStrategy):
    """Life cycle first, then the ends of texts, then what was of no use for the longest time.

    A node's rank is its branch's (:mod:`rksc_sglang.rsbcm.life_cycle`). Of ordinary rank, the last
    tokens of every text go before the rest of any: they are of use only where all in front of them
    is, and cost little. Then what was used the longest ago goes first, its age divided by what it
    is worth: one plus the weighted ingredients below.

    Args:
        life_cycle: whether branches' fates count.
        lease: whether leases count: a leased branch's nodes are used now.
        mass: weight of the attention that the node's tokens get, relative to the tree's mean.
        depth: weight of the node's nearness to the root, in nodes.
        cost: weight of the share of its recomputation that attention to its prefix is.
        fan_out: weight of the number of its siblings.
        trim: tokens that a leaf loses at least, from its end, when it is evicted in parts; 0: it
            always goes as a whole.
        tail: tokens at the end of a text that go before the rest of others; needs ``trim``.
    """

    def __init__(
        self,
        life_cycle: bool = True,
        lease: bool = False,
        mass: float = 0.0,
        depth: float = 0.0,
        cost: float = 0.0,
        fan_out: float = 2.0,
        trim: int = 16,
        tail: int = 64,
    ) -> None:
        self.uses_life_cycle, self.uses_leases = life_cycle, lease
        self.weights = {"mass": mass, "depth": depth, "cost": cost, "fan_out": fan_out}
        self.trim, self.tail = trim, tail if trim else 0
        self._cut: WeakKeyDictionary[UnifiedTreeNode, int] = WeakKeyDictionary()
        self.life_cycle: LifeCycle | None = None
        self.slot_mass: SlotMass | None = None
        self.now = 0.0
        self._importance: Mapping[UnifiedTreeNode, float] = {}

    @property
    def uses_mass(self) -> bool:
        return self.weights["mass"] != 0

    def begin(self, leaves: Collection[UnifiedTreeNode]) -> None:
        """A walk begins; these are the leaves that it may evict."""
        if self.life_cycle is not None:
            (self.life_cycle.renew if self.uses_leases else self.life_cycle.forget)()
        self._importance = {}
        if self.uses_mass and self.slot_mass is not None:
            self._importance = self.slot_mass.of_nodes(leaves)
        self.now = max((leaf.last_access_time for leaf in leaves), default=0.0) + 1

    def in_units_of(self, tokens: int) -> None:
        """Let one place in a node's key stand for so many tokens: a public trace's block.

        A tail that fills none is not worth one.
        """
        self.trim, self.tail = -(-self.trim // tokens), self.tail // tokens

    def portion(self, leaf: UnifiedTreeNode, wanted: int) -> int:
        """How many tokens to evict of a leaf, from its end, of ``wanted`` ones."""
        spare = self._spare(leaf)
        return max(
            min(wanted, spare) if spare and self._rank(leaf) == ORDINARY else wanted, self.trim
        )

    def split(self, head: UnifiedTreeNode, end: UnifiedTreeNode) -> None:
        """A node was split: its head is a node of its own, and its end is about to go."""
        self._cut[head] = self._cut.get(end, 0) + len(end.key)
        if self.life_cycle is not None:
            self.life_cycle.split(head, end)

    def _spare(self, leaf: UnifiedTreeNode) -> int:
        """Tokens that are left of the tail that its text can spare."""
        return max(self.tail - self._cut.get(leaf, 0), 0)

    def _rank(self, node: UnifiedTreeNode) -> int:
        cycle = self.life_cycle
        return cycle.rank(node) if cycle is not None and self.uses_life_cycle else ORDINARY

    def importance(self, node: UnifiedTreeNode) -> float:
        """Attention mass per token, relative to the mean over all slots that have any."""
        if self.slot_mass is None:
            return 0.0
        if node not in self._importance:
            return self.slot_mass.of_nodes([node])[node]
        return self._importance[node]

    def get_priority(self, node: UnifiedTreeNode) -> tuple[float, ...]:
        cycle, age = self.life_cycle, self.now - node.last_access_time
        if self.uses_leases and cycle is not None and cycle.is_leased(node):
            age = 0.0
        rank = self._rank(node)
        return rank, not (rank == ORDINARY and self._spare(node)), -age / self._worth(node)

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
        super().__init__(mass=1.0, trim=0)

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
