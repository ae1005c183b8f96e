"""Doubt: where a splice could have decided the first token, the request is computed again exactly.

Splicing moves logits a little. That changes a greedy token only where the first two are close, so
a spliced request whose first token leads the next by less than a margin gives no answer: its pass
is discarded, and it goes to the head of the queue to be served exactly. The margin is calibrated
(``asks/calibrate.py``): what splices move the lead by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from rksc_sglang.contract import DOUBTED
from rksc_sglang.serving.splice_state import SpliceState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

#: What is expected of a server's requests before any has been seen: doubts, of so many judged.
PRIOR = (4, 20)


class Doubt:
    """For one scheduler.

    Args:
        margin: nats by which a spliced greedy first token must lead; 0: none is doubted.
        count: called with a counter's name.
    """

    def __init__(self, margin: float, count: Callable[[str], None]) -> None:
        self.margin = margin
        self.count = count
        self.doubts, self.judged = PRIOR

    def on_first_logits(self, req: Req, logits: torch.Tensor) -> None:
        """Note by how much the first token leads; it stays on the device."""
        splice = getattr(req.rksc, "splice", None)
        if splice is not None and splice.spliced_tokens > 0 and self._may_doubt(req, splice):
            first, second = logits.float().topk(2).values
            splice.lead = first - second

    def _may_doubt(self, req: Req, splice: SpliceState) -> bool:
        greedy = req.sampling_params.top_k == 1
        # Who asks for splices of any similarity wants to see them.
        return greedy and self.margin > 0 and splice.tau > 0

    def risk(self, req: Req, splice: SpliceState) -> float:
        """Chance that the answer to a request is discarded if it is spliced."""
        return self.doubts / self.judged if self._may_doubt(req, splice) else 0.0

    def is_close(self, splice: SpliceState) -> bool:
        return splice.lead is not None and float(splice.lead) < self.margin

    def review(self, reqs: Iterable[Req]) -> list[Req]:
        """Of a batch that has run: the requests that shall give no answer, marked so."""
        doubted = []
        for req in reqs:
            splice = getattr(req.rksc, "splice", None)
            if splice is None or splice.lead is None:
                continue
            close, splice.lead = self.is_close(splice), None
            self.doubts, self.judged = self.doubts + close, self.judged + 1
            if close and splice.discard(req, DOUBTED):
                self.count("doubts")
                doubted.append(req)
        return doubted
