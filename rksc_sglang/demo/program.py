"""The program that the demo runs: fork, answer, verify, vote; and an account of its tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang as sgl
from sglang.lang.interpreter import StreamExecutor
from sglang.utils import http_request

import rksc_sglang as rksc
from rksc_sglang.demo.questions import (
    OWN_PROBLEMS,
    OWN_QUESTIONS,
    AnswerKey,
    Question,
    answer_key,
    stated_answer,
    vote,
)


@dataclass(frozen=True)
class Setting:
    """How a model is asked: what stands before the question, where its answer ends and is."""

    questions: Path
    system: str
    examples: Sequence[tuple[str, str]]
    max_tokens: int
    stop: str | None
    key: AnswerKey


SETTINGS = {
    "smollm2": Setting(
        questions=OWN_QUESTIONS,
        system="Answer in one short sentence.",
        examples=(
            ("What is the capital of Spain?", "The capital of Spain is Madrid."),
            (
                "Ben has 7 pencils and gives away 2. How many are left?",
                "7 - 2 = 5 pencils are left.",
            ),
            ("A bag holds 3 balls. How many balls are in 5 bags?", "3 * 5 = 15 balls."),
        ),
        max_tokens=24,
        stop="\n",
        key=answer_key,
    ),
    "reasoner": Setting(
        questions=OWN_PROBLEMS,
        system="You solve problems. Work step by step.",
        examples=(),
        max_tokens=160,
        stop=None,
        key=stated_answer,
    ),
}
#: One a branch. Branches differ by their hints and not by chance, so that every pass over the
#: questions generates the same tokens.
HINTS = (
    "Answer briefly.",
    "Answer in one sentence.",
    "Be exact.",
    "Think carefully.",
    "Explain it to a child.",
    "Check your answer.",
    "Take your time.",
    "Say what you know.",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one question.

    ``right`` is the answer of most branches, ``verdict_right`` that of the verdict's winner;
    ``shared`` prompt tokens were in the KV cache, ``computed`` ones went through the model;
    ``generated`` counts the branches' answers.
    """

    answer: str
    votes: int
    branches: int
    verdict: rksc.Verdict
    right: bool
    verdict_right: bool
    shared: int
    computed: int
    generated: int
    seconds: float


class CountingEndpoint(sgl.RuntimeEndpoint):
    """SGLang's backend; keeps the token counts of the request that computes a fork's prefix."""

    def commit_lazy_operations(self, s: StreamExecutor) -> None:
        body = {"text": s.text_, "sampling_params": {"max_new_tokens": 0}}
        answer = http_request(f"{self.base_url}/generate", json=body)
        self._assert_success(answer)
        s.meta_info["prefix"] = answer.json()["meta_info"]


@sgl.function
def _solve(s: Any, question: str, hints: Sequence[str], setting: Setting) -> Any:
    s += sgl.system(setting.system)
    for example, answer in setting.examples:
        s += sgl.user(example) + sgl.assistant(answer)
    s += sgl.user_begin() + question
    branches = rksc.fork(s, len(hints), hints=[f" {hint}" for hint in hints])
    reply = sgl.gen("answer", max_tokens=setting.max_tokens, temperature=0, stop=setting.stop)
    branches += sgl.user_end() + sgl.assistant(reply)
    verdict = rksc.verify(branches, "answer")
    branches.join()
    return branches, verdict


def solve(
    endpoint: CountingEndpoint, question: Question, branches: int, setting: Setting
) -> Outcome:
    """Answer one question.

    Raises:
        Exception: whatever went wrong first; SGLang's executors only take note of it.
    """
    start = time.perf_counter()
    program = _solve.run(question.text, HINTS[:branches], setting, backend=endpoint)
    group, verdict = program.ret_value
    for state in (program, *group):
        if state.error() is not None:
            raise state.error()

    keys = [setting.key(state["answer"], question.text) for state in group]
    answer, votes = vote(keys, verdict.scores)
    metas = [state.get_meta_info("answer") for state in group]
    prefix = program.get_meta_info("prefix")  # none for a single branch
    prompts = metas if prefix is None else [*metas, prefix]
    shared = sum(meta["cached_tokens"] for meta in prompts)
    prompt_tokens = sum(meta["prompt_tokens"] for meta in prompts)
    return Outcome(
        answer=answer,
        votes=votes,
        branches=branches,
        verdict=verdict,
        right=answer in question.answers,
        verdict_right=verdict.winner is not None and keys[verdict.winner] in question.answers,
        shared=shared + verdict.prompt_tokens - verdict.computed_tokens,
        computed=prompt_tokens - shared + verdict.computed_tokens,
        generated=sum(meta["completion_tokens"] for meta in metas),
        seconds=time.perf_counter() - start,
    )
