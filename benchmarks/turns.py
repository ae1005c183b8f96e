"""Servers that work in turns of a second, so that what slows the machine slows all of them alike.

On a machine that others share, the same work takes up to twice as long from one minute to the next:
conditions that run one after another differ by that. Here all run at the same time, one of them
for a second, then the next, while the processes of the others are stopped.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from rksc_sglang.server_process import ServerProcess

#: Many passes long, and short against what the machine's speed takes to change.
TURN_SECONDS = 1.0

Result = TypeVar("Result")


class Clock:
    """Seconds of a server's turns so far."""

    def __init__(self) -> None:
        # Of earlier turns, and when this one began; replaced at once, as other threads read it.
        self._turns: tuple[float, float | None] = (0.0, None)

    def __call__(self) -> float:
        earlier, began = self._turns
        return earlier if began is None else earlier + time.perf_counter() - began

    @contextmanager
    def running(self) -> Iterator[None]:
        self._turns = (self(), time.perf_counter())
        try:
            yield
        finally:
            self._turns = (self(), None)


def take_turns(
    processes: Mapping[str, ServerProcess],
    jobs: Mapping[str, Callable[[Clock], Result]],
    turn: float = TURN_SECONDS,
) -> dict[str, Result]:
    """What each job returns; each has a server, a thread and a clock of its own.

    Args:
        processes: the servers, by the jobs' names; all run before and afterwards.
        jobs: in the order of their turns; each begins with its first.
        turn: seconds.

    Raises:
        ServerFailedError: a server ended.
        Exception: the first that a job raised; the other jobs end before it is.
    """
    clocks = {name: Clock() for name in jobs}
    futures: dict[str, Future[Result]] = {}
    with ThreadPoolExecutor(len(jobs)) as pool, _stopped([processes[name] for name in jobs]):
        waiting = list(jobs)
        while waiting:
            for name in waiting:
                with _resumed(processes[name]), clocks[name].running():
                    if name not in futures:
                        futures[name] = pool.submit(jobs[name], clocks[name])
                    done, _ = wait([futures[name]], timeout=turn)
                for future in done:
                    future.result()
            waiting = [name for name in waiting if not futures[name].done()]
    return {name: future.result() for name, future in futures.items()}


def settle(processes: Mapping[str, ServerProcess], seconds: float, turn: float) -> None:
    """Leave each server alone: it has no work, and the others are stopped.

    Args:
        processes: all run before and afterwards.
        seconds: of each server's turns.
        turn: seconds.

    Raises:
        ServerFailedError: a server ended.
    """

    def rest(clock: Clock) -> None:
        while clock() < seconds:
            time.sleep(turn / 100)

    take_turns(processes, dict.fromkeys(processes, rest), turn)


@contextmanager
def _stopped(processes: list[ServerProcess]) -> Iterator[None]:
    for process in processes:
        process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.signal(signal.SIGCONT)


@contextmanager
def _resumed(process: ServerProcess) -> Iterator[None]:
    process.check()
    process.signal(signal.SIGCONT)
    try:
        yield
    finally:
        process.signal(signal.SIGSTOP)
