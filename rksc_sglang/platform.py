"""When SGLang runs on the portable CPU platform, and with which dtype.

It is chosen when the machine has no accelerator at all, and steps aside in every other case.
Nothing of SGLang is imported here: SGLang loads this module in the middle of its own import.
"""

from __future__ import annotations

import os
import time

import torch

_CLASS = "rksc_sglang.platform_cpu.PortableCpuPlatform"


def has_accelerator() -> bool:
    """Whether torch sees any device that SGLang has a platform of its own for."""
    return (
        torch.cuda.is_available()  # CUDA, ROCm, SAIL, MUSA
        or torch.xpu.is_available()
        or torch.mps.is_available()
        or (hasattr(torch, "npu") and torch.npu.is_available())
        or getattr(torch.version, "musa", None) is not None
    )


def default_dtype() -> str:
    """``bfloat16`` where the processor multiplies it and that is measured faster; else ``float32``.

    What this gives is for ``--dtype``.
    """
    found = torch.cpu.get_capabilities()
    if not any(found.get(name) for name in ("avx512_bf16", "amx_bf16")):
        return "float32"
    # Well faster, so that one machine gives the same answer every time.
    faster = _product_seconds(torch.bfloat16) < 0.8 * _product_seconds(torch.float32)
    return "bfloat16" if faster else "float32"


def _product_seconds(dtype: torch.dtype) -> float:
    """Seconds for a layer's product as in decoding a batch: the best of a few, after a warm-up."""
    x, weight = torch.ones(16, 2048, dtype=dtype), torch.ones(4096, 2048, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``: a class name, or None to step aside."""
    if has_accelerator() or os.getenv("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return _CLASS
