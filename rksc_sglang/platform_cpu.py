"""A portable CPU platform: SGLang's PyPI wheel on any x86 CPU, torch operators only.

SGLang's own CPU engine needs AMX-era operators that only a source build has. When this platform is
chosen instead, ``platform`` says.
"""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class PortableCpuPlatform(SRTPlatform, CpuDeviceMixin):
    """CPU device operations of SGLang with the ``forward_native`` form of every fused operator."""

    # OOT, not CPU: SGLang reads CPU as "the AMX operators are there".
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def post_load_model(self, model: torch.nn.Module) -> None:
        from rksc_sglang import linear_cpu  # its layers ask which platform this is

        if linear_cpu.pays():
            linear_cpu.use_in(model)
