"""Beam search over steps: a beam's score is the chance that all of its steps are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl

import rksc_sglang as rksc
from benchmarks.programs.interface import ALL, SETTINGS, Mechanisms, Outcome, Program, Settings
from benchmarks.programs.prompts import ask_step, opening
from benchmarks.programs.search import Groups, Node, fork_plain, grow, search
from benchmarks.programs.states import judge


@sgl.function
def solve(
    s: Any,
    question: str,
    settings: Settings = SETTINGS,
    mechanisms: Mechanisms = ALL,
    depth: int = 4,
    expansions: int = 3,
    width: int = 2,
) -> Outcome:
    groups = Groups(expansions, mechanisms)

    def expand(nodes: Sequence[Node], is_last: bool) -> list[Node]:
        steps = grow(nodes, groups.fork(nodes), settings, is_last)
        verdict = rksc.verify(
            [step.branch for step in steps],
            "line",
            question=lambda branch: ask_step(branch["line"]),
            share=mechanisms.share,
            exit=mechanisms.exit,
        )
        return [
            step.scored(step.node.score * (score or 0.0))
            for step, score in zip(steps, verdict.scores)
        ]

    s += opening(question, settings.examples)
    return search(s, settings, depth, width, expand, groups.stop)


@sgl.function
def solve_plain(
    s: Any,
    question: str,
    settings: Settings = SETTINGS,
    depth: int = 4,
    expansions: int = 3,
    width: int = 2,
) -> Outcome:
    def expand(nodes: Sequence[Node], is_last: bool) -> list[Node]:
        steps = grow(nodes, fork_plain(nodes, expansions), settings, is_last)
        scores = judge([step.branch for step in steps], lambda branch: ask_step(branch["line"]))
        return [step.scored(step.node.score * score) for step, score in zip(steps, scores)]

    s += opening(question, settings.examples)
    return search(s, settings, depth, width, expand)


PROGRAM = Program("beam_search", solve, solve_plain)
