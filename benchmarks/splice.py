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
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import requests
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
from benchmarks.splice_summary import TIMINGS, common_length, plot, print_families
from benchmarks.splice_summary import summarise as summarise  # where benchmarks.summarise looks
from benchmarks.text import machine_texts
from rksc_sglang.contract import DOUBTED
from rksc_sglang.models.smollm2 import ensure_smollm2

PARTS = ("timing", "quality", "curves")
SIMILAR, EXACT = "similar", "exact"
STEPS = 16
#: Of an adversarial prompt's greedy tokens, those that are its answer.
ANSWER_TOKENS = 4
#: A run is worth the name from here on; shorter ones do not count as repeatable.
SHORTEST_RUN = 16
RUN_TOKENS = 1000
LABELS = ("Yes", "No")


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
class Answer:
    ttft: float
    tokens: list[int]
    info: dict[str, Any] | None  # meta_info["rksc"]; None on a stock server


class Client:
    """Requests to one server. What must not see the KV of other work gets a :meth:`salt`."""

    def __init__(self, url: str, vocabulary: int) -> None:
        self.url = url
        self.vocabulary = vocabulary
        self._salts = itertools.count()

    def salt(self) -> str:
        return f"benchmark-{next(self._salts)}"

    def ask(
        self, prompt: str, steps: int, share: str, salt: str, tau: float | None = None
    ) -> Answer:
        """Greedy tokens, streamed, and the seconds until the first."""
        body = _body(prompt, steps, share, salt, tau) | {"stream": True}
        start = time.perf_counter()
        ttft, last = 0.0, b""
        try:
            with requests.post(
                self.url + "/generate", json=body, stream=True, timeout=600
            ) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line.startswith(b"data: {"):
                        ttft = ttft or time.perf_counter() - start
                        last = line
            result = json.loads(last[len(b"data: ") :])
            return Answer(ttft, result["output_ids"], result["meta_info"].get("rksc"))
        except (requests.RequestException, ValueError, KeyError) as error:
            raise BenchmarkError(f"{self.url}: {error!r}") from error

    def first_token(
        self, prompt: str, share: str, salt: str, tau: float | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Log-probabilities of the whole vocabulary, and what they were computed from."""
        # Not token_ids_logprob: with that SGLang takes twice as long.
        body = _body(prompt, 1, share, salt, tau)
        body |= {"return_logprob": True, "top_logprobs_num": self.vocabulary}
        try:
            answer = requests.post(self.url + "/generate", json=body, timeout=600)
            answer.raise_for_status()
            meta = answer.json()["meta_info"]
        except (requests.RequestException, ValueError, KeyError) as error:
            raise BenchmarkError(f"{self.url}: {error!r}") from error
        logprobs = np.full(self.vocabulary, -np.inf)
        for logprob, token, _ in meta["output_top_logprobs"][0]:
            logprobs[token] = logprob
        return logprobs, meta["rksc"]

    def rksc_status(self) -> dict[str, Any]:
        answer = requests.get(self.url + "/rksc/status", timeout=60)
        answer.raise_for_status()
        return answer.json()


def _body(prompt: str, steps: int, share: str, salt: str, tau: float | None) -> dict[str, Any]:
    contract = {"share": share} if tau is None else {"share": share, "tau": tau}
    params = {
        "max_new_tokens": steps,
        "temperature": 0,
        "ignore_eos": True,
        "custom_params": {"rksc": contract},
    }
    return {"text": prompt, "sampling_params": params, "cache_salt": salt}


def repeated_runs(
    tokens: Sequence[int], donors: Sequence[Sequence[int]], shortest: int
) -> list[tuple[int, int]]:
    """What a prompt repeats of its donors behind another prefix.

    Greedy, the longest run from each place on. The exact prefix is no such run, nor is the last
    token, which is always computed.

    Returns:
        Start in the prompt and length of each run of at least ``shortest`` tokens.
    """
    places: dict[tuple[int, ...], list[tuple[Sequence[int], int]]] = {}
    for donor in donors:
        for i in range(len(donor) - shortest + 1):
            places.setdefault(tuple(donor[i : i + shortest]), []).append((donor, i))
    end = len(tokens) - 1
    at = max((common_length(tokens, 0, donor, 0) for donor in donors), default=0)
    runs = []
    while at + shortest <= end:
        found = places.get(tuple(tokens[at : at + shortest]), ())
        longest = max((common_length(tokens, at, donor, i) for donor, i in found), default=0)
        if longest:
            runs.append((at, min(longest, end - at)))
        at += longest or 1
    return runs


def kl_divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """KL(exact || other) in nats, of log-probabilities."""
    return float(np.sum(np.exp(exact) * (exact - other)))


@dataclass(frozen=True)
class Recomputed:
    """A prompt's answer by full recompute."""

    answer: Answer
    logprobs: np.ndarray


class Quality:
    """Spliced against full recompute on one server."""

    def __init__(
        self, client: Client, condition: str, tokenize: Callable[[str], list[int]]
    ) -> None:
        self.client = client
        self.condition = condition
        self.tokenize = tokenize
        splice = client.rksc_status()["ranks"][0].get("splice") or {}
        self.setting = {name: splice.get(name) for name in ("head", "tail", "min_tokens")}
        self.labels = [self._label(text) for text in LABELS]

    def _label(self, text: str) -> int:
        tokens = self.tokenize(text)
        if len(tokens) != 1:
            raise BenchmarkError(f"the verdict {text!r} is not a single token of this model")
        return tokens[0]

    def recompute(self, case: SpliceCase) -> Recomputed:
        salt = self.client.salt()
        answer = self.client.ask(case.prompt, STEPS, EXACT, salt)
        return Recomputed(answer, self.client.first_token(case.prompt, EXACT, salt)[0])

    def row(self, number: int, case: SpliceCase, exact: Recomputed) -> Row:
        """The raw measurements of a case; each request finds the donors and nothing else."""
        salt = self._with_donors(case)
        spliced = self.client.ask(case.prompt, STEPS, SIMILAR, salt)
        salt = self._with_donors(case)
        logprobs, info = self.client.first_token(case.prompt, SIMILAR, salt)
        row = {
            **self._facts(number, case),
            "exact_ttft": exact.answer.ttft,
            "exact_output": exact.answer.tokens,
            "exact_labels": exact.logprobs[self.labels].tolist(),
            "ttft": spliced.ttft,
            "output": spliced.tokens,
            "info": spliced.info,
            **self._distance(exact, logprobs, info),
            "labels": logprobs[self.labels].tolist(),
            "ungated": None,
        }
        if info["spliced_tokens"] < row["repeatable_tokens"] / 2:
            # What the gate refused, or was doubted, is needed to judge gate and margin.
            salt = self._with_donors(case)
            row["ungated"] = self._distance(
                exact, *self.client.first_token(case.prompt, SIMILAR, salt, tau=0)
            )
        return row

    def adversarial(self, cases: Sequence[SpliceCase], wanted: int) -> Iterator[Row]:
        """Rows of all near-duplicates tried, until ``wanted`` answered differently were spliced."""
        found = 0
        for number, case in enumerate(cases):
            original = self.client.ask(case.donors[0], ANSWER_TOKENS, EXACT, self.client.salt())
            salt = self.client.salt()
            edited = self.client.ask(case.prompt, STEPS, EXACT, salt)
            facts = {
                "answer_tokens": ANSWER_TOKENS,
                "donor_output": original.tokens,
                "answers_differ": original.tokens != edited.tokens[:ANSWER_TOKENS],
            }
            if not facts["answers_differ"]:
                yield {**self._facts(number, case), **facts}
                continue
            logprobs = self.client.first_token(case.prompt, EXACT, salt)[0]
            row = {**self.row(number, case, Recomputed(edited, logprobs)), **facts}
            found += row["info"]["spliced_tokens"] > 0
            yield row
            if found == wanted:
                return

    def _with_donors(self, case: SpliceCase) -> str:
        salt = self.client.salt()
        for donor in case.donors:
            self.client.ask(donor, 1, EXACT, salt)
        return salt

    def _facts(self, number: int, case: SpliceCase) -> Row:
        tokens = self.tokenize(case.prompt)
        donors = [self.tokenize(donor) for donor in case.donors]
        runs = repeated_runs(tokens, donors, SHORTEST_RUN)
        return {
            "workload": case.family,
            "condition": self.condition,
            "repeat": 0,
            "position": number,
            "setting": self.setting,
            **case.facts,
            "prompt_tokens": len(tokens),
            "prefix_tokens": max(common_length(tokens, 0, donor, 0) for donor in donors),
            "repeatable_tokens": sum(length for _, length in runs),
            "runs": runs,
        }

    @staticmethod
    def _distance(exact: Recomputed, logprobs: np.ndarray, info: Mapping[str, Any]) -> Row:
        return {
            "kl": kl_divergence(exact.logprobs, logprobs),
            "lead": float(np.diff(np.partition(logprobs, -2)[-2:])[0]),
            "top1": bool(exact.logprobs.argmax() == logprobs.argmax()),
            "kl_info": dict(info),
        }


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
