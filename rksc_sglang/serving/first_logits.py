"""What the model says about the first token of each request, shown to those who judge splices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

logger = logging.getLogger(__name__)

#: Called with a request whose prompt ends in this pass, and its logits, [vocab_size].
Listener = Callable[["Req", torch.Tensor], None]


class FirstLogits:
    """Reads a model's logits processor.

    Args:
        on_error: called, with a word for where, when a listener fails; the batch goes on.

    Attributes:
        batch: in its forward pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        listeners: Sequence[Listener],
        on_error: Callable[[str], None],
    ) -> None:
        self.batch: ScheduleBatch | None = None
        self.listeners = listeners
        self.on_error = on_error
        model.logits_processor.register_forward_hook(self._on_logits)

    def _on_logits(self, module: Any, args: Any, output: Any) -> None:
        try:
            self._tell(output.next_token_logits)
        except Exception:
            logger.exception("RKSC: first tokens were not looked at")
            self.on_error("first_logits")

    def _tell(self, logits: torch.Tensor | None) -> None:
        batch = self.batch
        if batch is None or not batch.forward_mode.is_extend() or logits is None:
            return
        for row, req in zip(logits, batch.reqs):
            if req.output_ids or req.extend_end != len(req.full_untruncated_fill_ids):
                continue  # decodes, or is a chunk that is not the last
            exit_ = getattr(req.rksc, "exit", None)
            if exit_ is not None and exit_.layer is not None:
                continue  # these logits are a middle layer's
            for listener in self.listeners:
                listener(req, row)
