"""Models that the tests share, and the option ``--long``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# OpenMP threads that spin while they wait bring two servers on two cores to a standstill.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="the exactness tests in full: more prompts, page sizes"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model, converted once a machine."""
    from rksc_sglang.models.smollm2 import ensure_smollm2

    return ensure_smollm2()


@pytest.fixture(scope="session")
def tiny_model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random Llama layers behind SmolLM2's tokenizer."""
    from rksc_sglang.models.tiny import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama", smollm2)
