"""The reasoner's weights, as they are shipped."""

import itertools
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rksc_sglang.demo.questions import OWN_PROBLEMS
from rksc_sglang.models import EmbeddedModelError, ensure_model
from rksc_sglang.models.manifest import MANIFEST
from rksc_sglang.models.problems import check, problems, split_of
from rksc_sglang.models.reasoner import WEIGHTS, ensure_reasoner


@pytest.fixture(scope="module")
def reasoner():
    folder = ensure_model("reasoner")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def test_it_is_as_small_as_promised(reasoner):
    model, _ = reasoner
    assert model.config.model_type == "llama"
    assert 8 <= model.config.num_hidden_layers <= 14
    assert 3e6 <= model.num_parameters() <= 10e6
    assert model.config.max_position_embeddings >= 2048
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 40e6


def test_every_file_is_in_the_manifest():
    listed = json.loads((WEIGHTS / MANIFEST).read_text())["files"]
    assert {*listed, MANIFEST} == {path.name for path in WEIGHTS.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_tampered_file_is_refused(tmp_path, name):
    folder = shutil.copytree(WEIGHTS, tmp_path / "reasoner")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(EmbeddedModelError, match=f"{name} has the wrong SHA-256"):
        ensure_reasoner(folder)


def test_a_missing_file_is_refused(tmp_path):
    folder = shutil.copytree(WEIGHTS, tmp_path / "reasoner")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EmbeddedModelError, match=r"tokenizer\.json is missing"):
        ensure_reasoner(folder)


def test_it_solves_problems_that_it_was_not_trained_on(reasoner):
    """A quarter of easy ones, far from chance; benchmarks.reasoner measures what it can do."""
    model, tokenizer = reasoner
    asked = list(itertools.islice(problems("test", 0, difficulties=(1,)), 30))
    right = 0
    for problem in asked:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**prompt, max_new_tokens=100, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += check(problem, text)
    assert right >= len(asked) // 4


def test_the_demos_problems_are_of_the_test_split():
    lines = [json.loads(line) for line in OWN_PROBLEMS.read_text().splitlines()]
    assert len(lines) >= 12
    assert {split_of(line["question"]) for line in lines} == {"test"}
