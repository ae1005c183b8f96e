"""The skip gate: whether a group of branches needs no verification at all.

A group-level decision, made before anything is asked: from the branches' confidences (mean top-1
probability of their tokens up to the end), the lead over those that say something else, and how
many branches have the same answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

#: The paper's constants (section 3.1): top confidence with its absolute lead, or with its relative.
PAPER_TOP, PAPER_LEAD = 0.70, 0.06
PAPER_LOWER_TOP, PAPER_RELATIVE_LEAD = 0.63, 0.08


@dataclass(frozen=True)
class Evidence:
    """What is known of a group before any verification.

    Attributes:
        share: of all branches, those that have the most frequent answer; 0 where there is none.
        top, second: confidences of the most confident branch and of the runner-up.
        support: mean confidence of the branches with the most frequent answer.
        edge: by how much ``leader`` is more confident than all branches that say something else;
            its own confidence where there are none.
        winner: the most confident branch, and of those with the most frequent answer,
        leader: the most confident one; None where there is no answer.
    """

    share: float
    top: float
    second: float
    support: float
    edge: float
    winner: int
    leader: int | None


def gather(
    answers: Sequence[Hashable | None], confidences: Sequence[float], branches: int | None = None
) -> Evidence:
    """Sum a group up; answers that are None (nothing could be extracted) count for nobody.

    Args:
        branches: of the group, where not all have finished: the others have no answer yet.

    Raises:
        ValueError: no branches, or not one confidence for each answer.
    """
    if not answers or len(answers) != len(confidences):
        raise ValueError("expected one answer and one confidence for each branch")
    ranked = sorted(range(len(answers)), key=lambda branch: -confidences[branch])
    second = confidences[ranked[1]] if len(ranked) > 1 else 0.0
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return Evidence(0.0, confidences[ranked[0]], second, 0.0, 0.0, ranked[0], None)
    # Of equally frequent answers, that of the more confident branch.
    best = max(votes, key=lambda answer: (votes[answer], -_first(ranked, answers, answer)))
    having = [c for c, answer in zip(confidences, answers) if answer == best]
    others = [c for c, answer in zip(confidences, answers) if answer != best]
    return Evidence(
        share=votes[best] / (branches or len(answers)),
        top=confidences[ranked[0]],
        second=second,
        support=sum(having) / len(having),
        edge=max(having) - max(others, default=0.0),
        winner=ranked[0],
        leader=ranked[_first(ranked, answers, best)],
    )


def _first(ranked: Sequence[int], answers: Sequence[Any], answer: Any) -> int:
    return next(place for place, branch in enumerate(ranked) if answers[branch] == answer)


class SkipGate(Protocol):
    def winner(self, evidence: Evidence) -> int | None:
        """The branch that wins without verification; None: it must be verified."""


@dataclass(frozen=True)
class PaperGate:
    """The paper's two rules; the most confident branch wins."""

    def winner(self, evidence: Evidence) -> int | None:
        lead = evidence.top - evidence.second
        if evidence.top >= PAPER_TOP and lead >= PAPER_LEAD:
            return evidence.winner
        if evidence.top >= PAPER_LOWER_TOP and lead >= PAPER_RELATIVE_LEAD * evidence.second:
            return evidence.winner
        return None


@dataclass(frozen=True)
class CalibratedGate:
    """Skip when the chance that the most frequent answer is right is high enough.

    Attributes:
        weights: of share, support and edge of a logistic model of that chance, and its bias.
        threshold: least chance.
    """

    weights: tuple[float, float, float, float]
    threshold: float

    def chance(self, evidence: Evidence) -> float:
        share, support, edge, bias = self.weights
        score = share * evidence.share + support * evidence.support + edge * evidence.edge + bias
        return 1 / (1 + math.exp(-max(min(score, 50.0), -50.0)))

    def winner(self, evidence: Evidence) -> int | None:
        if evidence.leader is None or self.chance(evidence) < self.threshold:
            return None
        return evidence.leader
