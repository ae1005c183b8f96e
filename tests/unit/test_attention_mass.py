"""Attention mass, on SGLang's real pools and attention modules."""

import pytest
import torch
from torch import nn

from rksc_sglang.decoder import UnsupportedModel
from rksc_sglang.rsbcm.attention_mass import AttentionSampler, SlotMass, attention_of


def test_attention_is_the_mean_over_heads_of_each_ones_softmax():
    torch.manual_seed(0)
    query, keys = torch.randn(6, 8), torch.randn(10, 2, 8)
    expected = torch.zeros(10)
    for head in range(6):
        expected += torch.softmax(keys[:, head // 3] @ query[head] * 0.5, 0) / 6
    assert torch.allclose(attention_of(query, keys, 0.5), expected, atol=1e-6)


def test_mass_fades_and_is_forgotten_where_a_slot_is_written_anew():
    mass = SlotMass(5, "cpu", decay=0.5)
    mass.add(torch.tensor([1, 1, 3]), torch.tensor([1.0, 1.0, 4.0]))
    mass.fade()
    mass.forget(torch.tensor([3]))
    assert mass.mass.tolist() == [0, 1, 0, 0, 0]


class Layer(nn.Module):
    def __init__(self, layer_id):
        super().__init__()
        from sglang.srt.layers.radix_attention import RadixAttention

        self.attn = RadixAttention(2, 4, 0.5, 1, layer_id)


class Model(nn.Module):
    """SGLang's attention modules, in the place where its models have them."""

    def __init__(self, layers):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(i) for i in range(layers))


class Batch:
    """What the sampler reads of a decode pass."""

    def __init__(self, lengths, out_cache_loc):
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self.forward_mode = ForwardMode.DECODE
        self.batch_size = len(lengths)
        self.req_pool_indices = torch.arange(len(lengths))
        self.seq_lens = torch.tensor(lengths)
        self.out_cache_loc = torch.tensor(out_cache_loc)


@pytest.fixture
def pools(sglang_runtime):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

    pool = MHATokenToKVPool(
        size=32,
        page_size=1,
        dtype=torch.float32,
        head_num=1,
        head_dim=4,
        layer_num=6,
        device="cpu",
        enable_memory_saver=False,
    )
    torch.manual_seed(0)
    for keys in pool.k_buffer:
        keys.normal_()
    rows = ReqToTokenPool(4, 16, "cpu", False)
    for row in range(3):
        rows.req_to_token[row, :8] = torch.arange(8, dtype=torch.int32) + 8 * row + 1
    return rows, pool


def sample(model, query, batch):
    for layer in model.model.layers:
        # What a pass runs before a layer's attention, and no more of it.
        if getattr(layer.attn, "query_observer", None) is not None:  # SGLang with patches/
            layer.attn.query_observer(layer.attn, query, batch)
        for hook in layer.attn._forward_pre_hooks.values():
            hook(layer.attn, (query, None, None, batch), {})


def test_it_samples_two_layers_of_every_few_passes_and_takes_requests_in_turn(pools):
    rows, pool = pools
    model, mass = Model(6), SlotMass(33, "cpu", decay=1.0)
    errors = []
    sampler = AttentionSampler(
        model, mass, rows, pool, lambda: True, errors.append, every=2, requests=1
    )
    assert sampler.chosen == [2, 4]
    query = torch.randn(3, 8)
    batch = Batch([8, 8, 8], [25, 26, 27])
    sample(model, query, batch)
    assert mass.mass.sum() == 0, "the first pass of two"
    sample(model, query, batch)
    expected = torch.zeros(33)
    for layer in (2, 4):
        slots = torch.arange(1, 8)  # the key of the token itself is not there yet
        expected[slots] += attention_of(query[0].view(2, 4), pool.k_buffer[layer][slots], 0.5)
    assert torch.allclose(mass.mass, expected, atol=1e-6)
    sample(model, query, batch)
    sample(model, query, batch)
    assert mass.mass[9:16].sum() == pytest.approx(2.0), "the next request's turn"
    assert not errors
    assert sampler.seconds > 0


def test_nothing_is_sampled_while_nothing_is_about_to_be_evicted(pools):
    rows, pool = pools
    model, mass = Model(3), SlotMass(33, "cpu")
    AttentionSampler(model, mass, rows, pool, lambda: False, lambda where: None, every=1)
    sample(model, torch.randn(1, 8), Batch([8], [25]))
    assert mass.mass.sum() == 0


def test_a_failure_ends_the_sampling_and_not_the_pass(pools):
    rows, pool = pools
    model, mass = Model(3), SlotMass(33, "cpu")
    errors = []
    AttentionSampler(model, mass, rows, pool, lambda: True, errors.append, every=1)
    for _ in range(2):
        sample(model, torch.randn(1, 7), Batch([8], [25]))
    assert errors == ["attention_mass"]


def test_a_pool_whose_keys_it_cannot_read_is_refused():
    with pytest.raises(UnsupportedModel, match="keys in a object"):
        AttentionSampler(Model(3), SlotMass(3, "cpu"), None, object(), bool, print)
