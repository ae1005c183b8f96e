"""float32 linear layers on a CPU: products with few rows are computed from the weight's side.

MKL divides ``x @ weight.T`` badly among threads when ``x`` has few rows, as in decoding and behind
a cached prefix, on processors that are not Intel's. ``(weight @ x.T).T`` is the same product and
divides well.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from torch import Tensor

# More rows than this gain nothing.
MAX_ROWS = 64


def pays() -> bool:
    """Whether this processor gains: on Intel's, two rows of SmolLM2 would take twice as long."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return "GenuineIntel" not in processor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: [..., in] by [out, in] gives [..., out], contiguous."""
    rows = x.numel() // x.shape[-1]
    if not 1 < rows <= MAX_ROWS or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    out = torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous()
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], -1)


class CpuLinearMethod(UnquantizedLinearMethod):
    """SGLang's linear layers without quantization, through :func:`linear`."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.weight, bias)


class CpuHeadMethod(UnquantizedEmbeddingMethod):
    """The same for embeddings, which models use as heads too."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.weight, bias)


def use_in(model: torch.nn.Module) -> None:
    """Let the float32 layers of a loaded model use it."""
    for module in model.modules():
        method = type(getattr(module, "quant_method", None))
        if getattr(getattr(module, "weight", None), "dtype", None) != torch.float32:
            continue
        if method is UnquantizedLinearMethod:
            module.quant_method = CpuLinearMethod()
        # SGLang computes logits without the head's bias, unless the method is not its own.
        elif method is UnquantizedEmbeddingMethod and getattr(module, "bias", None) is None:
            module.quant_method = CpuHeadMethod()
