"""Best-of-N: the solution that a verifier, with words of its own, finds most probably right.

Its words are a further turn of each branch: a system prompt of its own (``system=``) would compute
problem and candidate again, which candidates as short as these do not pay for.
"""

from __future__ import annotations

from typing import Any

import sglang as sgl

import rksc_sglang as rksc
from benchmarks.programs.interface import ALL, SETTINGS, Mechanisms, Outcome, Program, Settings
from benchmarks.programs.prompts import ASK, VERIFIER, opening
from benchmarks.programs.states import fork, judge

QUESTION = f"{VERIFIER} {ASK}"


@sgl.function
def solve(
    s: Any,
    question: str,
    settings: Settings = SETTINGS,
    mechanisms: Mechanisms = ALL,
    branches: int = 8,
) -> Outcome:
    s += opening(question, settings.examples)
    group = rksc.fork(s, branches, share=mechanisms.share, confidence=mechanisms.skip is not None)
    group += lambda i: settings.generate("answer", i)
    verdict = rksc.verify(
        group,
        "answer",
        question=QUESTION,
        share=mechanisms.share,
        exit=mechanisms.exit,
        skip=mechanisms.skip,
        extract=settings.extract,
    )
    group.join()
    texts = {i: branch["answer"] for i, branch in enumerate(group)}
    return Outcome.of(texts, verdict.winner, settings)


@sgl.function
def solve_plain(s: Any, question: str, settings: Settings = SETTINGS, branches: int = 8) -> Outcome:
    s += opening(question, settings.examples)
    states = fork(s, branches)
    for i, state in enumerate(states):
        state += settings.generate("answer", i)
    scores = judge(states, lambda state: QUESTION)
    texts = {i: state["answer"] for i, state in enumerate(states)}
    return Outcome.of(texts, scores.index(max(scores)), settings)


PROGRAM = Program("best_of_n", solve, solve_plain)
