"""Branches recorded from a live server, and how alike they are: what merging is calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from rksc_sglang.asks.alike import Thought
from rksc_sglang.asks.merge_calibration import compare
from rksc_sglang.cgee.record import Recorder, RecordError
from rksc_sglang.contract import KEY
from rksc_sglang.lang.merging import FOLLOWING, with_probe
from rksc_sglang.models.dialogues import Turn, prompt_of


def record_branches(
    recorder: Recorder,
    asked: Sequence[str],
    temperature: float,
    extract: Callable[[str], str | None],
    is_right: Callable[[str | None], bool],
    state: Callable[[str], Hashable | None],
) -> dict[str, Any]:
    """One problem's branches, and what can be seen behind each of their lines.

    Args:
        asked: the question as each branch is asked it.
        extract: the answer in a solution.
        state: what a solution comes down to so far.

    Returns:
        A row for :func:`rksc_sglang.asks.merge_calibration.group_of`.

    Raises:
        RecordError: the server does not answer, or has no signatures.
    """
    drawn = recorder.solve(asked, 1, temperature)
    heads_of = [heads(sample.text) for sample in drawn]
    ends = iter(recorder.tokenize([head for some in heads_of for head in some]))
    places = [(text, head) for text, some in zip(asked, heads_of) for head in some[:-1]]
    seen = probe(recorder, places, state)
    branches, thoughts = [], []
    for text, sample, some in zip(asked, drawn, heads_of):
        answer = extract(sample.text)
        branches.append(
            {
                "text": sample.text,
                "tokens": sample.tokens,
                "answer": answer,
                "right": is_right(answer),
                "ends": [len(next(ends)) for _ in some],
            }
        )
        thoughts.append([seen[text, head] for head in some[:-1]])
    return {"branches": branches, "alike": compare(thoughts)}


def heads(text: str) -> list[str]:
    """A text up to the end of each of its lines."""
    lines = text.splitlines()
    return ["\n".join(lines[:n]) for n in range(1, len(lines) + 1)]


def probe(
    recorder: Recorder,
    places: Sequence[tuple[str, str]],
    state: Callable[[str], Hashable | None],
) -> dict[tuple[str, str], Thought]:
    """What is seen behind heads of solutions, each of a question."""
    places = list(dict.fromkeys(places))
    if not places:
        return {}
    contract = {"share": "exact", "signature": True}
    body = {
        "text": [prompt_of([Turn("user", question)]) + head for question, head in places],
        "sampling_params": {
            "max_new_tokens": 1,
            "temperature": 0,
            "custom_params": {KEY: contract},
        },
        "return_logprob": True,
        "top_logprobs_num": FOLLOWING,
    }
    found = {}
    for (question, head), answer in zip(places, recorder.post("/generate", body)):
        meta = answer["meta_info"]
        seen = with_probe(Thought(head, state(head)), meta)
        if not seen.signature:
            raise RecordError(f"there are no signatures: {meta[KEY].get('fallback')}")
        found[question, head] = seen
    return found
