"""The verification node of the frontend's intermediate representation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglGen

from rksc_sglang.lang.scoring import Question, make_question, score
from rksc_sglang.lang.thinking import Think


class SglVerdict(SglGen):
    """Scores labels behind the state's text, which stays as it is.

    A kind of ``SglGen``, so that the tracer, variable events and streaming treat it as one.
    """

    def __init__(self, name: str, question: Question) -> None:
        super().__init__(name)
        self.question = question

    def __repr__(self) -> str:
        return f"Verdict('{self.name}', {self.question})"

    def execute(self, executor: StreamExecutor) -> None:
        """Called in the executor's thread, by the hook in ``compat``."""
        scores = score(executor, self.question)
        executor.variables[self.name] = scores.best
        executor.meta_info[self.name] = dataclasses.asdict(scores)
        executor.variable_event[self.name].set()
        if executor.stream_var_event:
            executor.stream_var_event[self.name].set()


def gen_verdict(
    name: str,
    question: str | None = None,
    labels: Sequence[str] | None = None,
    *,
    system: str | None = None,
    share: str | None = None,
    exit: str | None = None,
    think: Think | None = None,
) -> SglVerdict:
    """``s += rksc.gen_verdict("ok")``: ask about the state so far, without adding to it.

    ``s["ok"]`` becomes the more probable label; ``s.get_meta_info("ok")`` has the labels'
    ``probabilities`` (among the labels) and ``logprobs``, and the tokens spent.

    Args:
        name: variable for the verdict.
        question: what to ask, a user turn of its own in a chat program; None asks whether the
            answer is correct.
        labels: the possible answers, each a single token of the model in that place; None
            stands for YES and NO, or Yes and No, or yes and no, whichever are.
        system, share, exit, think: as in ``rksc.verify``.

    Raises:
        VerifyError: a wrong argument, named. Labels that do not fit the model's tokenizer show
            when the node runs.
    """
    return SglVerdict(name, make_question(question, labels, system, share, exit, think))
