"""Tree of thought: each level grows the best thoughts by several more, and verifies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl

import rksc_sglang as rksc
from benchmarks.programs.interface import ALL, SETTINGS, Mechanisms, Outcome, Program, Settings
from benchmarks.programs.prompts import opening
from benchmarks.programs.search import Groups, Node, fork_plain, grow, search
from benchmarks.programs.states import judge


@sgl.function
def solve(
    s: Any,
    question: str,
    settings: Settings = SETTINGS,
    mechanisms: Mechanisms = ALL,
    depth: int = 3,
    breadth: int = 4,
    keep: int = 2,
) -> Outcome:
    groups = Groups(breadth, mechanisms)

    def expand(nodes: Sequence[Node], is_last: bool) -> list[Node]:
        thoughts = grow(nodes, groups.fork(nodes), settings, is_last)
        branches = [thought.branch for thought in thoughts]
        verdict = rksc.verify(branches, "line", share=mechanisms.share, exit=mechanisms.exit)
        return [thought.scored(score or 0.0) for thought, score in zip(thoughts, verdict.scores)]

    s += opening(question, settings.examples)
    return search(s, settings, depth, keep, expand, groups.stop)


@sgl.function
def solve_plain(
    s: Any,
    question: str,
    settings: Settings = SETTINGS,
    depth: int = 3,
    breadth: int = 4,
    keep: int = 2,
) -> Outcome:
    def expand(nodes: Sequence[Node], is_last: bool) -> list[Node]:
        thoughts = grow(nodes, fork_plain(nodes, breadth), settings, is_last)
        scores = judge([thought.branch for thought in thoughts])
        return [thought.scored(score) for thought, score in zip(thoughts, scores)]

    s += opening(question, settings.examples)
    return search(s, settings, depth, keep, expand)


PROGRAM = Program("tree_of_thought", solve, solve_plain)
