"""What RKSC reads of SGLang's stream executors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from sglang.lang.interpreter import ProgramState

from rksc_sglang.contract import RequestContract

_POLL_SECONDS = 0.002


def contract_of_executor(executor: Any) -> RequestContract | None:
    """The contract that this executor's requests carry, None outside of ``rksc.fork``."""
    return getattr(executor.default_sampling_para, "contract", None)


def settle(state: ProgramState) -> Exception | None:
    """Wait until the state has done all that was appended to it, or has failed.

    ``state.sync()`` alone waits for ever when something was appended after a failure: nobody is
    left to do it.

    Returns:
        What it failed with, or None.
    """
    executor = state.stream_executor
    while not _is_settled(executor):
        time.sleep(_POLL_SECONDS)
    return executor.error_


def as_settled(states: Sequence[ProgramState]) -> Iterator[int]:
    """Numbers of the states, each as soon as :func:`settle` would return for it."""
    waiting = dict(enumerate(state.stream_executor for state in states))
    while waiting:
        for number, executor in list(waiting.items()):
            if _is_settled(executor):
                del waiting[number]
                yield number
        if waiting:
            time.sleep(_POLL_SECONDS)


def _is_settled(executor: Any) -> bool:
    running = executor.use_thread and executor.queue.unfinished_tasks
    return executor.error_ is not None or not running
