"""What to do next with a prompt of which a part is cached behind other contexts.

A prompt is served from left to right: what is *ready* (cached exactly, or already spliced), then a
run of tokens that the content index found behind another context, then new text, and so on. Before
a run is taken over, its first ``head`` tokens are recomputed behind the new context: attention
sinks form there, and what differs in front of a run matters most right behind it (LegoLink,
arXiv 2410.15332).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rksc_sglang.asks.content_index import Run

#: Longer heads that are tried where the gate refuses a run.
RETRIES = 2


class Compute(NamedTuple):
    """Prefill the prompt up to ``stop``; then a run of ``gain`` tokens can be taken over."""

    stop: int
    gain: int


class Take(NamedTuple):
    """What follows is cached in each of these runs, up to the position that stands beside it."""

    options: list[tuple[Run, int]]  # the longest first


class Planner(NamedTuple):
    """The shipped settings of a splice.

    Attributes:
        head: tokens recomputed at the beginning of each run, at least 1.
        tail: tokens recomputed at the end of a prompt, at least 1: what is asked is there.
        min_tokens: shortest stretch that is worth a splice.
        page_size: of the KV pool: what is ready always fills whole pages.
    """

    head: int
    tail: int
    min_tokens: int
    page_size: int

    def search_from(self, ready: int) -> int:
        """Where the search for runs must begin: a head may be among what is ready."""
        return max(ready - self.head, 0)

    def limit(self, prompt_length: int) -> int:
        """Tokens from here on are always computed."""
        return max(prompt_length - self.tail, 0)

    def next_step(self, runs: Sequence[Run], ready: int, limit: int) -> Compute | Take | None:
        """The next thing to do for a prompt whose first ``ready`` tokens have their KV.

        Args:
            runs: of :meth:`ContentIndex.find` from :meth:`search_from` on.
            limit: of :meth:`limit`, or less.

        Returns:
            None when nothing is left that is worth a splice.
        """
        begins: dict[int, list[tuple[Run, int]]] = {}
        for run in runs:
            begin = self._up(max(ready, run.start + self.head))
            stop = self._down(min(run.stop, limit))
            if stop - begin >= self.min_tokens:
                begins.setdefault(begin, []).append((run, stop))
        if not begins:
            return None
        first = min(begins)
        options = sorted(begins[first], key=lambda option: option[1], reverse=True)
        if first > ready:
            return Compute(first, options[0][1] - first)
        # A donor that holds nearly as much may be closer to the new context.
        least = options[0][1] - self.min_tokens
        return Take([option for option in options if option[1] > least])

    def stretches(self, runs: Sequence[Run], ready: int, limit: int) -> Iterator[Compute]:
        """All that could be taken over, one after the other.

        As :meth:`next_step`, where what can be taken at once is a stretch that begins at ``ready``.
        """
        while (step := self.next_step(runs, ready, limit)) is not None:
            if isinstance(step, Take):
                step = Compute(ready, step.options[0][1] - ready)
            yield step
            ready = step.stop + step.gain

    def again(self, step: Take, ready: int, refusals: int) -> int:
        """Where the gate may look again at a step that it has refused ``refusals`` times.

        The further a run goes on behind the new context, the less is left of the donor's: the head
        is made four times as long each time. Past the end of the run after ``RETRIES``, or where
        what is left is too short.
        """
        position = self._up(ready + 3 * self.head * 4 ** (refusals - 1))
        longest = step.options[0][1]
        if refusals > RETRIES or longest - position < self.min_tokens:
            return longest
        return position

    def _up(self, position: int) -> int:
        return -(-position // self.page_size) * self.page_size

    def _down(self, position: int) -> int:
        return position // self.page_size * self.page_size
