"""The backend on SGLang's own pools and batches, against torch_native and a dense reference."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from rksc_sglang.attention_cpu import NAME, RkscCpuAttnBackend, register_attention_cpu
from rksc_sglang.kernels.prefix_attention import reference_attention

HEADS, KV_HEADS, DIM, SIZE = 9, 3, 16, 4096


class Rig:
    """A model runner's pools with a batch of requests in them, page by page."""

    def __init__(self, groups, *, page_size=1, dtype=torch.float32, pool=None):
        generator = torch.Generator().manual_seed(0)
        self.pool = pool or MHATokenToKVPool(
            SIZE,
            page_size,
            dtype,
            KV_HEADS,
            DIM,
            layer_num=2,
            device="cpu",
            enable_memory_saver=False,
        )
        self.req_pool = ReqToTokenPool(32, 2048, "cpu", enable_memory_saver=False)
        for layer in range(2):
            for buffer in (self.pool.get_key_buffer(layer), self.pool.get_value_buffer(layer)):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
        pages = 1 + torch.randperm(SIZE // page_size - 1, generator=generator)
        free = iter(pages[:, None] * page_size + torch.arange(page_size))

        def allocate(count):
            chunks = [next(free) for _ in range(-(-count // page_size))]
            return torch.cat([torch.empty(0, dtype=torch.long), *chunks])[:count]

        self.requests = []
        for shared, tails in groups:
            prefix = allocate(shared)
            self.requests += [torch.cat([prefix, allocate(tail)]) for tail in tails]
        self.rows = torch.arange(len(self.requests)).flip(0) + 3
        for row, slots in zip(self.rows, self.requests):
            self.req_pool.write((row, slice(0, len(slots))), slots.int())
        self.runner = SimpleNamespace(
            device="cpu",
            req_to_token_pool=self.req_pool,
            token_to_kv_pool=self.pool,
            model_config=SimpleNamespace(is_encoder_decoder=False),
        )

    def batch(self, mode, new):
        lens = torch.tensor([len(slots) for slots in self.requests])
        extend = {}
        if mode != ForwardMode.DECODE:
            extend = {
                "extend_seq_lens": torch.tensor(new),
                "extend_prefix_lens": lens - torch.tensor(new),
            }
        return ForwardBatch(
            forward_mode=mode,
            batch_size=len(lens),
            input_ids=torch.zeros(sum(new), dtype=torch.long),
            req_pool_indices=self.rows,
            seq_lens=lens,
            out_cache_loc=torch.cat([s[len(s) - n :] for s, n in zip(self.requests, new)]),
            seq_lens_sum=int(lens.sum()),
            **extend,
        )

    def run(self, backend_class, mode, new, *, layers=(0, 1), save=True, skip=0, **layer_options):
        """Outputs of the layers; tokens are random, the same ones at each call, after ``skip``."""
        generator = torch.Generator().manual_seed(1)
        backend, batch, outs = backend_class(self.runner), self.batch(mode, new), []
        backend.init_forward_metadata(batch)
        dtype, span = self.pool.dtype, slice(skip, skip + sum(new))
        for layer_id in layers:
            layer = RadixAttention(HEADS, DIM, 0.25, KV_HEADS, layer_id, **layer_options)
            q, k, v = (
                torch.randn(1000, heads * DIM, generator=generator).to(dtype)[span]
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            k, v = k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM)
            outs.append(backend.forward(q, k, v, layer, batch, save_kv_cache=save))
        return torch.stack(outs)


GROUPS = [(400, [3, 17, 8]), (0, [1, 90]), (260, [30, 31])]
UNSHARED = [(0, [300, 1, 90])]
BATCHES = {
    "decode": (GROUPS, ForwardMode.DECODE, [1] * 7),
    "extend": (GROUPS, ForwardMode.EXTEND, [2, 17, 5, 1, 90, 30, 31]),
    "prefill": (UNSHARED, ForwardMode.EXTEND, [300, 1, 90]),
    "mixed": (GROUPS, ForwardMode.MIXED, [1, 1, 8, 1, 60, 1, 1]),
}


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("window", [-1, 20])
@pytest.mark.parametrize("kind", BATCHES)
def test_equals_torch_native(kind, window, page_size):
    groups, *batch = BATCHES[kind]
    rig, stock = (Rig(groups, page_size=page_size) for _ in range(2))
    out = rig.run(RkscCpuAttnBackend, *batch, sliding_window_size=window)
    expected = stock.run(TorchNativeAttnBackend, *batch, sliding_window_size=window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for layer in range(2):
        assert torch.equal(rig.pool.get_key_buffer(layer), stock.pool.get_key_buffer(layer))
        assert torch.equal(rig.pool.get_value_buffer(layer), stock.pool.get_value_buffer(layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BATCHES)
def test_half_precision_is_close_to_torch_native(kind, dtype):
    groups, *batch = BATCHES[kind]
    out = Rig(groups, dtype=dtype).run(RkscCpuAttnBackend, *batch)
    expected = Rig(groups, dtype=dtype).run(TorchNativeAttnBackend, *batch)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_chunks_of_a_prompt_equal_the_whole():
    whole = Rig([(0, [300])])
    expected = whole.run(RkscCpuAttnBackend, ForwardMode.EXTEND, [300])
    chunk = Rig([(0, [300])])
    for layer in range(2):  # the first 200 tokens are cached already
        for get in ("get_key_buffer", "get_value_buffer"):
            getattr(chunk.pool, get)(layer).copy_(getattr(whole.pool, get)(layer))
    out = chunk.run(RkscCpuAttnBackend, ForwardMode.EXTEND, [100], skip=200)
    torch.testing.assert_close(out, expected[:, 200:], rtol=1e-5, atol=1e-5)


def test_encoder_only_layers_see_the_whole_request():
    groups, *batch = BATCHES["prefill"]
    options = {"attn_type": AttentionType.ENCODER_ONLY}
    out = Rig(groups).run(RkscCpuAttnBackend, *batch, **options)
    expected = Rig(groups).run(TorchNativeAttnBackend, *batch, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_without_saving_the_pool_stays_as_it_is():
    rig, stock = Rig(GROUPS), Rig(GROUPS)
    before = rig.pool.get_key_buffer(0).clone()
    out = rig.run(RkscCpuAttnBackend, ForwardMode.DECODE, [1] * 7, save=False)
    expected = stock.run(TorchNativeAttnBackend, ForwardMode.DECODE, [1] * 7, save=False)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rig.pool.get_key_buffer(0), before)


def test_one_request_alone_has_the_same_bits_every_time():
    first, *others = (
        Rig([(0, [700])]).run(RkscCpuAttnBackend, ForwardMode.DECODE, [1]) for _ in range(3)
    )
    assert all(torch.equal(first, other) for other in others)


def test_company_moves_a_request_by_rounding_only():
    alone = Rig(GROUPS[:1]).run(RkscCpuAttnBackend, ForwardMode.DECODE, [1] * 3)
    together = Rig(GROUPS).run(RkscCpuAttnBackend, ForwardMode.DECODE, [1] * 7)
    torch.testing.assert_close(alone, together[:, :3], rtol=1e-5, atol=1e-5)


def dense(rig, layer, requests, new, **options):
    """The layer's outputs from its pool by the float64 reference."""
    generator = torch.Generator().manual_seed(1)
    return reference_attention(
        torch.randn(1000, HEADS * DIM, generator=generator)[: sum(new)].view(-1, HEADS, DIM),
        rig.pool.get_key_buffer(layer),
        rig.pool.get_value_buffer(layer),
        requests,
        new,
        scale=0.25,
        **options,
    ).flatten(1)


def test_logit_cap_is_applied():
    rig = Rig(GROUPS)
    out = rig.run(RkscCpuAttnBackend, ForwardMode.DECODE, [1] * 7, layers=(0,), logit_cap=1.5)
    expected = dense(rig, 0, rig.requests, [1] * 7, logit_cap=1.5)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BATCHES)
def test_sliding_window_pool_is_read_at_its_own_slots(kind):
    """Layer 1 lives in the smaller pool of a hybrid model, under other slot numbers."""
    pool = SWAKVPool(
        size=SIZE,
        size_swa=SIZE,
        page_size=1,
        dtype=torch.float32,
        head_num=KV_HEADS,
        head_dim=DIM,
        swa_attention_layer_ids=[1],
        full_attention_layer_ids=[0],
        device="cpu",
        enable_memory_saver=False,
    )
    permutation = torch.randperm(SIZE + 1, generator=torch.Generator().manual_seed(2))
    pool.register_mapping(torch.cat([permutation, torch.tensor([-1])]))
    groups, mode, new = BATCHES[kind]
    rig = Rig(groups, pool=pool)
    out = rig.run(RkscCpuAttnBackend, mode, new, layers=(1,), sliding_window_size=20)
    expected = dense(rig, 1, [permutation[slots] for slots in rig.requests], new, window=20)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_encoder_decoder_models_are_refused():
    runner = Rig(GROUPS).runner
    runner.model_config.is_encoder_decoder = True
    with pytest.raises(NotImplementedError, match="torch_native"):
        RkscCpuAttnBackend(runner)


def test_registering_twice_is_registering_once():
    register_attention_cpu()
    register_attention_cpu()
    assert ATTENTION_BACKEND_CHOICES.count(NAME) == 1
    assert ATTENTION_BACKENDS[NAME] is RkscCpuAttnBackend
