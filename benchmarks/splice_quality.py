"""Asks a server with splices and without, and compares its answers, for ``benchmarks.splice``."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import requests

from benchmarks.harness import BenchmarkError, Row
from benchmarks.splice_cases import SpliceCase
from benchmarks.splice_summary import common_length

SIMILAR, EXACT = "similar", "exact"
STEPS = 16
#: Of an adversarial prompt's greedy tokens, those that are its answer.
ANSWER_TOKENS = 4
#: A run is worth the name from here on; shorter ones do not count as repeatable.
SHORTEST_RUN = 16
LABELS = ("Yes", "No")


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
