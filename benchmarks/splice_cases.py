"""Prompts for ``benchmarks.splice``: pairs of a donor and a prompt that repeats text of it.

Written as users write them, in SmolLM2's ChatML, over prose of the machine and, where given, word
problems of a file. The same seed gives the same cases.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The families of cases, by the workload's name in the rows.
PERSONA, VERIFIER, HINT, ORDER, ADVERSARIAL, LENGTH = (
    "a_persona",
    "b_verifier",
    "c_hint",
    "d_order",
    "e_adversarial",
    "length",
)

PERSONAS = (
    "You are a helpful assistant.",
    "You are a careful technical writer. You answer in plain words and never guess.",
    "You are a lawyer who reads every text for duties, rights and exceptions.",
    "You are a patient teacher. Explain things so that a child of ten understands them.",
    "You are a senior software engineer who reviews documentation before a release.",
    "You are an examiner. You are strict, you quote the text, and you do not add opinions of your "
    "own. When the text does not answer a question, you say so.",
    "You are a journalist. You want to know who did what, when, where and why, and you write short "
    "sentences without technical terms.",
    "You are a translator. Before you translate a text, you make sure that you have understood "
    "each sentence of it, and you note what could be read in two ways.",
    "You are part of a team of three reviewers. Another reviewer looks at style, and another one "
    "at grammar. Your part is the content: is it complete, is it right, and does it "
    "contradict itself anywhere?",
    "You are the support desk of a software company. Customers send you a text and a question "
    "about it. Be friendly, be brief, and tell them which part of the text your answer is from.",
)
QUESTIONS = (
    "What is the text about? Answer in one sentence.",
    "What is the most important thing a reader must know?",
    "Who is this text written for?",
    "Name one condition that the text mentions.",
    "What happens when something goes wrong, according to the text?",
    "Summarise the text in ten words.",
    "Which part of the text is hardest to understand?",
    "What does the text say first?",
)
HINTS = (
    "Think about it step by step.",
    "First write down what is known and what is asked, then work it out.",
    "Hint: read the last sentence again before you start.",
    "Try to estimate the result first, then compute it and compare.",
    "Work backwards from what is asked.",
    "Draw a small table with one row for each step, and fill it in.",
    "Be careful: not everything that is mentioned is needed.",
    "Someone else has answered this wrongly. Find out where one could go wrong, and avoid it.",
)
SOLVER = "You solve problems. Work step by step and end with the answer."
VERIFIER_SYSTEM = (
    "You check the work of others. You are given a problem and a proposed solution, and you decide "
    "whether the solution is correct."
)

#: How an answer to a word problem begins.
ANSWERS = ("The answer is", "We know that")

_FIRST_NAMES = "Oliver Hannah Marcus Elena Victor Rosa Daniel Ingrid".split()
_PROPER_NAMES = "Berlin Harvard Turing Oxford Edward Windsor Sydney Newton".split()
_UNITS = (
    "seconds minutes hours days weeks months years",
    "minute hour day week month year",
    "bytes bits characters lines words",
    "dollars euros pounds francs",
    "miles feet inches meters yards kilometers",
    "ounces kilograms grams tons",
)
_COMPARISONS = (
    "more less",
    "greater smaller",
    "least most",
    "before after",
    "larger smaller",
    "longer shorter",
    "higher lower",
    "first last",
    "minimum maximum",
    "above below",
    "older younger",
    "start end",
)
_VERBS = "is are was were can will does do did must should may could would has have".split()


@dataclass(frozen=True)
class SpliceCase:
    """A prompt, and the prompts whose KV it may use.

    Attributes:
        family: the workload's name.
        donors: sent before the prompt, in the same namespace.
        facts: what goes into the row: what was changed, which group it belongs to.
    """

    family: str
    donors: Sequence[str]
    prompt: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    text: str
    solution: str = ""


@dataclass(frozen=True)
class Edit:
    """``old``, which is ``text[start:end]``, becomes ``new``; with ``everywhere`` the same word
    elsewhere in the text does so too."""

    kind: str
    start: int
    end: int
    old: str
    new: str
    everywhere: bool = False

    def apply(self, text: str) -> str:
        if self.everywhere:
            return re.sub(rf"\b{self.old}\b", self.new, text)
        return text[: self.start] + self.new + text[self.end :]


def chat(system: str, *turns: str) -> str:
    """A prompt of user and assistant turns, in this order; ends where the assistant is to speak."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for number, turn in enumerate(turns):
        text += f"<|im_start|>{('user', 'assistant')[number % 2]}\n{turn}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def paragraphs(texts: Sequence[str]) -> list[str]:
    """The paragraphs of prose in texts, each once: no code, no tables, no lists of names."""
    found: dict[str, None] = {}
    for text in texts:
        for block in re.split(r"\n\s*\n", text):
            paragraph = " ".join(block.split())
            if (
                25 <= len(paragraph.split()) <= 150
                and re.match(r"[A-Z][a-z]* ", paragraph)
                and paragraph[-1] in ".!?"
                and not re.search(r">>>|https?:|[`{}|]", paragraph)
                and sum(c.isalpha() or c == " " for c in paragraph) > 0.93 * len(paragraph)
            ):
                found.setdefault(paragraph)
    return list(found)


def word_problems(path: Path) -> list[Problem]:
    """JSON lines of ``question`` and, as in GSM8K, ``answer`` with worked steps."""
    problems = []
    for line in path.read_text().splitlines():
        if line.strip():
            item = json.loads(line)
            steps = re.sub(r"<<.*?>>", "", str(item.get("answer", "")))
            problems.append(
                Problem(item["question"].strip(), steps.replace("\n####", "\nThe answer is"))
            )
    return problems


class Shelf:
    """Documents and problems, drawn at random; none comes twice before all have been drawn.

    Args:
        texts: for documents.
        problems: word problems; empty where there are none.
    """

    def __init__(self, texts: Sequence[str], problems: Sequence[Problem], seed: int) -> None:
        self.rng = random.Random(seed)
        prose = paragraphs(texts)
        #: Words that stand in lower case somewhere: capitalised they are no names.
        self.common = frozenset(re.findall(r"\b[a-z]+\b", " ".join(prose)))
        self._paragraphs = _endless(prose, self.rng)
        self._problems = _endless(problems, self.rng) if problems else None

    @property
    def has_problems(self) -> bool:
        return self._problems is not None

    def paragraph(self) -> str:
        return next(self._paragraphs)

    def document(self, words: int) -> str:
        """Paragraphs of ``words`` words together, and up to 150 more."""
        parts: list[str] = []
        while sum(len(part.split()) for part in parts) < words:
            parts.append(self.paragraph())
        return "\n\n".join(parts)

    def problem(self) -> Problem:
        """A word problem, or, without a file of them, a question about a document."""
        if self._problems is not None:
            return next(self._problems)
        document = self.document(60)
        return Problem(f"{document}\n\n{self.rng.choice(QUESTIONS)}", document)


def _endless(items: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    while True:
        yield from rng.sample(items, len(items))


def persona_cases(shelf: Shelf, count: int) -> list[SpliceCase]:
    """Another system prompt before the same document and question."""
    cases = []
    for _ in range(count):
        donor, target = shelf.rng.sample(PERSONAS, 2)
        user = f"{shelf.document(shelf.rng.randint(60, 180))}\n\n{shelf.rng.choice(QUESTIONS)}"
        cases.append(SpliceCase(PERSONA, [chat(donor, user)], chat(target, user)))
    return cases


def verifier_cases(shelf: Shelf, groups: int, sizes: tuple[int, int] = (4, 8)) -> list[SpliceCase]:
    """A verifier's own prompt around problem and candidate; the donor is the solver's branch."""
    cases = []
    for group in range(groups):
        problem = shelf.problem()
        for candidate in _candidates(problem, shelf, shelf.rng.randint(*sizes)):
            question = (
                f"Here is a problem and a proposed solution.\n\nProblem:\n{problem.text}\n\n"
                f"Proposed solution:\n{candidate}\n\n"
                "Is the proposed solution correct? Answer Yes or No."
            )
            cases.append(
                SpliceCase(
                    VERIFIER,
                    [chat(SOLVER, problem.text) + candidate + "<|im_end|>\n"],
                    chat(VERIFIER_SYSTEM, question),
                    {"group": group},
                )
            )
    return cases


def _candidates(problem: Problem, shelf: Shelf, count: int) -> list[str]:
    """Different solutions: the right one and ones with a wrong number, or parts of documents."""
    if not shelf.has_problems or not edits(problem.solution, "number", shelf.rng):
        return [problem.solution, *(shelf.document(45) for _ in range(count - 1))][:count]
    candidates = {problem.solution: None}
    while len(candidates) < count:
        wrong = problem.solution
        for _ in range(shelf.rng.randint(1, 3)):
            wrong = shelf.rng.choice(edits(wrong, "number", shelf.rng)).apply(wrong)
        candidates.setdefault(wrong)
    return shelf.rng.sample(list(candidates), count)


def hint_cases(shelf: Shelf, problems: int) -> list[SpliceCase]:
    """Eight branches, each with its hint before the problem; the donor is their parent."""
    cases = []
    for group in range(problems):
        text = shelf.problem().text
        for hint in HINTS:
            prompt = chat(SOLVER, f"{hint}\n\n{text}")
            cases.append(SpliceCase(HINT, [chat(SOLVER, text)], prompt, {"group": group}))
    return cases


def order_cases(shelf: Shelf, count: int) -> list[SpliceCase]:
    """The same documents, or the same solved examples, in another order."""
    cases = []
    for number in range(count):
        if shelf.has_problems and number % 2:
            shots = [shelf.problem() for _ in range(3)]
            last = shelf.problem().text
            first, second = (
                chat(SOLVER, *(turn for s in order for turn in (s.text, s.solution)), last)
                for order in _two_orders(shots, shelf.rng)
            )
            what = "shots"
        else:
            parts = [shelf.document(40) for _ in range(3)]
            question = shelf.rng.choice(QUESTIONS)
            first, second = (
                chat(
                    PERSONAS[0],
                    "\n\n".join(f"### Document\n{part}" for part in order)
                    + f"\n\n### Question\n{question}",
                )
                for order in _two_orders(parts, shelf.rng)
            )
            what = "documents"
        cases.append(SpliceCase(ORDER, [first], second, {"what": what}))
    return cases


def _two_orders(items: Sequence[Any], rng: random.Random) -> tuple[Sequence[Any], Sequence[Any]]:
    """Two orders that begin differently: a common beginning would be an exact prefix."""
    first = rng.sample(items, len(items))
    second = first[1:] + first[:1] if rng.random() < 0.5 else first[::-1]
    return first, second


def length_cases(shelf: Shelf, words: Sequence[int], each: int) -> list[SpliceCase]:
    """As the personas, with runs from a few words to many."""
    cases = []
    for _ in range(each):
        for count in words:
            donor, target = shelf.rng.sample(PERSONAS, 2)
            text = " ".join(shelf.document(count).split()[:count])
            cases.append(SpliceCase(LENGTH, [chat(donor, text)], chat(target, text)))
    return cases


KINDS = ("number", "name", "unit", "negation", "comparison")


def adversarial_cases(shelf: Shelf) -> Iterator[SpliceCase]:
    """Near-duplicates without end: one number, name, unit, negation or comparison is changed.

    Kinds, ways of asking, and whether the change is near or far from the question take turns.
    The donor is the original. Whether the two are answered differently is for the caller to try.
    """
    while True:
        for make in (_quote, _solve) if shelf.has_problems else (_quote,):
            for kind in KINDS:
                for far in (False, True):
                    case = make(shelf, kind, far)
                    if case is not None:
                        yield case


def _quote(shelf: Shelf, kind: str, far: bool) -> SpliceCase | None:
    """Asks to go on where a paragraph was changed; None when no paragraph in reach has any."""
    for _ in range(60):
        original = shelf.paragraph()
        choices = [
            edit
            for edit in edits(original, kind, shelf.rng, shelf.common)
            if original[: edit.start].count(" ") >= 6
            and original[edit.end :].count(" ") >= 35
            and not edit.everywhere
        ]
        if choices:
            break
    else:
        return None
    edit = shelf.rng.choice(choices)
    # The changed words are the next to be said, or the next but one or two.
    quoted = original[: edit.start].split(" ")[: -1 - shelf.rng.randint(0, 2)][-6:]
    question = "Continue this quotation from the text, word for word."
    versions = (original, edit.apply(original))
    filler = shelf.document(120)
    return _pair(PERSONAS[0], versions, filler, question, " ".join(quoted), edit, far, "quote")


def _solve(shelf: Shelf, kind: str, far: bool) -> SpliceCase | None:
    """Asks a word problem's own question."""
    for _ in range(60):
        text = shelf.problem().text
        body, _, question = text.rpartition(". ")
        choices = [e for e in edits(text, kind, shelf.rng, shelf.common) if e.end <= len(body)]
        if choices and question.endswith("?"):
            break
    else:
        return None
    edit = shelf.rng.choice(choices)
    # A name that the question repeats is changed there too: both prompts make sense.
    changed, _, new_question = edit.apply(text).rpartition(". ")
    notes = f"Here are some notes for later:\n{shelf.document(60)}"
    bodies = (f"{body}.", f"{changed}.")
    questions = (question, new_question)
    answer = shelf.rng.choice(ANSWERS)
    return _pair(SOLVER, bodies, notes, questions, answer, edit, far, "solve")


def _pair(
    system: str,
    versions: tuple[str, str],
    filler: str,
    question: str | tuple[str, str],
    answer: str,
    edit: Edit,
    far: bool,
    ask: str,
) -> SpliceCase:
    """The original as donor of the edited: a filler stands between change and question if far."""
    questions = (question, question) if isinstance(question, str) else question
    donor, prompt = (
        chat(system, "\n\n".join([*((text, filler) if far else (filler, text)), asked])) + answer
        for text, asked in zip(versions, questions)
    )
    facts = {"kind": edit.kind, "where": "far" if far else "near", "ask": ask}
    return SpliceCase(ADVERSARIAL, [donor], prompt, {**facts, "old": edit.old, "new": edit.new})


def edits(
    text: str, kind: str, rng: random.Random, common: frozenset[str] = frozenset()
) -> list[Edit]:
    """All places of a text where one thing of a kind can be changed, with what it becomes.

    Args:
        common: words in lower case that are no names, though they may be capitalised.
    """
    found: list[tuple[re.Match[str], str]] = []
    if kind == "number":
        for match in re.finditer(r"(?<![\w.,-])\d{1,6}(?![\w,-]|\.\d)", text):
            digits = len(match.group())
            found.append((match, _other(range(10 ** (digits - 1), 10**digits), match, rng)))
    elif kind == "name":
        for match in re.finditer(r"(?<=[a-z,] )[A-Z][a-z]{3,}\b", text):
            if match.group().lower() not in common:
                found.append((match, _other(_PROPER_NAMES, match, rng)))
        # At the beginning of a sentence: who has or does something.
        for match in re.finditer(r"(?<![a-z,] )\b[A-Z][a-z]{2,}(?=['\u2019]s | has | had )", text):
            if match.group().lower() not in common:
                found.append((match, _other(_FIRST_NAMES, match, rng)))
    elif kind == "negation":
        for match in re.finditer(rf"(?<=\w )({'|'.join(_VERBS)}) (not )?", text):
            found.append((match, match.group(1) + (" " if match.group(2) else " not ")))
    else:
        for group in map(str.split, _UNITS if kind == "unit" else _COMPARISONS):
            for match in re.finditer(rf"\b(?:{'|'.join(group)})\b", text):
                found.append((match, _other(group, match, rng)))
    return [
        Edit(
            kind,
            match.start(),
            match.end(),
            match.group(),
            new,
            everywhere=kind == "name" and len(re.findall(rf"\b{match.group()}\b", text)) > 1,
        )
        for match, new in found
    ]


def _other(choices: Sequence[Any], match: re.Match[str], rng: random.Random) -> str:
    return str(rng.choice([choice for choice in choices if str(choice) != match.group()]))
