"""Whether two partial thoughts of sibling branches are the same, in other words.

Each signal is a number, larger where two thoughts are more alike; none of them is a proof. What
they are worth as predictors that two branches end with the same answer is measured by
``benchmarks.merge``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(frozen=True)
class Thought:
    """A branch at the point where it may be merged.

    Attributes:
        text: what it has generated so far.
        state: what that comes down to, as the program says; None where nothing can be said.
        following: probability of each of the most probable next tokens, by token id.
        signature: of its last token (:mod:`rksc_sglang.asks.signature`); empty where there is none.
    """

    text: str
    state: Hashable | None = None
    following: Mapping[int, float] = field(default_factory=dict)
    signature: Sequence[float] = ()


def text_ratio(a: Thought, b: Thought) -> float:
    """Share of the words that the two have in common, in order; 0 to 1."""
    return difflib.SequenceMatcher(None, a.text.split(), b.text.split(), autojunk=False).ratio()


def same_state(a: Thought, b: Thought) -> float:
    """1 where both come down to the same."""
    return float(a.state is not None and a.state == b.state)


def next_token(a: Thought, b: Thought) -> float:
    """1 less the Jensen-Shannon divergence, in bits, of the next tokens' distributions.

    What is not among the most probable tokens of either counts as one token more.
    """
    tokens = {*a.following, *b.following}
    pairs = [(a.following.get(token, 0.0), b.following.get(token, 0.0)) for token in tokens]
    pairs.append((max(1 - sum(p for p, _ in pairs), 0.0), max(1 - sum(q for _, q in pairs), 0.0)))
    divergence = 0.0
    for p, q in pairs:
        for one in (p, q):
            if one > 0:
                divergence += one / 2 * math.log2(2 * one / (p + q))
    return 1 - divergence


def sigma(a: Thought, b: Thought) -> float:
    """The paper's similarity: weighted cosines of the last tokens' hidden states; -1 to 1.

    Raises:
        ValueError: one of them has no signature.
    """
    if not a.signature or len(a.signature) != len(b.signature):
        raise ValueError("sigma: there is no signature to compare")
    return sum(x * y for x, y in zip(a.signature, b.signature))


SIGNALS = {"text": text_ratio, "state": same_state, "next": next_token, "sigma": sigma}


@dataclass(frozen=True)
class Duplicate:
    """A thought that is the same as an earlier one, by how much."""

    place: int
    of: int
    similarity: float


#: What stands for a thought.
T = TypeVar("T")


def duplicates(
    thoughts: Sequence[T | None], signal: Callable[[T, T], float], threshold: float
) -> list[Duplicate]:
    """Thoughts that need not be gone on from, in the order of their places.

    Each is compared with those before it that stay, and is a duplicate of the most similar one of
    at least ``threshold``: likenesses do not add up along a chain. None takes no part.
    """
    found: list[Duplicate] = []
    staying: list[int] = []
    for place, thought in enumerate(thoughts):
        if thought is None:
            continue
        alike = [
            (similarity, -other)
            for other in staying
            if (kept := thoughts[other]) is not None
            and (similarity := signal(kept, thought)) >= threshold
        ]
        if alike:
            similarity, other = max(alike)
            found.append(Duplicate(place, -other, similarity))
        else:
            staying.append(place)
    return found
