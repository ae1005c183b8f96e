"""Which of RKSC's features are on for this server and this model, and why the others are not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rksc_sglang.config import RkscConfig
from rksc_sglang.contract import RequestContract


@dataclass(frozen=True)
class Feature:
    """One line of the start-up banner: on, or off for ``reason``."""

    name: str
    on: bool
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: on" if self.on else f"{self.name}: off ({self.reason})"


class Unsupported(Exception):
    """A feature cannot be on on this server; the message is the reason."""


def refuse_beside(scheduler: Any, allowed: Collection[str]) -> None:
    """Raise Unsupported for what SGLang is asked to do beside, except what is ``allowed``."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    for on, what in (
        (parallel.tp_size > 1, "tensor parallelism"),
        (parallel.pp_size > 1, "pipeline parallelism"),
        (parallel.dp_size > 1, "data parallelism"),
        (not scheduler.spec_algorithm.is_none(), "speculative decoding"),
        (scheduler.enable_hierarchical_cache, "the hierarchical cache"),
        (scheduler.enable_session_radix_cache, "session-aware caching"),
        (scheduler.enable_lora, "LoRA"),
        (scheduler.model_config.is_multimodal, "a multimodal model"),
        (scheduler.model_config.is_encoder_decoder, "an encoder-decoder"),
        (scheduler.dllm_config is not None, "a diffusion language model"),
    ):
        if on and what not in allowed:
            raise Unsupported(f"not with {what}")


def decide(
    config: RkscConfig,
    *,
    has_radix_cache: bool,
    has_mamba: bool,
    splice_reason: str | None,
    exit_reason: str | None,
    eviction_reason: str | None,
    mass_reason: str | None,
) -> tuple[Feature, ...]:
    """Decide at start, from the configuration and what the model's cache can do.

    Args:
        has_radix_cache: the server's tree cache is RKSC's.
        has_mamba: the model keeps recurrent state beside its KV.
        splice_reason: why nothing can be spliced, None where it can.
        exit_reason: why no verification can stop at a middle layer, None where it can.
        eviction_reason: why no eviction policy of RKSC's is on, None where one is.
        mass_reason: why no attention mass is measured, None where it is.
    """
    if not config.root_first:
        root_first = Feature("root_first", False, "--no-rksc-root-first")
    elif not has_radix_cache:
        root_first = Feature("root_first", False, "this server shares no prefixes")
    elif has_mamba:
        root_first = Feature("root_first", False, "recurrent state is matched at admission")
    else:
        root_first = Feature("root_first", True)
    others = {
        "splice": splice_reason,
        "layer_exit": exit_reason,
        "eviction": eviction_reason,
        "attention_mass": mass_reason,
    }
    return (root_first, *(Feature(name, why is None, why) for name, why in others.items()))


def fallback_reason(contract: RequestContract, features: tuple[Feature, ...]) -> str | None:
    """Why this request is served exactly although it asked for an approximation, or None."""
    by_name = {feature.name: feature for feature in features}
    wanted = []
    if contract.share == "similar" or contract.signature:  # who splices keeps signatures
        wanted.append(by_name["splice"])
    if contract.verify is not None and contract.verify.exit not in (None, "off"):
        wanted.append(by_name["layer_exit"])
    return "; ".join(str(feature) for feature in wanted if not feature.on) or None
