"""Verifiers that think: a chain of thought behind a branch, and the verdict at its end.

The thought is generated in pieces, each behind the cached KV of those before. Behind each piece the
labels are scored as if the thought ended there; once two of these verdicts in a row are the same,
and sure, the verifier need not finish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Think:
    """How a verifier thinks before its verdict.

    Attributes:
        max_tokens: of the thought at most.
        every: tokens from one look at the verdict to the next.
        sure: probability among the labels that makes a verdict sure; above 1 every thought is
            finished.
        question: what it is asked.
        marker: what stands in front of the verdict, where the verifier ends its thought by itself.
    """

    max_tokens: int = 160
    every: int = 32
    sure: float = 0.95
    question: str = "Check the solution. Think first, then give your verdict."
    marker: str = "Verdict:"

    def __post_init__(self) -> None:
        for name in ("max_tokens", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if not self.marker.strip():
            raise ValueError(f"marker: expected some text, got {self.marker!r}")


@dataclass(frozen=True)
class Piece:
    """Some generated text; ``ended``: the model has come to its verdict, or to its end."""

    text: str
    tokens: int
    ended: bool


def think(
    how: Think, generate: Callable[[str, int], Piece], judge: Callable[[str], Any]
) -> tuple[str, int, list[Any]]:
    """Think until the verdict is stable, or the thought has ended.

    Args:
        generate: continues a thought by so many tokens at most.
        judge: the verdict behind a thought that ends in the marker; has ``best``, a label, and
            ``probabilities``.

    Returns:
        The thought, the tokens that were generated, and every verdict, the last one the final one.
    """
    thought, generated = "", 0
    verdicts: list[Any] = []
    while True:
        piece = generate(thought, min(how.every, how.max_tokens - generated))
        thought += piece.text
        generated += piece.tokens
        verdicts.append(judge(f"{thought.rstrip()}\n{how.marker}"))
        if piece.ended or not piece.tokens or generated >= how.max_tokens:
            return thought, generated, verdicts
        if len(verdicts) > 1 and _are_stable(verdicts[-2:], how.sure):
            return thought, generated, verdicts


def _are_stable(verdicts: list[Any], sure: float) -> bool:
    certainty = min(max(verdict.probabilities) for verdict in verdicts)
    return len({verdict.best for verdict in verdicts}) == 1 and certainty >= sure
