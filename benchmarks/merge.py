"""What merging branches that thought the same saves, and what it costs in answers.

Branches of the reasoner, 16 a problem, half of them behind hints, are recorded once on the
calibration and on the test split, with what each signal says behind each line. Which signal tells
that two siblings end with the same answer is measured on pairs; thresholds come from the
calibration split, for a stated risk that a group's majority changes; merging, merging at random at
the same rate and fewer branches at equal tokens are then replayed on the same samples of the test
split. Times and trees of thought are live.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
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
    Outcome,
    at_random,
    by_signal,
    fewer_branches,
    replay,
    result_of,
    sibling_pairs,
)
from benchmarks.programs.interface import Mechanisms, Settings
from benchmarks.programs.search import Groups, Node, grow, search
from benchmarks.reasoner import on_reasoner
from benchmarks.statistics import auc, mean_gain, paired_ratio
from rksc_sglang.asks.alike import SIGNALS, Signal
from rksc_sglang.cgee.calibration import TooLittleData, fit_logistic, fixed_sequence
from rksc_sglang.cgee.record import Recorder, RecordError
from rksc_sglang.contract import KEY
from rksc_sglang.lang.merging import FOLLOWING
from rksc_sglang.models.dialogues import Turn, prompt_of
from rksc_sglang.models.problems import Problem, extract_answer, problems
from rksc_sglang.server_process import ServerProcess

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
RISK, DELTA = 0.05, 0.05
#: Tried from the most careful on.
THRESHOLDS = tuple(1 - 0.02 * step for step in range(46))
COMBINED = "combined"


# Recording


def recorded(recorder: Recorder, split: str, problem: Problem) -> Row:
    """A problem's branches, and what can be seen behind each of their lines."""
    asked = [problem.question] * (BRANCHES // 2)
    asked += [f"{problem.question} {hint}" for hint in HINTS]
    drawn = recorder.solve(problem.question, BRANCHES // 2, TEMPERATURE)
    drawn += [recorder.solve(text, 1, TEMPERATURE)[0] for text in asked[BRANCHES // 2 :]]
    branches = []
    for question, sample in zip(asked, drawn):
        lines = sample.text.splitlines()
        heads = ["\n".join(lines[:n]) for n in range(1, len(lines) + 1)]
        answer = extract_answer(sample.text)
        branches.append(
            {
                "text": sample.text,
                "tokens": sample.tokens,
                "answer": answer,
                "right": answer == problem.answer,
                "ends": [len(tokens) for tokens in recorder.tokenize(heads)],
                "probes": [probe(recorder, question, head) for head in heads[:-1]],
            }
        )
    return {
        "workload": split,
        "condition": "recorded",
        "question": problem.question,
        "answer": problem.answer,
        "family": problem.family,
        "branches": branches,
    }


def probe(recorder: Recorder, question: str, head: str) -> dict[str, Any]:
    """The next token's distribution behind a head of a solution, and the signature there."""
    contract = {"share": "exact", "signature": True}
    body = {
        "text": prompt_of([Turn("user", question)]) + head,
        "sampling_params": {
            "max_new_tokens": 1,
            "temperature": 0,
            "custom_params": {KEY: contract},
        },
        "return_logprob": True,
        "top_logprobs_num": FOLLOWING,
    }
    meta = recorder.post("/generate", body)["meta_info"]
    if not meta[KEY].get("signature"):
        raise RecordError(f"there are no signatures: {meta[KEY].get('fallback')}")
    top = meta["output_top_logprobs"][0]
    return {
        "following": {token: round(math.exp(value), 5) for value, token, _ in top},
        "signature": [round(value, 4) for value in meta[KEY]["signature"]],
    }


# Predictors


def pairs_of(rows: Sequence[Row], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Signals, [pairs, signals], and whether the pairs end the same."""
    found = [
        pair for row in rows if row["workload"] == split for pair in sibling_pairs(row["branches"])
    ]
    values = np.array([list(values.values()) for values, _ in found])
    return values, np.array([same for _, same in found])


def fit_combination(values: np.ndarray, same: np.ndarray) -> list[float]:
    """Weights of the signals, and a bias: a logistic model of ending the same."""
    return fit_logistic(np.hstack([values, np.ones((len(values), 1))]), same, 1e-4)


def combination(weights: Sequence[float]) -> Signal:
    def signal(a: Any, b: Any) -> float:
        score = weights[-1] + sum(w * one(a, b) for w, one in zip(weights, SIGNALS.values()))
        return 1 / (1 + math.exp(-score))

    return signal


# Decisions


def calibrate(rows: Sequence[Row], signal: Signal) -> float | None:
    """The boldest threshold that holds the risk on the calibration split; None: there is none."""
    groups = [row["branches"] for row in rows if row["workload"] == "calibration"]
    before = [replay(group).answer for group in groups]

    def changed(threshold: float) -> int:
        decide = by_signal(signal, threshold)
        return sum(replay(g, decide).answer != answer for g, answer in zip(groups, before))

    try:
        return fixed_sequence(THRESHOLDS, changed, len(groups), RISK, DELTA)[0]
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


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    weights = fit_combination(*pairs_of(rows, "calibration"))
    signals: dict[str, Signal] = {**SIGNALS, COMBINED: combination(weights)}
    values, same = pairs_of(rows, "test")
    aucs = {
        name: auc(values[:, place].tolist(), same.tolist()) for place, name in enumerate(SIGNALS)
    }
    aucs[COMBINED] = auc((values @ np.array(weights[:-1])).tolist(), same.tolist())
    groups = [row["branches"] for row in rows if row["workload"] == "test"]
    before = [replay(group) for group in groups]
    conditions: dict[str, Any] = {}
    outcomes: dict[str, list[Outcome]] = {}
    thresholds = {name: calibrate(rows, signal) for name, signal in signals.items()}
    for name, threshold in thresholds.items():
        if threshold is not None:
            outcomes[name] = [
                replay(group, by_signal(signals[name], threshold)) for group in groups
            ]
            conditions[name] = _condition(before, outcomes[name])
    best = max(conditions, key=lambda name: conditions[name]["tokens_saved"], default=None)
    summary: dict[str, Any] = {
        "predictor_auc": aucs,
        "pairs": len(same),
        "ends_the_same": float(same.mean()),
        "weights": dict(zip([*SIGNALS, "bias"], weights)),
        "thresholds": thresholds,
        "accuracy": float(np.mean([b.right for b in before])),
        "conditions": conditions,
        "signal": best,
        **_live(rows),
    }
    if best is None:
        return summary
    chosen = outcomes[best]
    lines = sum(len(sample["probes"]) for group in groups for sample in group)
    rate = conditions[best]["merges"] / max(lines, 1)
    rng = random.Random(0)
    conditions["at_random"] = _condition(before, [replay(g, at_random(rate, rng)) for g in groups])
    fewer = [fewer_branches(g, merged.tokens) for g, merged in zip(groups, chosen)]
    conditions["fewer_branches"] = _condition(before, fewer)
    keys = ("tokens_saved", "kv_peak_ratio", "majority_changed_rate", "accuracy_delta")
    summary |= {key: conditions[best][key] for key in keys}
    summary["vs_fewer_branches"] = _points(chosen, fewer)
    return summary


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
        known = len(groups.groups)
        thoughts = grow(nodes, groups.fork, Settings(temperature=TEMPERATURE), is_last)
        tokens[0] += sum(_tokens(thought.branch, "line") for thought in thoughts)
        gone: set[int] = set()
        for group in groups.groups[known:] if merge else ():
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


def measure(args: Any, model: str, folder: Path) -> list[Row]:
    calibration, test, timed = (120, 60, 10) if args.quick else (600, 600, 200)
    flags = ["--model-path", model, "--dtype", "float32", "--rksc-mode", "balanced"]
    flags += ["--max-total-tokens", "65536"]
    rows: list[Row] = []
    with ServerProcess(flags, log=folder / "server.log") as server:
        server.wait_ready()
        recorder = Recorder(server.url)
        for split, count in (("calibration", calibration), ("test", test)):
            drawn = list(itertools.islice(problems(split, args.seed), count))  # type: ignore[arg-type]
            with ThreadPoolExecutor(4) as pool:
                done = pool.map(lambda p, s=split: recorded(recorder, s, p), drawn)
                rows += track(done, split, total=count, console=Console(stderr=True))
        rows += live(server.url, drawn[:timed], args.seed)
    return rows


def main() -> None:
    args, result = on_reasoner("benchmarks.merge", __doc__, measure)
    harness.report(result, args.json)


if __name__ == "__main__":
    main()
