"""SGLang's general plugin: the only place that registers anything with SGLang.

SGLang calls :func:`register` in each of its processes. With no RKSC configuration in the
environment it leaves no trace, but for the CPU attention backend's name on machines that have no
accelerator.
"""

from __future__ import annotations

from rksc_sglang.config import RkscConfig
from rksc_sglang.platform import has_accelerator


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``."""
    if not has_accelerator():
        from rksc_sglang.attention_cpu import register_attention_cpu

        register_attention_cpu()
    if RkscConfig.from_env() is None:
        return

    from sglang.srt.mem_cache.registry import (
        get_radix_cache_factory,
        register_radix_cache_backend,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from rksc_sglang.rsbcm.policy import register_policies
    from rksc_sglang.serving.radix_cache import BACKEND, create_cache
    from rksc_sglang.serving.scheduler import RkscScheduler

    if get_radix_cache_factory(BACKEND) is None:
        register_radix_cache_backend(BACKEND, create_cache)
    register_policies()
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler", RkscScheduler, HookType.REPLACE
    )
