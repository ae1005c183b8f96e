"""The reasoner on problems it has never seen: accuracy, votes, verdicts, confidence, speed.

Through a server, on the test split: each problem is answered greedily and by eight samples at
temperature 0.8; each sample is judged behind its own conversation, by the log-odds of YES over NO.
The verdict's AUC is within problems, right samples against wrong ones of the same problem, so that
telling easy problems from hard ones earns nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Row
from benchmarks.statistics import mean_gain
from rksc_sglang.cgee.record import Recorder, RecordError
from rksc_sglang.models import ensure_model
from rksc_sglang.models.problems import Problem, check, extract_answer, hard_problems
from rksc_sglang.server_process import ServerProcess

SAMPLES = 8
TEMPERATURE = 0.8
CONCURRENT = 32
#: Problems that a server is asked at the same time, once speed has been measured.
ASKED = 12


def ask(recorder: Recorder, problem: Problem) -> Row:
    """All measurements on one problem."""
    greedy, *samples = [
        {
            **sample._asdict(),
            "answer": extract_answer(sample.text),
            "right": check(problem, sample.text),
        }
        for sample in (
            *recorder.solve(problem.question, 1, 0.0),
            *recorder.solve(problem.question, SAMPLES, TEMPERATURE),
        )
    ]
    texts = [sample["text"] for sample in samples]
    for sample, verified in zip(samples, recorder.verify(problem.question, texts)):
        yes, no = verified.final
        sample["log_odds"] = yes - no
    return {
        "workload": problem.family,
        "condition": "reasoner",
        "difficulty": problem.difficulty,
        "question": problem.question,
        "greedy": greedy,
        "samples": samples,
    }


def majority(samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the most frequent answer is right; the first one where two are as frequent."""
    answers = [sample["answer"] for sample in samples if sample["answer"] is not None]
    if not answers:
        return False
    (best, _), *_ = Counter(answers).most_common(1)
    return next(sample["right"] for sample in samples if sample["answer"] == best)


def best_by(samples: Sequence[Mapping[str, Any]], score: str) -> bool:
    return bool(max(samples, key=lambda sample: sample[score])["right"])


def within_auc(rows: Sequence[Row], score: str) -> float | None:
    """Chance that a right sample scores higher than a wrong one of the same problem."""
    wins: list[float] = []
    for row in rows:
        right = [s[score] for s in row["samples"] if s["right"]]
        wrong = [s[score] for s in row["samples"] if not s["right"]]
        wins += [(r > w) + 0.5 * (r == w) for r in right for w in wrong]
    return float(np.mean(wins)) if wins else None


def calibration_error(rows: Sequence[Row], bins: int = 10) -> float:
    """Expected calibration error of the verdict's probability of YES."""
    samples = [sample for row in rows for sample in row["samples"]]
    probability = np.array([1 / (1 + math.exp(-s["log_odds"])) for s in samples])
    right = np.array([s["right"] for s in samples], dtype=float)
    place = np.minimum((probability * bins).astype(int), bins - 1)
    return float(
        sum(
            (place == b).mean() * abs(probability[place == b].mean() - right[place == b].mean())
            for b in range(bins)
            if (place == b).any()
        )
    )


def _share(rows: Sequence[Row], outcome: Callable[[Row], Any]) -> float:
    return float(np.mean([bool(outcome(row)) for row in rows]))


def _gain(
    rows: Sequence[Row], a: Callable[[Row], Any], b: Callable[[Row], Any]
) -> dict[str, float]:
    """Mean of ``a - b`` over problems, with its interval."""
    return mean_gain([float(bool(a(row))) - float(bool(b(row))) for row in rows])


def _accuracies(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "problems": len(rows),
        "greedy": _share(rows, lambda row: row["greedy"]["right"]),
        "majority8": _share(rows, lambda row: majority(row["samples"])),
        "best_of_8": _share(rows, lambda row: best_by(row["samples"], "log_odds")),
        "oracle8": _share(rows, lambda row: any(s["right"] for s in row["samples"])),
        "verdict_auc": within_auc(rows, "log_odds"),
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    speed = [row for row in rows if row["workload"] == "speed"]
    rows = [row for row in rows if row["workload"] != "speed"]
    by_family: dict[str, list[Row]] = defaultdict(list)
    by_difficulty: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_family[row["workload"]].append(row)
        by_difficulty[str(row["difficulty"])].append(row)
    verdicts = [sample["log_odds"] > 0 for row in rows for sample in row["samples"]]
    accuracies = _accuracies(rows)
    gains = {
        "majority8": _gain(
            rows, lambda row: majority(row["samples"]), lambda row: row["greedy"]["right"]
        ),
        "best_of_8": _gain(
            rows,
            lambda row: best_by(row["samples"], "log_odds"),
            lambda row: majority(row["samples"]),
        ),
    }
    return {
        "greedy_accuracy": accuracies["greedy"],
        "majority8_gain": gains["majority8"]["value"],
        "best_of_8_gain": gains["best_of_8"]["value"],
        "oracle8": accuracies["oracle8"],
        "verdict_auc": accuracies["verdict_auc"],
        "confidence_auc": within_auc(rows, "confidence"),
        "calibration_error": calibration_error(rows),
        "yes_share": float(np.mean(verdicts)),
        "no_share": 1 - float(np.mean(verdicts)),
        "fact_sheet_accuracy": _accuracies(by_family["facts"])["greedy"],
        "tokens_per_s": float(np.median([row["tokens_per_s"] for row in speed])),
        "gains": gains,
        "families": {family: _accuracies(some) for family, some in by_family.items()},
        "difficulties": {level: _accuracies(some) for level, some in by_difficulty.items()},
    }


def measure_speed(recorder: Recorder, drawn: Sequence[Problem]) -> Row:
    """Generated tokens a second with ``CONCURRENT`` greedy requests under way."""
    start = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(lambda p: recorder.solve(p.question, 1, 0.0)[0], drawn))
    seconds = time.perf_counter() - start
    tokens = sum(answer.tokens for answer in answers)
    return {"workload": "speed", "condition": "reasoner", "tokens_per_s": tokens / seconds}


def on_reasoner(
    module: str,
    doc: str | None,
    measure: Callable[[argparse.Namespace, str, Path], list[Row]],
    options: Callable[[argparse.ArgumentParser], Any] = lambda command: None,
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line of a benchmark of the reasoner, or of ``--model-path``, and its result.

    Args:
        measure: gives the rows; called with the command line, the model and a scratch folder.
        options: adds more to the command line.

    Raises:
        BenchmarkError: the server could not be asked.
    """
    command = harness.parser(doc or "")
    command.add_argument("--model-path", metavar="PATH", help="default: the embedded reasoner")
    options(command)
    args = command.parse_args()
    model = args.model_path or str(ensure_model("reasoner"))
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = measure(args, model, Path(folder))
        except RecordError as error:
            raise BenchmarkError(str(error)) from error
    return args, harness.make_result(module, args, rows, (*harness.PACKAGES, "reasoning-gym"))


@contextmanager
def serve(
    model: str,
    log: Path,
    mode: str,
    *flags: str,
    tokens: int = 65536,
    env: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """URL of a server of the model in a mode of RKSC, with a KV pool of so many tokens."""
    common = ["--model-path", model, "--dtype", "float32", "--rksc-mode", mode]
    common += ["--max-total-tokens", str(tokens)]
    with ServerProcess([*common, *flags], log=log, env=env) as server:
        server.wait_ready()
        yield server.url


@contextmanager
def serve_on_each_core(model: str, folder: Path, mode: str) -> Iterator[list[Recorder]]:
    """A server of one thread for each core: a model as small as this gains nothing from more."""
    one = {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        logs = [folder / f"{mode}{core}.log" for core in range(os.cpu_count() or 1)]
        yield [Recorder(stack.enter_context(serve(model, log, mode, env=one))) for log in logs]


def ask_each(
    recorders: Sequence[Recorder],
    ask: Callable[[Recorder, Problem], Row],
    drawn: Sequence[Problem],
    description: str,
) -> Iterator[Row]:
    """What each problem's questions give, by the servers in turn, with progress."""
    turns = [recorders[place % len(recorders)] for place in range(len(drawn))]
    with ThreadPoolExecutor(ASKED * len(recorders)) as pool:
        done = pool.map(ask, turns, drawn)
        yield from track(done, description, total=len(drawn), console=Console(stderr=True))


def measure(args: argparse.Namespace, model: str, folder: Path) -> list[Row]:
    stream = hard_problems("test", args.seed)
    with serve(model, folder / "server.log", "off") as url:
        recorder = Recorder(url)
        rows = [
            measure_speed(recorder, list(itertools.islice(stream, 4 * CONCURRENT)))
            for _ in range(3)
        ]
    drawn = list(itertools.islice(stream, 120 if args.quick else 1000))
    with serve_on_each_core(model, folder, "off") as recorders:
        return [*rows, *ask_each(recorders, ask, drawn, "asking")]


def main() -> None:
    args, result = on_reasoner("benchmarks.reasoner", __doc__, measure)
    harness.report(result, args.json)


if __name__ == "__main__":
    main()
