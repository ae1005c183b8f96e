"""The training script, end to end at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FLAGS = ["--layers", "2", "--width", "64", "--vocab-size", "512", "--batch-tokens", "1024"]


def train(folder, *flags):
    command = [sys.executable, str(ROOT / "scripts/train_reasoner.py"), "--out", str(folder)]
    result = subprocess.run(
        [*command, *FLAGS, "--device", "cpu", *flags], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr


def steps(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=False)["step"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was interrupted after its first step, and went on."""
    folder = tmp_path_factory.mktemp("reasoner")
    flags = ["--tokens", "44000", "--attempts-every", "22000", "--attempts", "4"]
    train(folder, *flags, "--minutes", "0.0001")
    assert steps(folder) == 1
    train(folder, *flags, "--workers", "1")
    return folder


def curve(folder):
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


def test_it_learns(trained):
    losses = [point["loss"] for point in curve(trained) if "loss" in point]
    assert losses[-1] < losses[0] - 0.5


def test_it_samples_its_own_attempts(trained):
    (sampled, *_) = [point for point in curve(trained) if "right" in point]
    assert set(sampled["greedy"]) == {"chain", "legs", "order", "facts"}
    attempts = torch.load(trained / "checkpoint.pt", weights_only=False)["attempts"]
    assert len(attempts) >= 4
    assert all(len(texts) == 4 for _, texts in attempts.values())


def test_the_model_is_one_for_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert model.config.max_position_embeddings >= 2048
    messages = [{"role": "user", "content": "State the answer: 12 + 3 ="}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.decode(ids) == prompt
    digits = [token.removeprefix("\u0120") for token in tokenizer.tokenize("12 + 345")]
    assert [token for token in digits if token.isdigit()] == list("12345")
    for label in ("YES", "NO"):
        assert len(tokenizer.encode(label, add_special_tokens=False)) == 1


def test_it_goes_on_from_a_model(trained, tmp_path):
    train(tmp_path, "--init", str(trained / "model"), "--tokens", str(20 * 1024))
    begun = next(point["loss"] for point in curve(trained) if "loss" in point)
    gone_on = next(point["loss"] for point in curve(tmp_path) if "loss" in point)
    assert gone_on < begun - 0.5


def test_it_ends_where_it_was_told_to(trained):
    assert steps(trained) == 44000 // 1024
