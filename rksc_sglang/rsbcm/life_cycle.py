"""What becomes of programs and their branches, and what that says about the KV that they left.

A *program* is one run of a user's program: it forks groups of branches, and some branches fork
again. A branch's nodes are those that its own requests computed; what its program alone reads
beside them (the prefix before a fork) is the program's; what several programs read is nobody's.
Nodes of pruned and joined branches, and of programs that have no branch any more, go before all
others. The rest of a program's nodes are leased, so that the next level of its tree finds them.

A lease is a place in the order of eviction, not a lock: it ends by itself, no tenant's leases are
of more than a share of the pool, and a pool full of leases is evicted like any other. Where
programs want more than there is, those that began first keep theirs: they end first, and what a
program needs is of no use in parts.
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
PRUNED, DONE, ORDINARY, LEASED = range(4)


@dataclass(eq=False)
class Program:
    """One run of a user's program; times in seconds.

    Attributes:
        tenant: namespace of its requests.
        born: when it was first heard of.
        seen: when it was last heard of.
        branches: by group and number.
        prefix_tokens: that it reads beside its branches' own.
        ended: it will read nothing any more.
    """

    tenant: Hashable
    born: float
    seen: float
    branches: dict[tuple[str, int], Branch] = field(default_factory=dict)
    prefix_tokens: int = 0
    leased: bool = False
    ended: bool = False

    @property
    def alive(self) -> bool:
        return not self.ended and any(branch.alive for branch in self.branches.values())

    @property
    def tokens(self) -> int:
        """That a lease covers."""
        live = (branch.tokens for branch in self.branches.values() if branch.alive)
        return self.prefix_tokens + sum(live)


@dataclass(eq=False)
class Branch:
    """One branch of a group.

    Attributes:
        state: as last reported.
        tokens: that its requests left in the tree.
    """

    program: Program
    state: State = "frontier"
    tokens: int = 0

    @property
    def alive(self) -> bool:
        return not self.program.ended and self.state in ("frontier", "won")


@dataclass
class LifeCycle:
    """Programs, branches, and whose which node is.

    Args:
        capacity: of the pool, in tokens.
        lease_seconds: that a program is leased for after it was last heard of.
        tenant_share: of the pool, that one tenant's leases may cover.
    """

    capacity: int
    lease_seconds: float = 60.0
    tenant_share: float = 0.8
    clock: Callable[[], float] = time.monotonic
    programs: dict[tuple[Hashable, str], Program] = field(default_factory=dict)
    groups: dict[tuple[Hashable, str], Program] = field(default_factory=dict)
    owners: WeakKeyDictionary[UnifiedTreeNode, Branch] = field(default_factory=WeakKeyDictionary)
    #: Of nodes that are no branch's: the program that alone reads it, None where several do.
    readers: WeakKeyDictionary[UnifiedTreeNode, Program | None] = field(
        default_factory=WeakKeyDictionary
    )

    def branch(
        self, tenant: Hashable, group: str, number: int, program: str | None = None
    ) -> Branch:
        """A branch that is heard of: by its requests, or by a report.

        Args:
            program: names the run; without it the group is one by itself.
        """
        now = self.clock()
        run = self.groups.get((tenant, group))
        if run is None:
            fresh = Program(tenant, now, now)
            run = self.programs.setdefault((tenant, program or group), fresh)
            self.groups[tenant, group] = run
        run.seen = now
        return run.branches.setdefault((group, number), Branch(run))

    def claim(
        self,
        branch: Branch,
        computed: Iterable[UnifiedTreeNode],
        read: Iterable[UnifiedTreeNode] = (),
    ) -> None:
        """A branch's request left some nodes, and read others; who came first keeps them."""
        for node in computed:
            if node not in self.owners:
                self.owners[node] = branch
                branch.tokens += len(node.key)
        for node in read:
            if node in self.owners:
                continue
            if node not in self.readers:
                self.readers[node] = branch.program
                branch.program.prefix_tokens += len(node.key)
            elif self.readers[node] is not branch.program:
                self.readers[node] = None

    def report(self, tenant: Hashable, group: str, states: Mapping[int, State]) -> None:
        for number, state in states.items():
            self.branch(tenant, group, number).state = state

    def end(self, tenant: Hashable, program: str) -> None:
        """A program is over, and all of its branches."""
        run = self.programs.get((tenant, program))
        if run is not None:
            run.ended = True

    def renew(self) -> None:
        """Decide anew which programs are leased, and forget those that are long silent."""
        now = self.clock()
        silent = [run for run in self.programs.values() if now - run.seen > self.lease_seconds]
        for run in silent:
            run.leased = False
        if silent:
            gone = set(map(id, silent))
            self.programs = {k: run for k, run in self.programs.items() if id(run) not in gone}
            self.groups = {k: run for k, run in self.groups.items() if id(run) not in gone}
        left: dict[Hashable, float] = {}
        for run in self.programs.values():  # in the order in which they were born
            room = left.setdefault(run.tenant, self.tenant_share * self.capacity)
            run.leased = run.alive and run.tokens <= room
            if run.leased:
                left[run.tenant] = room - run.tokens

    def rank(self, node: UnifiedTreeNode) -> int:
        branch = self.owners.get(node)
        if branch is not None and not branch.alive:
            return PRUNED if branch.state == "pruned" else DONE
        run = branch.program if branch is not None else self.readers.get(node)
        if run is None:
            return ORDINARY
        if run.leased:
            return LEASED
        return ORDINARY if run.alive else DONE

    def clear(self) -> None:
        """Nothing is in the tree any more."""
        self.owners.clear()
        self.readers.clear()
        for run in self.programs.values():
            run.prefix_tokens = 0
            for branch in run.branches.values():
                branch.tokens = 0

    def to_dict(self) -> dict[str, int]:
        """For the status page."""
        runs = self.programs.values()
        return {
            "programs": len(self.programs),
            "branches": sum(len(run.branches) for run in runs),
            "leased_programs": sum(run.leased for run in runs),
        }
