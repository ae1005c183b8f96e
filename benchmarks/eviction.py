"""Which eviction policy recomputes least: traces replayed on the real tree, and a live server.

Traces of reasoning programs that ran at once, in benchmarks/traces, and those of --trace, are
replayed under SGLang's policies, RKSC's, RKSC's without each of its ingredients, and a clairvoyant
one, at five sizes of the pool. --server runs the programs on a server with a small pool instead.
--record makes the traces anew. 20 minutes; with --server 30; with --record 10.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks import harness
from benchmarks.eviction_replay import (
    LruFreeing,
    Policy,
    clairvoyant,
    read_trace,
    replay,
    smallest_pool,
)
from benchmarks.harness import BenchmarkError, Row

TRACES = Path(__file__).parent / "traces"
#: Pools between the smallest in which the trace's requests fit (0), and all that it computes (1).
SIZES = (0.02, 0.05, 0.1, 0.2, 0.4)
STOCK = (
    Policy("lru", "lru"),
    Policy("lfu", "lfu"),
    *(Policy(f"slru-{n}", "slru", {"protected_threshold": n}) for n in (2, 3, 5)),
    *(
        Policy(f"tlru-{n}", "tlru", {"threshold": n, "next_prompt_estimate": 64})
        for n in (256, 512, 1024)
    ),
    Policy("priority", "priority"),
)
OURS = Policy("rksc", "rksc")
FREEING = Policy("lru-freeing", "rksc", strategy=LruFreeing)
VARIANTS = (
    FREEING,
    Policy("rksc-paper", "rksc-paper"),
    Policy("without-life_cycle", "rksc", {"life_cycle": False}),
    Policy("without-fan_out", "rksc", {"fan_out": 0.0}),
    Policy("without-tail", "rksc", {"tail": 0}),
    Policy("without-trim", "rksc", {"trim": 0}),
    Policy("lru-trimming", "rksc", {"life_cycle": False, "fan_out": 0.0, "tail": 0}),
    Policy("with-lease", "rksc", {"lease": True}),
    Policy("with-mass", "rksc", {"mass": 1.0}),
    Policy("with-depth", "rksc", {"depth": 1.0}),
    Policy("with-cost", "rksc", {"cost": 1.0}),
)
CLAIRVOYANT = "clairvoyant"
RESAMPLES = 2000


def measure(path: Path, limit: int | None, progress: Progress) -> Iterator[Row]:
    """Rows of one trace: every policy at every size of the pool.

    Raises:
        BenchmarkError: a policy recomputed less than the clairvoyant one.
    """
    events, unit = read_trace(path, limit)
    name = path.name.partition(".")[0]
    policies = (*STOCK, OURS, *VARIANTS)
    bar = progress.add_task(name, total=len(SIZES) * len(policies))
    smallest, whole = smallest_pool(events)
    for size in SIZES:
        capacity = int(smallest + size * (whole - smallest))
        bound = clairvoyant(events, capacity)
        outcomes = {CLAIRVOYANT: bound}
        for policy in policies:
            outcomes[policy.name] = replay(events, capacity, policy, unit)
            progress.advance(bar)
        for policy_name, outcome in outcomes.items():
            if outcome.recomputed_tokens < bound.recomputed_tokens:
                raise BenchmarkError(f"{policy_name} beats the clairvoyant policy on {name}")
            yield {
                "workload": f"{name}/{size}",
                "condition": policy_name,
                "reasoning": path.parent == TRACES,
                "capacity": capacity,
                "recomputed_tokens": outcome.recomputed_tokens,
                "prompt_tokens": outcome.prompt_tokens,
                "evicted_tokens": outcome.evicted_tokens,
                "hit_rate": outcome.hit_rate,
                "evict_seconds": outcome.evict_seconds,
            }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    replayed = [row for row in rows if "recomputed_tokens" in row]
    served = [row for row in rows if "problems_per_second" in row]
    return {**(_replayed(replayed) if replayed else {}), **(_served(served) if served else {})}


def _replayed(rows: Sequence[Row]) -> dict[str, Any]:
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row["workload"], {})[row["condition"]] = row
    reasoning = [cell for cell in cells.values() if cell[OURS.name]["reasoning"]]
    stock = [policy.name for policy in STOCK]
    closed = {
        name: _gap_closed(reasoning, name)
        for name in (OURS.name, *stock, *(policy.name for policy in VARIANTS))
    }
    best = max(stock, key=lambda name: closed[name]["value"])
    regrets = {
        workload: 100
        * (max(cell[name]["hit_rate"] for name in stock) - cell[OURS.name]["hit_rate"])
        for workload, cell in cells.items()
    }
    ours = [cell[OURS.name] for cell in cells.values()]
    lru = sum(cell["lru"]["recomputed_tokens"] for cell in reasoning)
    bound = sum(cell[CLAIRVOYANT]["recomputed_tokens"] for cell in reasoning)
    return {
        "gap_closed": closed[OURS.name],
        "gap_closed_by_best_stock": {"policy": best, **closed[best]},
        "gap_closed_by_lru_freeing": closed[FREEING.name],
        "gap_closed_by": {policy.name: closed[policy.name]["value"] for policy in VARIANTS},
        "gap_of_lru": 1 - bound / lru,
        "worst_regret": max(regrets.values()),
        "regrets": regrets,
        "evict_us_per_token": 1e6
        * sum(row["evict_seconds"] for row in ours)
        / max(sum(row["evicted_tokens"] for row in ours), 1),
    }


def _gap_closed(cells: Sequence[dict[str, Row]], policy: str) -> dict[str, float]:
    """(policy - lru) / (clairvoyant - lru) in recomputed tokens, over cells; resampled by cell."""
    tokens = np.array(
        [
            [cell[name]["recomputed_tokens"] for name in ("lru", policy, CLAIRVOYANT)]
            for cell in cells
        ],
        dtype=float,
    )
    picks = np.random.default_rng(0).integers(0, len(cells), (RESAMPLES, len(cells)))

    def share(lru: Any, ours: Any, bound: Any) -> Any:
        return (lru - ours) / np.maximum(lru - bound, 1)

    resampled = share(*tokens[picks].sum(axis=1).T)
    return {
        "value": float(share(*tokens.sum(axis=0))),
        "low": float(np.quantile(resampled, 0.025)),
        "high": float(np.quantile(resampled, 0.975)),
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Hit rates by size of the pool, a picture a trace, where matplotlib is installed."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    rates: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        trace, size = row["workload"].split("/")
        rates.setdefault(trace, {}).setdefault(row["condition"], {})[float(size)] = row["hit_rate"]
    figure, axes = pyplot.subplots(
        1, len(rates), figsize=(3.2 * len(rates), 3.2), layout="constrained", squeeze=False
    )
    for axis, (trace, policies) in zip(axes[0], sorted(rates.items())):
        for policy in ("lru", "tlru-256", "rksc-paper", OURS.name, CLAIRVOYANT):
            sizes, values = zip(*sorted(policies[policy].items()))
            names = [f"{size:g}" for size in sizes]
            axis.plot(names, values, "o-", label=policy, markersize=3)
        axis.set(title=trace, xlabel="size of the pool")
    axes[0][0].set_ylabel("token hit rate")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _served(rows: Sequence[Row]) -> dict[str, Any]:
    from benchmarks.eviction_server import summarise_served

    return summarise_served(rows)


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--trace", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--server", action="store_true", help="a live server with a small pool")
    parser.add_argument("--record", action="store_true", help="record benchmarks/traces anew")
    parser.add_argument("--model-path", help="for --server and --record (default: the tiny model)")
    args = parser.parse_args()
    if args.record or args.server:
        from benchmarks import eviction_server

        (eviction_server.record if args.record else eviction_server.run)(args)
        return
    prepare_sglang()
    paths = [*sorted(TRACES.glob("*.jsonl.gz")), *args.trace]
    random.Random(args.seed).shuffle(paths)
    rows: list[Row] = []
    try:
        with Progress(console=Console(stderr=True)) as progress:
            for path in paths:
                rows += measure(path, 2000 if args.quick else None, progress)
    except (BenchmarkError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    traces = [path.name for path in paths]
    harness.report(harness.make_result("benchmarks.eviction", args, rows, traces=traces), args.json)
    if args.json:
        plot(rows, args.json.with_suffix(".png"))


def prepare_sglang() -> None:
    """Publish a server's configuration, which SGLang's radix cache reads."""
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    from rksc_sglang.models.smollm2 import ensure_smollm2

    args = ServerArgs(
        model_path=str(ensure_smollm2()),
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
    )
    args.resolve_once()
    publish(args, role="scheduler")


if __name__ == "__main__":
    main()
