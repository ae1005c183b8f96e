"""When branches may be merged at a stated risk: found by replaying recorded ones.

A branch is lines of a solution; it may be merged behind each line but the last, at the same line as
its siblings. A branch that goes on has the rest of its own recorded text; one that is merged ends
there, and gives its votes away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rksc_sglang.asks.alike import SIGNALS, Duplicate, Thought, duplicates
from rksc_sglang.cgee.calibration import fixed_sequence

#: A recorded branch: ``text``, ``tokens``, ``answer``, ``right``; ``ends``, its tokens up to the
#: end of each line.
Sample = Mapping[str, Any]
#: By line, [branches, branches]: how alike they are behind it.
Alike = Sequence[np.ndarray]
#: Which of the branches that are still there at a line, from 1 on, are duplicates of others.
Decide = Callable[[int, Sequence[int | None]], list[Duplicate]]
#: Tried from the most careful on.
THRESHOLDS = tuple(round(1 - 0.02 * step, 2) for step in range(46))


@dataclass(frozen=True)
class Group:
    """A problem's branches, and by signal how alike they are behind each of their lines."""

    branches: Sequence[Sample]
    alike: Mapping[str, Alike]

    @property
    def lines(self) -> range:
        """Lines behind which some branches may be merged, from 1 on."""
        return range(1, 1 + max(map(points_of, self.branches), default=0))


class Outcome(NamedTuple):
    """Of one problem.

    Attributes:
        answer: of most votes, that of the first branch where two have as many; None: no answer.
        right: whether it is the problem's.
        tokens: generated.
        peak: most tokens of branches in the cache at once, all generating at the same speed.
        merges: branches that were merged.
    """

    answer: str | None
    right: bool
    tokens: int
    peak: int
    merges: int


def points_of(sample: Sample) -> int:
    """Lines behind which a branch may be merged."""
    return max(len(sample["ends"]) - 1, 0)


def compare(thoughts: Sequence[Sequence[Thought]]) -> dict[str, list[list[float]]]:
    """By signal and line, that of each two branches that are there, the earlier one first.

    Args:
        thoughts: of each branch, behind each of its lines.
    """
    points = list(map(len, thoughts))
    return {
        name: [
            [
                round(signal(thoughts[i][line], thoughts[j][line]), 3)
                for i, j in _pairs_at(points, line)
            ]
            for line in range(max(points, default=0))
        ]
        for name, signal in SIGNALS.items()
    }


def _pairs_at(points: Sequence[int], line: int) -> Iterator[tuple[int, int]]:
    """Of the branches that have more points than ``line``; the earlier one first."""
    there = [place for place, count in enumerate(points) if count > line]
    for n, place in enumerate(there):
        for earlier in there[:n]:
            yield earlier, place


def group_of(row: Mapping[str, Any]) -> Group:
    """A recorded row: its ``branches``, and ``alike`` as :func:`compare` gives it."""
    branches = row["branches"]
    points = list(map(points_of, branches))
    alike: dict[str, Alike] = {}
    for name, lines in row["alike"].items():
        matrices = []
        for line, values in enumerate(lines):
            matrix = np.full((len(branches), len(branches)), np.nan)
            for (i, j), value in zip(_pairs_at(points, line), values):
                matrix[i, j] = matrix[j, i] = value
            matrices.append(matrix)
        alike[name] = matrices
    return Group(branches, alike)


def by_signal(alike: Alike, threshold: float) -> Decide:
    def decide(line: int, places: Sequence[int | None]) -> list[Duplicate]:
        matrix = alike[line - 1]
        return duplicates(places, lambda a, b: float(matrix[a, b]), threshold)

    return decide


def nobody(line: int, places: Sequence[int | None]) -> list[Duplicate]:
    return []


def replay(group: Group, decide: Decide = nobody) -> Outcome:
    """One problem's branches, merged as ``decide`` says."""
    samples = group.branches
    weights = [1] * len(samples)
    ends = [sample["tokens"] for sample in samples]
    for line in group.lines:
        places = [
            place if weights[place] and points_of(sample) >= line else None
            for place, sample in enumerate(samples)
        ]
        for duplicate in decide(line, places):
            weights[duplicate.of] += weights[duplicate.place]
            weights[duplicate.place] = 0
            ends[duplicate.place] = samples[duplicate.place]["ends"][line - 1]
    votes: Counter[str] = Counter()
    for sample, weight in zip(samples, weights):
        if weight and sample["answer"] is not None:
            votes[sample["answer"]] += weight
    answer = max(votes, key=votes.__getitem__) if votes else None
    right = any(s["right"] for s in samples if s["answer"] == answer and answer is not None)
    gone = [not weight for weight in weights]
    return Outcome(answer, right, sum(ends), _peak(ends, gone), sum(gone))


def _peak(ends: Sequence[int], gone: Sequence[bool]) -> int:
    """A merged branch's tokens are free behind its end; the others' are kept for the answer."""
    return max(
        sum(min(end, now) for end, away in zip(ends, gone) if not away or end >= now)
        for now in {*ends, 0}
    )


def merge_all(groups: Sequence[Group], signal: str, threshold: float) -> list[Outcome]:
    return [replay(group, by_signal(group.alike[signal], threshold)) for group in groups]


def thresholds_of(signal: str) -> Sequence[float]:
    """The most careful first; of what is or is not, there is one."""
    return (1.0,) if signal == "state" else THRESHOLDS


def calibrate_merge(
    groups: Sequence[Group], signal: str, risk: float, delta: float
) -> tuple[float, dict[str, Any]]:
    """The boldest threshold at which the majority answer changes in that share of groups or less.

    Args:
        risk, delta: the share, and the chance that the promise does not hold.

    Returns:
        The threshold, and the evidence: how many groups, how many changed at it, the share of
        tokens that it saved, and what was tried.

    Raises:
        TooLittleData: there is no such threshold.
    """
    before = [replay(group) for group in groups]

    def changed(after: Sequence[Outcome]) -> int:
        return sum(merged.answer != whole.answer for merged, whole in zip(after, before))

    threshold, tried = fixed_sequence(
        thresholds_of(signal),
        lambda at: changed(merge_all(groups, signal, at)),
        len(groups),
        risk,
        delta,
    )
    after = merge_all(groups, signal, threshold)
    return threshold, {
        "problems": len(groups),
        "changed": changed(after),
        "tokens_saved": 1 - sum(a.tokens for a in after) / sum(b.tokens for b in before),
        "curve": tried,
    }
