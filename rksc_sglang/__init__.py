"""RKSC, reasoning-aware KV cache sharing, on SGLang.

``import rksc_sglang as rksc`` gives the frontend (``fork``, ``verify``, ``gen_verdict``) and
``RkscConfig``. Names load on first use: SGLang imports this package in every process it starts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rksc_sglang.config import RkscConfig
    from rksc_sglang.lang import (
        BranchGroup,
        Merge,
        MergeError,
        MergeRule,
        Think,
        Verdict,
        VerifyError,
        fork,
        gen_verdict,
        verify,
    )

__version__ = "0.1.0"

_HOMES = {
    "RkscConfig": "rksc_sglang.config",
    "BranchGroup": "rksc_sglang.lang",
    "Merge": "rksc_sglang.lang",
    "MergeError": "rksc_sglang.lang",
    "MergeRule": "rksc_sglang.lang",
    "Think": "rksc_sglang.lang",
    "Verdict": "rksc_sglang.lang",
    "VerifyError": "rksc_sglang.lang",
    "fork": "rksc_sglang.lang",
    "gen_verdict": "rksc_sglang.lang",
    "verify": "rksc_sglang.lang",
}
__all__ = [
    "BranchGroup",
    "Merge",
    "MergeError",
    "MergeRule",
    "RkscConfig",
    "Think",
    "Verdict",
    "VerifyError",
    "fork",
    "gen_verdict",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
