"""Search over partial solutions: grow the best ones by a line, score each, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import rksc_sglang as rksc
from benchmarks.programs.interface import Mechanisms, Outcome, Settings
from benchmarks.programs.states import fork


class Node(NamedTuple):
    """A partial solution.

    Attributes:
        state: whose assistant's turn is open, at the end of ``text``.
    """

    state: Any
    text: str
    score: float


class Grown(NamedTuple):
    """A branch of a node's state that has been asked for one line more."""

    node: Node
    branch: Any

    @property
    def line(self) -> str:
        return self.branch["line"]

    def scored(self, score: float) -> Node:
        separator = "\n" if self.node.text else ""
        return Node(self.branch, f"{self.node.text}{separator}{self.line}", score)


def grow(
    nodes: Sequence[Node],
    forked: Iterable[Iterable[Any]],
    settings: Settings,
    is_last: bool,
) -> list[Grown]:
    """Branches of all nodes, each generating its next line, or at last all that is left.

    Args:
        forked: of each node, the branches of its state.
    """
    grown: list[Grown] = []
    for node, branches in zip(nodes, forked):
        for branch in branches:
            if node.text:
                branch += "\n"
            branch += settings.generate("line", len(grown), None if is_last else "\n")
            grown.append(Grown(node, branch))
    return grown


def fork_plain(nodes: Sequence[Node], breadth: int) -> list[list[Any]]:
    """For :func:`grow`, in plain SGLang."""
    return [fork(node.state, breadth, cached=bool(node.text)) for node in nodes]


class Groups:
    """All groups that a search has forked."""

    def __init__(self, breadth: int, mechanisms: Mechanisms) -> None:
        self.breadth, self.mechanisms = breadth, mechanisms
        self.groups: list[rksc.BranchGroup] = []

    def fork(self, nodes: Sequence[Node]) -> list[rksc.BranchGroup]:
        states = [node.state for node in nodes]
        share = self.mechanisms.share
        forked = rksc.fork_all(states, self.breadth, share=share, confidence=False)
        self.groups += forked
        return forked

    def stop(self, nodes: Sequence[Node]) -> None:
        """Their pages are free for others."""
        states = {id(node.state) for node in nodes}
        for group in self.groups if self.mechanisms.stop else ():
            dropped = [i for i, branch in enumerate(group) if id(branch) in states]
            if dropped:
                group.stop(dropped)


def search(
    root: Any,
    settings: Settings,
    depth: int,
    keep: int,
    expand: Callable[[Sequence[Node], bool], Sequence[Node]],
    drop: Callable[[Sequence[Node]], None] = lambda nodes: None,
) -> Outcome:
    """The best solution, after ``depth`` levels or when all that are kept have an answer.

    Args:
        root: the state behind the problem.
        keep: how many partial solutions a level leaves.
        expand: the scored children of nodes; told whether the level is the last.
        drop: told which of them are not gone on from.
    """
    kept = [Node(root, "", 1.0)]
    for level in range(depth):
        growing = [node for node in kept if not settings.is_finished(node.text)]
        if not growing:
            break
        finished = [node for node in kept if settings.is_finished(node.text)]
        candidates = [*finished, *expand(growing, level == depth - 1)]
        ranked = sorted(candidates, key=lambda node: -node.score)
        kept = ranked[:keep]
        drop(ranked[keep:])
    return Outcome.of(dict(enumerate(node.text for node in kept)), 0, settings)
