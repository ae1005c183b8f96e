"""Ends program states that are garbage, from threads of its own.

SGLang ends a state in its finalizer, which takes locks: its queue's and those of ``threading``. The
garbage collector runs finalizers in whatever thread it is called in, also in one that holds such a
lock, for instance because it is starting another thread, and that thread then waits for itself.
"""

from __future__ import annotations

import gc
import os
import threading
import warnings
from queue import SimpleQueue
from typing import Any

#: Finalizers may put into a SimpleQueue: it takes no lock that its own thread could hold.
_garbage: SimpleQueue[Any] = SimpleQueue()


def end_later(executor: Any) -> None:
    """End a stream executor soon, in another thread."""
    _garbage.put(executor)


def start() -> None:
    """Start the threads, in this process and in those that are forked from it."""
    _start_threads()
    os.register_at_fork(after_in_child=_start_threads)


def _start_threads() -> None:
    for work in (_end_garbage, _collect_at_exit):
        threading.Thread(target=work, name="rksc-endings", daemon=True).start()


def _collect_at_exit() -> None:
    """Python waits for the threads of all states before it exits, and collects no garbage."""
    threading.main_thread().join()
    gc.collect()


def _end_garbage() -> None:
    while True:
        executor = _garbage.get()
        try:
            executor.end()
        except Exception as error:
            warnings.warn(f"a program state was not ended: {error!r}", stacklevel=1)
        del executor  # or it would live until the next one comes
