"""Questions about a document: personas read it, a verifier reads it again and thinks about each.

The document stands in the problem's text, before the question.
"""

from __future__ import annotations

from typing import Any

import sglang as sgl

import rksc_sglang as rksc
from benchmarks.programs.ballot import Ballot
from benchmarks.programs.interface import ALL, SETTINGS, Mechanisms, Outcome, Program, Settings
from benchmarks.programs.prompts import (
    PERSONAS,
    THINK,
    VERIFIER,
    is_accepted,
    opening,
    quote,
)
from benchmarks.programs.states import as_finished, fork


def _read(settings: Settings, reader: int, question: str) -> Any:
    answer = settings.generate("answer", reader)
    return opening(question, settings.examples, PERSONAS[reader]) + answer


def _think(settings: Settings, reader: int) -> Any:
    return settings.generate("thoughts", len(PERSONAS) + reader)


def _outcome(
    texts: dict[int, str], answers: list[str | None], accepted: Ballot, settings: Settings
) -> Outcome:
    """The most frequent of the accepted answers, or of all where none was accepted."""
    winner = accepted.winner
    if winner is None:
        winner = Ballot.of(answers).winner
    return Outcome.of(texts, winner, settings)


@sgl.function
def solve(
    s: Any, question: str, settings: Settings = SETTINGS, mechanisms: Mechanisms = ALL
) -> Outcome:
    readers = rksc.fork(s, len(PERSONAS), share=mechanisms.share, confidence=False)
    for reader, state in enumerate(readers):
        state += _read(settings, reader, question)
    texts = {reader: state["answer"] for reader, state in enumerate(readers)}
    answers = [settings.extract(text) for text in texts.values()]
    accepted = Ballot(len(texts))
    readers.join()
    if not settings.are_agreed(answers):
        checks = rksc.fork(s, len(texts), share=mechanisms.share, confidence=False)
        for reader, state in enumerate(checks):
            message = f"{quote(question, texts[reader])}\n\n{THINK}"
            state += sgl.system(VERIFIER) + sgl.user(message) + sgl.assistant_begin()
            state += _think(settings, reader)
        for reader, thoughts in as_finished(checks.states, "thoughts"):
            accepted.cast(reader, answers[reader] if is_accepted(thoughts) else None)
            if accepted.decided:
                if mechanisms.stop:
                    checks.stop(accepted.missing)
                break
    return _outcome(texts, answers, accepted, settings)


@sgl.function
def solve_plain(s: Any, question: str, settings: Settings = SETTINGS) -> Outcome:
    """The verifier's prompt is a further turn of each reader, which computes nothing again."""
    readers = fork(s, len(PERSONAS))
    for reader, state in enumerate(readers):
        state += _read(settings, reader, question)
    texts = {reader: state["answer"] for reader, state in enumerate(readers)}
    answers = [settings.extract(text) for text in texts.values()]
    accepted = Ballot(len(texts))
    if not settings.are_agreed(answers):
        for reader, state in enumerate(readers):
            state += sgl.assistant_end() + sgl.user(f"{VERIFIER} {THINK}") + sgl.assistant_begin()
            state += _think(settings, reader)
        for reader, thoughts in as_finished(readers, "thoughts"):
            accepted.cast(reader, answers[reader] if is_accepted(thoughts) else None)
            if accepted.decided:
                break
    return _outcome(texts, answers, accepted, settings)


PROGRAM = Program("document_qa", solve, solve_plain)
