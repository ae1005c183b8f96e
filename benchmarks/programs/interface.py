"""What every program takes and gives, in either of its forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sglang as sgl

from rksc_sglang.models.problems import extract_answer


@dataclass(frozen=True)
class Settings:
    """How a program asks and samples.

    Attributes:
        temperature: of all that is sampled.
        max_tokens: of one generation at most, where the model ends by itself.
        lengths: tokens of each generation, in turn, whatever the model would do: the same work in
            every run, for timing. Empty: the model ends by itself.
        examples: solved problems, question and solution, in front of the problem.
        extract: the answer in a text; None where there is none.
    """

    temperature: float = 0.8
    max_tokens: int = 160
    lengths: Sequence[int] = ()
    examples: Sequence[tuple[str, str]] = ()
    extract: Callable[[str], str | None] = extract_answer

    def generate(self, name: str, place: int, stop: str | None = None) -> Any:
        """An expression that samples into ``name``.

        Args:
            place: which of the program's generations it is, for its length.
            stop: ends it, where the model ends by itself.
        """
        if not self.lengths:
            limit = self.max_tokens
            return sgl.gen(name, max_tokens=limit, temperature=self.temperature, stop=stop)
        exact = self.lengths[place % len(self.lengths)]
        # The chat template's stop string is the end-of-text token, which ignore_eos alone lets
        # the model sample; min_tokens does not.
        return sgl.gen(
            name,
            max_tokens=exact,
            min_tokens=exact,
            ignore_eos=True,
            temperature=self.temperature,
        )

    def is_finished(self, text: str) -> bool:
        """Whether a search need not go on behind a text; never where lengths are given."""
        return not self.lengths and self.extract(text) is not None

    def are_agreed(self, answers: Sequence[str | None]) -> bool:
        """Whether no verdict on these answers could matter; never where lengths are given."""
        return not self.lengths and len(set(answers)) == 1


@dataclass(frozen=True)
class Mechanisms:
    """What a program uses of RKSC, beside ``fork`` and ``verify`` themselves.

    Attributes:
        share, exit, skip: as in ``rksc.fork`` and ``rksc.verify``.
        stop: branches that cannot change the outcome any more are stopped.
    """

    share: str | None = "similar"
    exit: str | None = None
    skip: str | None = None
    stop: bool = True


#: Defaults of the programs' arguments.
SETTINGS, ALL = Settings(), Mechanisms()


class Outcome(NamedTuple):
    """What a program answers.

    Attributes:
        answer: None where nothing could be extracted.
        text: the whole text that the answer is from.
        candidates: all that were chosen from.
        votes: how many of them have each answer.
    """

    answer: str | None
    text: str
    candidates: list[str]
    votes: dict[str, int]

    @classmethod
    def of(cls, texts: Mapping[int, str], chosen: int | None, settings: Settings) -> Outcome:
        """Of texts by branch; the first of them where none was chosen."""
        candidates = [texts[branch] for branch in sorted(texts)]
        text = candidates[0] if chosen is None else texts[chosen]
        answers = [settings.extract(candidate) for candidate in candidates]
        votes = Counter(answer for answer in answers if answer is not None)
        return cls(settings.extract(text), text, candidates, dict(votes))


class Program(NamedTuple):
    """A program in its two forms, both ``sgl.function`` with the same arguments.

    Attributes:
        solve: with RKSC; takes ``mechanisms`` as well.
        solve_plain: the best that SGLang alone can do.
    """

    name: str
    solve: Any
    solve_plain: Any
