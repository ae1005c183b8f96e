"""``rksc.verify``: which of the branches is right, by asking the model about each."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from sglang.lang.interpreter import ProgramState, ProgramStateGroup
from sglang.lang.tracer import TracerProgramState

from rksc_sglang.cgee.skip_gate import PaperGate, SkipGate, gather
from rksc_sglang.contract import Together
from rksc_sglang.lang.branches import BranchGroup
from rksc_sglang.lang.executor import as_settled, settle
from rksc_sglang.lang.node import SglVerdict
from rksc_sglang.lang.scoring import LabelScores, Question, VerifyError, make_question, score
from rksc_sglang.lang.server import server_of
from rksc_sglang.lang.thinking import Think

SKIPS = ("calibrated", "paper")


@dataclass(frozen=True)
class Verdict:
    """Outcome of a verification; lists have one entry a branch.

    Attributes:
        winner: the branch with the highest score, None when none was verified.
        labels: as they were scored; the first one is the one that counts for a branch.
        scores: probability of the first label among the labels; None where skipped.
        verdicts: the more probable label; None where skipped.
        confidences: mean top-1 probability of the branch's generated tokens, up to its end;
            None where the branch has no log-probabilities.
        skipped: branch -> why it was not verified.
        gate: what let the whole group go unverified, None where it was verified.
        thoughts: of verifiers that think; None where they do not, or were not asked.
        generated_tokens: of these thoughts.
        prompt_tokens: of all verification prompts together.
        computed_tokens: of those, the ones that were not in the KV cache.
        spliced_tokens: of those, the ones whose KV was computed behind another context.
        exit_layers: the layer at which the branch's verification stopped; None where it did not.
        computed_layers: that verifications went through, of ``all_layers``, as the server counted
            them; both 0 where it does not.
        seconds: wall-clock time of the whole call, waiting for unfinished branches included.
    """

    winner: int | None
    labels: tuple[str, ...]
    scores: list[float | None]
    verdicts: list[str | None]
    confidences: list[float | None]
    skipped: dict[int, str] = field(default_factory=dict)
    gate: str | None = None
    thoughts: list[str | None] = field(default_factory=list)
    generated_tokens: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    spliced_tokens: int = 0
    exit_layers: list[int | None] = field(default_factory=list)
    computed_layers: int = 0
    all_layers: int = 0
    seconds: float = 0.0

    def explain(self) -> str:
        """In words: who won, what was skipped and why, and what it cost."""
        lines = []
        if self.gate is not None:
            lines.append(f"branch {self.winner} won without verification: {self.gate}")
        elif self.winner is None:
            lines.append("no branch was verified")
        else:
            lines.append(
                f"branch {self.winner} won: {self.labels[0]} {self.scores[self.winner]:.3f}"
            )
        for branch, value in enumerate(self.scores):
            if value is None:
                lines.append(f"  branch {branch}: not verified, {self.skipped[branch]}")
                continue
            layer = self.exit_layers[branch]
            where = "" if layer is None else f", stopped after layer {layer}"
            lines.append(f"  branch {branch}: {self.labels[0]} {value:.3f}{where}")
        lines.append(
            f"{self.computed_tokens} of {self.prompt_tokens} prompt tokens computed, "
            f"{self.spliced_tokens} spliced, {self.generated_tokens} generated, "
            + (f"{self.computed_layers} of {self.all_layers} layers, " if self.all_layers else "")
            + f"{1000 * self.seconds:.0f} ms"
        )
        return "\n".join(lines)


def verify(
    branches: ProgramStateGroup | Sequence[ProgramState],
    var: str,
    *,
    question: str | Callable[[ProgramState], str] | None = None,
    labels: Sequence[str] | None = None,
    system: str | None = None,
    share: str | None = None,
    exit: str | None = None,
    think: Think | None = None,
    skip: str | None = None,
    stop: bool = False,
    extract: Callable[[str], Hashable | None] = str.strip,
) -> Verdict:
    """Ask the model about each branch and pick a winner.

    Each question continues its branch's own cached KV, so it costs its own few tokens. With a
    system prompt of the verifier's own it continues no cached prefix: then the branch's text is
    computed again, unless ``share="similar"`` lets the server take its KV over.
    Branches are asked together, when all have finished; by a verifier that thinks, each as soon as
    it has, while others still generate.

    Args:
        branches: from ``rksc.fork``, or any states of programs on one SGLang server.
        var: the variable that holds the branch's answer; a branch that did not set it is skipped.
        question: what to ask behind the branch's text, or a function of the branch's state that
            says so; None asks whether the answer is correct.
        labels: possible answers, the good one first, each one token of the model in that place;
            None stands for YES and NO, or Yes and No, or yes and no, whichever are.
        system: a system prompt for the verification, in the place of the branches' own.
        share: "exact", or "similar" to let the server share KV of equal text behind different
            prefixes; None leaves it to what the branch was forked with.
        exit: when a verification's pass may stop at a middle layer: "off", "layer" (by the model's
            calibrated rule), "paper" (by the paper's), "observe" (never; the answer shows what the
            layers say); None leaves it to the server.
        think: has the verifier think before its verdict; ``rksc.Think()`` is a beginning.
        skip: "calibrated" or "paper": a group whose branches are sure enough, or agree, is not
            verified at all, by the gate in the server's profile or by the paper's. Where a branch
            has no confidence, all are verified.
        stop: the gate looks at the group each time that a branch has finished, and where these are
            enough, those that still generate are stopped; with ``skip="calibrated"``.
        extract: what a branch's answer comes down to; None where there is none. For the gate, and
            for layer exit: where all branches have the same answer, verdicts may stop earlier.

    Raises:
        VerifyError: no branches, or labels that collide or do not fit, by name; a ``skip`` that
            the server has no gate for; a ``stop`` of states that ``rksc.fork`` has not made.
    """
    start = time.perf_counter()
    if callable(question) and think is not None:
        raise VerifyError("question: a verifier that thinks is asked think.question")
    text = None if callable(question) else question
    asked_for = make_question(text, labels, system, share, exit, think)
    states = list(branches.states if isinstance(branches, ProgramStateGroup) else branches)
    if not states:
        raise VerifyError("branches: expected at least one")
    if skip not in (None, *SKIPS):
        raise VerifyError(f"skip: expected one of {', '.join(SKIPS)}, got {skip!r}")
    if stop and (skip != "calibrated" or not isinstance(branches, BranchGroup)):
        raise VerifyError('stop: needs branches of rksc.fork, and skip="calibrated"')
    if isinstance(states[0], TracerProgramState):
        return _trace(states, var, asked_for)
    if skip is not None:
        verdict = _skip(states, branches, var, skip, stop, extract, start)
        if verdict is not None:
            return verdict

    stopped = branches.stopped if isinstance(branches, BranchGroup) else set()

    def hindrance(branch: int) -> str | None:
        """The reason to skip the branch."""
        if branch in stopped:
            return "stopped"
        error = settle(states[branch])
        if error is not None:
            return f"failed: {error}"
        return None if var in states[branch] else f"no variable {var!r}"

    def question_about(branch: int) -> Question:
        if not callable(question):
            return asked_for
        return replace(asked_for, text=make_question(question(states[branch]), None).text)

    def ask(branch: int) -> LabelScores | str:
        reason = hindrance(branch)
        return reason or score(states[branch].stream_executor, question_about(branch))

    if think is None:
        for state in states:  # few passes of many questions take less than many passes of few
            settle(state)
        usable = [branch for branch in range(len(states)) if hindrance(branch) is None]
        answers = {extract(states[branch][var]) for branch in usable}
        if len(usable) > 1 and len(answers) == 1 and answers != {None}:
            asked_for = replace(asked_for, unanimous=True)
        together = Together(id=uuid.uuid4().hex, count=len(usable)) if len(usable) > 1 else None
        asked_for = replace(asked_for, together=together)
    with ThreadPoolExecutor(len(states)) as pool:
        outcomes = list(pool.map(ask, range(len(states))))

    asked = {b: o for b, o in enumerate(outcomes) if isinstance(o, LabelScores)}
    scores = [asked[b].probabilities[0] if b in asked else None for b in range(len(states))]
    confidences = [_confidence(state, var) for state in states]
    winner = max(
        asked,
        key=lambda b: (asked[b].probabilities[0], confidences[b] or 0.0, -b),
        default=None,
    )
    if winner is not None and isinstance(branches, BranchGroup):
        branches.report({winner: "won"})
    return Verdict(
        winner=winner,
        labels=asked[winner].labels if winner is not None else asked_for.labels or (),
        scores=scores,
        verdicts=[asked[b].best if b in asked else None for b in range(len(states))],
        confidences=confidences,
        skipped={b: o for b, o in enumerate(outcomes) if isinstance(o, str)},
        thoughts=[asked[b].thought if b in asked else None for b in range(len(states))],
        generated_tokens=sum(o.generated_tokens for o in asked.values()),
        prompt_tokens=sum(o.prompt_tokens for o in asked.values()),
        computed_tokens=sum(o.prompt_tokens - o.cached_tokens for o in asked.values()),
        spliced_tokens=sum((o.rksc or {}).get("spliced_tokens", 0) for o in asked.values()),
        exit_layers=[asked[b].exit_layer if b in asked else None for b in range(len(states))],
        computed_layers=sum(o.exit_layer or o.num_layers for o in asked.values()),
        all_layers=sum(o.num_layers for o in asked.values()),
        seconds=time.perf_counter() - start,
    )


def _gate(skip: str, state: ProgramState) -> SkipGate:
    if skip == "paper":
        return PaperGate()
    server = server_of(state.stream_executor.backend)
    gate = server.skip_gate() if server is not None else None
    if gate is None:
        raise VerifyError("skip: this server has no calibrated gate, see rksc_sglang.calibrate")
    return gate


def _skip(
    states: list[ProgramState],
    branches: Any,
    var: str,
    skip: str,
    stop: bool,
    extract: Callable[[str], Hashable | None],
    start: float,
) -> Verdict | None:
    """The verdict of a group that needs no verification; None where it does."""
    gate = _gate(skip, states[0])
    stopped = branches.stopped if isinstance(branches, BranchGroup) else set()
    generating = set(range(len(states))) - stopped
    usable: list[int] = []
    winner = None
    for branch in as_settled(states):
        if branch in stopped:
            continue
        generating.discard(branch)
        if settle(states[branch]) is None and var in states[branch]:
            usable.append(branch)
        if stop or not generating:
            total = len(usable) + len(generating)
            winner = _decided(gate, states, var, sorted(usable), total, extract)
        if winner is not None or not generating:
            break
    if winner is None:
        return None
    if generating:
        branches.stop(generating)
    if isinstance(branches, BranchGroup):
        branches.report({winner: "won"})
    why = dict.fromkeys(range(len(states)), "the group was decided before")
    nothing: list[Any] = [None] * len(states)
    return Verdict(
        winner=winner,
        labels=(),
        scores=nothing,
        verdicts=nothing,
        confidences=[
            None if branch in generating else _confidence(state, var)
            for branch, state in enumerate(states)
        ],
        skipped=why | dict.fromkeys(generating, "stopped, the group was decided before it ended"),
        gate=f"the {skip} gate",
        thoughts=nothing,
        exit_layers=nothing,
        seconds=time.perf_counter() - start,
    )


def _decided(
    gate: SkipGate,
    states: list[ProgramState],
    var: str,
    finished: list[int],
    branches: int,
    extract: Callable[[str], Hashable | None],
) -> int | None:
    """The branch that wins by what the finished ones of a group say."""
    confidences = [_confidence(states[branch], var) for branch in finished]
    known = [confidence for confidence in confidences if confidence is not None]
    if not finished or len(known) < len(finished):
        return None
    answers = [extract(states[branch][var]) for branch in finished]
    place = gate.winner(gather(answers, known, branches))
    return None if place is None else finished[place]


def _confidence(state: ProgramState, var: str) -> float | None:
    meta: Any = state.stream_executor.meta_info.get(var)
    if not isinstance(meta, dict) or not meta.get("output_top_logprobs"):
        return None
    top = [max(entry[0] for entry in token) for token in meta["output_top_logprobs"] if token]
    return sum(math.exp(logprob) for logprob in top) / len(top) if top else None


def _trace(states: list[ProgramState], var: str, question: Question) -> Verdict:
    """Under tracing nothing runs: one node a branch, and branch 0 stands for the winner."""
    for state in states:
        state += SglVerdict(f"{var}_verdict", question)
    nothing: list[Any] = [None] * len(states)
    reason = "traced, not run"
    return Verdict(
        0,
        question.labels or (),
        nothing,
        nothing,
        nothing,
        dict.fromkeys(range(len(states)), reason),
    )
