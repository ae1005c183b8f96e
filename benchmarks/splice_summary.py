"""What the rows of ``benchmarks.splice`` say: figures, families, curves, and their picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Row
from benchmarks.splice_cases import ADVERSARIAL, HINT, LENGTH, ORDER, PERSONA, VERIFIER
from benchmarks.statistics import auc, mean_interval, paired_ratio
from rksc_sglang.contract import DOUBTED

FAMILIES = (PERSONA, VERIFIER, HINT, ORDER, ADVERSARIAL)
MARGINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
TIMINGS = ("ttft_1k", "ttft_1k_new_context", "fanout8", "fanout8_cold")


def common_length(a: Sequence[int], i: int, b: Sequence[int], j: int) -> int:
    """How many tokens of ``a`` from ``i`` on equal those of ``b`` from ``j`` on."""
    length = 0
    while i + length < len(a) and j + length < len(b) and a[i + length] == b[j + length]:
        length += 1
    return length


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures, of the shipped setting but for the curves.

    Raises:
        BenchmarkError: nothing was spliced where a figure needs it.
    """
    shipped = [row for row in rows if row["condition"] == "rksc"]
    measured = [row for row in shipped if row["workload"] in FAMILIES and "kl" in row]
    spliced = [row for row in measured if row["kl_info"]["spliced_tokens"]]
    adversarial = [row for row in spliced if row["workload"] == ADVERSARIAL]
    timed = {workload: _timed_splices(shipped, workload) for workload in TIMINGS}
    if not spliced or not adversarial:
        reasons = {str(row["kl_info"]["fallback"]) for row in measured}
        raise BenchmarkError(f"nothing was spliced: {', '.join(sorted(reasons))}")
    repeatable = [row for row in measured if row["workload"] in (PERSONA, VERIFIER, HINT)]
    judge = judge_consistency(spliced)
    gate = gate_aucs([_without_gate(row) for row in measured])
    speed = {
        workload: paired_ratio(*harness.pairs(rows, workload, "seconds", "stock", "rksc"))
        for workload in TIMINGS
    }
    overhead = paired_ratio(*harness.pairs(rows, "f_nothing", "throughput", "rksc", "stock"))
    status = next((row for row in shipped if row["workload"] == "status"), {})
    tau = (status.get("splice") or {}).get("tau", 0.0)
    doubted = [row for row in measured if _is_doubted(row["info"])]
    return {
        "ttft_speedup_1k": speed["ttft_1k"]["ratio"],
        "ttft_speedup_1k_new_context": speed["ttft_1k_new_context"]["ratio"],
        "fanout8_speedup": speed["fanout8"]["ratio"],
        "fanout8_cold_speedup": speed["fanout8_cold"]["ratio"],
        "coverage": float(np.mean([_covered(row) for row in repeatable])),
        "top1_agreement": float(np.mean([row["top1"] for row in spliced])),
        "kl_mean": float(np.mean([row["kl"] for row in spliced])),
        "kl_p99": float(np.quantile([row["kl"] for row in spliced], 0.99)),
        "greedy16_agreement": float(np.mean([_greedy(row) for row in spliced])),
        "adversarial_agreement": float(np.mean([_answer_kept(row) for row in adversarial])),
        "judge_consistency": judge["consistent"],
        "overhead_f": overhead["ratio"],
        "index_us_per_token": (status.get("splice") or {}).get("index_microseconds_per_token"),
        "gate_auc": gate["similarity"],
        "cases": len(measured),
        "spliced_cases": len(spliced),
        "doubted_cases": len(doubted),
        "coverage_with_doubted": float(
            np.mean([_covered(row) or _covered_but_doubted(row, tau) for row in repeatable])
        ),
        "intervals": {**speed, "overhead_f": overhead},
        "timed_requests": timed,
        "adversarial": {
            "tried": sum(row["workload"] == ADVERSARIAL for row in shipped),
            "spliced_and_different": len(adversarial),
            # The harm that matters: the donor's answer given for the edited prompt.
            "donor_answers": sum(_is_donor_answer(row) for row in adversarial),
            "agreement": wilson([_answer_kept(row) for row in adversarial]),
        },
        "judge": judge,
        "gate": gate,
        "families": {
            family: family_summary([row for row in measured if row["workload"] == family])
            for family in FAMILIES
        },
        "curves": {
            "tau": tau_curve([_without_gate(row) for row in measured]),
            "margin": margin_curve([_without_gate(row) for row in measured], tau),
            "head": head_curve(rows),
            "run_length": length_curve([row for row in rows if row["workload"] == LENGTH]),
        },
    }


def _timed_splices(shipped: Sequence[Row], workload: str) -> dict[str, Any]:
    """How many of the timed requests were spliced, and why the others were not.

    Raises:
        BenchmarkError: none was.
    """
    infos = [i for row in shipped if row["workload"] == workload for i in row["infos"]]
    others = [str(info["fallback"]) for info in infos if not info["spliced_tokens"]]
    if len(others) == len(infos):
        raise BenchmarkError(f"nothing was spliced in {workload}: {others[:1]}")
    return {"requests": len(infos), "not_spliced": dict(Counter(others))}


def _covered(row: Row) -> bool:
    return row["info"]["spliced_tokens"] >= 0.8 * row["repeatable_tokens"]


def _is_doubted(info: Mapping[str, Any]) -> bool:
    return info["fallback"] == DOUBTED


def _covered_but_doubted(row: Row, tau: float) -> bool:
    """Spliced as far as it takes, and then computed again for a near tie."""
    info = (row["ungated"] or row)["kl_info"]
    enough = info["spliced_tokens"] >= 0.8 * row["repeatable_tokens"]
    return _is_doubted(row["info"]) and enough and (info["similarity"] or 0.0) >= tau


def _greedy(row: Row) -> float:
    """Share of the greedy tokens before the first that differs."""
    return common_length(row["output"], 0, row["exact_output"], 0) / len(row["exact_output"])


def _answer_kept(row: Row) -> bool:
    steps = row["answer_tokens"]
    return row["output"][:steps] == row["exact_output"][:steps]


def _is_donor_answer(row: Row) -> bool:
    return row["output"][: row["answer_tokens"]] == row["donor_output"]


def _without_gate(row: Row) -> Row:
    """The row as it would be with tau 0."""
    return {**row, **(row["ungated"] or {})}


def wilson(outcomes: Sequence[bool]) -> dict[str, float]:
    """A share and its 95 % Wilson interval: all or none of a few is no certainty."""
    n, z = len(outcomes), 1.96
    share = sum(outcomes) / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return {"share": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def family_summary(measured: Sequence[Row]) -> dict[str, Any]:
    spliced = [row for row in measured if row["kl_info"]["spliced_tokens"]]
    if not spliced:
        return {"cases": len(measured), "spliced": 0}
    return {
        "cases": len(measured),
        "spliced": len(spliced),
        "spliced_share_of_prompt": float(
            np.mean([row["info"]["spliced_tokens"] / row["prompt_tokens"] for row in spliced])
        ),
        "ttft_speedup": paired_ratio(
            [row["exact_ttft"] for row in spliced], [row["ttft"] for row in spliced]
        ),
        "top1_agreement": wilson([row["top1"] for row in spliced]),
        "kl": mean_interval([row["kl"] for row in spliced]),
        "kl_max": max(row["kl"] for row in spliced),
        "greedy16_agreement": mean_interval([_greedy(row) for row in spliced]),
    }


def judge_consistency(spliced: Sequence[Row]) -> dict[str, Any]:
    """Groups whose spliced candidates have the same winner and verdicts as with full recompute.

    A candidate's score is the margin of Yes over No, its verdict the sign of that. None where the
    cost model left all groups alone.
    """
    groups: dict[int, list[Row]] = {}
    for row in spliced:
        if row["workload"] == VERIFIER:
            groups.setdefault(row["group"], []).append(row)
    outcomes = []
    for group in groups.values():
        if len(group) > 1:
            exact, ours = (
                np.subtract(*np.transpose([row[name] for row in group]))
                for name in ("exact_labels", "labels")
            )
            same_winner = bool(exact.argmax() == ours.argmax())
            outcomes.append((same_winner, bool(((exact > 0) == (ours > 0)).all())))
    if not outcomes:
        return {"groups": 0, "consistent": None, "interval": None}
    winners, verdicts = zip(*outcomes)
    both = wilson([winner and verdict for winner, verdict in outcomes])
    return {
        "groups": len(outcomes),
        "consistent": both["share"],
        "interval": both,
        "same_winner": float(np.mean(winners)),
        "same_verdicts": float(np.mean(verdicts)),
    }


#: What could tell a harmful splice from a harmless one; more of it should mean less harm.
PREDICTORS: dict[str, Callable[[Row], float]] = {
    "similarity": lambda row: row["kl_info"]["similarity"],
    "run_tokens": lambda row: row["kl_info"]["spliced_tokens"],
    "recomputed_share": lambda row: row["kl_info"]["recomputed_tokens"] / row["prompt_tokens"],
    "tokens_behind_last_change": lambda row: row["prompt_tokens"] - row["runs"][-1][0],
    "few_changed_tokens": lambda row: (
        row["prefix_tokens"] + row["repeatable_tokens"] - row["prompt_tokens"]
    ),
    "short_context": lambda row: -row["runs"][0][0],
}


def gate_aucs(measured: Sequence[Row]) -> dict[str, Any]:
    """How well each predictor tells splices of KL up to the median from those above.

    ``tail``: the worst tenth from the rest.
    """
    rows = [
        row
        for row in measured
        if row["runs"]
        and row["kl_info"]["spliced_tokens"]
        and row["kl_info"]["similarity"] is not None
    ]
    if not rows:
        return {"similarity": None}
    kl = np.array([row["kl"] for row in rows])
    median, tail = (float(np.quantile(kl, q)) for q in (0.5, 0.9))
    scores = {name: [predict(row) for row in rows] for name, predict in PREDICTORS.items()}
    return {
        **{name: auc(values, list(kl <= median)) for name, values in scores.items()},
        "median_kl": median,
        "tail": {name: auc(values, list(kl <= tail)) for name, values in scores.items()},
        "tail_kl": tail,
    }


def _point(rows: Sequence[Row]) -> dict[str, Any]:
    kl = [row["kl"] for row in rows]
    return {
        "cases": len(rows),
        "kl_mean": float(np.mean(kl)),
        "kl_max": max(kl),
        "top1_agreement": float(np.mean([row["top1"] for row in rows])),
    }


def tau_curve(measured: Sequence[Row]) -> list[dict[str, Any]]:
    """What is spliced, and what that does, at every tau, from cases taken without the gate."""
    rows = [row for row in measured if row["kl_info"]["similarity"] is not None]
    points = []
    for tau in sorted({0.0, *(round(row["kl_info"]["similarity"], 2) for row in rows)}):
        passed = [row for row in rows if row["kl_info"]["similarity"] >= tau]
        if passed:
            share = len(passed) / len(rows)
            points.append({"tau": tau, "spliced_share": share, **_point(passed)})
    return points


def margin_curve(measured: Sequence[Row], tau: float) -> list[dict[str, Any]]:
    """What is answered, and how often as with full recompute, at every margin, behind the gate."""
    rows = [row for row in measured if (row["kl_info"]["similarity"] or 0.0) >= max(tau, 1e-9)]
    points = []
    for margin in MARGINS:
        kept = [row for row in rows if row["lead"] >= margin]
        if kept:
            points.append({"margin": margin, "share": len(kept) / len(rows), **_point(kept)})
    return points


def head_curve(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """By r, over the cases that were measured and spliced with each."""
    taken: dict[int, dict[tuple[str, int], Row]] = {}
    for row in rows:
        of_curve = row["condition"] == "rksc" or row["condition"].startswith("head=")
        if of_curve and "kl" in row and row["kl_info"]["spliced_tokens"]:
            key = (row["workload"], row["position"])
            taken.setdefault(row["setting"]["head"], {})[key] = row
    # In order: the last bit of a mean depends on it.
    common = sorted(set.intersection(*map(set, taken.values()))) if len(taken) > 1 else []
    return [
        {
            "head": head,
            **_point([taken[head][key] for key in common]),
            "greedy16_agreement": float(np.mean([_greedy(taken[head][key]) for key in common])),
            "ttft_speedup": float(
                np.median([taken[head][k]["exact_ttft"] / taken[head][k]["ttft"] for k in common])
            ),
        }
        for head in sorted(taken)
        if common
    ]


def length_curve(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """By length of the run, in steps of a factor of two."""
    bins: dict[int, list[Row]] = {}
    for row in rows:
        if row["kl_info"]["spliced_tokens"]:
            bins.setdefault(int(np.log2(row["kl_info"]["spliced_tokens"])), []).append(row)
    return [
        {
            "run_tokens": float(np.mean([r["kl_info"]["spliced_tokens"] for r in bins[power]])),
            **_point(bins[power]),
            "ttft_speedup": float(np.median([r["exact_ttft"] / r["ttft"] for r in bins[power]])),
        }
        for power in sorted(bins)
    ]


def plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """A picture of the curves, where matplotlib is installed."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    panels = (
        ("margin", "margin", "share", "share answered spliced"),
        ("tau", "tau", "spliced_share", "share spliced"),
        ("head", "head", "ttft_speedup", "TTFT speed-up"),
        ("run_length", "run_tokens", "ttft_speedup", "TTFT speed-up"),
    )
    labels = (
        "margin of the first token, nats",
        "tau",
        "r, tokens recomputed at the head",
        "length of the run, tokens",
    )
    for axis, label, (curve, x, benefit, name) in zip(axes, labels, panels):
        xs = [point[x] for point in curves[curve]]
        if curve == "margin":
            changed = [1 - point["top1_agreement"] for point in curves[curve]]
            axis.plot(xs, changed, "o-", color="tab:red")
            axis.set(xlabel=label, ylabel="first tokens changed", ylim=(0, None))
        else:
            axis.plot(xs, [point["kl_mean"] for point in curves[curve]], "o-", color="tab:red")
            axis.set(xlabel=label, ylabel="mean KL, nats", ylim=(0, None))
        other = axis.twinx()
        other.plot(xs, [point[benefit] for point in curves[curve]], "s--", color="tab:blue")
        other.set(ylabel=name, ylim=(0, None))
        if x not in ("tau", "margin"):
            axis.set_xscale("symlog", base=2)
    figure.savefig(path, dpi=120)
    print(f"curves: {path}")


def print_families(families: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("family", "spliced", "reused", "TTFT x", "top 1", "mean KL", "16 greedy tokens")

    def cell(value: Mapping[str, float], name: str) -> str:
        return f"{value[name]:.3g} [{value['low']:.3g}, {value['high']:.3g}]"

    for family, result in families.items():
        cells = [family, f"{result['spliced']} of {result['cases']}"]
        if result["spliced"]:
            cells += [
                f"{result['spliced_share_of_prompt']:.0%}",
                cell(result["ttft_speedup"], "ratio"),
                cell(result["top1_agreement"], "share"),
                cell(result["kl"], "mean"),
                cell(result["greedy16_agreement"], "mean"),
            ]
        table.add_row(*cells)
    Console().print(table)
