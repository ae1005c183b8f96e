"""asks/rope on SGLang's rotary embeddings and small models around them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

HEAD_DIM, HIDDEN, KV_HEADS, LENGTH = 64, 32, 2, 512
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.fixture
def sglang(sglang_runtime):
    """SGLang's modules and ours, imported once a configuration is published."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.rotary_embedding import get_rope

    from rksc_sglang.asks import rope

    return SimpleNamespace(
        get_rope=get_rope,
        RadixAttention=RadixAttention,
        find_rope=rope.find_rope,
        UnsupportedRope=rope.UnsupportedRope,
    )


@pytest.fixture
def make_rotary(sglang):
    def make(base=10000, neox=True, scaling=None, rotary_dim=HEAD_DIM, **options):
        return sglang.get_rope(HEAD_DIM, rotary_dim, LENGTH, base, neox, scaling, **options)

    return make


@pytest.fixture
def make_model(sglang):
    """A model of attention layers as SGLang writes them, one for each rotary embedding given."""

    class Attention(nn.Module):
        def __init__(self, layer_id, rotary):
            super().__init__()
            self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
            self.rotary_emb = rotary
            self.attn = sglang.RadixAttention(KV_HEADS, HEAD_DIM, 1.0, KV_HEADS, layer_id)

        def key(self, positions, hidden_states):
            key = self.k_proj(hidden_states)
            return self.rotary_emb.forward_native(positions, key, key)[1]

        def forward(self, positions, hidden_states, forward_batch):
            key = self.key(positions, hidden_states)
            return self.attn(key, key, key, forward_batch)

    class SkipsRope(Attention):
        def key(self, positions, hidden_states):
            return self.k_proj(hidden_states)

    class NormsAfterRope(Attention):
        def key(self, positions, hidden_states):
            key = super().key(positions, hidden_states)
            return key * torch.linspace(0.5, 2, key.shape[-1])

    class NeedsBatch(SkipsRope):
        def forward(self, positions, hidden_states, forward_batch):
            return super().forward(positions, hidden_states, forward_batch.next)

    class Learned(Attention):
        def __init__(self, layer_id, rotary):
            super().__init__(layer_id, rotary)
            del self.rotary_emb

    kinds = {cls.__name__: cls for cls in (SkipsRope, NormsAfterRope, NeedsBatch, Learned)}

    def make(*rotaries, kind=None, kind_of_layer=1):
        torch.manual_seed(0)
        model = nn.Module()
        model.config = SimpleNamespace(hidden_size=HIDDEN)
        model.layers = nn.ModuleList(
            (kinds[kind] if kind and i == kind_of_layer else Attention)(i, rotary)
            for i, rotary in enumerate(rotaries)
        )
        return model

    return make


def plain(base=10000, rotary_dim=HEAD_DIM):
    return base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def test_default(sglang, make_rotary, make_model):
    rope = sglang.find_rope(make_model(make_rotary(), make_rotary()))
    assert rope.neox
    assert rope.rotary_dim == HEAD_DIM
    assert rope.inverse_frequencies.dtype == torch.float64
    torch.testing.assert_close(rope.inverse_frequencies, plain(), rtol=1e-6, atol=0)


def test_interleaved(sglang, make_rotary, make_model):
    assert not sglang.find_rope(make_model(make_rotary(neox=False))).neox


def test_partial(sglang, make_rotary, make_model):
    rope = sglang.find_rope(make_model(make_rotary(partial_rotary_factor=0.25)))
    assert rope.rotary_dim == HEAD_DIM // 4
    torch.testing.assert_close(
        rope.inverse_frequencies, plain(rotary_dim=HEAD_DIM // 4), rtol=1e-6, atol=0
    )


def test_linear(sglang, make_rotary, make_model):
    rotary = make_rotary(scaling={"rope_type": "linear", "factor": 4.0})
    rope = sglang.find_rope(make_model(rotary))
    torch.testing.assert_close(rope.inverse_frequencies, plain() / 4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_slow_pairs_are_stretched(sglang, make_rotary, make_model, scaling):
    rope = sglang.find_rope(make_model(make_rotary(scaling=scaling)))
    assert rope.inverse_frequencies[0].item() == pytest.approx(1)
    assert rope.inverse_frequencies[-1].item() == pytest.approx(
        plain()[-1].item() / scaling["factor"]
    )


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_table(sglang, make_rotary, make_model, scaling, dtype):
    """Frequencies are those of the float32 embedding even where the table is rounded."""
    rotary = make_rotary(scaling=scaling, dtype=dtype)
    # The CPU keeps float32 tables unless a kernel casts them.
    rotary.cos_sin_cache = rotary.cos_sin_cache.to(dtype)
    exact = sglang.find_rope(make_model(make_rotary(scaling=scaling)))
    model = make_model(rotary).to(dtype)
    rope = sglang.find_rope(model)
    assert torch.equal(rope.inverse_frequencies, exact.inverse_frequencies)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0, "alpha": 2.0},
        {"rope_type": "default", "mrope_section": [8, 12, 12]},
        {"rope_type": "proportional"},
        {
            "rope_type": "longrope",
            "short_factor": (1.0,) * 32,
            "long_factor": (2.0,) * 32,
            "original_max_position_embeddings": 256,
        },
    ],
    ids=["dynamic", "dynamic-alpha", "mrope", "proportional", "longrope"],
)
def test_other_classes(sglang, make_rotary, make_model, scaling):
    rotary = make_rotary(scaling=scaling)
    assert type(rotary).__name__ != "RotaryEmbedding"
    with pytest.raises(sglang.UnsupportedRope, match=f"layers.1.* {type(rotary).__name__}"):
        sglang.find_rope(make_model(make_rotary(), rotary))


def test_deepseek(sglang, make_rotary, make_model):
    from sglang.srt.layers.rotary_embedding import get_rope_wrapper

    scaling = {"rope_type": "deepseek_yarn", "factor": 2.0}
    rotary = get_rope_wrapper(HEAD_DIM, HEAD_DIM, LENGTH, 10000, False, scaling, device="cpu")
    with pytest.raises(sglang.UnsupportedRope, match="DeepseekScalingRotaryEmbedding"):
        sglang.find_rope(make_model(rotary))


def test_learned_positions(sglang, make_model, make_rotary):
    with pytest.raises(sglang.UnsupportedRope, match="learned positions"):
        sglang.find_rope(make_model(None, kind="Learned", kind_of_layer=0))
    with pytest.raises(sglang.UnsupportedRope, match=r"layers\.1 has no rotary"):
        sglang.find_rope(make_model(make_rotary(), None, kind="Learned"))


def test_no_attention(sglang, make_rotary):
    model = nn.Module()
    model.rotary_emb = make_rotary()
    with pytest.raises(sglang.UnsupportedRope, match="no attention layer"):
        sglang.find_rope(model)


def test_layers_differ(sglang, make_rotary, make_model):
    for other in (make_rotary(base=500000), make_rotary(neox=False)):
        with pytest.raises(sglang.UnsupportedRope, match=r"layers\.1 .* than layers\.0"):
            sglang.find_rope(make_model(make_rotary(), other))


def test_table_of_other_frequencies(sglang, make_rotary, make_model):
    rotary = make_rotary(base=12345)
    rotary.cos_sin_cache = make_rotary().cos_sin_cache
    with pytest.raises(sglang.UnsupportedRope, match="off by"):
        sglang.find_rope(make_model(rotary))


@pytest.mark.parametrize("kind", ["SkipsRope", "NormsAfterRope"])
def test_layer_caches_other_keys(sglang, make_rotary, make_model, kind):
    with pytest.raises(sglang.UnsupportedRope, match=r"layers\.1 does not cache"):
        sglang.find_rope(make_model(make_rotary(), make_rotary(), kind=kind))


def test_layer_that_cannot_be_called(sglang, make_rotary, make_model):
    """Then the embedding's own check is all there is, and no hook stays behind."""
    model = make_model(make_rotary(), make_rotary(), kind="NeedsBatch")
    assert sglang.find_rope(model).neox
    assert not any(layer.attn._forward_pre_hooks for layer in model.layers)
