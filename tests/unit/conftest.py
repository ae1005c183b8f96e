"""SGLang's real parts, small: runtime context, allocator, pools, radix cache, requests."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def sglang_runtime(tiny_model: Path) -> Any:
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
    return args


@pytest.fixture(scope="module")
def model_runner(
    sglang_runtime: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """SGLang's model runner of a random model of six layers, on our CPU attention.

    SGLang builds one in a process: for a single module. ``RKSC_TEST_ARCHITECTURE`` may
    name another architecture than Llama, as transformers spells it.
    """
    from sglang.benchmark.one_batch import load_model
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.server_args import PortArgs, ServerArgs

    from rksc_sglang.attention_cpu import NAME, register_attention_cpu
    from rksc_sglang.models.tiny import save_random_model

    path = tmp_path_factory.mktemp("models") / "six-layers"
    architecture = os.environ.get("RKSC_TEST_ARCHITECTURE", "Llama")
    sizes = {"vocab_size": 1000, "num_hidden_layers": 6, "initializer_range": 0.3}
    save_random_model(path, architecture, **sizes)
    register_attention_cpu()
    args = ServerArgs(
        model_path=str(path),
        tokenizer_path=str(tiny_model),
        device="cpu",
        attention_backend=NAME,
        sampling_backend="pytorch",
        dtype="float32",
        max_total_tokens=4096,
    )
    args.resolve_once()
    ranks = SpawnRanks(world_rank=spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0)
    publish(args, role="scheduler", ranks=ranks)
    runner, _ = load_model(args, PortArgs.init_new(args), 0, 0)
    yield runner.torch_runner
    publish(sglang_runtime, role="scheduler")


@pytest.fixture
def make_cache(sglang_runtime: None) -> Callable[..., Any]:
    """A radix cache of a given class, over ``capacity`` real KV slots.

    Further arguments are SGLang's ``CacheInitParams``.
    """

    def make(cache_class: type, capacity: int = 512, page_size: int = 1, **params: Any) -> Any:
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
                **params,
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


@pytest.fixture(params=[1, 4], ids=lambda size: f"page{size}")
def scheduler(request: pytest.FixtureRequest, make_cache: Any, make_req: Any) -> Any:
    from tests.unit.splicing_scheduler import Scheduler

    return Scheduler(make_cache, make_req, page_size=request.param)


@pytest.fixture(params=[1, 4], ids=lambda size: f"page{size}")
def joining(request: pytest.FixtureRequest, make_cache: Any, make_req: Any) -> Any:
    """A scheduler whose stages share a pass with what follows them."""
    from tests.unit.splicing_scheduler import Scheduler

    return Scheduler(make_cache, make_req, 400, page_size=request.param, joins=True)
