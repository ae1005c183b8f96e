"""The reasoner, a small Llama that solves problems; its weights come along.

Trained by ``scripts/train_reasoner.py``; ``weights/reasoner/README.md`` is its model card.
"""

from __future__ import annotations

from pathlib import Path

from rksc_sglang.models import EmbeddedModelError
from rksc_sglang.models.manifest import damage

WEIGHTS = Path(__file__).parent / "weights" / "reasoner"


def ensure_reasoner(folder: Path = WEIGHTS) -> Path:
    """The directory of the model: a ``LlamaForCausalLM`` in float32 with its tokenizer.

    Raises:
        EmbeddedModelError: a file is missing, or is not the one that was shipped.
    """
    found = damage(folder, "full")
    if found is not None:
        raise EmbeddedModelError(
            f"the reasoner in {folder} is damaged: {found}; reinstall rksc-sglang"
        )
    return folder
