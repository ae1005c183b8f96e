"""The least similarity of contexts at which text is shared: given, calibrated, or the paper's."""

from __future__ import annotations

from rksc_sglang.config import RkscConfig

PAPER = 0.80
UNCALIBRATED = 0.90


def threshold(config: RkscConfig) -> float:
    """Tau for requests that do not give their own."""
    if config.tau is not None:
        return config.tau
    return PAPER if config.mode == "paper" else UNCALIBRATED
