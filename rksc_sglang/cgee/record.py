"""Branches and their verifications, recorded from a live server: what calibration replays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import requests

from rksc_sglang.cgee.judged import Judged
from rksc_sglang.models.dialogues import END, NO, YES, Turn, prompt_of

QUESTION = "Is the answer above correct? Reply with YES or NO."


class RecordError(RuntimeError):
    """The server cannot be recorded; the message says why."""


class Sample(NamedTuple):
    """A generated solution.

    Attributes:
        tokens: how many it took.
        confidence: mean over them of the most probable alternative's probability.
    """

    text: str
    tokens: int
    confidence: float


class Verified(NamedTuple):
    """What a verification says.

    Attributes:
        final: [labels] log-probabilities, of the layer where it stopped.
        layer: where it stopped, None: it did not.
        scores: [labels] what the verdict is made of: ``final``, or the server's estimate of it.
        states: [checks, hidden_size] float32 normed states where exits look; empty where they were
            not asked for.
    """

    final: list[float]
    layer: int | None
    scores: list[float]
    states: np.ndarray


class Recorder:
    """Asks one server, in the reasoner's chat format."""

    def __init__(self, url: str, max_tokens: int = 160) -> None:
        self.url = url
        self.max_tokens = max_tokens

    @functools.cached_property
    def labels(self) -> list[int]:
        """Tokens of YES and NO; raises RecordError where they are not single ones."""
        return [self._label(text) for text in (YES, NO)]

    @functools.cached_property
    def num_layers(self) -> int:
        """Of the model, as a server with RKSC says."""
        try:
            return self._ask("GET", "/rksc/status")["ranks"][0]["num_layers"]
        except LookupError as error:
            raise RecordError(f"{self.url}: {error!r}") from error

    def post(self, route: str, body: Mapping[str, Any]) -> Any:
        """Raises RecordError where there is no answer, or no success."""
        return self._ask("POST", route, body)

    def _ask(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            answer = requests.request(method, self.url + route, json=body, timeout=600)
            answer.raise_for_status()
            return answer.json()
        except (requests.RequestException, ValueError) as error:
            raise RecordError(f"{self.url}: {error!r}") from error

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it."""
        body = {"prompt": list(texts), "add_special_tokens": False}
        return self.post("/tokenize", body)["tokens"] if texts else []

    def _label(self, text: str) -> int:
        (tokens,) = self.tokenize([text])
        if len(tokens) != 1:
            raise RecordError(f"the verdict {text!r} is not a single token of this model")
        return tokens[0]

    def solve(self, question: str | Sequence[str], count: int, temperature: float) -> list[Sample]:
        """``count`` solutions of a question, or of each of several; greedy at temperature 0."""
        asked = [question] if isinstance(question, str) else question
        body = {
            "text": [prompt_of([Turn("user", text)]) for text in asked],
            "sampling_params": {
                "max_new_tokens": self.max_tokens,
                "temperature": temperature,
                "n": count,
                "stop": [END],
            },
            "return_logprob": True,
            "top_logprobs_num": 1,
        }
        samples = []
        for answer in self.post("/generate", body):
            meta = answer["meta_info"]
            top = [math.exp(token[0][0]) for token in meta["output_top_logprobs"]]
            confidence = sum(top) / len(top)
            samples.append(Sample(answer["text"], meta["completion_tokens"], confidence))
        return samples

    def cache(self, question: str, solutions: Sequence[str]) -> None:
        """Have the server compute branches, as their generation would have."""
        texts = [prompt_of([Turn("user", question)]) + solution for solution in solutions]
        self.post("/generate", {"text": texts, "sampling_params": {"max_new_tokens": 0}})

    def verify(
        self,
        question: str,
        solutions: Sequence[str],
        exit_: str | None = None,
        asked: str = QUESTION,
        unanimous: bool = False,
    ) -> list[Verified]:
        """Ask about each solution behind its own conversation, all at once.

        Args:
            exit_: as in the request contract; None sends none, for servers without RKSC.
            asked: the question about it.
            unanimous: all solutions have the same answer.
        """
        turns = [
            [Turn("user", question), Turn("assistant", solution), Turn("user", asked)]
            for solution in solutions
        ]
        params: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0}
        if exit_ is not None:
            verify = {"labels": [YES, NO], "exit": exit_, "unanimous": unanimous}
            contract = {"share": "exact", "verify": verify}
            params["custom_params"] = {"rksc": contract}
        body = {
            "text": [prompt_of(dialogue) for dialogue in turns],
            "sampling_params": params,
            "return_logprob": True,
            "token_ids_logprob": self.labels,
        }
        metas = [answer["meta_info"] for answer in self.post("/generate", body)]
        return [self._verified(meta, exit_) for meta in metas]

    def _verified(self, meta: Mapping[str, Any], exit_: str | None) -> Verified:
        found = {token: value for value, token, _ in meta["output_token_ids_logprobs"][0]}
        final = [found[token] for token in self.labels]
        info = meta.get("rksc") or {}
        if info.get("fallback"):
            raise RecordError(f"exit {exit_!r} was not to be had: {info['fallback']}")
        scores = info.get("label_scores") or final
        states = np.array(info.get("states") or [], dtype=np.float32)
        return Verified(final, info.get("exit_layer"), scores, states)

    def group(
        self,
        question: str,
        count: int,
        temperature: float,
        extract: Callable[[str], str | None],
        is_right: Callable[[str | None], bool],
    ) -> Sequence[Judged]:
        """A problem's branches, each verified in full."""
        judged = []
        samples = self.solve(question, count, temperature)
        verifications = self.verify(question, [sample.text for sample in samples], "observe")
        for sample, verified in zip(samples, verifications):
            answer = extract(sample.text)
            judged.append(
                Judged(
                    answer,
                    is_right(answer),
                    sample.confidence,
                    verified.states,
                    verified.final,
                    sample.tokens,
                )
            )
        return judged
