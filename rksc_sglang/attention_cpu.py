"""CPU attention backend ``rksc_cpu``: new queries only, batched decode, shared prefixes read once.

SGLang's ``torch_native`` recomputes every cached token's attention at each extend and decodes
request by request. This one plans a batch once per forward pass and leaves the tensor work of
all layers to :mod:`rksc_sglang.kernels.prefix_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from rksc_sglang.kernels.prefix_attention import Plan, plan_attention, prefix_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

NAME = "rksc_cpu"


def register_attention_cpu() -> None:
    """Makes ``--attention-backend rksc_cpu`` known to SGLang in this process; may be repeated."""
    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(RkscCpuAttnBackend)


class RkscCpuAttnBackend(AttentionBackend):
    """Attention of one model runner on the CPU.

    Attributes:
        on_kv_written: called with a layer's number between its new tokens' KV and its attention.

    Raises:
        NotImplementedError: the model is an encoder-decoder.
    """

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: ModelRunner):
        super().__init__()
        if model_runner.model_config.is_encoder_decoder:
            raise NotImplementedError(f"{NAME} has no cross-attention; use torch_native")
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.has_swa_pool = (
            isinstance(self.token_to_kv_pool, SWAKVPool)
            and self.token_to_kv_pool.swa_layer_nums > 0
        )
        self.swa_out_cache_loc: torch.Tensor | None = None
        self.scratch: dict[tuple, torch.Tensor] = {}
        self.on_kv_written: Callable[[int], None] | None = None
        self.requests: list[torch.Tensor] = []
        self.new: list[int] = []
        # One per kind of layer: (reads the sliding-window pool, window, causal).
        self.plans: dict[tuple[bool, int | None, bool], Plan] = {}

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        table = self.req_to_token_pool.req_to_token
        rows = forward_batch.req_pool_indices.tolist()
        lens = forward_batch.seq_lens.tolist()
        self.requests = [table[row, :length] for row, length in zip(rows, lens)]
        if forward_batch.forward_mode.is_decode_or_idle():
            self.new = [1] * len(rows)
        else:
            self.new = forward_batch.extend_seq_lens.tolist()
        self.plans = {}
        self.swa_out_cache_loc = None
        if self.has_swa_pool and forward_batch.out_cache_loc is not None:
            self.swa_out_cache_loc = self.token_to_kv_pool.translate_loc_from_full_to_swa(
                forward_batch.out_cache_loc
            )

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Writes the new tokens' ``k`` and ``v`` to the pool and attends to it.

        ``q`` is [tokens, heads * head_dim]; so is the result, with ``v_head_dim``.
        """
        if save_kv_cache and k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
            if self.on_kv_written is not None:
                self.on_kv_written(layer.layer_id)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = prefix_attention(
            q,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self._plan(layer),
            scale=layer.scaling,
            logit_cap=layer.logit_cap,
            scratch=self.scratch,
        )
        return out.view(out.shape[0], -1)

    # A decoding request is one with a single new token; the plan knows.
    forward_decode = forward_extend

    def _plan(self, layer: RadixAttention) -> Plan:
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        window = layer.sliding_window_size if causal and layer.sliding_window_size > -1 else None
        swa = self.has_swa_pool and self.token_to_kv_pool.layers_mapping[layer.layer_id][1]
        kind = (swa, window, causal)
        if kind not in self.plans:
            requests = self.requests
            if swa:
                requests = [
                    self.token_to_kv_pool.translate_loc_from_full_to_swa(r) for r in requests
                ]
            self.plans[kind] = plan_attention(requests, self.new, window=window, causal=causal)
        return self.plans[kind]

    def support_triton(self) -> bool:
        return False
