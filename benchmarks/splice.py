"""Splicing: KV of the same text behind another context, against full recompute and stock SGLang.

Quality: the same server answers each prompt spliced, and again in full in a namespace where it has
no donor. Speed: stock SGLang on the same attention backend gets the same prompts. What was not
spliced counts for coverage, never for agreement. The families of prompts are in ``splice_cases``;
those of ``e_adversarial`` are tried until enough are found whose full answers differ from the
donor's.

Parts, with the minutes that a full run takes on 2 cores: timing (15), quality (30 to 60) and curves
(10 to 30). With the same --json file, a part that is measured again takes the place of what it was,
and the others are kept.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import harness, splice_cases
from benchmarks.harness import BenchmarkError, Row, stored, together
from benchmarks.splice_cases import (
    ADVERSARIAL,
    PERSONAS,
    Shelf,
    SpliceCase,
    chat,
)
from benchmarks.splice_quality import EXACT, SIMILAR, Client, Quality
from benchmarks.splice_summary import TIMINGS, plot, print_families
from benchmarks.splice_summary import summarise as summarise  # where benchmarks.summarise looks
from benchmarks.text import machine_texts
from rksc_sglang.contract import DOUBTED
from rksc_sglang.models.smollm2 import ensure_smollm2

PARTS = ("timing", "quality", "curves")
RUN_TOKENS = 1000


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    persona: int = 28
    groups: int = 11
    group_sizes: tuple[int, int] = (4, 8)
    hinted: int = 4
    order: int = 20
    adversarial: int = 100
    latencies: int = 12
    fanouts: int = 7
    loads: int = 16
    heads: Sequence[int] = (1, 16, 64)
    lengths: Sequence[int] = (20, 40, 80, 160, 320, 640)
    each_length: int = 2
    curve_cases: int = 2


QUICK = Sizes(
    persona=4,
    groups=2,
    group_sizes=(4, 4),
    hinted=1,
    order=4,
    adversarial=12,
    latencies=2,
    fanouts=1,
    loads=2,
    heads=(1,),
    lengths=(80, 320),
    each_length=2,
    curve_cases=2,
)


@dataclass(frozen=True)
class Speed:
    """Prompts for one repetition of a timing case, the same for each server."""

    donor: str
    context: str
    targets: Sequence[str]

    @classmethod
    def draw(cls, shelf: Shelf, cut: Callable[[str], str]) -> Speed:
        donor, *others = shelf.rng.sample(PERSONAS, 9)
        user = cut(shelf.document(900))
        context, _, _ = chat(others[0], user).partition(user)
        return cls(chat(donor, user), context, [chat(other, user) for other in others])

    def latency(self, client: Client, *, cached: bool) -> Row:
        salt = client.salt()
        client.ask(self.donor, 1, EXACT, salt)
        if cached:
            client.ask(self.context, 1, EXACT, salt)
        answer = client.ask(self.targets[0], 1, SIMILAR, salt)
        return {"seconds": answer.ttft, "infos": [answer.info]}

    def fanout(self, client: Client, *, donor: bool) -> Row:
        salt = client.salt()
        if donor:
            client.ask(self.donor, 1, EXACT, salt)
        start = time.perf_counter()
        answers, _ = together(
            [partial(client.ask, target, 1, SIMILAR, salt) for target in self.targets]
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "infos": [answer.info for answer in answers]}


def load(client: Client, prompts: Sequence[str]) -> Row:
    """Unrelated prompts at once: generated tokens a second."""
    salt = client.salt()
    start = time.perf_counter()
    together([partial(client.ask, prompt, 4, SIMILAR, salt) for prompt in prompts])
    return {"throughput": 4 * len(prompts) / (time.perf_counter() - start)}


def time_against_stock(
    clients: Mapping[str, Client], shelf: Shelf, cut: Callable[[str], str], sizes: Sizes
) -> Iterator[Row]:
    """Rows of the timing cases, servers interleaved in random order.

    Raises:
        BenchmarkError: the server splices nothing.
    """

    def interleaved(workload: str, repeat: int, run: Callable[[Client], Row]) -> Iterator[Row]:
        for condition in shelf.rng.sample(list(clients), len(clients)):
            yield {
                "workload": workload,
                "condition": condition,
                "repeat": repeat,
                "position": 0,
                **run(clients[condition]),
            }

    def speed() -> Speed:
        return Speed.draw(shelf, cut)

    for repeat in range(-1, max(sizes.latencies, sizes.loads, sizes.fanouts)):
        rows: list[Row] = []  # of repetition -1, which warms up
        if repeat < sizes.latencies:
            for workload, cached in (("ttft_1k", True), ("ttft_1k_new_context", False)):
                rows += interleaved(workload, repeat, partial(speed().latency, cached=cached))
        if repeat < sizes.loads:
            prompts = [shelf.document(50) for _ in range(16)]
            rows += interleaved("f_nothing", repeat, partial(load, prompts=prompts))
        if 0 <= repeat < sizes.fanouts:
            for workload, donor in (("fanout8", True), ("fanout8_cold", False)):
                rows += interleaved(workload, repeat, partial(speed().fanout, donor=donor))
        if repeat >= 0:
            yield from rows
            continue
        for row in rows:
            info = (row.get("infos") or [None])[0]
            if row["condition"] == "rksc" and info and info["fallback"] not in (None, DOUBTED):
                raise BenchmarkError(f"nothing was spliced: {info['fallback']}")


def compare(quality: Quality, cases: Iterable[tuple[int, SpliceCase]]) -> Iterator[Row]:
    for number, case in cases:
        yield quality.row(number, case, quality.recompute(case))


def quality_cases(shelf: Shelf, sizes: Sizes) -> list[SpliceCase]:
    return [
        *splice_cases.persona_cases(shelf, sizes.persona),
        *splice_cases.verifier_cases(shelf, sizes.groups, sizes.group_sizes),
        *splice_cases.hint_cases(shelf, sizes.hinted),
        *splice_cases.order_cases(shelf, sizes.order),
    ]


def part_of(row: Row) -> str:
    """Which of the parts a row is of."""
    if row["workload"] in (*TIMINGS, "f_nothing"):
        return "timing"
    return "quality" if row["condition"] == "rksc" else "curves"


def measure(
    args: argparse.Namespace, sizes: Sizes, progress: Progress, rows: list[Row]
) -> Iterator[dict[str, Any]]:
    """Measure the parts asked for; gives the configuration after each.

    Args:
        rows: of earlier runs; those of a part make room for new ones.
    """
    from transformers import AutoConfig, AutoTokenizer

    model = str(args.model_path or ensure_smollm2())
    tokenizer = AutoTokenizer.from_pretrained(model)
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    problems = splice_cases.word_problems(args.questions) if args.questions else []
    texts = machine_texts()
    flags = ["--model-path", model, "--max-total-tokens", "32768", "--dtype", "float32"]
    balanced = ("--rksc-mode", "balanced")

    # All is drawn whatever is measured: a part has the same work with and without the others.
    seeds = random.Random(args.seed)
    timed, judged = (Shelf(texts, problems, seeds.getrandbits(32)) for _ in range(2))
    cases = quality_cases(judged, sizes)
    order = seeds.sample(list(enumerate(cases)), len(cases))
    edits, grown = (Shelf(texts, problems, seeds.getrandbits(32)) for _ in range(2))
    edited = list(itertools.islice(splice_cases.adversarial_cases(edits), 5 * sizes.adversarial))

    def tokenize(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def cut(text: str) -> str:
        return tokenizer.decode(tokenize(text)[:RUN_TOKENS])

    @contextmanager
    def servers(**more: Sequence[str]) -> Iterator[dict[str, Client]]:
        with harness.start_together({name: [*flags, *own] for name, own in more.items()}) as up:
            yield {name: Client(process.url, vocabulary) for name, process in up.items()}

    def collect(description: str, new: Iterable[Row]) -> None:
        bar = progress.add_task(description, total=None)
        for number, row in enumerate(new, 1):
            rows.append(row)
            progress.update(bar, description=f"{description}: {number} rows")

    def config(client: Client) -> dict[str, Any]:
        return {"rksc": client.rksc_status()["config"], "flags": [*flags, *balanced]}

    def timing() -> dict[str, Any]:
        with servers(rksc=balanced, stock=["--rksc-mode", "off"]) as clients:
            collect("timing", time_against_stock(clients, timed, cut, sizes))
            return config(clients["rksc"])

    def quality() -> dict[str, Any]:
        with servers(rksc=balanced) as clients:
            client = clients["rksc"]
            judge = Quality(client, "rksc", tokenize)
            collect("quality", compare(judge, order))
            collect("near-duplicates", judge.adversarial(edited, sizes.adversarial))
            status = client.rksc_status()["ranks"][0]
            rows.append({"workload": "status", "condition": "rksc", **status})
            return config(client)

    def curves() -> dict[str, Any]:
        differing = [
            row["position"]
            for row in rows
            if row["workload"] == ADVERSARIAL
            and part_of(row) == "quality"
            and row["answers_differ"]
        ]
        curve = _some(cases, sizes.curve_cases)
        curve += [(n, edited[n]) for n in differing[: 2 * sizes.curve_cases]]
        for head in sizes.heads:
            with servers(curve=[*balanced, "--rksc-splice-head", str(head)]) as clients:
                judge = Quality(clients["curve"], f"head={head}", tokenize)
                collect(f"head of {head}", compare(judge, curve))
        with servers(curve=[*balanced, "--rksc-splice-min-tokens", "8"]) as clients:
            judge = Quality(clients["curve"], "min_tokens=8", tokenize)
            lengths = splice_cases.length_cases(grown, sizes.lengths, sizes.each_length)
            collect("lengths", compare(judge, list(enumerate(lengths))))
            return config(clients["curve"])

    for part, work in zip(PARTS, (timing, quality, curves)):
        if part in args.part:
            rows[:] = [row for row in rows if part_of(row) != part]
            yield work()


def _some(cases: Sequence[SpliceCase], each: int) -> list[tuple[int, SpliceCase]]:
    """The first ``each`` cases of every family, with their numbers."""
    chosen: list[tuple[int, SpliceCase]] = []
    for family in dict.fromkeys(case.family for case in cases):
        chosen += [(n, case) for n, case in enumerate(cases) if case.family == family][:each]
    return chosen


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--model-path", metavar="PATH", help="default: the embedded SmolLM2")
    args = parser.parse_args()
    rows, runs = stored(args.json)
    runs.append({"parts": args.part, "argv": sys.argv[1:], "machine": harness.machine()})
    with Progress(console=Console(stderr=True)) as progress:
        for config in measure(args, QUICK if args.quick else Sizes(), progress, rows):
            result = harness.make_result("benchmarks.splice", args, rows, runs=runs, **config)
            if args.json:
                # Kept also where they make no summary yet: benchmarks.summarise reads them.
                harness.store(result, args.json)
    summary = harness.report(result, args.json)["summary"]
    print_families(summary["families"])
    if args.json:
        plot(summary["curves"], args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
