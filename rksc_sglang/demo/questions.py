"""Questions with known answers: reading them, and comparing answers with them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rksc_sglang.models.problems import extract_answer

OWN_QUESTIONS = Path(__file__).with_name("questions.jsonl")
#: For the reasoner: problems of the split that it was not trained on.
OWN_PROBLEMS = Path(__file__).with_name("problems.jsonl")

#: What a reply to a question comes down to; empty where there is no answer in it.
AnswerKey = Callable[[str, str], str]

#: Words of a sentence around its answer: "The painting *was made by* Rembrandt."
_FILLERS = frozenset(
    "a an the is are was were be been it its of in on at to by from for and or as that this there "
    "s has have had do does did called named known located found made written painted".split()
)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")


class QuestionsError(Exception):
    """A questions file cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Question:
    """``answers`` are all the right ones, as the file's answer key makes them."""

    text: str
    answers: frozenset[str]


def answer_key(reply: str, question: str) -> str:
    """What a reply comes down to, so that replies can be counted and compared.

    Its last number if it has any; else yes or no if it begins so; else its words, without those
    that the question has already and those that carry nothing: "The capital of France is Paris."
    comes down to "paris".
    """
    numbers = _NUMBER.findall(reply)
    if numbers:
        value = numbers[-1].replace(",", "")
        return value.rstrip("0").rstrip(".") if "." in value else value
    words = re.findall(r"\w+", reply.lower())
    if words and words[0] in ("yes", "no"):
        return words[0]
    known = {*re.findall(r"\w+", question.lower()), *_FILLERS}
    return " ".join([word for word in words if word not in known] or words)


def stated_answer(reply: str, question: str) -> str:
    """What stands behind "Answer:", as the reasoner ends its solutions."""
    return extract_answer(reply) or ""


def vote(keys: Sequence[str], scores: Sequence[float | None]) -> tuple[str, int]:
    """The answer given most often, and how often; the best score decides between equals.

    An empty answer wins only when there is no other.
    """
    votes = Counter(keys)
    best: dict[str, float] = {}
    for key, score in zip(keys, scores):
        best[key] = max(best.get(key, 0.0), score or 0.0)
    winner = max(votes, key=lambda key: (key != "", votes[key], best[key]))
    return winner, votes[winner]


def load_questions(path: Path, key: AnswerKey = answer_key) -> list[Question]:
    """Read JSON lines of ``question`` and ``answer``; ``key`` is what replies are compared by.

    An answer is a string, a number, or a list of them when several are right; of a string with
    ``####`` (GSM8K), what follows counts.

    Raises:
        QuestionsError: naming the file and the first line that is wrong.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise QuestionsError(f"{path}: {error.strerror}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(_parse(line, key))
        except ValueError as error:
            raise QuestionsError(f"{path}:{number}: {error}") from None
    if not questions:
        raise QuestionsError(f"{path}: no questions in it")
    return questions


def _parse(line: bytes, key: AnswerKey) -> Question:
    try:
        raw = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(raw, dict):
        raise ValueError('expected an object with "question" and "answer"')
    for name in ("question", "answer"):
        if name not in raw:
            raise ValueError(f'"{name}" is missing')
    text = raw["question"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"question": expected some text, got {text!r}')
    answers = raw["answer"] if isinstance(raw["answer"], list) else [raw["answer"]]
    if not answers:
        raise ValueError('"answer": the list is empty')
    return Question(text.strip(), frozenset(_right_key(answer, text, key) for answer in answers))


def _right_key(answer: Any, question: str, key: AnswerKey) -> str:
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ValueError(f'"answer": expected text or a number, got {answer!r}')
    found = key(str(answer).split("####")[-1], question)
    if not found:
        raise ValueError(f'"answer": no word and no number in {answer!r}')
    return found
