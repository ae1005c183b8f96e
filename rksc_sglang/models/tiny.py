"""Random models of a few layers: the real code paths of a server at toy cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_random_model(path: Path, architecture: str = "Llama", **config: Any) -> None:
    """Write the random weights of a small model.

    Args:
        path: directory to make.
        architecture: as transformers spells it.
        config: what its configuration has besides the sizes that are the same for all.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{architecture}Config")(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **config,
    )
    getattr(transformers, f"{architecture}ForCausalLM")(made).save_pretrained(path)


def make_tiny_llama(path: Path, tokenizer: Path) -> Path:
    """Write a checkpoint with SmolLM2's vocabulary and random weights.

    The weights are drawn wide, so that the top two logits are seldom close to each other.

    Args:
        path: directory to make.
        tokenizer: directory of the model whose tokenizer it gets.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    save_random_model(
        path,
        vocab_size=len(loaded),
        num_hidden_layers=2,
        max_position_embeddings=4096,
        initializer_range=0.4,
        bos_token_id=loaded.bos_token_id,
        eos_token_id=loaded.eos_token_id,
        tie_word_embeddings=True,
    )
    loaded.save_pretrained(path)
    return path
