import pytest

from rksc_sglang import platform


def test_it_is_there_on_a_machine_without_accelerator(monkeypatch):
    monkeypatch.setattr(platform, "has_accelerator", lambda: False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    assert platform.activate() == "rksc_sglang.platform.PortableCpuPlatform"


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

    assert isinstance(current_platform, platform.PortableCpuPlatform)
    assert current_platform.get_dispatch_key_name() == "native"
