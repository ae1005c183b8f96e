"""Debate: agents of different personas read in each round what all have said, and then vote."""

from __future__ import annotations

from typing import Any

import sglang as sgl

import rksc_sglang as rksc
from benchmarks.programs.ballot import Ballot
from benchmarks.programs.interface import ALL, SETTINGS, Mechanisms, Outcome, Program, Settings
from benchmarks.programs.prompts import PERSONAS, opening, quote_agents
from benchmarks.programs.states import fork

AGENTS = PERSONAS[:3]


def _turn(settings: Settings, agent: int, message: str, round_: int) -> Any:
    place = round_ * len(AGENTS) + agent
    said = settings.generate("said", place)
    return opening(message, settings.examples, AGENTS[agent]) + said


def _vote(texts: list[str], settings: Settings) -> Outcome:
    winner = Ballot.of([settings.extract(text) for text in texts]).winner
    return Outcome.of(dict(enumerate(texts)), winner, settings)


@sgl.function
def solve(
    s: Any,
    question: str,
    settings: Settings = SETTINGS,
    mechanisms: Mechanisms = ALL,
    rounds: int = 3,
) -> Outcome:
    said: list[str] = []
    for round_ in range(rounds):
        message = quote_agents(question, said)
        agents = rksc.fork(s, len(AGENTS), share=mechanisms.share, confidence=False)
        for agent, state in enumerate(agents):
            state += _turn(settings, agent, message, round_)
        said = [state["said"] for state in agents]
        agents.join()
    return _vote(said, settings)


@sgl.function
def solve_plain(s: Any, question: str, settings: Settings = SETTINGS, rounds: int = 3) -> Outcome:
    """An agent's prompts share the persona and the problem; those of different agents nothing."""
    said: list[str] = []
    for round_ in range(rounds):
        message = quote_agents(question, said)
        agents = fork(s, len(AGENTS))
        for agent, state in enumerate(agents):
            state += _turn(settings, agent, message, round_)
        said = [state["said"] for state in agents]
    return _vote(said, settings)


PROGRAM = Program("debate", solve, solve_plain)
