"""The frontend: ``fork``, ``verify`` and ``gen_verdict`` for SGLang's frontend language."""

from rksc_sglang import compat
from rksc_sglang.lang import endings
from rksc_sglang.lang.branches import BranchGroup, fork, fork_all
from rksc_sglang.lang.merging import Merge, MergeError, MergeRule
from rksc_sglang.lang.node import SglVerdict, gen_verdict
from rksc_sglang.lang.scoring import VerifyError
from rksc_sglang.lang.thinking import Think
from rksc_sglang.lang.verdict import Verdict, verify

__all__ = [
    "BranchGroup",
    "Merge",
    "MergeError",
    "MergeRule",
    "Think",
    "Verdict",
    "VerifyError",
    "fork",
    "fork_all",
    "gen_verdict",
    "verify",
]

compat.hook_stream_executor(SglVerdict)
if not compat.has_extension("frontend_endings"):
    endings.start()
    compat.hook_finalizers(endings.end_later)
