"""What becomes of programs and their branches, and what that says about the KV that they left.

A *program* is one run of a user's program: it forks groups of branches, and some branches fork
again. A branch's nodes are those that its own requests computed; what its program alone reads
beside them (the prefix before a fork) is the program's; what several programs read is nobody's.
Nodes of pruned branches, and of programs that are over, go before all others; so does what a
verification computed behind a longer text, its question, until something else reads it. Branches
that are reported as the frontier, to be gone on from, can be leased: their nodes count as just
used.

A lease is a place in the order of eviction, not a lock: it ends by itself, no tenant's leases are
of more than a share of the pool, and a pool full of leases is evicted like any other. Where
branches want more than there is, those that were reported first keep theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode

#: As ``POST /rksc/branches`` takes them.
State = Literal["frontier", "joined", "pruned", "won"]
STATES: tuple[State, ...] = get_args(State)

#: Ranks of nodes, lowest evicted first.
PRUNED, DONE, ORDINARY = range(3)


@dataclass(eq=False)
class Program:
    """One run of a user's program.

    Attributes:
        tenant: namespace of its requests.
        name: by which it is known there; its group's, where its requests name none.
        seen: when it was last heard of, in seconds.
        branches: by group and number.
        named: by its requests; else it is one group, and over when all of its branches are.
        ended: it will read nothing any more.
        scraps: owns what its verifications computed.
    """

    tenant: Hashable
    name: str
    seen: float
    named: bool
    branches: dict[tuple[str, int], Branch] = field(default_factory=dict)
    ended: bool = False
    scraps: Branch = field(init=False)

    def __post_init__(self) -> None:
        self.scraps = Branch(self)


@dataclass(eq=False)
class Branch:
    """One branch of a group.

    Attributes:
        state: as last reported.
        reported: when that was, in seconds.
        tokens: that its requests left in the tree.
    """

    program: Program
    state: State | None = None
    reported: float = 0.0
    tokens: int = 0
    leased: bool = False

    @property
    def over(self) -> bool:
        return self.program.ended or self is self.program.scraps


@dataclass
class LifeCycle:
    """Programs, branches, and whose which node is.

    Args:
        capacity: of the pool, in tokens.
        lease_seconds: that a branch is leased for after it was reported as the frontier.
        memory_seconds: that a silent program is remembered for.
        tenant_share: of the pool, that one tenant's leases may cover.
    """

    capacity: int
    lease_seconds: float = 60.0
    memory_seconds: float = 600.0
    tenant_share: float = 0.5
    clock: Callable[[], float] = time.monotonic
    #: The longest silent one first.
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
            fresh = Program(tenant, program or group, now, named=program is not None)
            run = self.programs.setdefault((tenant, fresh.name), fresh)
            self.groups[tenant, group] = run
        run.seen = now
        self.programs[tenant, run.name] = self.programs.pop((tenant, run.name))
        return run.branches.setdefault((group, number), Branch(run))

    def claim(
        self,
        branch: Branch,
        computed: Sequence[UnifiedTreeNode],
        read: Sequence[UnifiedTreeNode] = (),
        verifies: bool = False,
    ) -> None:
        """A branch's request left some nodes, and read others; who came first keeps them.

        Args:
            verifies: it was a verification.
        """
        run = branch.program
        if verifies and _tokens(computed) < _tokens(read):
            branch = run.scraps
        for node in computed:
            if node not in self.owners:
                self.owners[node] = branch
                branch.tokens += len(node.key)
        for node in read:
            owner = self.owners.get(node)
            if owner is not None and (verifies or owner is not owner.program.scraps):
                continue
            self.owners.pop(node, None)
            if node not in self.readers:
                self.readers[node] = run
            elif self.readers[node] is not run:
                self.readers[node] = None

    def split(self, head: UnifiedTreeNode, tail: UnifiedTreeNode) -> None:
        """A node was split: its head is whose it was."""
        if tail in self.owners:
            self.owners[head] = self.owners[tail]
        if tail in self.readers:
            self.readers[head] = self.readers[tail]

    def report(self, tenant: Hashable, group: str, states: Mapping[int, State]) -> None:
        for number, state in states.items():
            branch = self.branch(tenant, group, number)
            branch.state, branch.reported = state, self.clock()
            run = branch.program
            if not run.named:
                run.ended = all(b.state in ("joined", "pruned") for b in run.branches.values())

    def end(self, tenant: Hashable, program: str) -> None:
        """A program is over, and all of its branches."""
        run = self.programs.get((tenant, program))
        if run is not None:
            run.ended = True

    def forget(self) -> None:
        """Forget programs that are long silent."""
        oldest = self.clock() - self.memory_seconds
        while self.programs:
            key, run = next(iter(self.programs.items()))
            if run.seen >= oldest:
                return
            del self.programs[key]
            for group, _ in run.branches:
                self.groups.pop((run.tenant, group), None)

    def renew(self) -> None:
        """Decide anew which branches are leased; what is long silent is forgotten first."""
        self.forget()
        now = self.clock()
        frontier: list[Branch] = []
        for run in self.programs.values():
            for branch in run.branches.values():
                branch.leased = False
                if branch.state == "frontier" and not branch.over:
                    frontier.append(branch)
        left: dict[Hashable, float] = {}
        for branch in sorted(frontier, key=lambda branch: branch.reported):
            tenant = branch.program.tenant
            room = left.setdefault(tenant, self.tenant_share * self.capacity)
            if now - branch.reported <= self.lease_seconds and branch.tokens <= room:
                left[tenant] = room - branch.tokens
                branch.leased = True

    def rank(self, node: UnifiedTreeNode) -> int:
        branch = self.owners.get(node)
        if branch is not None:
            return PRUNED if branch.state == "pruned" else DONE if branch.over else ORDINARY
        run = self.readers.get(node)
        return DONE if run is not None and run.ended else ORDINARY

    def is_leased(self, node: UnifiedTreeNode) -> bool:
        branch = self.owners.get(node)
        return branch is not None and branch.leased

    def clear(self) -> None:
        """Nothing is in the tree any more."""
        self.owners.clear()
        self.readers.clear()
        for run in self.programs.values():
            for branch in run.branches.values():
                branch.tokens = 0

    def to_dict(self) -> dict[str, int]:
        """For the status page."""
        runs = self.programs.values()
        return {
            "programs": len(self.programs),
            "branches": sum(len(run.branches) for run in runs),
            "leased": sum(b.leased for run in runs for b in run.branches.values()),
        }


def _tokens(nodes: Sequence[UnifiedTreeNode]) -> int:
    return sum(len(node.key) for node in nodes)
