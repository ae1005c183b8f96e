"""Verifications inside the scheduler: which may stop at a middle layer, and which did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rksc_sglang.cgee.exit_rule import ExitRule, Observe, check_layers, paper_rule
from rksc_sglang.cgee.layer_exit import Candidate, LayerExit, UnsupportedModel
from rksc_sglang.cgee.profile import ExitProfileError, profile_for
from rksc_sglang.config import RkscConfig
from rksc_sglang.contract import RequestContract
from rksc_sglang.serving.features import Unsupported, refuse_beside

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

#: Attention backends that were tried with batches that become smaller in the middle of a pass.
BACKENDS = ("rksc_cpu", "torch_native")


class ExitState:
    """Of one verification; ``req.rksc.exit``.

    Attributes:
        labels: token ids.
        rule: when it stops.
        layer: where it stopped.
        scores: [labels] estimates of the last layer's logits, up to a constant, where it stopped.
        seen: [checks][n] what the rule read.
    """

    def __init__(self, labels: tuple[int, ...], rule: ExitRule) -> None:
        self.labels = labels
        self.rule = rule
        self.layer: int | None = None
        self.scores: list[float] | None = None
        self.seen: list[list[float]] = []


class Verifications:
    """Layer exit for one scheduler.

    Args:
        count: called with a counter's name.
        on_error: called with a word for where.

    Attributes:
        batch: in its forward pass.

    Raises:
        Unsupported: with the reason.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        config: RkscConfig,
        count: Callable[[str], None],
        on_error: Callable[[str], None],
    ) -> None:
        self.batch: ScheduleBatch | None = None
        self.count, self.on_error = count, on_error
        self.mode = config.mode
        runner = scheduler.tp_worker.model_runner
        num_layers = scheduler.model_config.num_hidden_layers
        self.observe, self.paper = Observe(check_layers(num_layers)), paper_rule(num_layers)
        refuse_beside(scheduler, allowed=("the hierarchical cache", "session-aware caching"))
        backend = scheduler.server_args.attention_backend
        if backend not in BACKENDS:
            raise Unsupported(f"not with the attention backend {backend}")
        try:
            found = profile_for(config.profile, Path(scheduler.model_config.model_path))
            self.profile, self.skip, self.merge = found.exit, found.skip, found.merge
            self.exit = LayerExit(runner.model, runner.attn_backend, self._candidates, on_error)
        except (UnsupportedModel, ExitProfileError) as error:
            raise Unsupported(str(error)) from error

    def state_of(
        self, received: TokenizedGenerateReqInput, contract: RequestContract | None
    ) -> tuple[ExitState | None, str | None]:
        """What a new request gets, and why it does not stop early where it asked to."""
        try:
            return self._state_of(received, contract)
        except Exception:
            logger.exception("RKSC: a verification runs in full")
            self.on_error("layer_exit")
            return None, "layer_exit: an error inside RKSC"

    def _state_of(
        self, received: TokenizedGenerateReqInput, contract: RequestContract | None
    ) -> tuple[ExitState | None, str | None]:
        verify = contract.verify if contract is not None else None
        if verify is None:
            return None, None
        asked = verify.exit
        if asked is None:
            asked = "paper" if self.mode == "paper" else "layer" if self.profile else "off"
        if asked == "off":
            return None, None
        if verify.profile and verify.profile != (self.profile and self.profile.model):
            return None, "layer_exit: this server's profile is not the one asked for"
        tokens = received.token_ids_logprob or []
        if len(tokens) != len(verify.labels):
            return None, "layer_exit: token_ids_logprob must name one token for each label"
        if received.sampling_params.max_new_tokens > 1:
            return None, "layer_exit: only with max_new_tokens 1, nothing can follow"
        if received.return_hidden_states or received.logprob_start_len >= 0:
            return None, "layer_exit: not with hidden states or logprobs of the prompt"
        if asked == "observe":
            return ExitState(tuple(tokens), self.observe), None
        if asked == "paper":
            return ExitState(tuple(tokens), self.paper), None
        if self.profile is None:
            return None, "layer_exit: not calibrated for this model"
        if tuple(tokens) != self.profile.labels:
            return None, "layer_exit: not calibrated for these labels"
        rule = self.profile.unanimous_rule if verify.unanimous else self.profile.rule
        return ExitState(self.profile.labels, rule), None

    def _candidates(self, forward: ForwardBatch) -> Sequence[Candidate]:
        batch = self.batch
        if batch is None or forward.batch_size != len(batch.reqs):
            return []
        found = []
        for row, req in enumerate(batch.reqs):
            state = getattr(getattr(req, "rksc", None), "exit", None)
            if state is None or req.output_ids:
                continue
            if req.extend_end == len(req.full_untruncated_fill_ids):  # its last chunk
                report = _reporter(req, state, self.count)
                found.append(Candidate(row, state.labels, state.rule, report))
        return found

    def to_dict(self) -> dict[str, Any]:
        """For the status page, where the frontend finds skip gate and merge thresholds."""
        exit_, skip, merge = self.profile, self.skip, self.merge
        return {
            "exit": exit_
            and {
                "risk": exit_.risk,
                "delta": exit_.delta,
                "labels": list(exit_.labels),
                "layers": list(exit_.rule.layers),
            },
            "skip": skip and {"risk": skip.risk, "delta": skip.delta, "gate": asdict(skip.gate)},
            "merge": merge
            and {"risk": merge.risk, "delta": merge.delta, "thresholds": merge.thresholds},
        }


def _reporter(
    req: Req, state: ExitState, count: Callable[[str], None]
) -> Callable[[int | None, list[float], list[list[float]]], None]:
    def report(layer: int | None, scores: list[float], seen: list[list[float]]) -> None:
        state.seen = seen
        if layer is not None:
            state.layer, state.scores = layer, scores
            # Its KV ends at this layer: it is freed with the request, and never found again.
            req.skip_radix_cache_insert = True
            count("layer_exits")

    return report
