"""The paper's setting: eight strategy hints behind one long prompt, short answers, YES or NO."""

from __future__ import annotations

from typing import Any

import sglang as sgl

import rksc_sglang as rksc
from benchmarks.programs.interface import ALL, SETTINGS, Mechanisms, Outcome, Program, Settings
from benchmarks.programs.states import fork, judge

HINTS = (
    "Think step by step.",
    "First write down what is known.",
    "Work backwards from what is asked.",
    "Look for a simpler problem of the same kind.",
    "Rule out what cannot be.",
    "Check each step before the next.",
    "Look at the units and the sizes.",
    "Answer at once, then say why.",
)


def _answer(settings: Settings, branch: int) -> Any:
    answer = settings.generate("answer", branch)
    return f" {HINTS[branch]}" + sgl.user_end() + sgl.assistant_begin() + answer


@sgl.function
def solve(
    s: Any, question: str, settings: Settings = SETTINGS, mechanisms: Mechanisms = ALL
) -> Outcome:
    s += sgl.user_begin() + question
    gated = mechanisms.skip is not None
    group = rksc.fork(s, len(HINTS), share=mechanisms.share, confidence=gated)
    group += lambda branch: _answer(settings, branch)
    verdict = rksc.verify(
        group,
        "answer",
        share=mechanisms.share,
        exit=mechanisms.exit,
        skip=mechanisms.skip,
        extract=settings.extract,
    )
    group.join()
    texts = {i: branch["answer"] for i, branch in enumerate(group)}
    return Outcome.of(texts, verdict.winner, settings)


@sgl.function
def solve_plain(s: Any, question: str, settings: Settings = SETTINGS) -> Outcome:
    s += sgl.user_begin() + question
    states = fork(s, len(HINTS))
    for branch, state in enumerate(states):
        state += _answer(settings, branch)
    scores = judge(states)
    texts = {i: state["answer"] for i, state in enumerate(states)}
    return Outcome.of(texts, scores.index(max(scores)), settings)


PROGRAM = Program("paper_setting", solve, solve_plain)
