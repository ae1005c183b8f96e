"""``python -m rksc_sglang.calibrate``: thresholds of early exit for a model, at a stated risk.

Starts a server, has the model answer problems in several branches each, verifies every branch in
full and records what each layer said; then finds when a verification may stop at a middle layer,
and when a group needs none, so that at most the stated share of problems loses its right answer
(:mod:`rksc_sglang.cgee.calibration`). The thresholds and their evidence are written to the model's
profile, for ``--rksc-profile``; what the profile has of other calibrations stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from rksc_sglang.asks.profile import fingerprint
from rksc_sglang.cgee.calibration import Group, TooLittleData, calibrate_exit, calibrate_skip
from rksc_sglang.cgee.profile import ExitProfile, SkipProfile, update_profile
from rksc_sglang.cgee.record import Recorder, RecordError
from rksc_sglang.demo.questions import QuestionsError, answer_key, load_questions
from rksc_sglang.models import EmbeddedModelError, ensure_model
from rksc_sglang.models.problems import extract_answer, problems
from rksc_sglang.server_process import ServerFailedError, ServerProcess

#: Problems that are asked at the same time.
CONCURRENT = 4
#: Of the recorded problems: for the models; the others are for the thresholds.
FIT_SHARE = 1 / 4

Ask = Callable[[Recorder], Group]


def lens_layers(num_layers: int, count: int = 3) -> tuple[int, ...]:
    """Where exits look: evenly spread over the second half, and never behind the last layer."""
    first, last = max(num_layers // 2, 1), num_layers - 1
    count = min(count, last - first + 1)
    return tuple(round(first + i * (last - first) / max(count - 1, 1)) for i in range(count))


def own_problems(args: argparse.Namespace) -> Iterator[Ask]:
    """The reasoner's calibration split."""

    def right(answer: str, found: str | None) -> bool:
        return found == answer

    for problem in problems("calibration", args.seed):
        yield partial(
            Recorder.group,
            question=problem.question,
            count=args.branches,
            temperature=args.temperature,
            extract=extract_answer,
            is_right=partial(right, problem.answer),
        )


def asked_problems(args: argparse.Namespace) -> Iterator[Ask]:
    """Those of a file, in an order of their own."""
    questions = load_questions(args.questions)
    for question in random.Random(args.seed).sample(questions, len(questions)):
        yield partial(
            Recorder.group,
            question=question.text,
            count=args.branches,
            temperature=args.temperature,
            extract=partial(lambda text, reply: answer_key(reply, text) or None, question.text),
            is_right=question.answers.__contains__,
        )


def record(args: argparse.Namespace, model: Path) -> tuple[list[Group], list[int]]:
    """The problems' branches, and the label tokens they were verified with."""
    flags = ["--model-path", str(model), "--rksc-mode", "balanced", *args.server_flags]
    asks = asked_problems(args) if args.questions else own_problems(args)
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(flags, log=Path(folder) / "server.log") as process,
        ThreadPoolExecutor(CONCURRENT) as pool,
    ):
        process.wait_ready()
        recorder = Recorder(process.url, args.max_tokens)
        some = list(itertools.islice(asks, args.problems))
        groups = pool.map(lambda ask: ask(recorder), some)
        console = Console(stderr=True)
        done = list(track(groups, "recording", total=len(some), console=console))
        return done, recorder.labels


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m rksc_sglang.calibrate",
        description="Find when verifications of a model may stop early or be skipped, at a stated "
        "risk, and write it to a profile for --rksc-profile.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--output", type=Path, required=True, help="the profile, a JSON file; may be there already")
    add("--model-path", help="checkpoint directory; the embedded reasoner if none is given")
    add("--risk", type=_share, default=0.005, help="share of problems that may lose their answer")
    add("--delta", type=_share, default=0.05, help="chance that the promise does not hold")
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


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def calibrate(
    groups: Sequence[Group], labels: Sequence[int], model: str, risk: float, delta: float
) -> tuple[list[ExitProfile | SkipProfile], list[str]]:
    """What holds the risk, and why what does not is left out.

    Exit and skip are used together, so each gets half of the risk and half of the chance.
    """
    parts: list[ExitProfile | SkipProfile] = []
    reasons = []
    cut = int(len(groups) * FIT_SHARE)
    fit, test = groups[:cut], groups[cut:]
    layers = lens_layers(len(groups[0][0].lens) + 1)
    half = (risk / 2, delta / 2)
    try:
        rule, evidence = calibrate_exit(fit, test, layers, *half)
        parts.append(ExitProfile(model, tuple(labels), rule, *half, evidence))
    except TooLittleData as error:
        reasons.append(f"no layer exit: {error}")
    try:
        gate, evidence = calibrate_skip(fit, test, *half)
        parts.append(SkipProfile(model, gate, *half, evidence))
    except TooLittleData as error:
        reasons.append(f"no skip gate: {error}")
    return parts, reasons


def main() -> None:
    args = parser().parse_args()
    try:
        model = Path(args.model_path) if args.model_path else ensure_model("reasoner")
        groups, labels = record(args, model)
    except (EmbeddedModelError, QuestionsError, RecordError, ServerFailedError) as error:
        sys.exit(f"rksc: error: {error}")
    parts, reasons = calibrate(groups, labels, fingerprint(model), args.risk, args.delta)
    for reason in reasons:
        print(f"rksc: {reason}", file=sys.stderr)
    if not parts:
        sys.exit(1)
    summary: dict[str, Any] = {}
    for part in parts:
        update_profile(args.output, part)
        shown = {k: v for k, v in part.evidence.items() if k != "curve"}
        summary[part.PART] = {**asdict(part), "evidence": shown}
    Console().print_json(json.dumps(summary))


if __name__ == "__main__":
    main()
