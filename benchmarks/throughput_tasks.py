"""Problems for ``benchmarks.throughput``, with what counts as a right answer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.text import Passages, machine_texts
from rksc_sglang.demo.questions import Question, answer_key, load_questions
from rksc_sglang.models.problems import Problem, distinct, problems

#: Families of problems that are questions about a text.
WITH_DOCUMENT = ("facts",)
#: Of the solved examples: one each, of the first difficulty.
EXAMPLE_FAMILIES = ("chain", "legs", "order")
PAPER_SHARED_TOKENS = 1024


class Task(NamedTuple):
    """A problem for a program.

    Attributes:
        is_right: whether an answer, None where there is none, is right.
        lengths: tokens of the generations; empty where the model ends by itself.
    """

    text: str
    is_right: Callable[[str | None], bool]
    lengths: tuple[int, ...] = ()


def solved_examples(count: int) -> list[tuple[str, str]]:
    """Problems of the training split with their solutions."""
    drawn = problems("train", 0, EXAMPLE_FAMILIES, difficulties=(1,))
    return [(problem.question, problem.solution) for problem in itertools.islice(drawn, count)]


def tasks_of(program: str, seed: int, questions: Path | None, document: int) -> Iterator[Task]:
    """Problems for a program without end, the same from the same seed.

    Args:
        questions: JSON lines to take them from, instead of the generated ones.
        document: words of prose in front of each question about a text.

    Raises:
        QuestionsError: the file cannot be used.
    """
    about_text = program == "document_qa"
    if questions is None:
        tasks = unseen_problems(seed, WITH_DOCUMENT if about_text else ())
    else:
        tasks = file_problems(questions, seed)
    return behind_documents(tasks, seed, document) if about_text and document else tasks


def unseen_problems(seed: int, families: Sequence[str] = ()) -> Iterator[Task]:
    """Problems of the test split, each once."""
    for problem in distinct(problems("test", seed, families)):
        yield Task(problem.question, _checker(problem))


def _checker(problem: Problem) -> Callable[[str | None], bool]:
    return lambda answer: answer == problem.answer


def file_problems(path: Path, seed: int) -> Iterator[Task]:
    """Problems of JSON lines of ``question`` and ``answer``, in a random order, over and over."""
    questions = load_questions(path)
    random.Random(seed).shuffle(questions)
    for question in itertools.cycle(questions):
        yield Task(question.text, _key_checker(question))


def _key_checker(question: Question) -> Callable[[str | None], bool]:
    return lambda answer: (
        answer is not None and answer_key(answer, question.text) in question.answers
    )


def behind_documents(tasks: Iterator[Task], seed: int, words: int) -> Iterator[Task]:
    """Each problem at the end of a document of its own."""
    passages = Passages(machine_texts(), seed)
    for task in tasks:
        yield task._replace(text=f"{passages.take(words)}\n\n{task.text}")


def in_the_papers_length(
    tasks: Iterator[Task], seed: int, tokenizer: Any, new_tokens: int
) -> Iterator[Task]:
    """About 1,024 tokens that all branches share, and ``new_tokens`` for each branch."""
    passages = Passages(machine_texts(), seed)
    for task in tasks:
        question = tokenizer.encode(task.text, add_special_tokens=False)
        text = tokenizer.encode(passages.take(PAPER_SHARED_TOKENS), add_special_tokens=False)
        cut = tokenizer.decode(text[: max(PAPER_SHARED_TOKENS - len(question), 0)])
        yield task._replace(text=f"{cut}\n\n{task.text}", lengths=(new_tokens,))


def with_lengths(
    tasks: Iterator[Task], span: tuple[int, int], count: int, seed: int
) -> Iterator[Task]:
    """Give each task ``count`` lengths, uniform over ``span``, both ends included."""
    rng = random.Random(seed)
    for task in tasks:
        yield task._replace(lengths=tuple(rng.randint(*span) for _ in range(count)))
