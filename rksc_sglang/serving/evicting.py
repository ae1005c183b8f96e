"""Eviction inside the scheduler: the policy's parts for this model, and reports of branches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rksc_sglang.decoder import UnsupportedModel
from rksc_sglang.rsbcm.attention_mass import AttentionSampler, SlotMass
from rksc_sglang.rsbcm.life_cycle import STATES, State
from rksc_sglang.rsbcm.policy import POLICIES
from rksc_sglang.rsbcm.trace import Tenant
from rksc_sglang.serving.features import Unsupported, refuse_beside
from rksc_sglang.serving.radix_cache import RkscRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

#: Of the pool, free: with more, nothing is about to be evicted.
PLENTY = 0.5


def check_eviction(scheduler: Scheduler) -> RkscRadixCache:
    """The cache, where an eviction policy of RKSC's is on.

    Raises:
        Unsupported: with the reason.
    """
    cache = scheduler.tree_cache
    if not isinstance(cache, RkscRadixCache):
        raise Unsupported("this server shares no prefixes")
    if cache.strategy is None:
        policies = " or ".join(POLICIES)
        raise Unsupported(f"--radix-eviction-policy is not {policies}")
    return cache


def build_sampler(
    scheduler: Scheduler, cache: RkscRadixCache, on_error: Callable[[str], None]
) -> AttentionSampler:
    """What measures attention mass for the cache's policy.

    Raises:
        Unsupported: with the reason.
    """
    strategy = cache.strategy
    if strategy is None or not strategy.uses_mass:
        raise Unsupported("the eviction policy does not ask for it")
    refuse_beside(scheduler, allowed=("data parallelism", "LoRA", "session-aware caching"))
    args = scheduler.server_args
    if args.device != "cpu" and not args.disable_cuda_graph:
        raise Unsupported("decode passes run in CUDA graphs; it needs --disable-cuda-graph")
    runner, allocator = scheduler.tp_worker.model_runner, cache.token_to_kv_pool_allocator
    pool = runner.token_to_kv_pool

    def wanted() -> bool:
        return allocator.available_size() < PLENTY * allocator.size

    try:
        mass = SlotMass(pool.size + pool.page_size, pool.device)
        sampler = AttentionSampler(
            runner.model, mass, scheduler.req_to_token_pool, pool, wanted, on_error
        )
    except UnsupportedModel as error:
        raise Unsupported(str(error)) from error
    strategy.slot_mass = mass
    return sampler


# Reports from the tokenizer process. SGLang's message for setting a scheduler's state has names and
# numbers only: what is reported of is a name, and its state a number.

#: (group, branch) and the branch's state; (program, None) and "ended".
Reports = Mapping[tuple[str, int | None], str]

_PREFIX = "rksc:"
_STATES = (*STATES, "ended")


def states_of(group: str, states: Mapping[int, State]) -> Reports:
    return {(group, branch): state for branch, state in states.items()}


def end_of(program: str) -> Reports:
    return {(program, None): "ended"}


def encode(tenant: Tenant, reports: Reports) -> dict[str, int]:
    """``server_args`` of a ``SetInternalStateReq``."""
    return {
        _PREFIX + json.dumps([*tenant, *name]): _STATES.index(state)
        for name, state in reports.items()
    }


def receive(cache: RkscRadixCache, encoded: Mapping[str, float]) -> bool:
    """Hand reports to the cache; False, with nothing done, for what is not a report."""
    if not encoded or not all(name.startswith(_PREFIX) for name in encoded):
        return False
    groups: dict[tuple[Tenant, str], dict[int, State]] = {}
    for name, state in encoded.items():
        extra_key, cache_salt, who, branch = json.loads(name.removeprefix(_PREFIX))
        tenant = (extra_key, cache_salt)
        if branch is None:
            cache.end_program(tenant, who)
        else:
            groups.setdefault((tenant, who), {})[branch] = STATES[int(state)]
    for (tenant, group), states in groups.items():
        cache.report_branches(tenant, group, states)
    return True
