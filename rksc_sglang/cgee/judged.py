"""Branches that have been verified in full, by problem: what calibration replays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Judged:
    """A branch that has been verified in full.

    Attributes:
        answer: extracted; None where there is none.
        right: whether it is the problem's.
        confidence: mean top-1 probability of its tokens.
        seen: [checks][n] what was read where exits look: the normed states (``Observe``), or what
            a probe makes of them (:func:`rksc_sglang.cgee.probing.probed`).
        final: [labels] log-probabilities of the labels.
        tokens: that it took; branches that run at once finish in the order of these.
    """

    answer: str | None
    right: bool
    confidence: float
    seen: np.ndarray | Sequence[Sequence[float]]
    final: Sequence[float]
    tokens: int


Group = Sequence[Judged]


def full_winner(group: Group) -> int:
    """The branch that full verification prefers, as ``rksc.verify`` chooses it."""
    (winner,) = winners([group], np.array([judged.final for judged in group]))
    return winner


def winners(groups: Sequence[Group], scores: np.ndarray) -> list[int]:
    """The branch of each group that these scores prefer.

    Args:
        scores: [branches of all groups, labels] logits.
    """
    others = np.logaddexp.reduce(scores[:, 1:], axis=1)
    odds = (scores[:, 0] - others).tolist()  # in the order of the first label's probability
    found, start = [], 0
    for group in groups:
        places = range(len(group))
        found.append(max(places, key=lambda b: (odds[start + b], group[b].confidence, -b)))
        start += len(group)
    return found


def is_unanimous(group: Group) -> bool:
    """Whether all branches have the same answer, so that no verdict changes it."""
    return group[0].answer is not None and len({judged.answer for judged in group}) == 1


def reads_of(judged: Sequence[Judged]) -> Tensor:
    """What was seen of each, [judged, checks, n] float32."""
    return torch.tensor(np.array([j.seen for j in judged], dtype=np.float32))
