"""What RKSC costs where there is nothing to gain: stock SGLang against each mode of RKSC.

Unrelated prompts, one long prompt, many short decodes, 64 at once; on SmolLM2, and on a random
model of 2 layers, where scheduler and cache are what is timed. All use our CPU attention. The
summary is mode exact's; those of the other modes are in it under the mode's name.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests

from benchmarks import harness
from benchmarks.harness import Case, Condition, Row, stream, together
from benchmarks.statistics import geometric_mean_ratio
from benchmarks.text import Passages, machine_texts, question_texts
from rksc_sglang.models.smollm2 import ensure_smollm2
from rksc_sglang.models.tiny import make_tiny_llama

MODELS = ("smollm2", "tiny")
MODES = ("exact", "balanced")
#: Measurements of a case in each repetition: the tiny model's are short, and scatter more.
TAKES = {"smollm2": 1, "tiny": 4}


def make_cases(group: str, texts: Callable[[random.Random], Passages]) -> list[Case]:
    def load(count: int, words: int, steps: int) -> Callable[..., Mapping[str, Any]]:
        """``count`` unrelated prompts at once, each in a request of its own."""

        def case(url: str, rng: random.Random) -> Mapping[str, Any]:
            passages = texts(rng)
            prompts = [passages.take(words) for _ in range(count)]
            before = cache_work(url)
            start = time.perf_counter()
            answers, _ = together([partial(stream, url, prompt, steps) for prompt in prompts])
            seconds = time.perf_counter() - start
            tokens = sum(answer["tokens"] for answer in answers)
            return {
                "throughput": tokens / seconds,
                "ttft": float(np.mean([answer["ttft"] for answer in answers])),
                "requests": count,
                "cache_microseconds": {
                    operation: total - before[operation]
                    for operation, total in cache_work(url).items()
                },
            }

        return case

    # Short loads are repeated in one measurement: a scheduler step is milliseconds.
    many = 4 if group == "tiny" else 1
    return [
        Case(f"{group}/unrelated", load(16 * many, 60, 4), group),
        Case(f"{group}/one_long", load(1, 1200, 4 * many), group),
        Case(f"{group}/short_decodes", load(16 * many, 8, 24), group),
        Case(f"{group}/concurrent_64", load(64, 12, 8 * many), group),
    ]


def cache_work(url: str) -> dict[str, int]:
    """Microseconds spent in the radix cache so far; empty on a stock server."""
    answer = requests.get(url + "/rksc/status", timeout=60)
    if answer.status_code != 200:
        return {}
    timings = answer.json()["ranks"][0]["cache"]["timings"]
    return {operation: timing["microseconds"] for operation, timing in timings.items()}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    exact, *others = MODES
    return {**_summary(rows, exact), **{mode: _summary(rows, mode) for mode in others}}


def _summary(rows: Sequence[Row], mode: str) -> dict[str, Any]:
    def ratios(group: str, name: str) -> dict[str, list[float]]:
        """rksc / stock, of each pair, by workload."""
        workloads = dict.fromkeys(
            row["workload"] for row in rows if row["workload"].startswith(f"{group}/")
        )
        result = {}
        for workload in workloads:
            a, b = harness.pairs(rows, workload, name, f"{group}-{mode}", f"{group}-stock")
            result[workload] = [x / y for x, y in zip(a, b)]
        return result

    throughput = ratios("smollm2", "throughput")
    ours = [row for row in rows if row["condition"].endswith(f"-{mode}")]
    requests_ = sum(row["requests"] for row in ours)
    return {
        "throughput_ratio": geometric_mean_ratio(list(throughput.values())),
        "ttft_ratio": geometric_mean_ratio(list(ratios("smollm2", "ttft").values())),
        "worst_throughput_ratio": min(float(np.median(r)) for r in throughput.values()),
        "tiny_throughput_ratio": geometric_mean_ratio(list(ratios("tiny", "throughput").values())),
        "throughput_ratios": {
            workload: float(np.median(r))
            for group in MODELS
            for workload, r in ratios(group, "throughput").items()
        },
        "microseconds_per_request": {
            operation: sum(row["cache_microseconds"][operation] for row in ours) / requests_
            for operation in ("match", "insert", "evict")
        },
    }


def main() -> None:
    args = harness.parser(__doc__ or "").parse_args()
    source = question_texts(args.questions) if args.questions else machine_texts()

    def texts(rng: random.Random) -> Passages:
        return Passages(source, rng.getrandbits(32))

    with tempfile.TemporaryDirectory() as folder:
        smollm2 = ensure_smollm2()
        tiny = make_tiny_llama(Path(folder) / "tiny", smollm2)
        paths = {"smollm2": str(smollm2), "tiny": str(tiny)}
        conditions = [
            Condition(
                f"{group}-{name}",
                [
                    *("--rksc-mode", mode, "--model-path", paths[group]),
                    *("--max-total-tokens", "32768", "--dtype", "float32"),
                ],
                group,
            )
            for group in MODELS
            for name, mode in (("stock", "off"), *zip(MODES, MODES))
        ]
        cases = [case for group in MODELS for case in make_cases(group, texts) * TAKES[group]]
        harness.run("benchmarks.overhead", args, conditions, cases, 3 if args.quick else 8)


if __name__ == "__main__":
    main()
