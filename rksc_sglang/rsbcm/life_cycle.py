"""What becomes of branches, and what that says about the KV that they left in the tree.

A branch's nodes are those that its own requests computed: what it shares with its siblings was
computed before the fork, and is nobody's. While a branch is alive its nodes are leased, so that the
next level of the tree finds them; when it is pruned or joined they go before all others. A lease is
a place in the order of eviction, not a lock: it ends by itself, no tenant's leases are of more than
a share of the pool, and a pool full of leases is evicted like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

#: As ``POST /rksc/branches`` takes them; a branch that was never reported is "frontier".
State = Literal["frontier", "joined", "pruned", "won"]
STATES: tuple[State, ...] = get_args(State)

#: Ranks of nodes, lowest evicted first.
PRUNED, JOINED, ORDINARY, LEASED = range(4)


@dataclass(eq=False)
class Branch:
    """One branch of a group.

    Attributes:
        tenant: namespace of its requests.
        state: as last reported.
        seen: when it was last heard of, in seconds.
        tokens: that its requests left in the tree.
    """

    tenant: Hashable
    state: State = "frontier"
    seen: float = 0.0
    tokens: int = 0


@dataclass
class LifeCycle:
    """Branches of all groups, and who owns which node.

    Args:
        capacity: of the pool, in tokens.
        lease_seconds: that a branch is leased for after it was last heard of.
        tenant_share: of the pool, that one tenant's leases may cover; the oldest lapse first.
    """

    capacity: int
    lease_seconds: float = 60.0
    tenant_share: float = 0.5
    clock: Callable[[], float] = time.monotonic
    groups: dict[tuple[Hashable, str], dict[int, Branch]] = field(default_factory=dict)
    owners: WeakKeyDictionary[UnifiedTreeNode, Branch] = field(default_factory=WeakKeyDictionary)
    leased: set[Branch] = field(default_factory=set)

    def branch(self, tenant: Hashable, group: str, number: int) -> Branch:
        """A branch that is heard of: by its requests, or by a report."""
        branches = self.groups.setdefault((tenant, group), {})
        branch = branches.setdefault(number, Branch(tenant))
        branch.seen = self.clock()
        return branch

    def claim(self, branch: Branch, nodes: Iterable[UnifiedTreeNode]) -> None:
        """These nodes hold what the branch's requests computed; who came first keeps them."""
        for node in nodes:
            if node not in self.owners:
                self.owners[node] = branch
                branch.tokens += len(node.key)

    def report(self, tenant: Hashable, group: str, states: Mapping[int, State]) -> None:
        for number, state in states.items():
            self.branch(tenant, group, number).state = state

    def renew(self) -> None:
        """Decide anew which branches are leased, and forget those that are long silent."""
        now = self.clock()
        self.leased = set()
        left: dict[Hashable, float] = {}
        alive = []
        for key, branches in list(self.groups.items()):
            recent = [b for b in branches.values() if now - b.seen <= self.lease_seconds]
            if not recent:
                del self.groups[key]
            alive += [b for b in recent if b.state == "frontier"]
        for branch in sorted(alive, key=lambda b: b.seen, reverse=True):
            room = left.setdefault(branch.tenant, self.tenant_share * self.capacity)
            if branch.tokens <= room:
                left[branch.tenant] = room - branch.tokens
                self.leased.add(branch)

    def rank(self, node: UnifiedTreeNode) -> int:
        branch = self.owners.get(node)
        if branch is None:
            return ORDINARY
        if branch.state == "pruned":
            return PRUNED
        if branch.state == "joined":
            return JOINED
        return LEASED if branch in self.leased else ORDINARY

    def clear(self) -> None:
        """Nothing is in the tree any more."""
        self.owners.clear()
        for branches in self.groups.values():
            for branch in branches.values():
                branch.tokens = 0

    def to_dict(self) -> dict[str, int]:
        """For the status page."""
        branches = [b for group in self.groups.values() for b in group.values()]
        return {"groups": len(self.groups), "branches": len(branches), "leased": len(self.leased)}
