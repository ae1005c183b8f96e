"""What is known of the splice of one request; ``req.rksc.splice``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from rksc_sglang.serving.splicing_cache import Load


@dataclass(eq=False)
class SpliceState:
    """The splice of one request.

    Attributes:
        tau: least similarity of its context and a donor's.
        exact_tokens: cached exact prefix when the request was first looked at.
        private: KV slots, [n] int64, that its stages left behind the exact prefix, from position
            ``private_start`` on.
        stage: the stage that it waits for.
        staged_tokens: computed by stages.
        spliced_tokens, similarity: what was taken over, at which least similarity.
        skip_until: what is in front of this position is computed: the gate has refused it, or it
            is asked for often.
        refusals: how often, of the run that is looked at.
        reason: why nothing (more) is spliced.
        joins: a stage may share its pass with what follows it.
        refused: by the gate, in the pass that computed the answer.
        lead: nats by which the first token of the spliced prompt leads, on the device.
        discarded: the answer was; another request with the same id gives it.
        stopped: nothing more is spliced; what a stage of it still computes is of no use.
    """

    rid: str
    tau: float
    exact_tokens: int | None = None
    private: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    private_start: int = 0
    stage: Req | None = None
    staged_tokens: int = 0
    spliced_tokens: int = 0
    similarity: float | None = None
    skip_until: int = 0
    refusals: int = 0
    reason: str | None = None
    joins: bool = True
    refused: bool = False
    lead: torch.Tensor | None = None
    discarded: bool = False
    stopped: bool = False
    stages: int = 0
    nothing_at: tuple[int, int] | None = None  # index version and position of a vain search

    def accepts(self, similarity: float | None) -> bool:
        return self.tau <= 0 or (similarity is not None and similarity >= self.tau)

    def took(self, load: Load) -> None:
        """A load is in place."""
        self.spliced_tokens += load.stop - load.first
        if load.similarity is not None:
            self.similarity = min(load.similarity, self.similarity or 1.0)

    def discard(self, req: Req, reason: str) -> bool:
        """Let the request, whose pass has run, give no answer; False where it gives none anyway."""
        if req.finished() or req.to_finish is not None or req.is_retracted:
            return False
        req.discard_output_reason = FINISH_ABORT(reason)
        self.discarded = True
        return True

    def give_up(self, reason: str) -> None:
        """Serve what is left exactly; what was spliced so far is lost."""
        self.stopped = True
        self.reason = reason
        self.refused = False
        self.spliced_tokens = 0
        self.similarity = None
