"""``python -m rksc_sglang.calibrate``: thresholds of early exit, or of merging, at a stated risk.

Starts a server, has the model answer problems in several branches each, verifies every branch in
full and records the states of some layers; then finds when a verification may stop at a middle
layer, and when a group needs none, so that at most the stated share of problems loses its right
answer (:mod:`rksc_sglang.cgee.calibration`). With ``--merge`` it finds how alike branches must be
that one goes on for all, so that at most that share of problems changes its majority answer
(:mod:`rksc_sglang.asks.merge_calibration`). The thresholds and their evidence are written to the
model's profile, for ``--rksc-profile``; what the profile has of other calibrations stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import track

from rksc_sglang.asks.alike import SIGNALS
from rksc_sglang.asks.merge_calibration import calibrate_merge, group_of
from rksc_sglang.asks.merge_record import record_branches
from rksc_sglang.asks.profile import fingerprint
from rksc_sglang.cgee.calibration import TooLittleData, calibrate_exit, calibrate_skip
from rksc_sglang.cgee.exit_rule import Probe, check_layers
from rksc_sglang.cgee.judged import Group
from rksc_sglang.cgee.probing import fit_probe, probed
from rksc_sglang.cgee.profile import ExitProfile, MergeProfile, Part, SkipProfile, update_profile
from rksc_sglang.cgee.record import Recorder, RecordError
from rksc_sglang.demo.questions import QuestionsError, answer_key, load_questions
from rksc_sglang.lang.merging import last_line
from rksc_sglang.models import EmbeddedModelError, ensure_model
from rksc_sglang.models.problems import extract_answer, hard_problems
from rksc_sglang.server_process import ServerFailedError, ServerProcess

#: Problems that are asked at the same time.
CONCURRENT = 4
#: Of the recorded problems: for the models; the others are for the thresholds.
FIT_SHARE = 1 / 4


class Asked(NamedTuple):
    """A question, how an answer is found in a solution of it, and which answers are right."""

    question: str
    extract: Callable[[str], str | None]
    is_right: Callable[[str | None], bool]


#: What is kept of a question.
T = TypeVar("T")


def fit_and_test(recorded: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """What the models are fitted to, and what the thresholds are found on."""
    cut = int(len(recorded) * FIT_SHARE)
    return recorded[:cut], recorded[cut:]


class Recorded(NamedTuple, Generic[T]):
    """What was kept of each problem, the label tokens of verifications, and the model's layers."""

    kept: list[T]
    labels: list[int]
    num_layers: int


def own_problems(seed: int) -> Iterator[Asked]:
    """The reasoner's calibration split."""
    for problem in hard_problems("calibration", seed):
        yield Asked(problem.question, extract_answer, partial(operator.eq, problem.answer))


def asked_problems(path: Path, seed: int) -> Iterator[Asked]:
    """Those of a file, in an order of their own."""
    questions = load_questions(path)
    for question in random.Random(seed).sample(questions, len(questions)):
        extract = partial(lambda text, reply: answer_key(reply, text) or None, question.text)
        yield Asked(question.text, extract, question.answers.__contains__)


def record(
    args: argparse.Namespace, model: Path, keep: Callable[[Recorder, Asked], T]
) -> Recorded[T]:
    """Ask a server of its own about the problems, some at once."""
    flags = ["--model-path", str(model), "--rksc-mode", "balanced", *args.server_flags]
    asked = asked_problems(args.questions, args.seed) if args.questions else own_problems(args.seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(flags, log=Path(folder) / "server.log") as process,
        ThreadPoolExecutor(CONCURRENT) as pool,
    ):
        process.wait_ready()
        recorder = Recorder(process.url, args.max_tokens)
        labels = [] if args.merge else recorder.labels
        some = list(itertools.islice(asked, args.problems))
        kept = pool.map(partial(keep, recorder), some)
        console = Console(stderr=True)
        done = list(track(kept, "recording", total=len(some), console=console))
        return Recorded(done, labels, recorder.num_layers)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m rksc_sglang.calibrate",
        description="Find when verifications of a model may stop early or be skipped, or when its "
        "branches may be merged, at a stated risk, and write it to a profile for --rksc-profile.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--output", type=Path, required=True, help="the profile, a JSON file; may be there already")
    add("--model-path", help="checkpoint directory; the embedded reasoner if none is given")
    add(
        "--merge",
        action="store_true",
        help="find when branches may be merged; --risk is the share of problems whose majority "
        "answer may change",
    )
    add("--risk", type=share, default=0.005, help="share of problems that may lose their answer")
    add("--delta", type=share, default=0.05, help="chance that the promise does not hold")
    add(
        "--questions",
        type=Path,
        metavar="FILE",
        help="JSON lines of question and answer; the reasoner's own problems if none is given",
    )
    add("--problems", type=int, default=2400, help="problems to record at most")
    add("--branches", type=int, default=8, help="branches a problem")
    add("--temperature", type=float, default=0.8, help="of the branches")
    add("--max-tokens", type=int, default=160, help="of a branch")
    add("--seed", type=int, default=0, help="of the problems")
    add("server_flags", nargs="*", metavar="-- FLAG", help="further flags for the server")
    return result


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def calibrate(
    groups: Sequence[Group],
    probe: Probe,
    labels: Sequence[int],
    num_layers: int,
    model: str,
    risk: float,
    delta: float,
) -> tuple[list[Part], list[str]]:
    """What holds the risk, and why what does not is left out.

    Exit and skip are used together, so each gets half of the risk and half of the chance.

    Args:
        groups: as the probe has read them; it was fitted to the first part of :func:`fit_and_test`.
    """
    parts: list[Part] = []
    reasons = []
    fit, test = fit_and_test(groups)
    half = (risk / 2, delta / 2)
    try:
        exits = calibrate_exit(fit, test, probe, num_layers, *half)
        found = exits.rule, exits.unanimous
        parts.append(ExitProfile(model, tuple(labels), *found, *half, exits.evidence))
    except TooLittleData as error:
        reasons.append(f"no layer exit: {error}")
    try:
        gate, evidence = calibrate_skip(fit, test, *half)
        parts.append(SkipProfile(model, gate, *half, evidence))
    except TooLittleData as error:
        reasons.append(f"no skip gate: {error}")
    return parts, reasons


def calibrate_merging(
    rows: Sequence[Mapping[str, Any]], model: str, risk: float, delta: float
) -> tuple[list[Part], list[str]]:
    """The threshold of each signal that holds the risk, and why others are left out.

    Each holds it for itself: a program uses one of them.
    """
    groups = [group_of(row) for row in rows]
    thresholds: dict[str, float] = {}
    evidence: dict[str, Any] = {}
    reasons = []
    for signal in SIGNALS:
        try:
            thresholds[signal], evidence[signal] = calibrate_merge(groups, signal, risk, delta)
        except TooLittleData as error:
            reasons.append(f"no merging by {signal}: {error}")
    parts: list[Part] = []
    if thresholds:
        parts.append(MergeProfile(model, thresholds, risk, delta, evidence))
    return parts, reasons


def measure(args: argparse.Namespace, model: Path) -> tuple[list[Part], list[str]]:
    """Record and calibrate what is asked for."""
    found = (fingerprint(model), args.risk, args.delta)

    def group(recorder: Recorder, asked: Asked) -> Group:
        question, extract, is_right = asked
        return recorder.group(question, args.branches, args.temperature, extract, is_right)

    def thoughts(recorder: Recorder, asked: Asked) -> dict[str, Any]:
        question, extract, is_right = asked
        questions = [question] * args.branches
        return record_branches(recorder, questions, args.temperature, extract, is_right, last_line)

    if args.merge:
        return calibrate_merging(record(args, model, thoughts).kept, *found)
    kept, labels, num_layers = record(args, model, group)
    probe = fit_probe(fit_and_test(kept)[0], check_layers(num_layers))
    return calibrate(probed(kept, probe), probe, labels, num_layers, *found)


def main() -> None:
    args = parser().parse_args()
    try:
        model = Path(args.model_path) if args.model_path else ensure_model("reasoner")
        parts, reasons = measure(args, model)
    except (EmbeddedModelError, QuestionsError, RecordError, ServerFailedError) as error:
        sys.exit(f"rksc: error: {error}")
    for reason in reasons:
        print(f"rksc: {reason}", file=sys.stderr)
    if not parts:
        sys.exit(1)
    summary: dict[str, Any] = {}
    for part in parts:
        update_profile(args.output, part)
        summary[part.PART] = {**asdict(part), "evidence": without_curves(part.evidence)}
    Console().print_json(json.dumps(summary))


def without_curves(evidence: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: without_curves(value) if isinstance(value, Mapping) else value
        for key, value in evidence.items()
        if key != "curve"
    }


if __name__ == "__main__":
    main()
