"""The live half of ``benchmarks.eviction``: programs at once on a server with a small pool."""

from __future__ import annotations

import argparse
import gzip
import itertools
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
import sglang as sgl
from rich.console import Console
from rich.progress import Progress

from benchmarks import harness
from benchmarks.eviction import OURS, TRACES
from benchmarks.harness import Case, Condition, Row
from benchmarks.load import work
from benchmarks.programs import PROGRAMS, Mechanisms, Settings
from benchmarks.statistics import paired_ratio
from rksc_sglang.models.problems import problems
from rksc_sglang.models.smollm2 import ensure_smollm2
from rksc_sglang.models.tiny import make_tiny_llama
from rksc_sglang.server_process import ServerProcess

#: What is recorded; "mixed" takes the others in turn.
NAMES = ("tree_of_thought", "beam_search", "best_of_n", "debate")
#: Programs that run at once, all told, solved examples before each problem.
AT_ONCE, JOBS, EXAMPLES = 10, 20, 6
#: Tokens: a little more than what so many programs hold while they run.
SMALL_POOL = 6000
STOCK = {
    "lru": [],
    "lfu": ["--radix-eviction-policy", "lfu"],
    "slru": ["--radix-eviction-policy", "slru"],
}
MASS = "rksc-mass"
FLAGS = {
    **STOCK,
    OURS.name: ["--radix-eviction-policy", OURS.policy],
    MASS: [
        *("--radix-eviction-policy", OURS.policy),
        *("--radix-eviction-policy-config", '{"mass": 1.0}'),
    ],
}


def run_programs(url: str, names: Sequence[str], jobs: int, seed: int) -> float:
    """Solve ``jobs`` problems, some at once; gives seconds."""
    backend = sgl.RuntimeEndpoint(url, chat_template_name="chatml")
    drawn = list(itertools.islice(problems("calibration", seed), 2 * jobs))
    asked, solved = drawn[:jobs], drawn[jobs:]
    rng = random.Random(seed)
    examples = [rng.sample(solved, EXAMPLES) for _ in asked]
    # Lengths are given, so that every policy does the same work.
    lengths = [[rng.randint(4, 32) for _ in range(16)] for _ in asked]

    def job(number: int) -> None:
        settings = Settings(
            examples=[(p.question, p.solution) for p in examples[number]], lengths=lengths[number]
        )
        PROGRAMS[names[number % len(names)]].solve.run(
            question=asked[number].question,
            settings=settings,
            mechanisms=Mechanisms(share=None, exit="off"),
            backend=backend,
        )

    return work(range(jobs), job, AT_ONCE).wall


def record(args: argparse.Namespace) -> None:
    """Write benchmarks/traces: each program by itself, and all mixed."""
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as progress:
        folder = Path(name)
        model = model_path(args, folder)
        TRACES.mkdir(exist_ok=True)
        for number, names in enumerate([*([name] for name in NAMES), list(NAMES)]):
            title = names[0] if len(names) == 1 else "mixed"
            bar = progress.add_task(title, total=None)
            trace = folder / f"{title}.jsonl"
            flags = [
                *("--model-path", model, "--max-total-tokens", "16384"),
                *("--rksc-trace", str(trace), "--radix-eviction-policy", "rksc-paper"),
            ]
            with ServerProcess(flags, log=folder / "log") as server:
                server.wait_ready()
                run_programs(server.url, names, JOBS, args.seed + number)
            with trace.open("rb") as plain, gzip.open(TRACES / f"{title}.jsonl.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
            progress.update(bar, total=1, completed=1)


def run(args: argparse.Namespace) -> None:
    """The same programs under each policy, on servers that differ in nothing else."""

    def load(url: str, rng: random.Random) -> Mapping[str, Any]:
        requests.post(url + "/flush_cache", timeout=60).raise_for_status()
        before = _status(url)
        jobs = AT_ONCE if args.quick else JOBS
        seconds = run_programs(url, NAMES, jobs, rng.getrandbits(30))
        after = _status(url)
        return {
            "problems_per_second": jobs / seconds,
            "decode_seconds": after["decode_seconds"] - before["decode_seconds"],
            "mass_seconds": _mass(after) - _mass(before),
        }

    with tempfile.TemporaryDirectory() as folder:
        common = ["--model-path", model_path(args, Path(folder))]
        common += ["--max-total-tokens", str(SMALL_POOL)]
        conditions = [Condition(name, [*common, *flags]) for name, flags in FLAGS.items()]
        harness.run(
            "benchmarks.eviction", args, conditions, [Case("mixed", load)], 2 if args.quick else 8
        )


def summarise_served(rows: Sequence[Row]) -> dict[str, Any]:
    def speedup(name: str) -> dict[str, float]:
        ours, theirs = harness.pairs(rows, "mixed", "problems_per_second", OURS.name, name)
        return paired_ratio(ours, theirs)

    speedups = {name: speedup(name) for name in FLAGS if name != OURS.name}
    best = min(STOCK, key=lambda name: speedups[name]["ratio"])
    mass = [row for row in rows if row["condition"] == MASS]
    return {
        "server_speedup_vs_best_stock": {"policy": best, **speedups[best]},
        "server_speedup_vs": speedups,
        "mass_overhead": float(
            np.sum([row["mass_seconds"] for row in mass])
            / np.sum([row["decode_seconds"] for row in mass])
        ),
    }


def model_path(args: argparse.Namespace, folder: Path) -> str:
    return args.model_path or str(make_tiny_llama(folder / "tiny", ensure_smollm2()))


def _status(url: str) -> dict[str, Any]:
    answer = requests.get(url + "/rksc/status", timeout=60)
    answer.raise_for_status()
    return answer.json()["ranks"][0]


def _mass(status: Mapping[str, Any]) -> float:
    return status["eviction"]["mass_seconds"] or 0.0
