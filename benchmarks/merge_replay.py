"""What is measured of recorded branches beside merging: pairs of siblings, and controls."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rksc_sglang.asks.alike import Duplicate
from rksc_sglang.asks.merge_calibration import Decide, Group, Outcome, Sample, points_of, replay


def result_of(line: str) -> str:
    """What a step comes down to: what follows its last sign of equality, or all of it."""
    return line.rsplit("=", 1)[-1].strip()


def sibling_pairs(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """The group's signals, [pairs, signals], of each two siblings behind the same line that both
    have an answer, and whether it is the same, [pairs].
    """
    answers = np.array([sample["answer"] for sample in group.branches], dtype=object)
    values: list[np.ndarray] = [np.empty((0, len(group.alike)))]
    same: list[np.ndarray] = [np.empty(0, dtype=bool)]
    for line in group.lines:
        there = [
            place
            for place, sample in enumerate(group.branches)
            if points_of(sample) >= line and sample["answer"] is not None
        ]
        i, j = (np.array(there, dtype=int)[side] for side in np.triu_indices(len(there), 1))
        values.append(np.stack([alike[line - 1][i, j] for alike in group.alike.values()], axis=1))
        same.append((answers[i] == answers[j]).astype(bool))
    return np.concatenate(values), np.concatenate(same)


def at_random(rate: float, rng: random.Random) -> Decide:
    """Each branch but the first is merged with this chance, into any earlier one that stays."""

    def decide(line: int, places: Sequence[int | None]) -> list[Duplicate]:
        staying: list[int] = []
        found = []
        for place in places:
            if place is None:
                continue
            if staying and rng.random() < rate:
                found.append(Duplicate(place, rng.choice(staying), 0.0))
            else:
                staying.append(place)
        return found

    return decide


def several_go_on(decide: Decide, keep: int) -> Decide:
    """As ``decide``, but so many of a kind go on, and the votes of the others are dealt out."""

    def decide_for_several(line: int, places: Sequence[int | None]) -> list[Duplicate]:
        kinds: dict[int, list[Duplicate]] = {}
        for duplicate in decide(line, places):
            kinds.setdefault(duplicate.of, []).append(duplicate)
        found = []
        for first, others in kinds.items():
            staying = [first, *(other.place for other in others[: keep - 1])]
            for number, other in enumerate(others[keep - 1 :]):
                found.append(replace(other, of=staying[number % keep]))
        return found

    return decide_for_several


def fewer_branches(group: Group, tokens: int, rng: random.Random) -> Outcome:
    """Whole branches, as many as these tokens suffice for, of a random order; at least one."""
    kept: list[Sample] = []
    for sample in rng.sample(group.branches, len(group.branches)):
        if kept and sum(s["tokens"] for s in (*kept, sample)) > tokens:
            break
        kept.append(sample)
    return replay(Group(kept, {}))
