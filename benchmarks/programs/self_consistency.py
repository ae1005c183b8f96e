"""Self-consistency: the most frequent answer of several samples, known before all have ended."""

from __future__ import annotations

from typing import Any

import sglang as sgl

import rksc_sglang as rksc
from benchmarks.programs.ballot import Ballot
from benchmarks.programs.interface import ALL, SETTINGS, Mechanisms, Outcome, Program, Settings
from benchmarks.programs.prompts import opening
from benchmarks.programs.states import as_finished, fork


@sgl.function
def solve(
    s: Any,
    question: str,
    settings: Settings = SETTINGS,
    mechanisms: Mechanisms = ALL,
    branches: int = 8,
) -> Outcome:
    s += opening(question, settings.examples)
    group = rksc.fork(s, branches, share=mechanisms.share, confidence=False)
    group += lambda i: settings.generate("answer", i)
    ballot, texts = Ballot(branches), {}
    for branch, text in as_finished(group.states, "answer"):
        texts[branch] = text
        ballot.cast(branch, settings.extract(text))
        if ballot.decided:
            if mechanisms.stop:
                group.stop(ballot.missing)
            break
    return Outcome.of(texts, ballot.winner, settings)


@sgl.function
def solve_plain(s: Any, question: str, settings: Settings = SETTINGS, branches: int = 8) -> Outcome:
    """Answers as early, but what the other samples generate then is generated in vain."""
    s += opening(question, settings.examples)
    states = fork(s, branches)
    for i, state in enumerate(states):
        state += settings.generate("answer", i)
    ballot, texts = Ballot(branches), {}
    for branch, text in as_finished(states, "answer"):
        texts[branch] = text
        ballot.cast(branch, settings.extract(text))
        if ballot.decided:
            break
    return Outcome.of(texts, ballot.winner, settings)


PROGRAM = Program("self_consistency", solve, solve_plain)
