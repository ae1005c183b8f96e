"""Votes that come in one by one, and when no further one can change who wins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Ballot:
    """Voters are numbered; one whose answer is None votes for nobody.

    The winner does not depend on the order of the votes.
    """

    def __init__(self, voters: int) -> None:
        self.missing = set(range(voters))
        self._answers: dict[int, str] = {}

    @classmethod
    def of(cls, answers: Sequence[str | None]) -> Ballot:
        ballot = cls(len(answers))
        for voter, answer in enumerate(answers):
            ballot.cast(voter, answer)
        return ballot

    def cast(self, voter: int, answer: str | None) -> None:
        self.missing.remove(voter)
        if answer is not None:
            self._answers[voter] = answer

    @property
    def decided(self) -> bool:
        """The leading answer can be neither overtaken nor drawn level with."""
        counts = [count for _, count in Counter(self._answers.values()).most_common(2)]
        most, second = (*counts, 0, 0)[:2]
        return most > second + len(self.missing)

    @property
    def winner(self) -> int | None:
        """The first voter for the most frequent answer; of equals, that of the first voter."""
        counts = Counter(self._answers.values())
        ranked = sorted(self._answers, key=lambda voter: (-counts[self._answers[voter]], voter))
        return ranked[0] if ranked else None
