"""What the rows of ``benchmarks.throughput`` say: speedups, accuracy, and the bars over both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.statistics import geometric_mean_ratio, mean_gain, mean_interval

#: Where a token costs what it costs: speed is judged on it wherever it was measured.
SPEED_MODEL = "smollm2"
NO_KV, SGLANG, BEST, RKSC = "no_kv", "sglang", "sglang_best", "rksc"
BASELINES = (NO_KV, SGLANG, BEST)
#: Parts whose output lengths are given, the same in all conditions.
CLOSED_LOOP = ("speed", "no_kv")
#: What grows in the part "growth", by program.
GROWTH = {"self_consistency": "branches", "document_qa": "words of the document"}
#: Of the paper (one A100, models of 7 to 10 B, mean of 20 cells), by what is compared.
PAPER_ROW = {(RKSC, NO_KV): 3.008, (BEST, NO_KV): 1.808, (RKSC, BEST): 1.66}

Groups = dict[str, list[float]]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The bars, and everything by model. A bar whose part was not run is None.

    Speed is judged on SmolLM2, accuracy on the other model; with one model, both on that.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))
    models = {name: _model([row for row in rows if row["model"] == name]) for name in names}
    fast = models[SPEED_MODEL if SPEED_MODEL in models else names[0]]
    judged = models[next((name for name in names if name != SPEED_MODEL), names[0])]
    return {
        **{f"speedup_vs_{baseline}": fast["speedups"][baseline] for baseline in BASELINES},
        "worst_program_ratio": min(fast["programs"][BEST].values(), default=None),
        "paper_setting_vs_no_kv": fast["paper"] and fast["paper"][f"{RKSC}/{NO_KV}"]["all"],
        "accuracy_delta": judged["accuracy_delta"],
        "models": models,
    }


def _model(rows: Sequence[Row]) -> dict[str, Any]:
    def part(*names: str) -> list[Row]:
        return [row for row in rows if row["part"] in names]

    # A model on which only accuracy was measured: with the lengths that it gave its answers.
    closed = part(*CLOSED_LOOP) or part("accuracy")
    against = {baseline: ratios(closed, RKSC, baseline) for baseline in BASELINES}
    answered = part("accuracy") or part(*CLOSED_LOOP)
    return {
        "speedups": {baseline: _geometric_mean(groups) for baseline, groups in against.items()},
        "programs": {baseline: _by_program(closed, groups) for baseline, groups in against.items()},
        "growth": _by_program(part("growth"), ratios(part("growth"), RKSC, BEST)),
        "accuracy": _each(answered, accuracy),
        "accuracy_delta": accuracy_delta(answered, RKSC, BEST),
        "without": {
            condition: _by_program(part("ablations"), ratios(part("ablations"), RKSC, condition))
            for condition in _conditions(part("ablations"))
            if condition != RKSC
        },
        "open_loop": {
            condition: {
                f"{program} {name}": seconds
                for program, percentiles in programs.items()
                for name, seconds in percentiles.items()
            }
            for condition, programs in _each(part("open"), _percentiles).items()
        },
        "paper": _paper(part("paper")),
        "workloads": _workloads(rows),
    }


def _conditions(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["condition"] for row in rows))


def ratios(rows: Sequence[Row], a: str, b: str) -> Groups:
    """Problems a second under ``a`` / under ``b``, of each round, by workload that has both."""
    found: Groups = {}
    for workload in dict.fromkeys(row["workload"] for row in rows):
        ours, theirs = harness.pairs(rows, workload, "throughput", a, b)
        if ours:
            found[workload] = [x / y for x, y in zip(ours, theirs)]
    return found


def _geometric_mean(groups: Groups) -> dict[str, float] | None:
    return geometric_mean_ratio(list(groups.values())) if groups else None


def _by_program(rows: Sequence[Row], groups: Groups) -> dict[str, float]:
    """Geometric mean over each program's workloads of the median ratio."""
    programs = {row["workload"]: row["program"] for row in rows}
    logs = defaultdict(list)
    for workload, group in groups.items():
        logs[programs[workload]].append(np.log(np.median(group)))
    return {program: float(np.exp(np.mean(values))) for program, values in logs.items()}


def _each(
    rows: Iterable[Row], measure: Callable[[list[Row]], dict[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """A measure of the rows of each condition and program."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["condition"], {}).setdefault(row["program"], []).append(row)
    return {
        condition: {program: measure(some) for program, some in programs.items()}
        for condition, programs in found.items()
    }


def accuracy(rows: Iterable[Row]) -> dict[str, float]:
    """Share of right answers, its interval, and of how many."""
    right = [float(r) for row in rows for r in row["right"]]
    return {**mean_interval(right), "answers": len(right)}


def accuracy_delta(rows: Sequence[Row], a: str, b: str) -> dict[str, float] | None:
    """Points of accuracy of ``a`` over ``b``: the mean over programs of that over their problems.

    For the interval, the programs' answers to one problem count as one.
    """
    right: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        for problem, is_right in zip(row["problems"], row["right"]):
            run = (row["program"], problem, row["workload"], row["repeat"])
            right[run][row["condition"]] = float(is_right)
    deltas = defaultdict(list)
    for (program, problem, *_), found in right.items():
        if a in found and b in found:
            deltas[program].append((problem, 100 * (found[a] - found[b])))
    if not deltas:
        return None
    shares: dict[int, float] = defaultdict(float)  # of each problem in the mean
    for pairs in deltas.values():
        for problem, delta in pairs:
            shares[problem] += delta / len(pairs) / len(deltas)
    return {
        **mean_gain([len(shares) * share for share in shares.values()]),
        "problems": len(shares),
    }


def _percentiles(rows: Iterable[Row]) -> dict[str, float]:
    seconds = [s for row in rows for s in row["seconds"]]
    return {f"p{q}": float(np.percentile(seconds, q)) for q in (50, 95)}


def _workloads(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Medians over rounds, and percentiles of the seconds a problem took."""
    names = (
        "throughput",
        "computed_tokens",
        "generated_tokens",
        "prefill_passes",
        "decode_passes",
        "peak_kv_tokens",
    )
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for workload, condition in dict.fromkeys((row["workload"], row["condition"]) for row in rows):
        some = [r for r in rows if (r["workload"], r["condition"]) == (workload, condition)]
        table[workload][condition] = {
            # Older files have no passes.
            **{
                name: float(np.median([row[name] for row in some]))
                for name in names
                if all(name in row for row in some)
            },
            **_percentiles(some),
            "accuracy": accuracy(some) if some[0]["right"] else None,
        }
    return dict(table)


def _paper(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The paper's comparisons, over all numbers of new tokens and by each."""
    if not rows:
        return None
    programs = {row["workload"]: row["program"] for row in rows}
    result: dict[str, Any] = {}
    for a, b in PAPER_ROW:
        groups = ratios(rows, a, b)
        result[f"{a}/{b}"] = {
            "all": _geometric_mean(groups),
            **{programs[name]: geometric_mean_ratio([group]) for name, group in groups.items()},
        }
    return result


def print_bars(summary: Mapping[str, Any]) -> None:
    """Speedups by program, and the paper's row beside ours."""
    console = Console()
    for name, model in summary["models"].items():
        if model["programs"][BEST]:
            table = Table("problems a second", "rksc / sglang_best", title=name)
            for program, ratio in model["programs"][BEST].items():
                table.add_row(program, f"{ratio:.3f}")
            console.print(table)
        if model["paper"]:
            table = Table("problems a second", "paper", name, title="the paper's setting")
            for (a, b), value in PAPER_ROW.items():
                table.add_row(f"{a} / {b}", f"{value}", _cell(model["paper"][f"{a}/{b}"]["all"]))
            console.print(table)


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Speedups by program, and seconds a problem by branches and by words, of one model."""
    pyplot = harness.pyplot()
    models = summary["models"]
    name = SPEED_MODEL if SPEED_MODEL in models else next(iter(models))
    grown = _growth(models[name])
    if pyplot is None or not models[name]["programs"][BEST]:
        return
    figure, axes = pyplot.subplots(1, 1 + len(grown), figsize=(5 + 4 * len(grown), 4))
    bars, *others = np.atleast_1d(axes)
    programs = list(dict.fromkeys(p for one in models[name]["programs"].values() for p in one))
    for place, baseline in enumerate(BASELINES):
        ratios_ = models[name]["programs"][baseline]
        at = [programs.index(program) + 0.27 * (place - 1) for program in ratios_]
        bars.bar(at, list(ratios_.values()), 0.25, label=f"against {baseline}")
    bars.set_xticks(range(len(programs)), programs, rotation=30, ha="right", fontsize=7)
    bars.axhline(1, color="black", linewidth=0.5)
    bars.set_ylabel("problems a second, ratio")
    bars.legend(fontsize=7)
    for curve, (program, lines) in zip(others, grown.items()):
        for condition in sorted(lines):  # rounds have them in random order
            curve.plot(*zip(*sorted(lines[condition])), marker="o", label=condition)
        curve.set_title(program, fontsize=9)
        curve.set_xlabel(GROWTH[program])
        curve.set_ylabel("seconds a problem, median")
        curve.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _growth(model: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Of the part "growth", by program and condition: how much of it, and the seconds it took."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for workload, conditions in model["workloads"].items():
        _, part, name, _ = workload.split("/")
        if part == "growth":
            program, _, size = name.rpartition("_")
            for condition, row in conditions.items():
                lines = found.setdefault(program, {})
                lines.setdefault(condition, []).append((int(size), row["p50"]))
    return found


def _cell(value: Mapping[str, float] | None) -> str:
    return f"{value['ratio']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" if value else ""
