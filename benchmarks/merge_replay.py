"""What merging would have done to recorded branches: the same samples up to each merge, and after.

A branch is lines of a solution; it may be merged behind each line but the last, at the same line as
its siblings. A branch that goes on has the rest of its own recorded text; one that is merged ends
there, and gives its votes away.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rksc_sglang.asks.alike import SIGNALS, Duplicate, Signal, Thought, duplicates

#: A recorded branch: ``text``, ``tokens``, ``answer``, ``right``; ``ends``, its tokens up to the
#: end of each line; ``probes``, ``following`` and ``signature`` behind each line but the last.
Sample = Mapping[str, Any]
#: Which of the thoughts at a line are duplicates of others; None takes no part.
Decide = Callable[[Sequence[Thought | None]], list[Duplicate]]


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


def result_of(line: str) -> str:
    """What a step comes down to: what follows its last sign of equality, or all of it."""
    return line.rsplit("=", 1)[-1].strip()


def points_of(sample: Sample) -> int:
    """Lines behind which a branch may be merged."""
    return len(sample["probes"])


def lines_of(samples: Sequence[Sample]) -> range:
    """Lines behind which some of a problem's branches may be merged, from 1 on."""
    return range(1, 1 + max(map(points_of, samples), default=0))


def thought_at(sample: Sample, line: int) -> Thought:
    """The branch behind its first ``line`` lines, of at least one."""
    lines = sample["text"].splitlines()[:line]
    probe = sample["probes"][line - 1]
    following = {int(token): value for token, value in probe["following"].items()}
    text = "\n".join(lines)
    return Thought(text, result_of(lines[-1]), following, tuple(probe["signature"]))


def sibling_pairs(samples: Sequence[Sample]) -> Iterator[tuple[dict[str, float], bool]]:
    """Every signal between two siblings behind the same line, and whether they end the same."""
    for line in lines_of(samples):
        there = [s for s in samples if points_of(s) >= line and s["answer"] is not None]
        thoughts = [thought_at(sample, line) for sample in there]
        for i, a in enumerate(thoughts):
            for j in range(i):
                values = {name: signal(thoughts[j], a) for name, signal in SIGNALS.items()}
                yield values, there[i]["answer"] == there[j]["answer"]


def by_signal(signal: Signal, threshold: float) -> Decide:
    return lambda thoughts: duplicates(thoughts, signal, threshold)


def at_random(rate: float, rng: random.Random) -> Decide:
    """Each thought but the first is merged with this chance, into any earlier one that stays."""

    def decide(thoughts: Sequence[Thought | None]) -> list[Duplicate]:
        staying: list[int] = []
        found = []
        for place, thought in enumerate(thoughts):
            if thought is None:
                continue
            if staying and rng.random() < rate:
                found.append(Duplicate(place, rng.choice(staying), 0.0))
            else:
                staying.append(place)
        return found

    return decide


def replay(samples: Sequence[Sample], decide: Decide | None = None) -> Outcome:
    """One problem's branches, merged as ``decide`` says; never, without it."""
    weights = [1] * len(samples)
    ends = [sample["tokens"] for sample in samples]
    if decide is not None:
        _merge(samples, decide, weights, ends)
    votes: Counter[str] = Counter()
    for sample, weight in zip(samples, weights):
        if weight and sample["answer"] is not None:
            votes[sample["answer"]] += weight
    answer = max(votes, key=votes.__getitem__) if votes else None
    right = any(s["right"] for s in samples if s["answer"] == answer and answer is not None)
    gone = [not weight for weight in weights]
    return Outcome(answer, right, sum(ends), _peak(ends, gone), sum(gone))


def _merge(samples: Sequence[Sample], decide: Decide, weights: list[int], ends: list[int]) -> None:
    """Move the votes, and end the branches that are merged, line by line."""
    for line in lines_of(samples):
        thoughts = [
            thought_at(sample, line) if weight and points_of(sample) >= line else None
            for sample, weight in zip(samples, weights)
        ]
        for duplicate in decide(thoughts):
            weights[duplicate.of] += weights[duplicate.place]
            weights[duplicate.place] = 0
            ends[duplicate.place] = samples[duplicate.place]["ends"][line - 1]


def _peak(ends: Sequence[int], gone: Sequence[bool]) -> int:
    """A merged branch's tokens are free behind its end; the others' are kept for the answer."""
    return max(
        sum(min(end, now) for end, away in zip(ends, gone) if not away or end >= now)
        for now in {*ends, 0}
    )


def fewer_branches(samples: Sequence[Sample], tokens: int) -> Outcome:
    """Whole branches, as many of the first ones as these tokens suffice for; at least one."""
    kept: list[Sample] = []
    for sample in samples:
        if kept and sum(s["tokens"] for s in (*kept, sample)) > tokens:
            break
        kept.append(sample)
    return replay(kept)
