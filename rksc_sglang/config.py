"""RkscConfig: the one place where RKSC's settings are named, checked and passed on.

The same fields become ``--rksc-*`` flags of the server, keyword arguments in Python, and one JSON
environment variable, which is how the settings reach the processes that SGLang spawns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MODES = ("off", "exact", "balanced", "paper")
EMBEDDED_MODELS = ("smollm2",)

#: Carries the configuration to SGLang's processes; absent means that RKSC was not asked for.
ENV_VAR = "RKSC_CONFIG"


class ConfigError(ValueError):
    """A setting has a wrong value; the message names the flag."""


def _setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


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
        "hold back requests that share an uncached prefix with one that is being computed, "
        "so that the prefix is computed once",
    )
    root_first_min_tokens: int = _setting(
        32, "shortest uncached shared prefix, in tokens, that is worth holding a request back for"
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, default = getattr(self, f.name), f.default
            # bool is an int to Python, but not to a user.
            if type(value) is not type(default):
                raise ConfigError(
                    f"{flag(f.name)}: expected {type(default).__name__}, got {value!r}"
                )
            choices = f.metadata["choices"]
            if choices is not None and value not in choices:
                raise ConfigError(
                    f"{flag(f.name)}: expected one of {', '.join(choices)}; got {value!r}"
                )
        if self.root_first_min_tokens < 1:
            raise ConfigError(
                f"{flag('root_first_min_tokens')}: must be at least 1, "
                f"got {self.root_first_min_tokens}"
            )

    @property
    def enabled(self) -> bool:
        return self.mode != "off"

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
        if isinstance(value, str) and isinstance(f.default, int):
            # What is no number stays a string, which __post_init__ refuses.
            value = int(value) if value.lstrip("-").isdigit() else value
        values[f.name] = value
    return RkscConfig(**values)
