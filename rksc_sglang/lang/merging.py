"""``group.merge``: branches that thought the same thing are continued once.

What is merged goes on from one branch's own text and KV; no branch reads another's. The votes of
the duplicates are added to the branch that goes on, and the duplicates are stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sglang.lang.interpreter import ProgramState

from rksc_sglang.asks.alike import SIGNALS, Thought, duplicates
from rksc_sglang.contract import KEY, RequestContract
from rksc_sglang.lang.executor import contract_of_executor, settle
from rksc_sglang.lang.server import server_of

if TYPE_CHECKING:
    from rksc_sglang.lang.branches import BranchGroup

#: Next tokens that are compared.
FOLLOWING = 20
#: Signals that ask the server for one token of each branch.
PROBED = ("next", "sigma")


class MergeError(ValueError):
    """Branches cannot be merged as asked."""


@dataclass(frozen=True)
class Merge:
    """One branch that was merged into another.

    Attributes:
        branch, into: numbers in the group.
        at: the variable behind which they were compared.
        by: the signal, and how similar the two were by it.
    """

    branch: int
    into: int
    at: str
    by: str
    similarity: float


def last_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


@dataclass(frozen=True)
class MergeRule:
    """When two partial thoughts are the same.

    Attributes:
        by: a signal of :data:`rksc_sglang.asks.alike.SIGNALS`.
        threshold: least value of it; None: 1 for ``state``, for the others the one in the server's
            profile (``python -m rksc_sglang.calibrate --merge``).
        extract: what a thought comes down to, for ``state``; None: nothing can be said.
    """

    by: str = "state"
    threshold: float | None = None
    extract: Callable[[str], Hashable | None] = last_line

    def __post_init__(self) -> None:
        if self.by not in SIGNALS:
            raise MergeError(f"by: expected one of {', '.join(SIGNALS)}, got {self.by!r}")


def find_merges(group: BranchGroup, var: str, rule: MergeRule) -> list[Merge]:
    """Which of the branches that still go on are the same as others, behind ``var``.

    Raises:
        MergeError: the server cannot tell, or there is no threshold, with the reason.
    """
    threshold = _threshold_of(group, rule)

    def thought_of(branch: int) -> Thought | None:
        state = group.states[branch]
        if branch in group.stopped or settle(state) is not None or var not in state:
            return None
        text = state[var]
        thought = Thought(text, rule.extract(text))
        return _probe(state, thought, rule) if rule.by in PROBED else thought

    with ThreadPoolExecutor(len(group)) as pool:
        thoughts = list(pool.map(thought_of, range(len(group))))
    return [
        Merge(found.place, found.of, var, rule.by, found.similarity)
        for found in duplicates(thoughts, SIGNALS[rule.by], threshold)
    ]


def _threshold_of(group: BranchGroup, rule: MergeRule) -> float:
    if rule.threshold is not None:
        return rule.threshold
    if rule.by == "state":
        return 1.0
    server = server_of(group.states[0].stream_executor.backend)
    threshold = server.merge_threshold(rule.by) if server is not None else None
    if threshold is None:
        raise MergeError(f"threshold: by={rule.by!r} needs one, or a server whose profile has it")
    return threshold


def _probe(state: ProgramState, thought: Thought, rule: MergeRule) -> Thought:
    """What would come next, and the signature of the last token: one token behind the branch's
    cached KV."""
    executor = state.stream_executor
    server = server_of(executor.backend)
    if server is None:
        raise MergeError(f"by={rule.by!r} needs an SGLang server")
    contract = contract_of_executor(executor) or RequestContract()
    contract = replace(contract, signature=rule.by == "sigma" or None)
    meta = server.generate(
        executor.text_, contract, return_logprob=True, top_logprobs_num=FOLLOWING
    )["meta_info"]
    seen = with_probe(thought, meta)
    if rule.by == "sigma" and not seen.signature:
        why = (meta.get(KEY) or {}).get("fallback") or "this server has no signatures"
        raise MergeError(f"by='sigma': {why}")
    return seen


def with_probe(thought: Thought, meta: dict[str, Any]) -> Thought:
    """What the ``meta_info`` of one token behind a thought says of it."""
    following = {token: math.exp(value) for value, token, _ in meta["output_top_logprobs"][0]}
    signature = (meta.get(KEY) or {}).get("signature") or ()
    return replace(thought, following=following, signature=signature)
