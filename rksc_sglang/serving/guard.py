"""The guard: some spliced requests are computed again exactly, and sharing that harms is ended.

A shadow is an exact prefill of a prompt that was spliced, run when the server has nothing else to
do. Its first token's distribution is compared with the one that was served. Per tenant, the share
of first tokens that differ and the mean KL divergence feed bounds that hold at any time
(``asks/harm.py``); once one of them is above its limit for sure, nothing is spliced for that tenant
any more.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rksc_sglang.asks.harm import HarmMonitor
from rksc_sglang.serving.doubt import Doubt
from rksc_sglang.serving.internal import (
    IDLE_SECONDS,
    InternalState,
    ModelFacts,
    make_internal_req,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

#: Shadows that wait; each keeps a prompt and one row of logits.
MAX_WAITING = 16
#: Chance that splicing is ended for a tenant whom it does not harm.
ALPHA = 0.05
#: Nats; what is above counts as this much.
KL_CAP = 1.0


@dataclass(frozen=True)
class Limits:
    """What is tolerated on average: share of first tokens that differ, and KL in nats."""

    disagreement: float
    kl: float


class TenantMonitor:
    """Evidence about one tenant's splices."""

    def __init__(self, limits: Limits) -> None:
        # Half of the error that is allowed to each.
        self.disagreement = HarmMonitor(limits.disagreement, ALPHA / 2)
        self.kl = HarmMonitor(limits.kl / KL_CAP, ALPHA / 2)

    @property
    def tripped(self) -> bool:
        return self.disagreement.tripped or self.kl.tripped

    def add(self, exact: torch.Tensor, served: torch.Tensor) -> None:
        """``exact`` and ``served`` are log-probabilities, [vocab_size] float32."""
        self.disagreement.add(float(exact.argmax() != served.argmax()))
        kl = torch.nn.functional.kl_div(served, exact, log_target=True, reduction="sum").item()
        self.kl.add(min(max(kl / KL_CAP, 0.0), 1.0))

    def to_dict(self) -> dict[str, Any]:
        return {
            "tripped": self.tripped,
            "disagreement": self.disagreement.to_dict(),
            "kl": self.kl.to_dict(),
        }


@dataclass(eq=False)
class Shadow(InternalState):
    """``req.rksc`` of a shadow request."""

    namespace: Hashable = None
    served: torch.Tensor | None = None


class Guard:
    """For one scheduler.

    Args:
        share: of the spliced requests that are shadowed, 0 to 1.
        limits: beyond which sharing ends.
        model: whose requests these are.
        submit: puts a request of our own into the waiting queue.
        doubt: discards the answers of some of them.
        count: called with a counter's name.
    """

    def __init__(
        self,
        share: float,
        limits: Limits,
        model: ModelFacts,
        submit: Callable[[Req], None],
        doubt: Doubt,
        count: Callable[[str], None],
    ) -> None:
        self.share = share
        self.limits = limits
        self.model = model
        self.submit = submit
        self.doubt = doubt
        self.count = count
        self.tenants: dict[Hashable, TenantMonitor] = {}
        self._waiting: deque[Req] = deque(maxlen=MAX_WAITING)
        self._random = random.Random(0)

    def allows(self, namespace: Hashable) -> bool:
        tenant = self.tenants.get(namespace)
        return tenant is None or not tenant.tripped

    def on_first_logits(self, req: Req, logits: torch.Tensor) -> None:
        """A request's first token is about to be chosen."""
        if isinstance(req.rksc, Shadow):
            self._compare(req.rksc, logits.float().log_softmax(0).cpu())
        elif self._shall_shadow(req):
            self._waiting.append(self._shadow_of(req, logits.float().log_softmax(0).cpu()))

    def _shall_shadow(self, req: Req) -> bool:
        splice = getattr(req.rksc, "splice", None)
        return (
            splice is not None
            and splice.spliced_tokens > 0
            and self.allows((req.extra_key, req.cache_salt))
            and self._random.random() < self.share
            and not self.doubt.is_close(splice)  # what is not served does no harm
        )

    def _shadow_of(self, req: Req, served: torch.Tensor) -> Req:
        namespace = (req.extra_key, req.cache_salt)
        shadow = make_internal_req(
            f"rksc-shadow-{req.rid}",
            req.origin_input_ids,
            Shadow("shadow", namespace=namespace, served=served),
            model=self.model,
            extra_key=req.extra_key,
            cache_salt=req.cache_salt,
            priority=req.priority,
        )
        shadow.skip_radix_cache_insert = True  # it shall not make room for itself
        return shadow

    def _compare(self, shadow: Shadow, exact: torch.Tensor) -> None:
        assert shadow.served is not None
        tenant = self.tenants.setdefault(shadow.namespace, TenantMonitor(self.limits))
        before = tenant.tripped
        tenant.add(exact, shadow.served)
        self.count("shadows")
        if tenant.tripped and not before:
            self.count("guard_trips")
            logger.warning(
                "RKSC: splicing is off for tenant %s from here on, it does harm: %s",
                _name(shadow.namespace),
                tenant.to_dict(),
            )

    def on_idle(self, quiet: float) -> None:
        """Called again and again while there is nothing to do, for some seconds now: runs the next
        shadow.
        """
        if self._waiting and quiet >= IDLE_SECONDS:
            self.submit(self._waiting.popleft())

    def to_dict(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "limits": vars(self.limits),
            "waiting": len(self._waiting),
            "tenants": {_name(ns): monitor.to_dict() for ns, monitor in self.tenants.items()},
        }


def _name(namespace: Hashable) -> str:
    """A tenant's name for logs and status pages: its keys are its secrets."""
    if namespace == (None, None):
        return "default"
    return hashlib.sha256(repr(namespace).encode()).hexdigest()[:12]
