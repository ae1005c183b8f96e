"""linear_cpu against torch, and on SGLang's own layer methods."""

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)

from rksc_sglang import linear_cpu


@pytest.mark.parametrize(
    ("processor", "pays"),
    [("vendor_id\t: GenuineIntel\n", False), ("vendor_id\t: AuthenticAMD\n", True)],
)
@pytest.mark.parametrize("linux", [True, False])
def test_intels_processors_are_left_alone(monkeypatch, processor, pays, linux):
    monkeypatch.setattr(linear_cpu.Path, "exists", lambda path: linux)
    monkeypatch.setattr(linear_cpu.Path, "read_text", lambda path: processor)
    monkeypatch.setattr(linear_cpu.platform, "processor", lambda: processor)
    assert linear_cpu.pays() == pays


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (16,), (64,), (65,), (3, 5), (2, 1)])
def test_equals_torch(shape, dtype, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (
        torch.randn(size, generator=generator).to(dtype) for size in ((*shape, 48), (100, 48), 100)
    )
    out = linear_cpu.linear(x, weight, b if bias else None)
    expected = F.linear(x, weight, b if bias else None)
    assert out.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 0
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_rows_need_not_be_contiguous():
    x, weight = torch.randn(48, 8).t(), torch.randn(100, 48)
    torch.testing.assert_close(linear_cpu.linear(x, weight), F.linear(x, weight))


def layer(method, dtype=torch.float32, bias=False):
    made = torch.nn.Linear(48, 100, bias=bias, dtype=dtype)
    made.quant_method = method
    return made


class OtherMethod(UnquantizedLinearMethod):
    """As a model or a LoRA might bring."""


def test_only_unquantized_float32_layers_are_changed():
    changed = {
        "linear": layer(UnquantizedLinearMethod()),
        "biased": layer(UnquantizedLinearMethod(), bias=True),
        "head": layer(UnquantizedEmbeddingMethod()),
    }
    kept = {
        "half_precision": layer(UnquantizedLinearMethod(), torch.bfloat16),
        "other": layer(OtherMethod()),
        "biased_head": layer(UnquantizedEmbeddingMethod(), bias=True),
        "plain": torch.nn.Linear(48, 100),
    }
    before = {name: getattr(module, "quant_method", None) for name, module in kept.items()}
    linear_cpu.use_in(torch.nn.ModuleDict({**changed, **kept}))
    assert [type(module.quant_method) for module in changed.values()] == [
        linear_cpu.CpuLinearMethod,
        linear_cpu.CpuLinearMethod,
        linear_cpu.CpuHeadMethod,
    ]
    assert {name: getattr(m, "quant_method", None) for name, m in kept.items()} == before


@pytest.mark.parametrize("method", [UnquantizedLinearMethod, UnquantizedEmbeddingMethod])
def test_a_changed_layer_computes_what_it_did(method):
    module, x = layer(method()), torch.randn(4, 48)
    expected = module.quant_method.apply(module, x)
    linear_cpu.use_in(module)
    torch.testing.assert_close(module.quant_method.apply(module, x), expected)


def test_sglang_computes_logits_through_the_changed_head():
    from sglang.srt.layers.logits_processor import should_apply_lm_head_quant_method

    head = layer(UnquantizedEmbeddingMethod())
    assert not should_apply_lm_head_quant_method(head, head.quant_method)
    linear_cpu.use_in(head)
    assert should_apply_lm_head_quant_method(head, head.quant_method)
