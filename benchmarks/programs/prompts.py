"""What the programs say, in the words that the reasoner knows (``models/dialogues.py``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sglang as sgl

from rksc_sglang.models.dialogues import ask_step, quote_agents
from rksc_sglang.models.dialogues import quote_text as quote

__all__ = [
    "ASK",
    "PERSONAS",
    "SOLVER",
    "THINK",
    "VERIFIER",
    "ask_step",
    "is_accepted",
    "opening",
    "quote",
    "quote_agents",
]

SOLVER = "You solve problems. Work step by step. Write the answer on the last line."
VERIFIER = "You check the work of others. Be exact."
PERSONAS = (
    "You are a careful mathematician. Work step by step. Write the answer on the last line.",
    "You are a patient teacher. Show your work. Write the answer on the last line.",
    "You are a strict examiner. Do not guess. Write the answer on the last line.",
    "You are a clerk who makes no mistakes. Be exact. Write the answer on the last line.",
)
ASK = "Is the answer above correct? Reply with YES or NO."
THINK = "Check the solution. Think first, then give your verdict."


def opening(question: str, examples: Sequence[tuple[str, str]], system: str = SOLVER) -> Any:
    """System prompt, solved examples and the problem, up to where the assistant is to speak."""
    text = sgl.system(system)
    for asked, solved in examples:
        text += sgl.user(asked) + sgl.assistant(solved)
    return text + sgl.user(question) + sgl.assistant_begin()


def is_accepted(thoughts: str) -> bool:
    """Whether the last verdict in a verifier's thoughts is YES."""
    found = re.findall(r"Verdict: *(YES|NO)\b", thoughts)
    return bool(found) and found[-1] == "YES"
