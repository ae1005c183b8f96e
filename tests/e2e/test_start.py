"""What SGLang's processes do at start, in processes of their own; no server comes up."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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


REFUSED = [
    (["--enable-lmcache"], {}, "--enable-lmcache does not work with RKSC"),
    (
        ["--radix-eviction-policy", "rksc", "--radix-eviction-policy-config", '{"weight": 1}'],
        {},
        "--radix-eviction-policy-config for rksc",
    ),
    (["--rksc-mode", "off"], {}, "is in use: choose another with --port"),
    ([], {"SGLANG_PLUGINS": "rksc_cpu"}, "SGLang's scheduler was not replaced"),
]


def test_what_cannot_be_served_is_refused(tiny_model):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])

        def launch(flags, env):
            command = [sys.executable, "-m", "rksc_sglang.launch_server", *flags]
            command += ["--model-path", str(tiny_model), "--port", port]
            return subprocess.run(
                command, capture_output=True, text=True, timeout=200, env={**os.environ, **env}
            )

        with ThreadPoolExecutor() as pool:  # most of it is imports
            results = list(pool.map(lambda case: launch(*case[:2]), REFUSED))
    for result, (_, _, named) in zip(results, REFUSED):
        assert result.returncode == 2
        assert named in result.stderr.splitlines()[-1]
