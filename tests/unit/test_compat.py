import os
import subprocess
import sys

import pytest

from rksc_sglang import compat
from rksc_sglang.config import ENV_VAR, RkscConfig


def run(code: str, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**{k: v for k, v in os.environ.items() if k != ENV_VAR}, **env},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("seam", compat.SEAMS, ids=lambda seam: seam.method)
def test_sglang_has_every_seam(seam):
    compat.check_seam(seam)


@pytest.mark.parametrize(
    "seam",
    [
        compat.Seam("sglang.srt.managers.scheduler.NoScheduler", "run", ()),
        compat.Seam("sglang.srt.managers.scheduler.Scheduler", "no_such_method", ()),
        compat.Seam("sglang.srt.managers.scheduler.Scheduler", "get_init_info", ("verbose",)),
    ],
)
def test_a_moved_seam_is_named(seam):
    with pytest.raises(compat.CompatError) as error:
        compat.check_seam(seam)
    assert seam.owner in str(error.value)


def test_another_sglang_is_refused(monkeypatch):
    monkeypatch.setattr("sglang.__version__", "0.5.24")
    with pytest.raises(compat.CompatError, match=r"0\.5\.23.*0\.5\.24"):
        compat.check_version()


def test_a_plugin_that_did_not_run_is_noticed():
    # This process loaded no plugin, so SGLang's scheduler is its own.
    with pytest.raises(compat.CompatError, match="scheduler was not replaced"):
        compat.check_registrations()


def test_the_plugin_registers_everything_when_rksc_is_asked_for(monkeypatch):
    monkeypatch.setenv(ENV_VAR, "")  # to_env() sets it: have it restored behind this test
    RkscConfig().to_env()
    env = {ENV_VAR: os.environ[ENV_VAR]}
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from rksc_sglang import compat; compat.check_registrations(); print('ok')"
    )
    assert run(code, **env).endswith("ok\n")


def test_without_a_configuration_the_plugin_leaves_sglang_alone():
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.managers import scheduler\n"
        "from sglang.srt.mem_cache.registry import registered_radix_cache_backends as names\n"
        "print(scheduler.Scheduler.__module__, 'rksc' in names())"
    )
    assert run(code).endswith("sglang.srt.managers.scheduler False\n")


def test_the_interpreter_hook_notices_an_executor_that_ignores_nodes():
    from rksc_sglang.lang.node import SglVerdict

    class Deaf:
        def __init__(self, *args, **kwargs):
            pass

        def submit(self, expr):
            pass

    with pytest.raises(compat.CompatError, match="_execute"):
        compat._check_stream_executor(Deaf, SglVerdict)
