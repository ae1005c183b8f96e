"""RkscConfig: the one place where RKSC's settings are named, checked and passed on.

The same fields become ``--rksc-*`` flags of the server, keyword arguments in Python, and one JSON
environment variable, which is how the settings reach the processes that SGLang spawns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rksc_sglang.models import EMBEDDED_MODELS

MODES = ("off", "exact", "balanced", "paper")

#: Carries the configuration to SGLang's processes; absent means that RKSC was not asked for.
ENV_VAR = "RKSC_CONFIG"


class ConfigError(ValueError):
    """A setting has a wrong value; the message names the flag."""


def _setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    type_: type | None = None,
) -> Any:
    """A field; ``type_`` where the default None does not tell it."""
    limits = {"choices": choices, "least": least, "most": most}
    return field(
        default=default, metadata={"help": help, "type_": type_ or type(default), **limits}
    )


@dataclass(frozen=True, kw_only=True)
class RkscConfig:
    """Settings of one server.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    mode: str = _setting(
        "exact",
        "off: stock SGLang. exact: nothing approximate, outputs equal stock token for token. "
        "balanced: approximate sharing and early exit with calibrated thresholds. "
        "paper: the same with the paper's constants. What a mode asks for and this version does "
        "not have is refused by name at start, and served exactly",
        MODES,
    )
    model: str = _setting(
        "smollm2",
        "embedded model that is served when --model-path is not given",
        EMBEDDED_MODELS,
    )
    root_first: bool = _setting(
        True,
        "admit requests together that are sent together, and compute a prefix that several "
        "requests share once",
    )
    root_first_min_tokens: int = _setting(
        32,
        "shortest uncached shared prefix, in tokens, that is worth it",
        least=1,
    )
    tau: float | None = _setting(
        None,
        "least similarity of two contexts, 0 to 1, at which text behind the one is spliced behind "
        "the other, where a request does not say; without it the model's profile decides, and "
        "0.80 in mode paper",
        least=0,
        most=1,
        type_=float,
    )
    margin: float | None = _setting(
        None,
        "nats by which the first token of a spliced greedy request must lead the next one; a "
        "request whose token leads by less is computed again exactly; 0: none is; without "
        "it the model's profile decides, and mode paper has none",
        least=0,
        type_=float,
    )
    profile: str | None = _setting(
        None,
        "calibrated profile of the served model, written by python -m rksc_sglang.asks.calibrate "
        "(splicing) and python -m rksc_sglang.calibrate (early exit); without it the one "
        "shipped for the model, if there is one",
        type_=str,
    )
    splice_head: int = _setting(
        8, "tokens recomputed at the head of each run of text that is spliced", least=1
    )
    splice_tail: int = _setting(
        16, "tokens at the end of a prompt that are always recomputed", least=1
    )
    splice_min_tokens: int = _setting(
        32, "shortest run, in tokens behind its head, that is spliced", least=1
    )
    trace: str | None = _setting(
        None,
        "file to write a trace of requests to, for python -m benchmarks.eviction --trace: token "
        "ids, branches, attention mass",
        type_=str,
    )
    guard_share: float = _setting(
        0.02,
        "share of the spliced requests that are computed again exactly, when the server is idle, "
        "to see what splicing does to them",
        least=0,
        most=1,
    )
    guard_max_disagreement: float = _setting(
        0.05,
        "share of first tokens changed by splicing beyond which it is ended for a tenant",
        least=0.001,
        most=1,
    )
    guard_max_kl: float = _setting(
        0.05,
        "mean KL divergence of first tokens, in nats, beyond which splicing is ended for a tenant",
        least=0.001,
        most=1,
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None or f.default is not None:
                _check(f.name, value, f.metadata)

    @property
    def enabled(self) -> bool:
        return self.mode != "off"

    @property
    def approximate(self) -> bool:
        """Whether requests may share approximate KV, and do so where they do not say."""
        return self.mode in ("balanced", "paper")

    def to_env(self) -> None:
        """Publish to this process's environment, which SGLang's processes inherit."""
        if self.enabled:
            os.environ[ENV_VAR] = json.dumps(dataclasses.asdict(self))
        else:
            os.environ.pop(ENV_VAR, None)

    @classmethod
    def from_env(cls) -> RkscConfig | None:
        """The configuration that the launcher published, or None when RKSC was not asked for."""
        text = os.environ.get(ENV_VAR)
        return cls(**json.loads(text)) if text else None


def _check(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    # bool is an int to Python, but not to a user.
    if type(value) is not limits["type_"]:
        raise ConfigError(f"{flag(name)}: expected {limits['type_'].__name__}, got {value!r}")
    choices, least, most = limits["choices"], limits["least"], limits["most"]
    if choices is not None and value not in choices:
        raise ConfigError(f"{flag(name)}: expected one of {', '.join(choices)}; got {value!r}")
    if least is not None and value < least:
        raise ConfigError(f"{flag(name)}: must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ConfigError(f"{flag(name)}: must be at most {most}, got {value}")


def flag(name: str) -> str:
    return "--rksc-" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one ``--rksc-*`` flag for each field; absent flags leave no attribute behind."""
    group = parser.add_argument_group("RKSC, reasoning-aware KV cache sharing")
    for f in dataclasses.fields(RkscConfig):
        common: dict[str, Any] = {
            "dest": f"rksc_{f.name}",
            "default": argparse.SUPPRESS,
            "help": f"{f.metadata['help']} (default: {f.default})",
        }
        if isinstance(f.default, bool):
            group.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, **common)
        else:
            # Values stay strings here, so that __post_init__ is the one place that judges them.
            group.add_argument(flag(f.name), metavar=f.name.upper(), **common)


def from_flags(namespace: argparse.Namespace) -> RkscConfig:
    """Build the configuration out of what :func:`add_flags` parsed.

    Raises:
        ConfigError: a value is wrong; the message names its flag.
    """
    values: dict[str, Any] = {}
    for f in dataclasses.fields(RkscConfig):
        value = getattr(namespace, f"rksc_{f.name}", f.default)
        if isinstance(value, str) and f.metadata["type_"] in (int, float):
            # What is no number stays a string, which __post_init__ refuses.
            with contextlib.suppress(ValueError):
                value = f.metadata["type_"](value)
        values[f.name] = value
    return RkscConfig(**values)
