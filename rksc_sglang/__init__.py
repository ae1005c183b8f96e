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
        fork_all,
        gen_verdict,
        verify,
    )

__version__ = "0.1.0"

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
    "fork_all",
    "gen_verdict",
    "verify",
]
_HOMES = dict.fromkeys(__all__, "rksc_sglang.lang") | {"RkscConfig": "rksc_sglang.config"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
