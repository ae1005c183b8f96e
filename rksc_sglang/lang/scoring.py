"""Scoring labels as the continuation of a branch: one short prefill behind its cached KV."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang.lang.interpreter import StreamExecutor

from rksc_sglang.contract import (
    EXITS,
    KEY,
    SHARES,
    RequestContract,
    Together,
    VerifyContract,
)
from rksc_sglang.lang.executor import contract_of_executor
from rksc_sglang.lang.server import Server, server_of
from rksc_sglang.lang.thinking import Piece, Think, think


class VerifyError(ValueError):
    """A verification cannot be asked as given: its labels, its question, or its backend."""


@dataclass(frozen=True)
class LabelScores:
    """Outcome of scoring one branch.

    ``probabilities`` are over the labels alone (they sum to 1), in the order of the labels;
    ``logprobs`` are the model's natural-log probabilities over its whole vocabulary, those of the
    layer at which the verification stopped where it did. A verifier that thinks has a ``thought``,
    of ``generated_tokens``; its prompt tokens are those of all its requests.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    rksc: dict[str, Any] | None
    thought: str | None = None
    generated_tokens: int = 0

    @property
    def exit_layer(self) -> int | None:
        return (self.rksc or {}).get("exit_layer")

    @property
    def num_layers(self) -> int:
        """Of the model; 0 where the server does not say."""
        return (self.rksc or {}).get("num_layers") or 0

    @property
    def best(self) -> str:
        return max(zip(self.probabilities, self.labels), key=lambda pair: pair[0])[1]


#: What labels=None stands for: the first spelling whose labels are single tokens of the model.
YES_NO = (("YES", "NO"), ("Yes", "No"), ("yes", "no"))


@dataclass(frozen=True)
class Question:
    """What to ask about a branch; ``text`` and ``labels`` None stand for a plain yes or no.

    ``system`` puts the branch's text behind a system prompt of the verifier's own; ``share`` says
    whether the KV of that text may be taken over all the same; ``exit`` when the pass may stop at a
    middle layer; ``think`` has the verifier think first; ``unanimous``: all branches of the group
    have the same answer; ``together``: which other branches are asked at the same time.
    """

    text: str | None = None
    labels: tuple[str, ...] | None = None
    system: str | None = None
    share: str | None = None
    exit: str | None = None
    think: Think | None = None
    unanimous: bool = False
    together: Together | None = None

    def spellings(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The question's text and labels, in each form that may be tried."""
        for labels in YES_NO if self.labels is None else (self.labels,):
            answers = " or ".join(labels)
            yield self.text or f"Is the answer above correct? Reply with {answers}.", labels


def make_question(
    text: str | None,
    labels: Sequence[str] | None,
    system: str | None = None,
    share: str | None = None,
    exit: str | None = None,
    think: Think | None = None,
) -> Question:
    """Check what a program asks, before any server sees it.

    Raises:
        VerifyError: naming the argument that is wrong.
    """
    for name, value in (("question", text), ("system", system)):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise VerifyError(f"{name}: expected some text, got {value!r}")
    if share is not None and share not in SHARES:
        raise VerifyError(f"share: expected one of {', '.join(SHARES)}, got {share!r}")
    if exit is not None and exit not in EXITS:
        raise VerifyError(f"exit: expected one of {', '.join(EXITS)}, got {exit!r}")
    if think is not None and not isinstance(think, Think):
        raise VerifyError(f"think: expected rksc.Think(...), got {think!r}")
    if think is not None and text is not None:
        raise VerifyError("question: a verifier that thinks is asked think.question")
    if labels is None:
        return Question(text, None, system, share, exit, think)
    if isinstance(labels, str) or not all(isinstance(label, str) and label for label in labels):
        raise VerifyError(f"labels: expected a list of non-empty strings, got {labels!r}")
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise VerifyError(f"labels: expected at least two different ones, got {list(labels)}")
    return Question(text, tuple(labels), system, share, exit, think)


def question_text(executor: StreamExecutor, question: str) -> str:
    """What follows the branch's own text so that its next token is the verdict.

    In a chat program a user turn with the question, and the opening of the assistant's; in a plain
    text program the question on a line of its own.
    """
    template, messages = executor.chat_template, executor.messages_
    if executor.cur_role is None and not messages:
        return f"\n{question}\nAnswer:"
    text = ""
    if executor.cur_role is not None:
        text = template.get_prefix_and_suffix(executor.cur_role, messages)[1]
        messages = [*messages, {"role": executor.cur_role, "content": ""}]
    prefix, suffix = template.get_prefix_and_suffix("user", messages)
    messages = [*messages, {"role": "user", "content": question}]
    opening, _ = template.get_prefix_and_suffix("assistant", messages)
    return f"{text}{prefix}{question}{suffix}{opening}"


def candidate_text(executor: StreamExecutor, system: str | None) -> str:
    """The branch's own text, behind the verifier's system prompt where it has one.

    In a chat program that prompt takes the place of the branch's; in a plain text program it is a
    paragraph in front of the text.
    """
    if system is None:
        return executor.text_
    template, messages = executor.chat_template, executor.messages_
    if executor.cur_role is None and not messages:
        return f"{system}\n\n{executor.text_}"
    prefix, suffix = template.get_prefix_and_suffix("system", [])
    own = ""
    if messages and messages[0]["role"] == "system":
        own = f"{prefix}{messages[0]['content']}{suffix}"
    if not executor.text_.startswith(own):
        raise VerifyError("system: the branch's own system prompt is not at its beginning")
    return f"{prefix}{system}{suffix}{executor.text_[len(own) :]}"


_label_caches: weakref.WeakKeyDictionary[Server, Any] = weakref.WeakKeyDictionary()


def label_tokens(server: Server, context: str, labels: tuple[str, ...]) -> tuple[int, ...]:
    """The token that each label is when it follows ``context``, looked up once a server.

    A label is written behind a space unless the context ends in whitespace.

    Raises:
        VerifyError: a label is not one token there, or two labels are the same one.
    """
    lookup = _label_caches.get(server)
    if lookup is None:
        reference = weakref.ref(server)
        lookup = functools.lru_cache(maxsize=256)(
            lambda context, labels: _look_up(reference(), context, labels)
        )
        _label_caches[server] = lookup
    return lookup(context, labels)


def _look_up(server: Any, context: str, labels: tuple[str, ...]) -> tuple[int, ...]:
    space = "" if context[-1].isspace() else " "
    base, *continued = server.tokenize([context, *(context + space + label for label in labels)])
    found: dict[int, str] = {}
    for label, tokens in zip(labels, continued):
        own = tokens[len(base) :]
        if tokens[: len(base)] != base:
            raise VerifyError(
                f"label {label!r}: it merges with the end of the question {context[-20:]!r}"
            )
        if len(own) != 1:
            raise VerifyError(
                f"label {label!r}: it is {len(own)} tokens of this model behind "
                f"{context[-20:]!r}, and must be one"
            )
        if own[0] in found:
            raise VerifyError(f"labels {found[own[0]]!r} and {label!r} are the same token")
        found[own[0]] = label
    return tuple(found)


def _fit(executor: StreamExecutor, server: Server, question: Question) -> Any:
    """The prompt's end, the labels and their tokens, in the first spelling that fits the model."""
    misfit = ""
    for text, labels in question.spellings():
        if question.think is None:
            context = suffix = question_text(executor, text)
        else:
            suffix = question_text(executor, question.think.question)
            context = f"\n{question.think.marker}"
        try:
            return suffix, labels, label_tokens(server, context, labels)
        except VerifyError as error:
            misfit = misfit or str(error)  # the error itself would keep all callers' frames
    raise VerifyError(misfit)


def score(executor: StreamExecutor, question: Question) -> LabelScores:
    """Ask ``question`` behind the executor's text and read the labels' probabilities.

    The executor's own text stays as it is. One forward pass over the new tokens, unless the
    verifier thinks.

    Raises:
        VerifyError: the labels do not fit, or the backend is no SGLang server.
        ServerError: the server refused.
    """
    server = server_of(executor.backend)
    if server is None:
        raise VerifyError(
            f"verification needs an SGLang server, not {type(executor.backend).__name__}"
        )
    suffix, labels, tokens = _fit(executor, server, question)
    prompt = candidate_text(executor, question.system) + suffix
    asked = contract_of_executor(executor) or RequestContract()
    asked = replace(asked, share=question.share or asked.share, together=question.together)
    verify = VerifyContract(labels=labels, exit=question.exit, unanimous=question.unanimous or None)
    verification = replace(asked, verify=verify)

    def read(thought: str) -> LabelScores:
        return _read_labels(server, prompt + thought, labels, tokens, verification)

    how = question.think
    if how is None:
        return read("")
    pieces: list[Any] = []  # meta_info of each

    def generate(thought: str, count: int) -> Piece:
        # Up to the marker, or the end of the verifier's turn.
        stop = [how.marker, *executor.chat_template.stop_str]
        piece = server.generate(prompt + thought, asked, count, stop)
        pieces.append(piece["meta_info"])
        ended = piece["meta_info"]["finish_reason"]["type"] != "length"
        return Piece(piece["text"], piece["meta_info"]["completion_tokens"], ended)

    thought, generated, verdicts = think(how, generate, read)
    return replace(
        verdicts[-1],
        prompt_tokens=sum(v.prompt_tokens for v in verdicts)
        + sum(meta["prompt_tokens"] for meta in pieces),
        cached_tokens=sum(v.cached_tokens for v in verdicts)
        + sum(meta["cached_tokens"] for meta in pieces),
        thought=thought,
        generated_tokens=generated,
    )


def _read_labels(
    server: Server,
    text: str,
    labels: tuple[str, ...],
    tokens: tuple[int, ...],
    contract: RequestContract,
) -> LabelScores:
    """The labels' probabilities as the next token of a text."""
    answer = server.generate(text, contract, return_logprob=True, token_ids_logprob=list(tokens))
    meta = answer["meta_info"]
    by_token = {token: value for value, token, _ in meta["output_token_ids_logprobs"][0]}
    logprobs = tuple(by_token[token] for token in tokens)
    info = meta.get(KEY)
    # Where it stopped early, the server estimates what the last layer would have said.
    scores = (info or {}).get("label_scores") or logprobs
    weights = [math.exp(value - max(scores)) for value in scores]
    return LabelScores(
        labels=labels,
        probabilities=tuple(weight / sum(weights) for weight in weights),
        logprobs=logprobs,
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        rksc=info,
    )
