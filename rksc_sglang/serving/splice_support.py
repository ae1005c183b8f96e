"""Whether this server and model can splice, and the parts for it where they can."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from rksc_sglang.asks.content_index import ContentIndex
from rksc_sglang.asks.context_shift import COMPARED, ContextShift, Spliced
from rksc_sglang.asks.plan import Planner
from rksc_sglang.asks.profile import ProfileError, thresholds
from rksc_sglang.asks.rope import UnsupportedRope, find_rope
from rksc_sglang.asks.signature import Signatures, UnsupportedModel
from rksc_sglang.attention_cpu import RkscCpuAttnBackend
from rksc_sglang.config import RkscConfig
from rksc_sglang.kernels.rotate_copy import rotate_copy, rotation_for
from rksc_sglang.serving.donors import Donors
from rksc_sglang.serving.features import Unsupported, refuse_beside
from rksc_sglang.serving.internal import ModelFacts
from rksc_sglang.serving.joined import JoinedPass
from rksc_sglang.serving.joining import JoiningSplicer
from rksc_sglang.serving.splicing import Splicer
from rksc_sglang.serving.splicing_cache import Copy, SplicingRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

_COPY_PROBE_TOKENS = 256


def build_splicer(
    scheduler: Scheduler, config: RkscConfig, count: Callable[[str], None]
) -> Splicer:
    """Put the parts together, for a scheduler that has its model and its pools.

    Raises:
        Unsupported: with the reason.
    """
    cache = scheduler.tree_cache
    if not isinstance(cache, SplicingRadixCache):
        raise Unsupported("this server shares no prefixes")
    refuse_beside(scheduler, allowed=("data parallelism", "an encoder-decoder"))
    runner = scheduler.tp_worker.model_runner
    pool = runner.token_to_kv_pool
    # The exact class: its subclasses store keys in layouts and dtypes of their own.
    if type(pool) is not MHATokenToKVPool or pool.store_dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise Unsupported(f"keys in a {type(pool).__name__} of {pool.dtype} cannot be moved")
    if cache.supports_mamba() or cache.supports_swa():
        raise Unsupported("the model has layers with recurrent state or sliding windows")
    try:
        rope = find_rope(runner.model)
        signatures = Signatures(
            runner.model,
            scheduler.model_config.hidden_size,
            pool.k_buffer[0].shape[0],
            pool.device,
        )
    except (UnsupportedRope, UnsupportedModel) as error:
        raise Unsupported(str(error)) from error
    frequencies = rope.inverse_frequencies.to(pool.device)
    shift = ContextShift(rope, pool.device)

    def copy(
        source: torch.Tensor,
        target: torch.Tensor,
        delta: int,
        head: torch.Tensor | None,
        donor_head: torch.Tensor,
    ) -> None:
        if scheduler.enable_overlap and source.is_cuda:
            # The forward pass that wrote the donor may still be under way.
            torch.cuda.current_stream().wait_stream(scheduler.forward_stream)
        rotation = rotation_for(frequencies, delta, rope.neox)
        rotate_copy(pool.k_buffer, pool.v_buffer, source, target, rotation)
        if head is not None:
            run = Spliced(head, donor_head, target, delta)
            shift.of([run]).add(pool.k_buffer, pool.v_buffer)

    cache.enable_splicing(ContentIndex(pool.k_buffer[0].shape[0]), copy)
    planner = Planner(
        config.splice_head, config.splice_tail, config.splice_min_tokens, cache.page_size
    )
    try:
        limits = thresholds(config, Path(scheduler.model_config.model_path))
    except ProfileError as error:
        raise Unsupported(str(error)) from error
    model = ModelFacts(scheduler.model_config.vocab_size, scheduler.tokenizer)
    donors = Donors(lambda: scheduler.waiting_queue)
    parts = (cache, signatures, planner, limits, model, donors, count)
    backend = runner.attn_backend
    splicer: Splicer
    # Elsewhere nothing tells between the writing of a layer's KV and its attention.
    if isinstance(backend, RkscCpuAttnBackend):
        splicer = JoiningSplicer(*parts)
        splicer.joined = JoinedPass(cache, backend, pool, shift, splicer.judge)
    else:
        splicer = Splicer(*parts)
    splicer.measure_copy = partial(_measure_copy, cache, copy)
    return splicer


def _measure_copy(cache: SplicingRadixCache, copy: Copy) -> float:
    """Seconds to take over the KV of one token; the best of three, over free slots if there are."""
    allocator = cache.token_to_kv_pool_allocator
    pages = min(_COPY_PROBE_TOKENS, allocator.available_size() // 2) // cache.page_size
    count = pages * cache.page_size
    if not count:
        return float("inf")
    source, target = allocator.alloc(count), allocator.alloc(count)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        copy(source, target, 1, source[:COMPARED], source[:COMPARED])
        if source.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    allocator.free(source)
    allocator.free(target)
    return best / count
