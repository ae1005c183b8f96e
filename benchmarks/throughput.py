"""Whole reasoning programs under load: RKSC against SGLang at its best, and without prefix sharing.

Conditions: no_kv (stock, radix cache off) and sglang (stock defaults) run each program as its
user wrote it with the frontend language; sglang_best (stock, the cache-aware schedule) runs its
best form in plain SGLang; rksc is mode balanced, and rksc_no_X the same without X. All use the same
attention backend. In a round each condition solves the same problems, from an empty cache; all do
so at the same time, in turns of a second, while the others' servers are stopped. A ratio is of
problems a second in one round, of the seconds in its turns. Equal servers differ by some percent
for as long as they run, so rounds are on servers that were started anew. Samples are independent:
SGLang takes sampling seeds only with deterministic inference, which no CPU attention backend has.

Parts, with the minutes that a full run takes on 2 cores (4 GB of memory a server): speed (80; 50 of
them beam_search, document_qa and debate), no_kv (25), ablations (45), growth (50: more branches,
longer documents), open (40: problems arrive at 0.7 of what sglang_best can do), accuracy (SmolLM2
45; with --bare 1,008 problems, four hours of the reasoner) and paper (50). In all but accuracy
every generation has a given length, drawn once a problem, and only samples that can no longer
change the outcome end earlier. Run the parts one by one, with the same --json file: it keeps what
the others measured. Another --seed adds rounds to a part. --programs divides a part further; growth
and paper have programs of their own.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Row, start_together, stored
from benchmarks.load import Worked, work
from benchmarks.programs import (
    PROGRAMS,
    Program,
    Settings,
    document_qa,
    paper_setting,
    self_consistency,
)
from benchmarks.throughput_conditions import (
    OURS,
    PARTS,
    SERVERS,
    Condition,
    Server,
    conditions_of,
    mechanisms_of,
)
from benchmarks.throughput_summary import BEST, RKSC, SPEED_MODEL, plot, print_bars
from benchmarks.throughput_summary import summarise as summarise  # where benchmarks.summarise looks
from benchmarks.throughput_tasks import (
    Task,
    in_the_papers_length,
    solved_examples,
    tasks_of,
    with_lengths,
)
from benchmarks.turns import Clock, settle, take_turns
from rksc_sglang.cgee.profile import ExitProfileError
from rksc_sglang.demo.questions import QuestionsError
from rksc_sglang.models.smollm2 import ensure_smollm2
from rksc_sglang.server_process import ServerFailedError

#: Of what SGLang at its best can do in a closed loop, the rate at which problems arrive.
OPEN_SHARE = 0.7
#: Each server that has started is left alone twice: RKSC measures what prefills cost there, again
#: and again, while nothing runs, and of several that measure at once none finds out.
SETTLE_SECONDS, SETTLE_TURN = 20.0, 10.0
#: A program has fewer generations at the same time.
LENGTHS = 12
SEARCHES = ("tree_of_thought", "beam_search")
WARM_UP = Task("What is 3 + 4?", lambda answer: False, (4,))


class Load(NamedTuple):
    """Rounds of ``problems`` each, ``concurrency`` at a time; so many on each start of servers."""

    concurrency: int
    problems: int
    rounds: int = 1


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        loads: of each part; of the part "open", how its rate is found and how much arrives.
        starts: how often the servers of a part are started; once where it is not said.
        answers, lines: least and most tokens of a whole answer, and of a line of a search.
        examples: solved ones in front of a problem.
        document: words of prose in front of a question about a text.
        paper_tokens: new tokens of a branch in the paper's setting.
        branches, documents: of the part "growth": samples of a vote, words in front of a question.
    """

    loads: Mapping[str, Sequence[Load]]
    starts: Mapping[str, int] = field(default_factory=dict)
    answers: tuple[int, int] = (16, 48)
    lines: tuple[int, int] = (8, 16)
    examples: int = 3
    document: int = 350
    paper_tokens: Sequence[int] = (8, 32)
    branches: Sequence[int] = (1, 8, 32)
    documents: Sequence[int] = (0, 350, 1400)


FULL = Sizes(
    {
        "speed": (Load(1, 1), Load(4, 4)),
        "no_kv": (Load(1, 1), Load(4, 4)),
        "ablations": (Load(4, 4),),
        "growth": (Load(2, 2),),
        "open": (Load(4, 8),),
        "accuracy": (Load(4, 8, 2),),
        "paper": (Load(1, 1, 3),),
    },
    {"speed": 3, "no_kv": 2, "ablations": 2, "growth": 3, "paper": 4},
)
#: Parts that --quick runs by default, and how much of them.
QUICK_PARTS = ("speed", "no_kv", "paper")
QUICK = Sizes(
    {
        **dict.fromkeys(PARTS, (Load(2, 2),)),
        "no_kv": (Load(1, 1),),
        "paper": (Load(1, 1),),
    },
    answers=(8, 16),
    lines=(4, 8),
    examples=1,
    document=100,
    paper_tokens=(8,),
    branches=(1, 2),
    documents=(0,),
)
BARE_ACCURACY = {False: Load(16, 48, 21), True: Load(16, 48)}  # by --quick


class Workload(NamedTuple):
    """Work for all conditions of a part.

    Attributes:
        options: further arguments of the program.
    """

    name: str
    program: Program
    tasks: Iterator[Task]
    options: Mapping[str, Any] = {}


class Part:
    """Measures one part."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        sizes: Sizes,
        model: Path,
        conditions: Sequence[Condition],
    ) -> None:
        self.name = name
        self.args = args
        self.sizes = sizes
        self.model_path = model
        self.model = Path(args.model_path).name if args.model_path else SPEED_MODEL
        self.conditions = conditions
        examples = 0 if name == "paper" else sizes.examples
        self.settings = Settings(examples=solved_examples(examples))
        self.workloads = list(self._workloads())
        self.starts = sizes.starts.get(name, 1)
        self._rng = random.Random(f"{args.seed}/{name}")

    @property
    def runs(self) -> int:
        """How many rows there will be."""
        rounds = self.starts * sum(load.rounds for load in self.sizes.loads[self.name])
        return len(self.workloads) * len(self.conditions) * rounds

    def _workloads(self) -> Iterator[Workload]:
        seed, questions = self.args.seed, self.args.questions
        if self.name == "growth":
            votes, readers = self_consistency.PROGRAM, document_qa.PROGRAM
            grown: list[tuple[Program, int, int, Mapping[str, Any]]] = [
                *((votes, count, 0, {"branches": count}) for count in self.sizes.branches),
                *((readers, words, words, {}) for words in self.sizes.documents),
            ]
            for program, size, words, options in grown:
                tasks = tasks_of(program.name, seed, questions, words)
                tasks = with_lengths(tasks, self.sizes.answers, LENGTHS, seed)
                yield Workload(f"{program.name}_{size}", program, tasks, options)
            return
        if self.name == "paper":
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.model_path)
            for count in self.sizes.paper_tokens:
                program = paper_setting.PROGRAM
                tasks = tasks_of(program.name, seed + count, questions, 0)
                tasks = in_the_papers_length(tasks, seed + count, tokenizer, count)
                yield Workload(f"{program.name}_{count}", program, tasks)
            return
        for name in self.args.programs:
            tasks = tasks_of(name, seed, questions, self.sizes.document)
            if self.name != "accuracy":
                span = self.sizes.lines if name in SEARCHES else self.sizes.answers
                tasks = with_lengths(tasks, span, LENGTHS, seed)
            yield Workload(name, PROGRAMS[name], tasks)

    def measure(self, start: int, servers: Mapping[str, Server]) -> Iterator[Row]:
        """The rounds of one start, on the servers of the conditions, by their names."""
        rng = self._rng
        for number, workload in enumerate(self.workloads):
            name, tasks = workload.name, workload.tasks
            if number == 0:  # first calls allocate and compile
                self._round(servers, self.conditions, workload, [WARM_UP], 1)
            for load in self.sizes.loads[self.name]:
                for round_ in range(start * load.rounds, (start + 1) * load.rounds):
                    drawn = [next(tasks) for _ in range(load.problems)]
                    arrivals = self._arrivals(servers, workload, load, rng)
                    place = "open" if arrivals else str(load.concurrency)
                    at_once = load.problems if arrivals else load.concurrency
                    in_turn = rng.sample(self.conditions, len(self.conditions))
                    found = self._round(servers, in_turn, workload, drawn, at_once, arrivals)
                    for condition, row in found.items():
                        yield {
                            "workload": f"{self.model}/{self.name}/{name}/{place}",
                            "condition": condition,
                            "repeat": f"{self.args.seed}/{round_}",
                            "position": 0,
                            "model": self.model,
                            "part": self.name,
                            "program": name,
                            "load": place,
                            "seed": self.args.seed,
                            **row,
                        }

    def _arrivals(
        self, servers: Mapping[str, Server], workload: Workload, load: Load, rng: random.Random
    ) -> list[float] | None:
        """Of an open loop: a Poisson process, the same for each condition."""
        if self.name != "open":
            return None
        best = next(condition for condition in self.conditions if condition.name == BEST)
        drawn = [next(workload.tasks) for _ in range(load.concurrency)]
        closed = self._round(servers, [best], workload, drawn, load.concurrency)[BEST]
        arrivals = [0.0]
        while len(arrivals) < load.problems:
            arrivals.append(arrivals[-1] + rng.expovariate(OPEN_SHARE * closed["throughput"]))
        return arrivals

    def _round(
        self,
        servers: Mapping[str, Server],
        conditions: Sequence[Condition],
        workload: Workload,
        tasks: Sequence[Task],
        concurrency: int,
        arrivals: Sequence[float] | None = None,
    ) -> dict[str, Row]:
        """The measurements of each condition; tokens are means over the problems, passes of all."""

        def job(condition: Condition) -> Callable[[Clock], tuple[Worked, int]]:
            server = servers[condition.name]

            def solve(task: Task) -> Any:
                return condition.solve(
                    workload.program, self.settings, task, server.endpoint, workload.options
                )

            def run(clock: Clock) -> tuple[Worked, int]:
                try:
                    with server.meter.peak() as peak:
                        return work(tasks, solve, concurrency, arrivals, clock), peak()
                except Exception as error:
                    server.process.check()
                    message = f"{condition.name}: {workload.name}: {error!r}"
                    raise BenchmarkError(message) from error

            return run

        meters = {one.name: servers[one.name].meter for one in conditions}
        processes = {one.name: servers[one.name].process for one in conditions}
        for process in processes.values():
            process.check()  # says more than the request that would fail
        before = {name: meter.emptied() for name, meter in meters.items()}
        done = take_turns(processes, {one.name: job(one) for one in conditions})
        rows = {}
        for name, (worked, peak) in done.items():
            after = meters[name].emptied()  # what still ran belongs to this row
            right = [task.is_right(outcome.answer) for task, outcome in zip(tasks, worked.results)]
            rows[name] = {
                "throughput": len(tasks) / worked.wall,
                "seconds": [round(seconds, 4) for seconds in worked.seconds],
                "arrivals": arrivals,
                "problems": [zlib.crc32(task.text.encode()) for task in tasks],
                "right": [] if self.name == "paper" else right,  # its answers are cut off
                "computed_tokens": (after.computed - before[name].computed) / len(tasks),
                "generated_tokens": (after.generated - before[name].generated) / len(tasks),
                "prefill_passes": float(after.prefills - before[name].prefills),
                "decode_passes": float(after.decodes - before[name].decodes),
                "peak_kv_tokens": float(peak),
            }
        return rows


def measure(
    args: argparse.Namespace, sizes: Sizes, on_start: Callable[[list[Row], Row], None]
) -> None:
    """Measure the chosen parts, the conditions of each on servers that are up at the same time.

    Args:
        on_start: called after each start of servers with the rows of its part so far, and with
            what they were taken with.
    """
    model = Path(args.model_path) if args.model_path else ensure_smollm2()
    common = ["--model-path", str(model), "--max-total-tokens", "24576", "--dtype", "float32"]
    common.append("--enable-metrics")
    profile = ["--rksc-profile", args.profile] if args.profile else []
    mechanisms = mechanisms_of(args.profile, model)
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in args.part:
            conditions = conditions_of(name, mechanisms)
            flags = {
                one.name: [*common, *SERVERS[one.name], *(profile if one.name in OURS else [])]
                for one in conditions
            }
            part = Part(name, args, sizes, model, conditions)
            rows: list[Row] = []
            bar = progress.add_task(f"{name}: starting servers", total=part.runs)
            for start in range(part.starts):
                with start_together(flags) as processes:
                    servers = {one: Server(one, process) for one, process in processes.items()}
                    settle(processes, SETTLE_SECONDS, SETTLE_TURN)
                    for row in part.measure(start, servers):
                        rows.append(row)
                        progress.update(bar, advance=1, description=name)
                    status = servers[RKSC].status()
                run = {
                    "part": name,
                    "model": part.model,
                    "argv": sys.argv[1:],
                    "starts": start + 1,
                    "machine": harness.machine(),
                    "flags": flags,
                    "mechanisms": {one.name: asdict(one.mechanisms) for one in conditions},
                    "rksc": status,
                }
                on_start(rows, run)


def merged(earlier: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows together; of work that was done again, the new ones."""

    def work_of(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("model", "part", "program", "seed"))

    again = {work_of(row) for row in new}
    return [*(row for row in earlier if work_of(row) not in again), *new]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all of them")
    parser.add_argument(
        "--paper", dest="part", action="store_const", const=["paper"], help="--part paper"
    )
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--model-path", metavar="PATH", help="default: the embedded SmolLM2")
    parser.add_argument(
        "--profile", metavar="FILE", help="calibrated profile of the model, for rksc"
    )
    parser.add_argument(
        "--bare",
        action="store_true",
        help="no examples before the problems and no prose in documents: for a model that was "
        "trained on the problems alone (scripts/train_reasoner.py)",
    )
    args = parser.parse_args(argv)
    args.part = args.part or list(QUICK_PARTS if args.quick else PARTS)
    return args


def sizes_of(args: argparse.Namespace) -> Sizes:
    sizes = QUICK if args.quick else FULL
    if not args.bare:
        return sizes
    loads = {**sizes.loads, "accuracy": (BARE_ACCURACY[args.quick],)}
    return replace(sizes, loads=loads, examples=0, document=0)


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore", message=".*runs SGLang without RKSC.*")
    rows, earlier = stored(args.json)
    runs: dict[str, Row] = {}

    def on_start(new: list[Row], run: Row) -> None:
        rows[:] = merged(rows, new)
        runs[run["part"]] = run
        packages = (*harness.PACKAGES, "reasoning-gym")
        config = {"runs": [*earlier, *runs.values()]}
        result = harness.make_result("benchmarks.throughput", args, rows, packages, **config)
        summary = harness.report(result, args.json)["summary"]
        print_bars(summary)
        if args.json:
            plot(summary, args.json.with_suffix(".png"))

    try:
        measure(args, sizes_of(args), on_start)
    except (ServerFailedError, QuestionsError, ExitProfileError) as error:
        raise BenchmarkError(str(error)) from error


if __name__ == "__main__":
    main()
