"""What merging branches that thought the same saves, and what it costs in answers.

Branches of the reasoner, 16 a problem, half of them behind hints, are recorded once on the
calibration and on the test split, with what each signal says behind each line. Which signal tells
that two siblings end with the same answer is measured on pairs; thresholds come from the
calibration split, for a stated risk that a group's majority changes; merging, merging at random at
the same rate and fewer branches at equal tokens are then replayed on the same samples of the test
split. Times and trees of thought are live; how the signals do on text is measured on SmolLM2.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import sglang as sgl
from rich.console import Console
from rich.progress import track

import rksc_sglang as rksc
from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.merge_replay import (
    at_random,
    fewer_branches,
    result_of,
    several_go_on,
    sibling_pairs,
)
from benchmarks.programs.interface import Mechanisms, Settings
from benchmarks.programs.search import Groups, Node, grow, search
from benchmarks.reasoner import on_reasoner, serve
from benchmarks.statistics import auc, mean_gain, paired_ratio
from benchmarks.throughput_tasks import solved_examples
from rksc_sglang.asks.alike import SIGNALS
from rksc_sglang.asks.merge_calibration import (
    Group,
    Outcome,
    by_signal,
    calibrate_merge,
    group_of,
    merge_all,
    points_of,
    replay,
    thresholds_of,
)
from rksc_sglang.asks.merge_record import record_branches
from rksc_sglang.cgee.calibration import TooLittleData, fit_logistic
from rksc_sglang.cgee.record import Recorder
from rksc_sglang.models import ensure_model
from rksc_sglang.models.dialogues import END, START, Turn
from rksc_sglang.models.problems import Problem, extract_answer, problems

BRANCHES = 16
TEMPERATURE = 0.8
HINTS = (
    "Think step by step.",
    "Be careful with the signs.",
    "Check each step.",
    "Do it slowly.",
    "Try it another way.",
    "Answer briefly.",
    "Think carefully.",
    "Take your time.",
)
#: Of problems whose majority answer may change, and the chance that this does not hold.
RISKS, DELTA = (0.02, 0.05, 0.1), 0.05
#: The one that is shipped.
RISK = 0.05
#: How many branches of a kind go on.
GOING_ON = (1, 2, 4)
#: Of the thresholds, which ones curves show.
CURVE_STEP = 3
COMBINED = "combined"
#: The workload of the model whose thoughts are text.
TEXT = "smollm2"


# Recording


def recorded(recorder: Recorder, split: str, problem: Problem, examples: str = "") -> Row:
    """A problem's branches, half of them behind hints.

    Args:
        examples: turns with solved ones, up to where the user is to speak of the problem.
    """
    asked = [f"{examples}{problem.question}"] * (BRANCHES // 2)
    asked += [f"{examples}{problem.question} {hint}" for hint in HINTS]
    return {
        "workload": split,
        "condition": "recorded",
        "question": problem.question,
        "answer": problem.answer,
        "family": problem.family,
        **record_branches(
            recorder,
            asked,
            TEMPERATURE,
            extract_answer,
            lambda answer: answer == problem.answer,
            lambda head: result_of(head.splitlines()[-1]),
        ),
    }


# Predictors


def predictor_aucs(
    groups: Sequence[Group],
) -> tuple[dict[str, float | None], dict[str, float]]:
    """How well each signal of the groups tells the pairs that end the same; of how many."""
    values, same = pairs_of(groups)
    aucs = {name: auc(one.tolist(), same.tolist()) for name, one in zip(groups[0].alike, values.T)}
    return aucs, {"pairs": len(same), "ends_the_same": float(same.mean())}


def pairs_of(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`sibling_pairs`, of all groups."""
    values, same = zip(*map(sibling_pairs, groups))
    return np.concatenate(values), np.concatenate(same)


def fit_combination(values: np.ndarray, same: np.ndarray) -> list[float]:
    """Weights of the signals, and a bias: a logistic model of ending the same."""
    return fit_logistic(np.hstack([values, np.ones((len(values), 1))]), same, 1e-4)


def with_combination(group: Group, weights: Sequence[float]) -> Group:
    scores = (
        weights[-1] + sum(w * matrix for w, matrix in zip(weights, line))
        for line in zip(*(group.alike[name] for name in SIGNALS))
    )
    combined = [1 / (1 + np.exp(-score)) for score in scores]
    return Group(group.branches, {**group.alike, COMBINED: combined})


# Decisions


def threshold_of(groups: Sequence[Group], signal: str, risk: float) -> float | None:
    try:
        return calibrate_merge(groups, signal, risk, DELTA)[0]
    except TooLittleData:
        return None


def _points(a: Sequence[Outcome], b: Sequence[Outcome]) -> dict[str, float]:
    """Accuracy of the ones over that of the others, in points."""
    return mean_gain([100.0 * (one.right - other.right) for one, other in zip(a, b)])


def _condition(before: Sequence[Outcome], after: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "accuracy": float(np.mean([a.right for a in after])),
        "accuracy_delta": _points(after, before),
        "majority_changed_rate": float(
            np.mean([a.answer != b.answer for b, a in zip(before, after)])
        ),
        "tokens_saved": 1 - sum(a.tokens for a in after) / sum(b.tokens for b in before),
        "kv_peak_ratio": float(np.mean([a.peak / max(b.peak, 1) for b, a in zip(before, after)])),
        "merges": sum(a.merges for a in after),
    }


def _with_controls(
    groups: Sequence[Group], before: Sequence[Outcome], merged: Sequence[Outcome]
) -> dict[str, Any]:
    """A way of merging, merging at random at its rate, and fewer branches at its tokens."""
    lines = sum(points_of(sample) for group in groups for sample in group.branches)
    rate, rng = sum(outcome.merges for outcome in merged) / max(lines, 1), random.Random(0)
    at_rate = [replay(group, at_random(rate, rng)) for group in groups]
    fewer = [fewer_branches(group, outcome.tokens, rng) for group, outcome in zip(groups, merged)]
    return {
        **_condition(before, merged),
        "vs_fewer_branches": _points(merged, fewer),
        "vs_at_random": _points(merged, at_rate),
        "controls": {
            "at_random": _condition(before, at_rate),
            "fewer_branches": _condition(before, fewer),
        },
    }


def going_on(groups: Sequence[Group]) -> dict[str, Any]:
    """What merging is worth where nothing is calibrated, so that all problems can be used.

    Thoughts that come down to the same, and thoughts that are the same word for word, of which
    one or several branches go on.
    """
    before = [replay(group) for group in groups]
    return {
        signal: {
            str(keep): _with_controls(
                groups,
                before,
                [
                    replay(group, several_go_on(by_signal(group.alike[signal], 1.0), keep))
                    for group in groups
                ],
            )
            for keep in GOING_ON
        }
        for signal in ("state", "text")
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    groups = {
        split: [group_of(row) for row in rows if row["workload"] == split]
        for split in ("calibration", "test", TEXT)
    }
    weights = fit_combination(*pairs_of(groups["calibration"]))
    for split, some in groups.items():
        groups[split] = [with_combination(group, weights) for group in some]
    test = groups["test"]
    aucs, facts = predictor_aucs(test)
    before = [replay(group) for group in test]
    risks: dict[str, Any] = {}
    for risk in RISKS:
        found = {name: threshold_of(groups["calibration"], name, risk) for name in aucs}
        risks[str(risk)] = {
            name: {
                "threshold": threshold,
                **_with_controls(test, before, merge_all(test, name, threshold)),
            }
            for name, threshold in found.items()
            if threshold is not None
        }
    shipped = risks[str(RISK)]
    best = max(shipped, key=lambda name: shipped[name]["tokens_saved"], default=None)
    summary: dict[str, Any] = {
        "predictor_auc": aucs,
        **facts,
        "weights": dict(zip([*SIGNALS, "bias"], weights)),
        "accuracy": float(np.mean([b.right for b in before])),
        "signal": best,
        "risks": risks,
        "curves": {
            name: [
                {"threshold": at, **_condition(before, merge_all(test, name, at))}
                for at in thresholds_of(name)[::CURVE_STEP]
            ]
            for name in aucs
        },
        "going_on": going_on([*groups["calibration"], *test]),
        **_live(rows),
    }
    if groups[TEXT]:
        aucs, facts = predictor_aucs(groups[TEXT])
        summary["text_model"] = {"predictor_auc": aucs, **facts}
    if best is not None:
        keys = ("tokens_saved", "kv_peak_ratio", "majority_changed_rate", "accuracy_delta")
        summary |= {key: shipped[best][key] for key in (*keys, "vs_fewer_branches")}
    return summary


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """What merging changes, and what fewer branches do, where matplotlib is installed."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    figure, (changed, accuracy) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, curve in summary["curves"].items():
        saved = [100 * point["tokens_saved"] for point in curve]
        rates = [100 * point["majority_changed_rate"] for point in curve]
        changed.plot(saved, rates, "o", markersize=4, label=name)
    changed.set_ylabel("majority changed, %")
    changed.set_title("thresholds of each signal")
    merged = list(summary["going_on"]["text"].values())
    fewer = [condition["controls"]["fewer_branches"] for condition in merged]
    for label, points in (
        ("merged where word for word the same: 1, 2, 4 go on", merged),
        ("fewer branches", fewer),
    ):
        gains = [point["accuracy_delta"] for point in points]
        values = [gain["value"] for gain in gains]
        bars = [
            [gain["value"] - gain["low"] for gain in gains],
            [gain["high"] - gain["value"] for gain in gains],
        ]
        saved = [100 * point["tokens_saved"] for point in points]
        accuracy.errorbar(saved, values, yerr=bars, fmt="o-", capsize=3, label=label)
    accuracy.axhline(0, color="gray", linewidth=0.8)
    accuracy.set_ylabel("accuracy against all branches, points")
    accuracy.set_title("votes at equal tokens")
    for axis in (changed, accuracy):
        axis.set_xlabel("tokens saved, %")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


# Live


@sgl.function
def vote(s: Any, question: str, merge: bool) -> tuple[str | None, int]:
    """Self-consistency whose branches are merged behind their first line, or are not."""
    s += sgl.user(question) + sgl.assistant_begin()
    branches = rksc.fork(s, BRANCHES, confidence=False, merge=rksc.MergeRule(extract=first_result))
    options = {"max_tokens": 160, "temperature": TEMPERATURE}
    tokens = 0
    if merge:
        branches += sgl.gen("head", stop="\n", **options)
        branches.merge("head")
        tokens += sum(_tokens(branch, "head") for branch in branches)
        branches += "\n"
    branches += sgl.gen("rest", **options)
    votes = branches.votes(lambda branch: extract_answer(branch["rest"]))
    going = [b for number, b in enumerate(branches) if number not in branches.stopped]
    tokens += sum(_tokens(branch, "rest") for branch in going)
    return (max(votes, key=votes.__getitem__) if votes else None), tokens  # type: ignore[return-value]


def first_result(text: str) -> str | None:
    return result_of(text) if text.strip() else None


@sgl.function
def tree(s: Any, question: str, merge: bool) -> tuple[str | None, int]:
    """Tree of thought, depth 3, breadth 4, whose new thoughts are merged, or are not."""
    groups = Groups(4, Mechanisms(share=None, exit="off"))
    tokens = [0]

    def expand(nodes: Sequence[Node], is_last: bool) -> list[Node]:
        forked = groups.fork(nodes)
        thoughts = grow(nodes, forked, Settings(temperature=TEMPERATURE), is_last)
        tokens[0] += sum(_tokens(thought.branch, "line") for thought in thoughts)
        gone: set[int] = set()
        for group in forked if merge else ():
            found = group.merge("line", rksc.MergeRule(extract=first_result))
            gone |= {id(group[one.branch]) for one in found}
        left = [thought for thought in thoughts if id(thought.branch) not in gone]
        verdict = rksc.verify([thought.branch for thought in left], "line", exit="off")
        tokens[0] += verdict.computed_tokens
        return [thought.scored(score or 0.0) for thought, score in zip(left, verdict.scores)]

    s += sgl.user(question) + sgl.assistant_begin()
    outcome = search(s, Settings(temperature=TEMPERATURE), 3, 2, expand, groups.stop)
    return outcome.answer, tokens[0]


def _tokens(branch: Any, name: str) -> int:
    return branch.get_meta_info(name)["completion_tokens"]


def live(url: str, drawn: Sequence[Problem], seed: int) -> Iterator[Row]:
    """Each problem with merging and without, in random order."""
    backend, rng = sgl.RuntimeEndpoint(url, chat_template_name="chatml"), random.Random(seed)
    for number, problem in enumerate(track(drawn, "live", console=Console(stderr=True))):
        for program in (vote, tree):
            for merge in rng.sample([False, True], 2):
                start = time.perf_counter()
                answer, tokens = program.run(problem.question, merge, backend=backend).ret_value
                yield {
                    "workload": program.func.__name__,
                    "condition": "merge" if merge else "plain",
                    "repeat": number,
                    "position": 0,
                    "seconds": time.perf_counter() - start,
                    "tokens": tokens,
                    "right": answer == problem.answer,
                }


def _live(rows: Sequence[Row]) -> dict[str, Any]:
    found = {}
    for name in ("vote", "tree"):
        if not any(row["workload"] == name for row in rows):
            continue
        slow, fast = harness.pairs(rows, name, "seconds", "plain", "merge")
        right = harness.pairs(rows, name, "right", "merge", "plain")
        tokens = harness.pairs(rows, name, "tokens", "merge", "plain")
        found[name] = {
            "speedup": paired_ratio(slow, fast),
            "accuracy_delta": mean_gain([100.0 * (a - b) for a, b in zip(*right)]),
            "tokens_saved": 1 - sum(tokens[0]) / sum(tokens[1]),
        }
    return {"live": found, **({"speedup": found["vote"]["speedup"]} if "vote" in found else {})}


# The whole


def record(recorder: Recorder, workload: str, drawn: Sequence[Problem], **how: str) -> list[Row]:
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(lambda problem: recorded(recorder, workload, problem, **how), drawn)
        return list(track(done, workload, total=len(drawn), console=Console(stderr=True)))


def measure(args: Any, model: str, folder: Path) -> list[Row]:
    calibration, test, timed, text = (100, 60, 10, 2) if args.quick else (500, 500, 150, 20)
    drawn = {
        "calibration": list(itertools.islice(problems("calibration", args.seed), calibration)),
        "test": list(itertools.islice(problems("test", args.seed), test)),
    }
    rows: list[Row] = []
    with serve(model, folder / "server.log", "balanced", tokens=32768) as url:
        for split, some in drawn.items():
            rows += record(Recorder(url), split, some)
        rows += live(url, drawn["test"][:timed], args.seed)
    examples = "".join(
        f"{asked}{END}\n{Turn('assistant', solved)}{START}user\n"
        for asked, solved in solved_examples(3)
    )
    smollm2 = str(ensure_model("smollm2"))
    with serve(smollm2, folder / "smollm2.log", "balanced", tokens=32768) as url:
        rows += record(Recorder(url), TEXT, drawn["test"][:text], examples=examples)
    return rows


def main() -> None:
    args, result = on_reasoner("benchmarks.merge", __doc__, measure)
    summary = harness.report(result, args.json)["summary"]
    if args.json is not None:
        plot(summary, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
