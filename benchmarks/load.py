"""Load on one server: problems in work at the same time or arriving at a rate, and their cost."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import requests

from benchmarks.harness import BenchmarkError

_SAMPLE_SECONDS = 0.25
_IDLE_SECONDS = 600

Task = TypeVar("Task")
Result = TypeVar("Result")


class Done(NamedTuple):
    """What a server has done since it started.

    Attributes:
        computed: tokens of prompts that were not cached.
        generated: tokens of answers, those of stopped branches included.
        prefills, decodes: forward passes.
    """

    computed: int
    generated: int
    prefills: int
    decodes: int


class Worked(NamedTuple):
    """Results in the order of the tasks.

    Attributes:
        seconds: of each task, from its start or arrival on.
        wall: seconds until the last result. What a program leaves running behind its result is
            not waited for.
    """

    results: list[Any]
    seconds: list[float]
    wall: float


def work(
    tasks: Sequence[Task],
    solve: Callable[[Task], Result],
    concurrency: int,
    arrivals: Sequence[float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Worked:
    """Solve tasks under a closed loop, or, with arrivals, under an open one.

    Args:
        concurrency: tasks in work at the same time, at most.
        arrivals: seconds at which each task arrives, ascending.
        clock: seconds; may stand still at times.
    """
    start = clock()

    def one(number: int) -> tuple[Result, float]:
        began = clock()
        if arrivals is not None:
            began = start + arrivals[number]
            while (left := began - clock()) > 0:
                time.sleep(left)
        return solve(tasks[number]), clock() - began

    with ThreadPoolExecutor(concurrency) as pool:
        done = list(pool.map(one, range(len(tasks))))
    wall = clock() - start
    return Worked([result for result, _ in done], [seconds for _, seconds in done], wall)


class Meter:
    """Counts of one server, which runs with ``--enable-metrics``."""

    def __init__(self, url: str) -> None:
        self.url = url

    def done(self) -> Done:
        """Once the server is idle: an answer is counted when it has ended."""
        text = self._get("/metrics").text
        # With CUDA graphs and without, which is what SGLang counts passes for.
        passes = r'sglang:cuda_graph_passes_total\{.*mode="%s_'
        return Done(
            _total(text, r'sglang:realtime_tokens_total\{.*mode="prefill_compute"'),
            _total(text, r"sglang:generation_tokens_total\{"),
            _total(text, passes % "prefill"),
            _total(text, passes % "decode"),
        )

    def emptied(self) -> Done:
        """Wait until nothing runs, empty the cache, and tell what was done."""
        self._get(f"/flush_cache?timeout={_IDLE_SECONDS}")
        return self.done()

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Sample the KV slots in use; what it gives is the most of them so far."""
        most, ended = [0], threading.Event()

        def sample() -> None:
            while not ended.wait(_SAMPLE_SECONDS):
                load = self._get("/v1/loads?include=core").json()["loads"][0]
                most[0] = max(most[0], load["num_used_tokens"])

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield lambda: most[0]
        finally:
            ended.set()
            thread.join()

    def _get(self, route: str) -> requests.Response:
        try:
            answer = requests.get(self.url + route, timeout=_IDLE_SECONDS)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise BenchmarkError(f"{self.url}: {error}") from error
        return answer


def _total(metrics: str, name: str) -> int:
    """Sum of a Prometheus counter over its labels."""
    found = re.findall(rf"^{name}.*\}} (\S+)$", metrics, re.MULTILINE)
    return int(sum(map(float, found)))
