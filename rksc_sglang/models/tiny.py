"""A random Llama of two layers: the real code paths of a server at toy cost."""

from __future__ import annotations

from pathlib import Path


def make_tiny_llama(path: Path, tokenizer: Path) -> Path:
    """Write a checkpoint with SmolLM2's vocabulary and random weights.

    The weights are drawn wide, so that the top two logits are seldom close to each other.

    Args:
        path: directory to make.
        tokenizer: directory of the model whose tokenizer it gets.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(loaded),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.4,
        bos_token_id=loaded.bos_token_id,
        eos_token_id=loaded.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    loaded.save_pretrained(path)
    return path
