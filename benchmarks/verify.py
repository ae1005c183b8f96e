"""What early exit saves in verifications, and what it costs in answers, on the reasoner.

Problems of the calibration and of the test split are recorded once: branches, full verifications,
and what a probe reads in some layers. Probe and thresholds come from the one, as
``rksc_sglang.calibrate`` finds them; the decisions of all conditions are then taken on the other,
on the same samples. Times are live: each problem's branches are verified in full and with layer
exit, in random order, and behind cached KV.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
from rich.console import Console
from rich.progress import track
from scipy.stats import beta, binom

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.reasoner import ask_each, on_reasoner, serve, serve_on_each_core
from benchmarks.statistics import mean_gain, paired_ratio, ratio_of_sums
from rksc_sglang.asks.profile import fingerprint
from rksc_sglang.calibrate import FIT_SHARE, fit_and_test, share
from rksc_sglang.cgee.calibration import (
    Exits,
    TooLittleData,
    calibrate_exit,
    calibrate_skip,
    evidence_of,
    needed_problems,
    replay,
    stop_early,
)
from rksc_sglang.cgee.exit_rule import Probe, check_layers
from rksc_sglang.cgee.judged import Group, Judged, full_winner, is_unanimous, winners
from rksc_sglang.cgee.probing import fit_probe, probed
from rksc_sglang.cgee.profile import ExitProfile, probe_of, update_profile
from rksc_sglang.cgee.record import Recorder
from rksc_sglang.cgee.skip_gate import CalibratedGate, PaperGate
from rksc_sglang.models.problems import Problem, extract_answer, hard_problems

BRANCHES, MORE_BRANCHES = 8, 12
TEMPERATURE = 0.8
DELTA = 0.05
#: Of the risk: where the promise is put to the test.
MULTIPLES = (1, 2, 4)


def recorded(workload: str, recorder: Recorder, problem: Problem) -> Row:
    """A problem's branches, the first eight verified in full; in tests what the paper's rule does
    to these."""
    count = MORE_BRANCHES if workload == "test" else BRANCHES
    branches: list[dict[str, Any]] = []
    for sample in recorder.solve(problem.question, count, TEMPERATURE):
        answer = extract_answer(sample.text)
        branches.append(
            {
                "answer": answer,
                "right": answer == problem.answer,
                "confidence": sample.confidence,
                "tokens": sample.tokens,
                "text": sample.text,
            }
        )
    verified = branches[:BRANCHES]
    texts = [branch["text"] for branch in verified]
    for branch, full in zip(verified, recorder.verify(problem.question, texts, "observe")):
        branch |= {"states": full.states, "final": _short([full.final])[0]}
    if workload == "test":
        for branch, paper in zip(verified, recorder.verify(problem.question, texts, "paper")):
            branch["paper"] = {"layer": paper.layer, "scores": _short([paper.scores])[0]}
    return {
        "workload": workload,
        "condition": "recorded",
        "question": problem.question,
        "family": problem.family,
        "difficulty": problem.difficulty,
        "branches": branches,
    }


def probed_row(row: Row, probe: Probe) -> Row:
    """The row with what a probe reads in the place of the states, which are too much to keep."""
    (group,) = probed(groups_of([row], row["workload"], seen="states"), probe)
    for branch, judged in zip(row["branches"], group):
        del branch["states"]
        branch["seen"] = _short(judged.seen)
    return row


def _short(values: Iterable[Iterable[float]]) -> list[list[float]]:
    return [[round(float(value), 4) for value in some] for some in values]


def groups_of(rows: Iterable[Row], split: str, seen: str = "seen") -> list[Group]:
    names = ("answer", "right", "confidence", "final", "tokens")
    return [
        [
            Judged(**{name: b[name] for name in names}, seen=b[seen])
            for b in row["branches"][:BRANCHES]
        ]
        for row in rows
        if row["workload"] == split
    ]


# Decisions


class Setting(NamedTuple):
    """What is known beside the problems.

    Attributes:
        risk: that was asked for.
        labels: token ids.
    """

    risk: float
    probe: Probe
    num_layers: int
    labels: tuple[int, ...]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Setting:
        (row,) = (row for row in rows if row["workload"] == "setting")
        return cls(row["risk"], probe_of(row["probe"]), row["num_layers"], tuple(row["labels"]))


def calibrated(
    groups: Sequence[Group], setting: Setting, exit_: bool, skip: bool
) -> tuple[Exits | None, CalibratedGate | None]:
    """What the recorded calibration split gives for a risk, shared where both are used."""
    fit, test = fit_and_test(groups)
    sharers = 2 if exit_ and skip else 1
    risk, delta = setting.risk / sharers, DELTA / sharers
    exits = gate = None
    try:
        if exit_:
            exits = calibrate_exit(fit, test, setting.probe, setting.num_layers, risk, delta)
    except TooLittleData:
        pass
    try:
        if skip:
            gate, _ = calibrate_skip(fit, test, risk, delta)
    except TooLittleData:
        pass
    return exits, gate


def exited(
    groups: Sequence[Group], exits: Exits | None, num_layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Layers and scores of all branches, as of :func:`replay`, each by its group's rule."""
    everyone = [judged for group in groups for judged in group]
    if exits is None:
        scores = np.array([judged.final for judged in everyone])
        return np.full(len(everyone), num_layers), scores
    layers, scores = replay(exits.rule, everyone, num_layers)
    bold = np.array([is_unanimous(group) for group in groups for _ in group])
    agreed = replay(exits.rule.at(exits.unanimous), everyone, num_layers)
    return np.where(bold, agreed[0], layers), np.where(bold[:, None], agreed[1], scores)


def outcomes(
    groups: Sequence[Group],
    num_layers: int,
    exits: Exits | None = None,
    gate: Any = None,
    stopped: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    stop: bool = False,
) -> list[dict[str, Any]]:
    """For each problem: the answer under full verification and under the condition.

    Args:
        stopped: in the place of rules, what a live server did: layer and scores of each branch.
        stop: the gate looks each time a branch has finished, and stops the others.
    """
    layers, scores = exited(groups, exits, num_layers)
    if stopped is not None:
        flat = [branch for some in stopped for branch in some]
        layers = np.array([branch["layer"] or num_layers for branch in flat])
        scores = np.array([branch["scores"] for branch in flat])
    found, start = [], 0
    for group, early in zip(groups, winners(groups, scores)):
        here = slice(start, start + len(group))
        start += len(group)
        skipped, spent = None, sum(judged.tokens for judged in group)
        if gate is not None:
            at_end = gate.winner(evidence_of(group)), spent
            skipped, spent = stop_early(group, gate) if stop else at_end
        winner = early if skipped is None else skipped
        before = full_winner(group)
        full = np.array([judged.final for judged in group])
        found.append(
            {
                "full": group[before].right,
                "right": group[winner].right,
                "skipped": skipped is not None,
                "split": len({judged.answer for judged in group}) > 1,
                "layers": layers[here].tolist() if skipped is None else [],
                "same_verdicts": int((scores[here].argmax(1) == full.argmax(1)).sum()),
                "branches": len(group),
                "tokens": spent,
                "all_tokens": sum(judged.tokens for judged in group),
            }
        )
    return found


def errors(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors caused, with Clopper and Pearson's bound, and errors mended, apart."""
    caused = sum(o["full"] and not o["right"] for o in found)
    count = max(len(found), 1)
    return {
        "problems": len(found),
        "accuracy": sum(o["right"] for o in found) / count,
        "errors": caused,
        "error_rate": caused / count,
        "error_upper95": float(beta.ppf(0.95, caused + 1, count - caused)) if found else None,
        "mended": sum(o["right"] and not o["full"] for o in found),
        "skip_rate": sum(o["skipped"] for o in found) / count,
    }


def _condition(found: Sequence[Mapping[str, Any]], num_layers: int) -> dict[str, Any]:
    layers = [layer for o in found for layer in o["layers"]]
    split = [o for o in found if o["split"]]
    return {
        **errors(found),
        "split": errors(split),
        "mean_exit_layer": float(np.mean(layers)) if layers else None,
        "verdict_agreement": sum(o["same_verdicts"] for o in found)
        / sum(o["branches"] for o in found),
        # Of the layers that full verification of all groups would compute.
        "cost": sum(layers) / (num_layers * sum(o["branches"] for o in found)),
        # Of the tokens that branches generate which nobody stops.
        "generated": sum(o["tokens"] for o in found) / sum(o["all_tokens"] for o in found),
    }


def skip_at_random(
    groups: Sequence[Group], num_layers: int, rate: float, seed: int = 0
) -> list[dict[str, Any]]:
    """As many groups skipped as the gate does, whatever is known of them."""
    rng = random.Random(seed)
    found = outcomes(groups, num_layers)
    for place in rng.sample(range(len(groups)), round(rate * len(groups))):
        leader = evidence_of(groups[place]).leader
        right = leader is not None and groups[place][leader].right
        found[place] |= {"right": right, "skipped": True, "layers": []}
    return found


def majority_of(branches: Sequence[Mapping[str, Any]]) -> bool:
    answers = Counter(b["answer"] for b in branches if b["answer"] is not None)
    if not answers:
        return False
    best = answers.most_common(1)[0][0]
    return any(b["right"] for b in branches if b["answer"] == best)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    test = [row for row in rows if row["workload"] == "test"]
    groups = groups_of(rows, "test")
    setting = Setting.of(rows)
    num_layers = setting.num_layers
    calibration = groups_of(rows, "calibration")
    exits, _ = calibrated(calibration, setting, True, False)
    _, gate = calibrated(calibration, setting, False, True)
    both = calibrated(calibration, setting, True, True)
    paper = [[b["paper"] for b in row["branches"][:BRANCHES]] for row in test]
    decide = partial(outcomes, groups, num_layers)
    conditions = {
        "full": decide(),
        "skip": decide(gate=gate),
        "exit": decide(exits),
        "stop": decide(gate=gate, stop=True),
        "all": decide(*both, stop=True),
        "paper": decide(gate=PaperGate(), stopped=paper),
        "paper_exit": decide(stopped=paper),
        "paper_skip": decide(gate=PaperGate()),
    }
    table = {name: _condition(found, num_layers) for name, found in conditions.items()}
    rate = table["skip"]["skip_rate"]
    table["skip_at_random"] = _condition(skip_at_random(groups, num_layers, rate), num_layers)
    held = []
    for asked in (setting.risk * multiple for multiple in MULTIPLES):
        bolder = calibrated(calibration, setting._replace(risk=asked), True, True)
        found = decide(*bolder, stop=True)
        # Not more than a rate equal to the risk would give in 19 of 20 test sets.
        most = int(binom.ppf(0.95, len(test), asked))
        held.append({"risk": asked, "errors": errors(found)["errors"], "most": most})
    more = [
        float(o["right"]) - float(majority_of(row["branches"]))
        for o, row in zip(conditions["all"], test)
    ]
    timing = [row for row in rows if row["workload"] == "timing"]
    forward, wall = (
        harness.pairs(timing, "timing", name, "full", "exit")
        for name in ("forward_seconds", "wall_seconds")
    )
    return {
        # Of the whole phase: a problem's own ratio is that of either a stop or none.
        "exit_speedup": ratio_of_sums(*forward) if timing else None,
        "exit_speedup_wall": ratio_of_sums(*wall) if timing else None,
        "exit_speedup_median": paired_ratio(*forward) if timing else None,
        "verdict_agreement": table["exit"]["verdict_agreement"],
        "mean_exit_layer": table["exit"]["mean_exit_layer"],
        "num_layers": num_layers,
        "skip_rate": rate,
        "skip_rate_split": table["skip"]["split"]["skip_rate"],
        "cgee_error_rate": table["all"]["error_rate"],
        "cgee_error_upper95": table["all"]["error_upper95"],
        "cgee_error_rate_split": table["all"]["split"]["error_rate"],
        "mended": table["all"]["mended"],
        "accuracy_vs_more_branches": mean_gain(more),
        "phase_speedup_all": _phase_speed(timing, conditions["all"]),
        "layers_saved": 1 - table["all"]["cost"],
        "tokens_saved": 1 - table["all"]["generated"],
        "calibration_held": int(all(point["errors"] <= point["most"] for point in held)),
        "risks": held,
        "conditions": table,
    }


def _phase_speed(
    timing: Sequence[Row], found: Sequence[Mapping[str, Any]]
) -> dict[str, float] | None:
    """Seconds of all verifications of the timed problems in full, over the seconds of those that
    the condition leaves, with exit; None where it leaves none."""
    full, exit_ = harness.pairs(timing, "timing", "wall_seconds", "full", "exit")
    left = [0.0 if o["skipped"] else seconds for o, seconds in zip(found, exit_)]
    return ratio_of_sums(full, left) if any(left) else None


# Measuring


def forward_seconds(url: str) -> float:
    answer = requests.get(url + "/rksc/status", timeout=60).json()
    return answer["ranks"][0]["prefill_seconds"]


def time_exits(url: str, rows: Sequence[Row], seed: int) -> Iterator[Row]:
    """Verify each problem's branches, all at once, in full and with layer exit.

    The branches are cached; the two ask in other words, so that neither finds the other's question.
    """
    recorder, rng = Recorder(url), random.Random(seed)
    words = ["Is the answer above correct? Reply with YES or NO.", "Is it right? YES or NO."]
    unanimous = [is_unanimous(group) for group in groups_of(rows, "test")]
    for number, row in enumerate(track(rows, "timing", console=Console(stderr=True))):
        texts = [branch["text"] for branch in row["branches"][:BRANCHES]]
        recorder.cache(row["question"], texts)
        for place in rng.sample(range(2), 2):
            exit_, asked = ("off", "layer")[place], words[(number + place) % 2]
            before, start = forward_seconds(url), time.perf_counter()
            recorder.verify(row["question"], texts, exit_, asked, unanimous[number])
            wall = time.perf_counter() - start
            yield {
                "workload": "timing",
                "condition": ("full", "exit")[place],
                "repeat": number,
                "position": 0,
                "wall_seconds": wall,
                "forward_seconds": forward_seconds(url) - before,
            }


def measure(args: Any, model: str, folder: Path) -> list[Row]:
    # As many as can show half of the risk at half of delta: exit and skip share both.
    enough = round(1.02 * needed_problems(args.risk / 2, DELTA / 2) / (1 - FIT_SHARE))
    calibration, count, timings = (240, 120, 40) if args.quick else (enough, 1000, 200)
    drawn = list(itertools.islice(hard_problems("calibration", args.seed), calibration))
    fit, rest = fit_and_test(drawn)
    test = list(itertools.islice(hard_problems("test", args.seed), count))
    with serve_on_each_core(model, folder, "balanced") as recorders:
        labels, num_layers = recorders[0].labels, recorders[0].num_layers

        def record(workload: str, drawn: Sequence[Problem], what: str) -> Iterator[Row]:
            return ask_each(recorders, partial(recorded, workload), drawn, what)

        fitted = list(record("calibration", fit, "fit"))
        groups = groups_of(fitted, "calibration", seen="states")
        probe = fit_probe(groups, check_layers(num_layers))
        recordings = (
            fitted,
            record("calibration", rest, "calibration"),
            record("test", test, "test"),
        )
        rows = [probed_row(row, probe) for row in itertools.chain(*recordings)]
    asked = {
        "risk": args.risk,
        "num_layers": num_layers,
        "labels": labels,
        "probe": asdict(probe),
    }
    rows.insert(0, {"workload": "setting", "condition": "asked", **asked})
    return [*rows, *timed(rows, model, folder, args.seed, count=timings)]


def timed(rows: Sequence[Row], model: str, folder: Path, seed: int, count: int) -> Iterator[Row]:
    """Times of the first test problems, on a server with the rules that the rows give."""
    setting = Setting.of(rows)
    exits, _ = calibrated(groups_of(rows, "calibration"), setting, True, False)
    if exits is None:
        print("too few problems for the risk: layer exit is not timed")
        return
    profile = folder / "profile.json"
    found = exits.rule, exits.unanimous
    part = ExitProfile(fingerprint(Path(model)), setting.labels, *found, setting.risk, DELTA, {})
    update_profile(profile, part)
    flags = ("--rksc-profile", str(profile))
    with serve(model, folder / "timing.log", "balanced", *flags) as url:
        yield from time_exits(url, [r for r in rows if r["workload"] == "test"][:count], seed)


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Accuracy against the layers computed, for all conditions, where matplotlib is installed."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, condition in summary["conditions"].items():
        axes.scatter(condition["cost"], condition["accuracy"], label=name)
    axes.set_xlabel("layers computed, share of full verification")
    axes.set_ylabel("accuracy")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--risk",
        type=share,
        default=0.005,
        help="of problems that may lose their right answer, by exit and skip together; how many "
        "problems are recorded for calibration follows from it (default: %(default)s)",
    )


def main() -> None:
    args, result = on_reasoner("benchmarks.verify", __doc__, measure, options)
    summary = harness.report(result, args.json)["summary"]
    if args.json:
        plot(summary, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
