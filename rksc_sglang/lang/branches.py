"""``rksc.fork``: branches of one program state that the server knows as a group."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from sglang.lang.interpreter import ProgramState, ProgramStateGroup
from sglang.lang.tracer import TracerProgramState

from rksc_sglang.contract import KEY, SHARES, RequestContract, Together
from rksc_sglang.lang.executor import contract_of_executor, settle
from rksc_sglang.lang.merging import Merge, MergeRule, find_merges
from rksc_sglang.lang.sampling import BranchSamplingParams
from rksc_sglang.lang.server import server_of


class BranchGroup(ProgramStateGroup):
    """Sibling branches: SGLang's state group, iterable, with an identity on the server.

    Attributes:
        group: the id that travels in the request contract; ``ids`` are ``(group, branch)`` pairs.
        depth: counts nested forks from 0.
        stopped: the branches stopped so far.
        merged: the branches merged so far, which are stopped too.
        weights: of each branch, the votes that it has: its own, and those of branches merged into
            it.
    """

    def __init__(
        self,
        states: list[ProgramState],
        source: ProgramState,
        group: str,
        depth: int,
        merge: MergeRule | None = None,
    ) -> None:
        super().__init__(states, source)
        self.group = group
        self.depth = depth
        self.stopped: set[int] = set()
        self.merged: list[Merge] = []
        self.weights = [1] * len(states)
        self._rule = merge or MergeRule()

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __iadd__(self, other: Any) -> BranchGroup:
        """Append to each branch: one expression or text for all, a list, or a function of i.

        Branches that were merged into others get nothing more.
        """
        other = [other] * len(self) if isinstance(other, str) else other
        if not self.merged:
            return super().__iadd__(other)
        for branch, state in enumerate(self.states):
            if self.weights[branch]:
                if isinstance(other, list | tuple):
                    state += other[branch]
                else:
                    state += other(branch) if callable(other) else other
        return self

    @property
    def ids(self) -> list[tuple[str, int]]:
        return [(self.group, branch) for branch in range(len(self))]

    def stop(self, branches: Iterable[int] | None = None) -> list[int]:
        """Stop branches, all of them by default: what they are generating ends where it is.

        A server without RKSC lets them finish; they count as stopped all the same, and
        ``rksc.verify`` skips them.

        Returns:
            The branches that were generating and have been aborted.

        Raises:
            IndexError: there is no such branch.
        """
        chosen = set(range(len(self)) if branches is None else branches)
        unknown = [branch for branch in chosen if not 0 <= branch < len(self)]
        if unknown:
            raise IndexError(f"no branch {unknown[0]} in a group of {len(self)}")
        self.stopped |= chosen
        left = dict.fromkeys(set(range(len(self))) - self.stopped, "frontier")
        return self.report({**dict.fromkeys(sorted(chosen), "pruned"), **left})

    def merge(self, var: str, rule: MergeRule | None = None) -> list[Merge]:
        """Go on once from branches that thought the same: the duplicates are stopped.

        Waits for what was appended so far. Each duplicate's votes go to the branch that it is
        merged into, whose text and KV stay its own; ``get_meta_info(var)`` of a duplicate says so
        under ``rksc``.

        Args:
            var: the variable with the thoughts so far.
            rule: when two are the same; by default the group's own, of ``rksc.fork(merge=...)``.

        Returns:
            Who was merged into whom.

        Raises:
            MergeError: the server cannot tell.
        """
        if isinstance(self.src_state, TracerProgramState):
            return []
        found = find_merges(self, var, rule or self._rule)
        for merge in found:
            self.weights[merge.into] += self.weights[merge.branch]
            self.weights[merge.branch] = 0
            meta = self.states[merge.branch].stream_executor.meta_info.setdefault(var, {})
            meta[KEY] = {**(meta.get(KEY) or {}), "merged_into": merge.into}
        self.merged += found
        if found:
            self.stop(merge.branch for merge in found)
        return found

    def votes(self, answers: Callable[[ProgramState], Hashable | None]) -> Counter[Hashable]:
        """How many votes each answer has; branches that were merged vote with those they are part
        of.

        Args:
            answers: of a branch's state; None: it votes for nobody.
        """
        counted: Counter[Hashable] = Counter()
        for branch, state in enumerate(self.states):
            answer = answers(state) if branch not in self.stopped else None
            if answer is not None:
                counted[answer] += self.weights[branch]
        return counted

    def join(self, mode: str = "gather_variable") -> None:
        """As in SGLang: wait for all branches, gather their variables into the source state.

        Raises:
            RuntimeError: a branch failed; the message says which and why.
        """
        if isinstance(self.src_state, TracerProgramState):
            return  # Nothing ran, so there is nothing to gather.
        for branch, state in enumerate(self.states):
            error = settle(state)
            if error is not None:
                raise RuntimeError(f"branch {branch} failed: {error}") from error
        super().join(mode)
        self.report({b: "joined" for b in range(len(self)) if b not in self.stopped})

    def report(self, states: dict[int, str]) -> list[int]:
        """Tell the server what became of branches; returns those that it aborted."""
        if isinstance(self.src_state, TracerProgramState):
            return []
        server = server_of(self.src_state.stream_executor.backend)
        return server.report_states(self.group, states) if server is not None else []


def _program_of(s: ProgramState) -> str:
    """Names this run of the program: all forks of a state that was not forked itself."""
    executor = s.stream_executor
    if not hasattr(executor, "rksc_program"):
        executor.rksc_program = uuid.uuid4().hex
        server_of(executor.backend)  # which hears of its end
    return executor.rksc_program


def fork(
    s: ProgramState,
    n: int,
    *,
    hints: Sequence[Any] | None = None,
    share: str | None = None,
    confidence: bool = True,
    merge: MergeRule | None = None,
) -> BranchGroup:
    """Fork a program state into ``n`` branches over its shared prefix, which is computed once.

    SGLang computes it when a state is forked, and the branches later. A server with RKSC's
    root-first fan-out is told how many branches will come, and computes it with them; a prefix of
    few tokens (``--rksc-root-first-min-tokens``) with each of them.

    Args:
        s: state of an ``@sgl.function`` program.
        n: number of branches, at least 1.
        hints: appended to the branches, one each: text, or any expression of the language.
        share: "exact", or "similar" to let the server share KV of equal text behind different
            prefixes; None leaves it to the server.
        confidence: have the server return the top probability of each generated token, which
            ``rksc.verify`` reports and uses to break ties.
        merge: when ``group.merge(var)`` takes two branches for the same.

    Raises:
        ValueError: a wrong argument, named.
        RuntimeError: the program has failed before it came here.
    """
    if hints is not None and (isinstance(hints, str) or len(hints) != n):
        raise ValueError(f"hints: expected {n} of them, one a branch, got {hints!r}")
    branches = fork_all([s], n, share=share, confidence=confidence, merge=merge)[0]
    if hints is not None:
        branches += list(hints)
    return branches


def fork_all(
    states: Sequence[ProgramState],
    n: int,
    *,
    share: str | None = None,
    confidence: bool = True,
    merge: MergeRule | None = None,
) -> list[BranchGroup]:
    """Fork each of several states, as a search does with all that it goes on from.

    The branches of all of them are asked for their first generations at the same time.

    Args, raises: as :func:`fork`.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n: expected an integer of at least 1, got {n!r}")
    if share is not None and share not in SHARES:
        raise ValueError(f"share: expected one of {', '.join(SHARES)}, got {share!r}")
    count = n * len(states)
    together = Together(id=uuid.uuid4().hex, count=count) if count > 1 else None
    groups = []
    for s in states:
        group, depth, program = uuid.uuid4().hex, 0, None
        branches = _fork(s, n)
        if not isinstance(s, TracerProgramState):
            parent = contract_of_executor(s.stream_executor)
            if parent is not None and parent.depth is not None:
                depth = parent.depth + 1
            program = parent.program if parent is not None else _program_of(s)
            for branch, state in enumerate(branches):
                executor = state.stream_executor
                executor.default_sampling_para = BranchSamplingParams.of_branch(
                    executor.default_sampling_para,
                    RequestContract(
                        program=program,
                        group=group,
                        branch=branch,
                        depth=depth,
                        share=share,
                        together=together,
                    ),
                    confidence=confidence,
                )
        groups.append(BranchGroup(branches, s, group, depth, merge))
    return groups


def _fork(s: ProgramState, n: int) -> list[ProgramState]:
    if isinstance(s, TracerProgramState):
        return s.fork(n).states
    # SGLang commits the prefix when the state has text, which its own thread may not have written
    # yet.
    error = settle(s)
    if error is not None:
        raise RuntimeError(f"the program failed before the fork: {error}") from error
    server = server_of(s.stream_executor.backend)
    if server is not None and server.admits_together():
        # Into one: for several SGLang would compute the prefix now, in a pass of its own.
        return [s.fork(1).states[0] for _ in range(n)]
    return s.fork(n).states
