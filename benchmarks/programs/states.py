"""Program states in plain SGLang: forked root first, waited for, verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import sglang as sgl

from benchmarks.programs.prompts import ASK


def fork(state: Any, branches: int, *, cached: bool = False) -> list[Any]:
    """Branches of a state, whose prefix is computed first.

    SGLang sees to that for text that is there; the state's own thread may not have written it yet.

    Args:
        cached: the prefix was generated a moment ago. It is in the cache but for a token, and to
            compute that first would only cost a pass.
    """
    state.sync()
    if cached:
        return [state.fork(1).states[0] for _ in range(branches)]
    return state.fork(branches).states


def as_finished(states: Sequence[Any], name: str) -> Iterator[tuple[int, str]]:
    """Number and variable ``name`` of each state, in the order in which they are done."""
    pool = ThreadPoolExecutor(len(states))
    waiting = {pool.submit(state.get_var, name): i for i, state in enumerate(states)}
    pool.shutdown(wait=False)  # who has seen enough need not wait for the others
    for done in as_completed(waiting):
        yield waiting[done], done.result()


def judge(states: Sequence[Any], ask: Callable[[Any], str] = lambda state: ASK) -> list[float]:
    """Probability of YES for each state, whose assistant's turn is open.

    A verification is a copy of the state with one more turn, so it continues the state's cached
    prefix. They are asked together, when all states are done: that takes fewer passes, and was
    measured to be faster. The states stay as they are.
    """

    def one(state: Any) -> float:
        probe = state.fork(1)[0]
        probe += sgl.assistant_end() + sgl.user(ask(state)) + sgl.assistant_begin()
        probe += sgl.gen(
            "verdict",
            max_tokens=1,
            temperature=0,
            return_logprob=True,
            top_logprobs_num=20,
            return_text_in_logprobs=True,
        )
        return probability_of_yes(probe.get_meta_info("verdict"))

    for state in states:
        state.sync()
    with ThreadPoolExecutor(len(states)) as pool:
        return list(pool.map(one, states))


def probability_of_yes(meta: Mapping[str, Any]) -> float:
    """Of YES against NO, however they are spelled, as the first token of an answer."""
    weights = {"YES": 0.0, "NO": 0.0}
    for logprob, _, text in meta["output_top_logprobs"][0]:
        for label in weights:
            # A tokenizer may have no token for the whole word.
            if text.strip() and label.startswith(text.strip().upper()):
                weights[label] += math.exp(logprob)
    total = sum(weights.values())
    return weights["YES"] / total if total else 0.5
