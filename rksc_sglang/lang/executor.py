"""What RKSC reads of SGLang's stream executors."""

from __future__ import annotations

import time
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
    if executor.use_thread:
        while executor.error_ is None and executor.queue.unfinished_tasks:
            time.sleep(_POLL_SECONDS)
    return executor.error_
