"""The calibrated exit of a model, a part of its profile: read and checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rksc_sglang.cgee.exit_rule import CalibratedRule

#: The profile's part of a model's JSON profile.
PART = "exit"


class ExitProfileError(ValueError):
    """A profile has no usable exit in it; the message says why."""


@dataclass(frozen=True)
class ExitProfile:
    """When verifications of one model may stop.

    Attributes:
        model: fingerprint of the model (:func:`rksc_sglang.asks.profile.fingerprint`).
        labels: token ids of the labels that it was calibrated for, in order.
        rule: with the thresholds that hold the risk.
        risk, delta: the share of verdicts that stopping may change, and the chance that the
            calibration promises it wrongly.
        evidence: counts, bounds and curves.
    """

    model: str
    labels: tuple[int, ...]
    rule: CalibratedRule
    risk: float
    delta: float
    evidence: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> ExitProfile | None:
        """None where the file is a profile without an exit.

        Raises:
            ExitProfileError: it is no profile, or its exit is malformed.
        """
        try:
            raw = json.loads(path.read_text())
            if PART not in raw:
                return None
            part = raw[PART]
            rule = part["rule"]
            return cls(
                model=part["model"],
                labels=tuple(part["labels"]),
                rule=CalibratedRule(
                    layers=tuple(rule["layers"]),
                    scale=tuple(rule["scale"]),
                    offset=tuple(tuple(offset) for offset in rule["offset"]),
                    threshold=tuple(rule["threshold"]),
                    patience=rule["patience"],
                ),
                risk=part["risk"],
                delta=part["delta"],
                evidence=part["evidence"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExitProfileError(f"{path} is no profile: {error!r}") from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
