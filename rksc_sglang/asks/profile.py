"""Calibrated thresholds of a model: read, checked, and the evidence kept beside them.

A profile is JSON that ``python -m rksc_sglang.asks.calibrate`` writes. It belongs to one model and
to the settings that it was measured with; the server refuses one of another model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rksc_sglang.config import RkscConfig

PAPER_TAU = 0.80
#: Without a profile: where SmolLM2's splices begin to be good, and the paper's value is below.
DEFAULT_TAU = 0.95
#: Without a profile, nats: what 19 of 20 splices of SmolLM2 move a lead by, or less.
DEFAULT_MARGIN = 0.25

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class ProfileError(ValueError):
    """A profile cannot be used; the message says why."""


@dataclass(frozen=True)
class SpliceProfile:
    """What a calibration found.

    Attributes:
        model: :func:`fingerprint` of the model.
        tau: least similarity at which a splice is good enough.
        margin: nats; splices seldom move the lead of a first token by more.
        limit_kl: nats that its first tokens' mean KL divergence was to stay below.
        settings: head, tail and min_tokens that were in use.
        evidence: counts, bound, and the measured pairs (similarity, KL, same first token).
    """

    model: str
    tau: float
    margin: float
    limit_kl: float
    settings: dict[str, int]
    evidence: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> SpliceProfile | None:
        """None where the profile is of other calibrations only.

        Raises:
            ProfileError: the file is no profile.
        """
        try:
            raw = json.loads(path.read_text())
            if "splice" not in raw and any(part in raw for part in ("exit", "skip")):
                return None
            return cls(**raw["splice"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProfileError(f"{path} is no splice profile: {error!r}") from error

    def save(self, path: Path) -> None:
        """Write it; what the file has of other calibrations stays."""
        raw = json.loads(path.read_text()) if path.exists() else {}
        raw["splice"] = asdict(self)
        path.write_text(json.dumps(raw, indent=1) + "\n")


def fingerprint(model_path: Path) -> str:
    """Identity of a checkpoint directory: its configuration, and samples of all its weights.

    Raises:
        ProfileError: it is no such directory.
    """
    try:
        digest = hashlib.sha256((model_path / "config.json").read_bytes())
    except OSError as error:
        raise ProfileError(f"{model_path} is no directory with a checkpoint") from error
    for weights in sorted(model_path.glob("*.safetensors")):
        size = weights.stat().st_size
        digest.update(f"{weights.name} {size}".encode())
        with weights.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def shipped_files() -> list[Path]:
    """The profiles of the embedded models."""
    return sorted(Path(str(files("rksc_sglang.asks") / "profiles")).glob("*.json"))


def shipped_profiles() -> list[SpliceProfile]:
    found = map(SpliceProfile.load, shipped_files())
    return [profile for profile in found if profile is not None]


@dataclass(frozen=True)
class Thresholds:
    """What decides about a splice where a request does not say.

    Attributes:
        tau: least similarity.
        margin: nats by which a spliced greedy first token must lead.
        tau_source, margin_source: where they are from.
    """

    tau: float
    margin: float
    tau_source: str
    margin_source: str


def thresholds(config: RkscConfig, model_path: Path) -> Thresholds:
    """Those of the flags; else the paper's in its mode, the model's profile, or the defaults.

    Raises:
        ProfileError: ``config.profile`` is no profile, or that of another model.
    """
    tau, margin, source = _calibrated(config, model_path)
    found = Thresholds(tau, margin, source, source)
    if config.tau is not None:
        found = replace(found, tau=config.tau, tau_source="--rksc-tau")
    if config.margin is not None:
        found = replace(found, margin=config.margin, margin_source="--rksc-margin")
    return found


def _calibrated(config: RkscConfig, model_path: Path) -> tuple[float, float, str]:
    if config.mode == "paper":
        return PAPER_TAU, 0.0, "the paper"
    if config.profile:
        given = SpliceProfile.load(Path(config.profile))
        if given is not None:
            if given.model != fingerprint(model_path):
                raise ProfileError(f"--rksc-profile {config.profile} is of another model")
            return given.tau, given.margin, f"the profile {config.profile}"
    if (model_path / "config.json").exists():
        model = fingerprint(model_path)
        for profile in shipped_profiles():
            if profile.model == model:
                return profile.tau, profile.margin, "the shipped profile of this model"
    return DEFAULT_TAU, DEFAULT_MARGIN, "not calibrated for this model"
