"""Calibrated exit, skip and merging of a model, parts of its profile: read, checked, written."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from rksc_sglang.asks.profile import fingerprint, shipped_files
from rksc_sglang.cgee.exit_rule import CalibratedRule, Probe
from rksc_sglang.cgee.skip_gate import CalibratedGate


class ExitProfileError(ValueError):
    """A profile cannot be used for early exit or merging; the message says why."""


@dataclass(frozen=True)
class ExitProfile:
    """When verifications of one model may stop at a middle layer.

    Attributes:
        model: fingerprint of the model (:func:`rksc_sglang.asks.profile.fingerprint`).
        labels: token ids of the labels that it was calibrated for, in order.
        rule: for all groups.
        unanimous: least lead, of whichever label, where all branches have the same answer.
        risk, delta: the share of problems that may lose their right answer to it, and the chance
            that this promise is wrong.
        evidence: counts and curve.
    """

    PART: ClassVar[str] = "exit"

    model: str
    labels: tuple[int, ...]
    rule: CalibratedRule
    unanimous: float
    risk: float
    delta: float
    evidence: dict[str, Any]

    @cached_property
    def unanimous_rule(self) -> CalibratedRule:
        return self.rule.at(self.unanimous)

    @classmethod
    def of(cls, raw: dict[str, Any]) -> ExitProfile:
        return cls(
            model=raw["model"],
            labels=tuple(raw["labels"]),
            rule=_rule_of(raw["rule"]),
            unanimous=raw["unanimous"],
            risk=raw["risk"],
            delta=raw["delta"],
            evidence=raw["evidence"],
        )


def probe_of(raw: dict[str, Any]) -> Probe:
    return Probe(
        layers=tuple(raw["layers"]),
        weights=tuple(tuple(map(tuple, check)) for check in raw["weights"]),
        bias=tuple(map(tuple, raw["bias"])),
    )


def _rule_of(raw: dict[str, Any]) -> CalibratedRule:
    return CalibratedRule(
        probe=probe_of(raw["probe"]),
        scale=tuple(raw["scale"]),
        offset=tuple(map(tuple, raw["offset"])),
        accept=raw["accept"],
        reject=raw["reject"],
        patience=raw["patience"],
    )


@dataclass(frozen=True)
class SkipProfile:
    """When groups of one model need no verification; fields as of :class:`ExitProfile`."""

    PART: ClassVar[str] = "skip"

    model: str
    gate: CalibratedGate
    risk: float
    delta: float
    evidence: dict[str, Any]

    @classmethod
    def of(cls, raw: dict[str, Any]) -> SkipProfile:
        gate = CalibratedGate(tuple(raw["gate"]["weights"]), raw["gate"]["threshold"])
        return cls(raw["model"], gate, raw["risk"], raw["delta"], raw["evidence"])


@dataclass(frozen=True)
class MergeProfile:
    """When branches of one model may be merged.

    Attributes:
        thresholds: by signal (:data:`rksc_sglang.asks.alike.SIGNALS`).
        risk: the share of groups whose majority answer may change; the rest as of
            :class:`ExitProfile`.
    """

    PART: ClassVar[str] = "merge"

    model: str
    thresholds: dict[str, float]
    risk: float
    delta: float
    evidence: dict[str, Any]

    @classmethod
    def of(cls, raw: dict[str, Any]) -> MergeProfile:
        thresholds = {name: float(value) for name, value in raw["thresholds"].items()}
        return cls(raw["model"], thresholds, raw["risk"], raw["delta"], raw["evidence"])


Part = ExitProfile | SkipProfile | MergeProfile


@dataclass(frozen=True)
class CalibratedParts:
    """What one profile file has; None where it was not calibrated."""

    exit: ExitProfile | None = None
    skip: SkipProfile | None = None
    merge: MergeProfile | None = None


def profile_of(path: str | None, model: str) -> CalibratedParts:
    """What a profile file has for a model's early exit and merging.

    Args:
        path: of the file; None where no profile was given: the one shipped for the model is taken.
        model: the model's fingerprint.

    Raises:
        ExitProfileError: the file is no profile, a part of it is malformed, or another model's.
    """
    if path is None:
        for shipped in shipped_files():
            parts = _parts_of(shipped)
            if any(part.model == model for part in parts.values()):
                return CalibratedParts(**parts)
        return CalibratedParts()
    parts = _parts_of(Path(path))
    if any(part.model != model for part in parts.values()):
        raise ExitProfileError(f"--rksc-profile {path} is of another model")
    return CalibratedParts(**parts)


def profile_for(path: str | None, model_path: Path) -> CalibratedParts:
    """:func:`profile_of` for a checkpoint; one from elsewhere than a directory has no fingerprint.

    Raises:
        ExitProfileError: as there.
        ProfileError: the directory holds no checkpoint.
    """
    return profile_of(path, fingerprint(model_path) if model_path.is_dir() else "")


def _parts_of(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
        return {
            kind.PART: kind.of(raw[kind.PART])
            for kind in (ExitProfile, SkipProfile, MergeProfile)
            if raw.get(kind.PART) is not None
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExitProfileError(f"{path} is no profile: {error!r}") from error


def update_profile(path: Path, part: Part) -> None:
    """Put a part into a profile file, in the place of an older one of its kind."""
    raw = json.loads(path.read_text()) if path.exists() else {}
    raw[part.PART] = asdict(part)
    path.write_text(json.dumps(raw, indent=1) + "\n")
