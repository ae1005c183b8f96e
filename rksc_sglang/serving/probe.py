"""Measures what a prefill costs on this server: a few prefills of its own, when it is idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rksc_sglang.serving.internal import (
    IDLE_SECONDS,
    InternalState,
    ModelFacts,
    make_internal_req,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

#: Tokens of the prefills, each done twice a round: the first time also allocates and compiles.
SHORT, LONG = 16, 256
#: Rounds, from the server's start on, and seconds between the first two; each pause is twice the
#: one before, so that the last comes after 9 minutes: where other programs start or work at the
#: same time, as many servers do, single rounds are worthless. Once there is a result, a round that
#: others' work disturbs is over.
ROUNDS, PAUSE = 10, 1.0
#: Seconds without work before a round that only refines a result: who works with short pauses shall
#: not meet it.
REFINING_SECONDS = 5.0


class CostProbe:
    """Drives the prefills from the scheduler's idle hook, round after round.

    Args:
        model: whose requests these are.
        longest: a prefill of more tokens does not fit the server.
        submit: puts a request of our own into the waiting queue.
        done: called after each round that ran alone with a short and a long prefill, each as
            (tokens, seconds), the fastest so far; not while the long one was not slower than the
            short one.
    """

    def __init__(
        self,
        model: ModelFacts,
        longest: int,
        submit: Callable[[Req], None],
        done: Callable[[tuple[int, float], tuple[int, float]], None],
    ) -> None:
        self.model = model
        self.submit = submit
        self.done = done
        self._rounds = ROUNDS if longest > SHORT else 0
        self._pause = PAUSE
        self._next = 0.0
        self._long = min(LONG, longest)
        self._left: list[int] = []
        self._seconds: dict[int, float] = {}
        self._has_result = False
        self._running: Req | None = None
        self._started = 0.0
        self._passes = 0

    def on_idle(self, forward_passes: int, quiet: float) -> bool:
        """Called again and again while the server is idle.

        Args:
            forward_passes: how many the server has made: one more means that ours ran alone.
            quiet: seconds that it has been so.

        Returns:
            Whether a prefill was submitted.
        """
        now = time.perf_counter()
        ran_alone = self._running is not None and forward_passes == self._passes + 1
        if self._running is not None:
            if ran_alone:
                self._end_prefill(len(self._running.origin_input_ids), now - self._started)
            elif self._has_result:  # else it is needed: made again when all is quiet
                self._left = []
                self._pause_rounds()
            self._running = None
        self._passes = forward_passes
        needed = REFINING_SECONDS if self._has_result else IDLE_SECONDS
        if not ran_alone and quiet < needed:
            return False  # the next of others' work would wait for a prefill that begins now
        if not self._left and self._rounds and now >= self._next:
            self._rounds -= 1
            self._left = [SHORT, SHORT, self._long, self._long]
        if not self._left or now < self._next:
            return False
        self._run(self._left[0])
        return True

    def _end_prefill(self, tokens: int, seconds: float) -> None:
        self._seconds[tokens] = min(seconds, self._seconds.get(tokens, seconds))
        self._left.pop(0)
        if not self._left:
            self._end_round()

    def _pause_rounds(self) -> None:
        self._next = time.perf_counter() + self._pause
        self._pause *= 2

    def _end_round(self) -> None:
        self._pause_rounds()
        short, long = self._seconds[SHORT], self._seconds[self._long]
        if long > short:
            self.done((SHORT, short), (self._long, long))
            self._has_result = True

    def _run(self, tokens: int) -> None:
        # Not one token again and again: attention to equal keys could be a special case.
        prompt = [(7 * i * i + 11 * i + 3) % self.model.vocab_size for i in range(tokens)]
        self._running = make_internal_req(
            f"rksc-probe-{self._rounds}-{len(self._left)}",
            prompt,
            InternalState("probe"),
            model=self.model,
            cache_salt="rksc-probe",
        )
        self._running.skip_radix_cache_insert = True
        self._started = time.perf_counter()
        self.submit(self._running)
