"""Real servers, started together on first use and shared by the session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rksc_sglang.asks.profile import fingerprint
from rksc_sglang.cgee.exit_rule import CalibratedRule, Probe
from rksc_sglang.cgee.profile import ExitProfile, MergeProfile, SkipProfile, update_profile
from rksc_sglang.cgee.skip_gate import CalibratedGate
from rksc_sglang.server_process import ServerProcess

REPORT = pytest.StashKey[list[str]]()


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Takes lines for the end of pytest's output."""
    return pytestconfig.stash.setdefault(REPORT, []).append


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for line in config.stash.get(REPORT, []):
        terminalreporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tiny_servers" in metafunc.fixturenames:
        sizes = [1, 16] if metafunc.config.getoption("--long") else [1]
        metafunc.parametrize(
            "tiny_servers", sizes, indirect=True, scope="session", ids="page{}".format
        )


@contextlib.contextmanager
def serving(logs: Path, **flags: Sequence[str]) -> Iterator[dict[str, str]]:
    """Start one server a keyword, together; gives their URLs."""
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(ServerProcess(flags[name], log=logs / f"{name}.log"))
            for name in flags
        }
        for server in running.values():
            server.wait_ready()
        yield {name: server.url for name, server in running.items()}


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def server(smollm2: Path, logs: Path) -> Iterator[str]:
    """URL of an rksc server in mode exact that serves SmolLM2."""
    flags = ["--enable-metrics", "--chunked-prefill-size", "256", "--dtype", "float32"]
    with serving(logs, smollm2=flags) as urls:
        yield urls["smollm2"]


@pytest.fixture(scope="session")
def splicing(smollm2: Path, logs: Path) -> Iterator[str]:
    """URL of a server in mode balanced; SGLang stops it when a slot leaks.

    Its profile lets all verifications with Yes and No stop after half of the layers, skips groups
    that agree, and has a threshold for merging by the next token.
    """
    profile, model = logs / "profile.json", fingerprint(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    labels = tuple(tokenizer.convert_tokens_to_ids(label) for label in ("Yes", "No"))
    probe = Probe((15,), (((0.0,) * 576,) * 2,), ((0.5, -0.5),))
    rule = CalibratedRule(probe, (1.0,), ((0.0, 0.0),), 0.0, 0.0)
    update_profile(profile, ExitProfile(model, labels, rule, 0.0, 0.01, 0.05, {}))
    gate = CalibratedGate((10.0, 0.0, 0.0, -7.0), 0.5)  # a share of more than 0.7
    update_profile(profile, SkipProfile(model, gate, 0.01, 0.05, {}))
    update_profile(profile, MergeProfile(model, {"next": 0.99}, 0.05, 0.05, {}))
    flags = ["--rksc-profile", str(profile)]
    flags += ["--rksc-mode", "balanced", "--rksc-tau", "0.5", "--rksc-guard-share", "1"]
    flags += ["--page-size", "16", "--max-total-tokens", "8192", "--chunked-prefill-size", "256"]
    flags += ["--enable-metrics", "--dtype", "float32", "--rksc-margin", "0"]
    with ServerProcess(flags, log=logs / "splicing.log") as server:
        server.wait_ready()
        yield server.url
        server.check()


@pytest.fixture(scope="session")
def tiny_servers(
    request: pytest.FixtureRequest, tiny_model: Path, logs: Path
) -> Iterator[dict[str, str]]:
    # A pool that a dozen requests outgrow, so that they evict, wait and retract.
    flags = ["--model-path", str(tiny_model), "--max-total-tokens", "1600"]
    flags += ["--chunked-prefill-size", "256", "--max-running-requests", "8"]
    flags += ["--page-size", str(request.param), "--dtype", "float32"]
    policy = ["--radix-eviction-policy", "rksc", "--rksc-trace", str(logs / "trace.jsonl")]
    policy += ["--radix-eviction-policy-config", '{"mass": 1, "depth": 1, "fan_out": 1}']
    stock = ["--rksc-mode", "off", *flags]
    with serving(logs, rksc=flags, stock=stock, evicting=[*flags, *policy]) as urls:
        yield urls


@pytest.fixture(scope="session")
def rksc_tiny(tiny_servers: dict[str, str]) -> str:
    """URL of an rksc server in mode exact that serves the tiny model from a small pool."""
    return tiny_servers["rksc"]


@pytest.fixture(scope="session")
def evicting_tiny(tiny_servers: dict[str, str]) -> str:
    """URL of a server as ``rksc_tiny`` whose eviction policy is RKSC's, with all it can weigh.

    Its trace is ``trace.jsonl`` in ``logs``.
    """
    return tiny_servers["evicting"]


@pytest.fixture(scope="session")
def stock_tiny(tiny_servers: dict[str, str]) -> str:
    """URL of stock SGLang with the same flags as ``rksc_tiny``."""
    return tiny_servers["stock"]
