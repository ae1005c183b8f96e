import pytest
import torch

from rksc_sglang import platform


def test_it_is_there_on_a_machine_without_accelerator(monkeypatch):
    monkeypatch.setattr(platform, "has_accelerator", lambda: False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    assert platform.activate() == "rksc_sglang.platform_cpu.PortableCpuPlatform"


@pytest.mark.parametrize("device", ["torch.cuda", "torch.xpu", "torch.mps"])
def test_it_steps_aside_for_an_accelerator(monkeypatch, device):
    monkeypatch.setattr(f"{device}.is_available", lambda: True)
    assert platform.activate() is None


def test_it_steps_aside_for_sglangs_own_cpu_engine(monkeypatch):
    monkeypatch.setattr(platform, "has_accelerator", lambda: False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


def test_sglang_takes_it():
    if platform.has_accelerator():
        pytest.skip("this machine has an accelerator")
    from sglang.srt.platforms import current_platform

    from rksc_sglang.platform_cpu import PortableCpuPlatform

    assert isinstance(current_platform, PortableCpuPlatform)
    assert current_platform.get_dispatch_key_name() == "native"


def test_float32_is_the_default_where_the_processor_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    monkeypatch.setattr(platform, "_product_seconds", lambda dtype: pytest.fail("measured"))
    assert platform.default_dtype() == "float32"


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "bfloat16"), (0.9, "float32"), (3.0, "float32")]
)
def test_bfloat16_is_the_default_only_where_it_is_well_faster(
    monkeypatch, feature, seconds, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True})
    times = {torch.bfloat16: seconds, torch.float32: 1.0}
    monkeypatch.setattr(platform, "_product_seconds", times.__getitem__)
    assert platform.default_dtype() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_can_be_timed_in_both_types(dtype):
    assert platform._product_seconds(dtype) > 0


@pytest.mark.parametrize("pays", [True, False])
def test_layers_get_the_cpu_products_after_loading(monkeypatch, pays):
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    from rksc_sglang import linear_cpu
    from rksc_sglang.platform_cpu import PortableCpuPlatform

    monkeypatch.setattr(linear_cpu, "pays", lambda: pays)
    layer = torch.nn.Linear(2, 3)
    layer.quant_method = UnquantizedLinearMethod()
    PortableCpuPlatform().post_load_model(torch.nn.Sequential(layer))
    expected = linear_cpu.CpuLinearMethod if pays else UnquantizedLinearMethod
    assert type(layer.quant_method) is expected
