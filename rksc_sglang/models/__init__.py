"""Models that come with the package, fetched or trained once."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODELS = ("smollm2", "reasoner")


class EmbeddedModelError(RuntimeError):
    """An embedded model could not be made ready; the message is meant for the user as it is."""


def ensure_model(name: str) -> Path:
    """The directory of an embedded model, a checkpoint that SGLang loads; made first if need be.

    Raises:
        EmbeddedModelError: it cannot be made, or is damaged.
    """
    if name == "reasoner":
        from rksc_sglang.models.reasoner import ensure_reasoner

        return ensure_reasoner()
    assert name == "smollm2", name
    from rksc_sglang.models.smollm2 import ensure_smollm2

    return ensure_smollm2()
