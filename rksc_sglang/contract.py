"""The request contract: ``custom_params["rksc"]`` on the way in, ``meta_info["rksc"]`` on the way
out. Shared by the frontend, which writes it, and the server, which checks it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEY = "rksc"
SHARES = ("exact", "similar")
EXITS = ("off", "layer", "paper", "observe")
#: ``fallback`` of a request whose spliced answer was discarded.
DOUBTED = "the spliced first token was nearly tied with another: computed again exactly"


class ContractError(ValueError):
    """The request's ``rksc`` object is malformed; the message names the key."""


def _fail(key: str, expected: str, got: Any) -> ContractError:
    return ContractError(f"custom_params.{KEY}{key}: expected {expected}, got {got!r}")


def _check_keys(raw: Any, cls: type, key: str) -> None:
    if not isinstance(raw, Mapping):
        raise _fail(key, "an object", raw)
    known = [f.name for f in dataclasses.fields(cls)]
    for name in raw:
        if name not in known:
            raise ContractError(
                f"custom_params.{KEY}{key}.{name}: unknown key; known keys: {', '.join(known)}"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True, kw_only=True)
class VerifyContract:
    """The request is a verification that scores ``labels`` as its next token.

    ``unanimous``: all branches of its group have the same answer, so that no verdict changes which
    answer wins.
    """

    labels: tuple[str, ...]
    exit: str | None = None  # None: the server's default
    profile: str | None = None
    unanimous: bool | None = None

    @classmethod
    def parse(cls, raw: Any) -> VerifyContract:
        _check_keys(raw, cls, ".verify")
        labels = raw.get("labels")
        if (
            not isinstance(labels, list | tuple)
            or len(labels) < 2
            or not all(isinstance(label, str) and label for label in labels)
            or len(set(labels)) != len(labels)
        ):
            raise _fail(".verify.labels", "at least two different non-empty strings", labels)
        exit_ = raw.get("exit")
        if exit_ is not None and exit_ not in EXITS:
            raise _fail(".verify.exit", f"one of {', '.join(EXITS)}", exit_)
        profile = raw.get("profile")
        if profile is not None and not isinstance(profile, str):
            raise _fail(".verify.profile", "a string", profile)
        unanimous = raw.get("unanimous")
        if unanimous is not None and not isinstance(unanimous, bool):
            raise _fail(".verify.unanimous", "true or false", unanimous)
        return cls(labels=tuple(labels), exit=exit_, profile=profile, unanimous=unanimous)


@dataclass(frozen=True, kw_only=True)
class Together:
    """The request is one of ``count`` that are sent at the same time, all with the same ``id``.

    The server computes the prompts of all of them together; it waits for those that are still on
    their way, no longer than that can pay.
    """

    id: str
    count: int

    @classmethod
    def parse(cls, raw: Any) -> Together:
        _check_keys(raw, cls, ".together")
        id_, count = raw.get("id"), raw.get("count")
        if not isinstance(id_, str) or not id_:
            raise _fail(".together.id", "a non-empty string", id_)
        if not _is_count(count) or count < 1:
            raise _fail(".together.count", "an integer of at least 1", count)
        return cls(id=id_, count=count)


@dataclass(frozen=True, kw_only=True)
class RequestContract:
    """What a request tells RKSC about itself; every key is optional."""

    program: str | None = None
    group: str | None = None
    branch: int | None = None
    depth: int | None = None
    share: str | None = None  # None: the server's default
    tau: float | None = None
    signature: bool | None = None
    together: Together | None = None
    verify: VerifyContract | None = None

    @classmethod
    def parse(cls, raw: Any) -> RequestContract:
        """Check the value of ``custom_params["rksc"]``.

        Raises:
            ContractError: unknown key or wrong value, named in the message.
        """
        _check_keys(raw, cls, "")
        given = {name: value for name, value in raw.items() if value is not None}
        for name in ("program", "group"):
            if name in given and (not isinstance(given[name], str) or not given[name]):
                raise _fail(f".{name}", "a non-empty string", given[name])
        for name in ("branch", "depth"):
            if name in given and not _is_count(given[name]):
                raise _fail(f".{name}", "an integer of at least 0", given[name])
        if "branch" in given and "group" not in given:
            raise ContractError(f"custom_params.{KEY}.branch: needs {KEY}.group beside it")
        if "share" in given and given["share"] not in SHARES:
            raise _fail(".share", f"one of {', '.join(SHARES)}", given["share"])
        tau = given.get("tau")
        if tau is not None and (
            not isinstance(tau, int | float) or isinstance(tau, bool) or not 0 <= tau <= 1
        ):
            raise _fail(".tau", "a number from 0 to 1", tau)
        if "signature" in given and not isinstance(given["signature"], bool):
            raise _fail(".signature", "true or false", given["signature"])
        if "together" in given:
            given["together"] = Together.parse(given["together"])
        if "verify" in given:
            given["verify"] = VerifyContract.parse(given["verify"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the keys that are not set."""
        raw = dataclasses.asdict(self)
        if self.verify is not None:
            raw["verify"] = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in raw["verify"].items()
                if value is not None
            }
        return {name: value for name, value in raw.items() if value is not None}


def contract_of(sampling_params: Any) -> RequestContract | None:
    """The contract inside a request's sampling parameters (a dict), None when there is none.

    Raises:
        ContractError: there is one and it is malformed.
    """
    if not isinstance(sampling_params, Mapping):
        return None
    custom_params = sampling_params.get("custom_params")
    if not isinstance(custom_params, Mapping) or KEY not in custom_params:
        return None
    return RequestContract.parse(custom_params[KEY])


@dataclass(kw_only=True)
class ResponseInfo:
    """``meta_info["rksc"]``: what this response was computed from.

    Token counts are of the prompt: ``exact_tokens`` came from the exact radix prefix,
    ``spliced_tokens`` from the same run of tokens behind another context,
    ``recomputed_tokens`` went through the model. Where a verification stopped at ``exit_layer``,
    ``label_scores`` estimate the last layer's logits up to a constant. With ``exit: "observe"``,
    ``states`` are the last token's normed hidden states where exits look. ``signature`` is that of
    the prompt's last token, where it was asked for (:mod:`rksc_sglang.asks.signature`).
    """

    share: str = "exact"
    exact_tokens: int = 0
    spliced_tokens: int = 0
    recomputed_tokens: int = 0
    similarity: float | None = None
    exit_layer: int | None = None
    num_layers: int | None = None
    label_scores: list[float] | None = None
    states: list[list[float]] | None = None
    signature: list[float] | None = None
    merged_into: int | None = None
    fallback: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with what only some requests ask for where there is any."""
        raw = dataclasses.asdict(self)
        rare = ("label_scores", "states", "signature")
        return {k: v for k, v in raw.items() if v is not None or k not in rare}
