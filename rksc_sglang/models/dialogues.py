"""Conversations about problems, as users and programs hold them: what the reasoner is trained on.

A problem is solved under some system prompt, behind a hint or another agent's attempt; solutions
right and wrong are judged, behind the conversation that made them or quoted before a verifier of
its own system prompt, whole or a single step, with the verdict at once or after thinking. Only
what the assistant ought to say is learned: nobody learns from a wrong solution.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from rksc_sglang.models.problems import Problem, check, extract_answer, follow_up

YES, NO = "YES", "NO"
START, END = "<|im_start|>", "<|im_end|>"

#: What a sampled attempt of the model itself is taken from; empty where there are none yet.
Attempts = Callable[[Problem], Sequence[str]]


class Turn(NamedTuple):
    """One message; ``learn``: an assistant's message that is trained on."""

    role: Literal["system", "user", "assistant"]
    text: str
    learn: bool = False

    def __str__(self) -> str:
        return f"{START}{self.role}\n{self.text}{END}\n"


Dialogue = list[Turn]


def prompt_of(dialogue: Sequence[Turn]) -> str:
    """The text of a conversation, up to where the assistant is to speak."""
    return f"{''.join(map(str, dialogue))}{START}assistant\n"


_WHO = (
    "You are a helpful assistant.",
    "You are a careful mathematician.",
    "You are a patient teacher.",
    "You are a strict examiner.",
    "You are a clerk who makes no mistakes.",
    "You are a student who likes puzzles.",
    "You are one of several agents who solve the same problem.",
    "You are an engineer.",
    "You solve problems.",
    "You are an expert.",
    "",
)
_HOW = (
    "Work step by step.",
    "Write one step on each line.",
    "Be brief.",
    "Be exact.",
    "Take your time.",
    "Do not guess.",
    "Read the question twice.",
    "Show your work.",
    "Answer in one short sentence.",
    "",
)
_END = ("End with the answer.", "Write the answer on the last line.", "")
_VERIFIERS = (
    "You check the work of others.",
    "You are a strict verifier.",
    "You decide whether a solution is correct.",
    "You are a judge of solutions.",
    "You grade the answers of students.",
    "You review what other agents have answered.",
)
_HINTS = (
    "Think step by step.",
    "Hint: begin with the first number.",
    "Be careful with the signs.",
    "First write down what is known.",
    "Check each step.",
    "Do it slowly.",
    "Someone else has answered this wrongly.",
    "Try it another way.",
    "Answer briefly.",
    "Be exact.",
    "Think carefully.",
    "Take your time.",
)
_ASK = (
    "Is the answer above correct? Reply with YES or NO.",
    "Is the proposed solution correct? Reply with YES or NO.",
    "Is this solution correct? Answer YES or NO.",
    "Is it right? YES or NO.",
    "Check the solution above. Is it correct? Answer YES or NO.",
)
_GRADE = (
    "Go through the solution step by step, and say after each step whether it is right.",
    "Check the solution line by line. YES or NO for each line, then your verdict.",
)
_THINK = (
    "Check the solution. Think first, then give your verdict.",
    "Work it out yourself, then say whether the solution is correct.",
)


def system_prompt(rng: random.Random) -> str:
    return " ".join(part for part in map(rng.choice, (_WHO, _HOW, _END)) if part)


def verifier_prompt(rng: random.Random) -> str:
    return " ".join(part for part in map(rng.choice, (_VERIFIERS, _HOW)) if part)


def user_prompt(problem: Problem, rng: random.Random) -> str:
    """The question, at times with a hint before or behind it."""
    place = rng.random()
    if place < 0.2:
        return f"{rng.choice(_HINTS)}\n\n{problem.question}"
    return f"{problem.question} {rng.choice(_HINTS)}" if place < 0.4 else problem.question


def quote(problem: Problem, candidate: str) -> str:
    """As :func:`quote_text`, of a problem."""
    return quote_text(problem.question, candidate)


def quote_text(question: str, candidate: str) -> str:
    """A verifier's user message around a problem and a candidate, without its question."""
    return f"Problem:\n{question}\n\nProposed solution:\n{candidate}"


def quote_agents(question: str, said: Sequence[str]) -> str:
    """A problem with what each agent has said about it; the problem alone where none has."""
    if not said:
        return question
    quoted = "\n\n".join(f"Agent {n} says:\n{text}" for n, text in enumerate(said, 1))
    return f"{question}\n\n{quoted}\n\nGive your own solution."


def ask_step(step: str) -> str:
    return f"Step: {step}\nIs this step right? YES or NO."


def thought_verdict(problem: Problem, candidate: str) -> str:
    """How a verifier that thinks answers: it solves the problem, compares, and decides."""
    proposed = extract_answer(candidate)
    verdict = _verdict(problem, candidate).text
    return f"{problem.solution}\nProposed: {proposed}\nVerdict: {verdict}"


def graded(problem: Problem, candidate: str) -> str:
    """How a verifier that goes through a solution answers: up to the first line that is wrong."""
    lines = candidate.splitlines()
    right = max(_shared_lines(lines, work.text.splitlines()) for work in problem.works())
    said = [f"{line} {YES}" for line in lines[:right]]
    if check(problem, candidate):
        said += [f"{line} {YES}" for line in lines[right:]]
    elif right < len(lines):
        said.append(f"{lines[right]} {NO}")
    return "\n".join([*said, f"Verdict: {_verdict(problem, candidate).text}"])


def _shared_lines(a: Sequence[str], b: Sequence[str]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def make_dialogue(
    problem: Problem, rng: random.Random, attempts: Attempts = lambda problem: ()
) -> Dialogue:
    """A conversation of a random kind about a problem."""
    make = rng.choices(list(_KINDS), weights=list(_KINDS.values()))[0]
    return make(problem, rng, attempts)


def _candidate(problem: Problem, rng: random.Random, attempts: Attempts) -> str:
    """A solution, right or wrong with equal chances: wrong as the model errs, where it does."""
    right = rng.random() < 0.5
    own = [text for text in attempts(problem) if check(problem, text) == right]
    if own and rng.random() < 0.8:
        return rng.choice(own)
    return (rng.choice(problem.works()) if right else problem.slip(rng)).text


def _opening(rng: random.Random, system: Callable[[random.Random], str]) -> Dialogue:
    text = system(rng)
    return [Turn("system", text)] if text and rng.random() < 0.7 else []


def _solve(problem: Problem, rng: random.Random, attempts: Attempts) -> Dialogue:
    turns = [
        *_opening(rng, system_prompt),
        Turn("user", user_prompt(problem, rng)),
        Turn("assistant", rng.choice(problem.works()).text, True),
    ]
    for _ in range(rng.randint(2, 8)):
        more = follow_up(problem, rng)
        if more is not None:
            turns += [Turn("user", more.question), Turn("assistant", more.solution, True)]
    return turns


def _debate(problem: Problem, rng: random.Random, attempts: Attempts) -> Dialogue:
    said = [_candidate(problem, rng, attempts) for _ in range(1, rng.randint(2, 3))]
    return [
        *_opening(rng, system_prompt),
        Turn("user", quote_agents(problem.question, said)),
        Turn("assistant", rng.choice(problem.works()).text, True),
    ]


def _verdict(problem: Problem, candidate: str) -> Turn:
    return Turn("assistant", YES if check(problem, candidate) else NO, True)


def _judge(problem: Problem, rng: random.Random, attempts: Attempts) -> Dialogue:
    """The verdict behind the conversation that the solution came from."""
    candidate = _candidate(problem, rng, attempts)
    turns = [
        *_opening(rng, rng.choice((system_prompt, verifier_prompt))),
        Turn("user", user_prompt(problem, rng)),
        Turn("assistant", candidate, check(problem, candidate)),
        Turn("user", rng.choice(_ASK)),
        _verdict(problem, candidate),
    ]
    return turns + _more_candidates(problem, rng, attempts)


def _quoted(problem: Problem, rng: random.Random, attempts: Attempts) -> Dialogue:
    """The verdict of a verifier to whom problem and solution are quoted."""
    candidate = _candidate(problem, rng, attempts)
    turns = [
        *_opening(rng, verifier_prompt),
        Turn("user", f"{quote(problem, candidate)}\n\n{rng.choice(_ASK)}"),
        _verdict(problem, candidate),
    ]
    return turns + _more_candidates(problem, rng, attempts)


def _more_candidates(problem: Problem, rng: random.Random, attempts: Attempts) -> Dialogue:
    turns: Dialogue = []
    for _ in range(rng.randint(2, 6)):
        candidate = _candidate(problem, rng, attempts)
        turns.append(Turn("user", f"Another solution:\n{candidate}\n\n{rng.choice(_ASK)}"))
        turns.append(_verdict(problem, candidate))
    return turns


def _think(problem: Problem, rng: random.Random, attempts: Attempts) -> Dialogue:
    candidate = _candidate(problem, rng, attempts)
    return [
        *_opening(rng, verifier_prompt),
        Turn("user", f"{quote(problem, candidate)}\n\n{rng.choice(_THINK)}"),
        Turn("assistant", thought_verdict(problem, candidate), True),
    ]


def _grade(problem: Problem, rng: random.Random, attempts: Attempts) -> Dialogue:
    turns = _opening(rng, verifier_prompt)
    for number in range(rng.randint(1, 4)):
        candidate = _candidate(problem, rng, attempts)
        quoted = f"Another solution:\n{candidate}" if number else quote(problem, candidate)
        turns.append(Turn("user", f"{quoted}\n\n{rng.choice(_GRADE)}"))
        turns.append(Turn("assistant", graded(problem, candidate), True))
    return turns


def _step(problem: Problem, rng: random.Random, attempts: Attempts) -> Dialogue:
    """Single steps are judged: those of a solution, and where one with a slip leaves it."""
    turns = _opening(rng, verifier_prompt)
    for number in range(rng.randint(2, 8)):
        right, wrong = problem.slip_beside(rng)
        slipped = next(b for a, b in zip(right.steps, wrong.steps) if a != b)
        good = rng.random() < 0.5
        asked = ask_step(rng.choice(right.steps) if good else slipped)
        turns.append(Turn("user", asked if number else f"{problem.question}\n\n{asked}"))
        turns.append(Turn("assistant", YES if good else NO, True))
    return turns


_KINDS = {
    _solve: 0.3,
    _judge: 0.2,
    _quoted: 0.1,
    _grade: 0.2,
    _think: 0.05,
    _debate: 0.05,
    _step: 0.1,
}
