"""SGLang's real parts, small: runtime context, allocator, pools, radix cache, requests."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def sglang_runtime(tiny_model: Path) -> None:
    """Publish a server configuration, as SGLang's scheduler process does."""
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(
        model_path=str(tiny_model),
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        dtype="float32",
    )
    args.resolve_once()
    publish(args, role="scheduler")


@pytest.fixture
def make_cache(sglang_runtime: None) -> Callable[..., Any]:
    """A radix cache of a given class, over ``capacity`` real KV slots."""

    def make(cache_class: type, capacity: int = 512, page_size: int = 1) -> Any:
        import torch
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
        from sglang.srt.mem_cache.unified_cache.components import ComponentType

        pool = MHATokenToKVPool(
            size=capacity,
            page_size=page_size,
            dtype=torch.float32,
            head_num=1,
            head_dim=4,
            layer_num=2,
            device="cpu",
            enable_memory_saver=False,
        )
        common = {"dtype": torch.float32, "device": "cpu", "kvcache": pool, "need_sort": False}
        if page_size == 1:
            allocator = TokenToKVPoolAllocator(capacity, **common)
        else:
            allocator = PagedTokenToKVPoolAllocator(capacity, page_size=page_size, **common)
        return cache_class(
            CacheInitParams(
                disable=False,
                req_to_token_pool=ReqToTokenPool(32, 4096, "cpu", False),
                token_to_kv_pool_allocator=allocator,
                page_size=page_size,
                tree_components=(ComponentType.FULL,),
            )
        )

    return make


@pytest.fixture
def make_req(sglang_runtime: None) -> Callable[..., Any]:
    """A generation request over the given prompt tokens."""

    def make(rid: str, tokens: Sequence[int], **kwargs: Any) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        return Req(rid, "", array("q", tokens), SamplingParams(max_new_tokens=4), **kwargs)

    return make
