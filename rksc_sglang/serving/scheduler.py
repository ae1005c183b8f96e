"""The scheduler process: SGLang's scheduler with RKSC on its extension points."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import scheduler as stock
from sglang.srt.managers.io_struct import SetInternalStateReqOutput
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from rksc_sglang import compat
from rksc_sglang.asks.cost import CostModel
from rksc_sglang.asks.gathering import Gathering
from rksc_sglang.asks.root_first import RootFirstPrefillAdder, make_adder_class
from rksc_sglang.config import RkscConfig
from rksc_sglang.contract import DOUBTED, KEY, RequestContract, ResponseInfo, contract_of
from rksc_sglang.rsbcm.trace import TraceWriter
from rksc_sglang.serving.admission import SplicingPrefillAdder
from rksc_sglang.serving.doubt import Doubt
from rksc_sglang.serving.evicting import build_sampler, check_eviction, receive
from rksc_sglang.serving.features import Unsupported, decide, fallback_reason
from rksc_sglang.serving.first_logits import FirstLogits
from rksc_sglang.serving.guard import Guard, Limits
from rksc_sglang.serving.internal import Quiet, is_internal
from rksc_sglang.serving.joined import REFUSED
from rksc_sglang.serving.metrics import SCHEDULER_COUNTERS, Counters
from rksc_sglang.serving.probe import CostProbe
from rksc_sglang.serving.radix_cache import RkscRadixCache, namespace_of
from rksc_sglang.serving.splice_state import SpliceState
from rksc_sglang.serving.splice_support import build_splicer
from rksc_sglang.serving.splicing import Splicer
from rksc_sglang.serving.verifying import ExitState, Verifications

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import (
        GetInternalStateReq,
        SetInternalStateReq,
        TokenizedGenerateReqInput,
    )
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder

#: Between two looks at who has arrived while all wait for others: the core is theirs that send.
ARRIVAL_SECONDS = 0.0005


class RequestState:
    """What the scheduler keeps of RKSC for one request; ``req.rksc``."""

    def __init__(
        self,
        contract: RequestContract | None,
        fallback: str | None,
        num_layers: int,
        splice: SpliceState | None,
        exit_: ExitState | None,
        received: TokenizedGenerateReqInput | None,
    ) -> None:
        self.contract = contract
        self.fallback = fallback
        self.num_layers = num_layers
        self.splice = splice
        self.exit = exit_
        self.received = received  # of a splice: what it is made from again if it is discarded
        self.signature: list[float] | None = None
        self.held = False

    def response_info(self, req: Req) -> dict[str, Any]:
        spliced = self.splice.spliced_tokens if self.splice else 0
        exit_, verify = self.exit, self.contract.verify if self.contract else None
        observed = exit_ is not None and verify is not None and verify.exit == "observe"
        return ResponseInfo(
            share="similar" if spliced else "exact",
            exact_tokens=req.cached_tokens - spliced,
            spliced_tokens=spliced,
            recomputed_tokens=len(req.origin_input_ids) - req.cached_tokens,
            similarity=self.splice.similarity if self.splice else None,
            exit_layer=exit_.layer if exit_ else None,
            num_layers=self.num_layers,
            label_scores=exit_.scores if exit_ else None,
            states=exit_.seen if exit_ and observed else None,
            signature=self.signature,
            fallback=self.fallback or (self.splice.reason if self.splice else None),
        ).to_dict()


def state_of(req: Req) -> RequestState | None:
    """RKSC's state of a request; None for requests of our own, and for embeddings."""
    state = getattr(req, "rksc", None)
    return state if isinstance(state, RequestState) else None


class RkscOutputStreamer(SchedulerOutputStreamer):
    """Adds ``meta_info["rksc"]`` to the responses of requests that carried the contract."""

    has_additional_customized_info = True

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list]:
        infos = [_info_of(req) for req in reqs]
        return {KEY: infos} if any(infos) else {}

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == KEY or super().is_request_level_customized_info_key(key)


class SplicingOutputStreamer(RkscOutputStreamer):
    """Answers nobody for the requests of our own, nor with discarded answers."""

    def stream_output(
        self, reqs: list[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        answered = [r for r in reqs if not is_internal(r) and not _is_discarded(r)]
        super().stream_output(answered, return_logprob, skip_req)


def _is_discarded(req: Req) -> bool:
    state = state_of(req)
    return state is not None and state.splice is not None and state.splice.discarded


def _info_of(req: Req) -> list[dict[str, Any]]:
    state = state_of(req)
    # What was approximated is said, also to those who did not ask.
    if state is None or (
        state.contract is None and not (state.splice and state.splice.spliced_tokens)
    ):
        return []
    return [state.response_info(req)]


class RkscScheduler(stock.Scheduler):
    """Replaces ``sglang.srt.managers.scheduler.Scheduler`` through SGLang's hook registry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = RkscConfig.from_env()
        assert config is not None, "the plugin registers this class only with a configuration"
        self.rksc_config = config
        # Where passes are asynchronous: until they are launched.
        self.rksc_prefill_seconds = self.rksc_decode_seconds = 0.0
        self.rksc_shortest_decode = float("inf")
        self.rksc_quiet = Quiet()
        super().__init__(*args, **kwargs)
        collector = self.metrics_collector
        self.rksc_counters = Counters(SCHEDULER_COUNTERS, collector and collector.labels)
        self.rksc_splicer, splice_reason = self._build_splicer()
        self.rksc_verifications, exit_reason = self._build_verifications()
        eviction_reason, mass_reason = self._build_eviction()
        if config.trace and isinstance(self.tree_cache, RkscRadixCache):
            self.tree_cache.trace = TraceWriter(Path(config.trace))
        self.rksc_features = decide(
            config,
            has_radix_cache=isinstance(self.tree_cache, RkscRadixCache),
            has_mamba=self.tree_cache.supports_mamba(),
            splice_reason=splice_reason,
            exit_reason=exit_reason,
            eviction_reason=eviction_reason,
            mass_reason=mass_reason,
        )
        self.rksc_gathering = Gathering(self._patience, self.rksc_counters.add)
        self.rksc_adder_class = self._make_adder_class()
        self.rksc_again: str | None = None  # why the request that arrives has arrived before
        self.rksc_first_logits: FirstLogits | None = None
        self.rksc_doubt: Doubt | None = None
        self.rksc_guard: Guard | None = None
        self.rksc_probe: CostProbe | None = None
        if self.rksc_splicer is not None:
            self._watch_splices(self.rksc_splicer)
        compat.check_scheduler(self)

    def _build_splicer(self) -> tuple[Splicer | None, str | None]:
        """The splicer, or None and the reason."""
        if not self.rksc_config.approximate:
            return None, f"mode {self.rksc_config.mode}"
        try:
            return build_splicer(self, self.rksc_config, self.rksc_counters.add), None
        except Unsupported as error:
            return None, str(error)

    def _build_verifications(self) -> tuple[Verifications | None, str | None]:
        """What lets verifications stop at a middle layer, or None and the reason."""
        if not self.rksc_config.approximate:
            return None, f"mode {self.rksc_config.mode}"
        count = self.rksc_counters.add
        try:
            return Verifications(self, self.rksc_config, count, self._count_error), None
        except Unsupported as error:
            return None, str(error)

    def _build_eviction(self) -> tuple[str | None, str | None]:
        """Why RKSC's eviction policies are not on, and why no attention mass is measured."""
        self.rksc_sampler = None
        try:
            cache = check_eviction(self)
        except Unsupported as error:
            return str(error), str(error)
        cache.on_error = self._count_error
        try:
            self.rksc_sampler = build_sampler(self, cache, self._count_error)
        except Unsupported as error:
            return None, str(error)
        return None, None

    def _make_adder_class(self) -> type[RootFirstPrefillAdder] | None:
        root_first = any(f.name == "root_first" and f.on for f in self.rksc_features)
        min_tokens = self.rksc_config.root_first_min_tokens if root_first else None
        common = (min_tokens, self._awaits, self._count_held, self._count_error)
        if self.rksc_splicer is not None:
            splicer = self.rksc_splicer
            return make_adder_class(*common, base=SplicingPrefillAdder, splicer=splicer)
        return make_adder_class(*common) if root_first else None

    def _awaits(self, req: Req) -> bool:
        """Whether others are on their way with which the request was sent together."""
        state = state_of(req)
        together = state.contract.together if state is not None and state.contract else None
        return together is not None and self.rksc_gathering.awaits(namespace_of(req), together)

    def _patience(self) -> float:
        """Seconds that a pass of few tokens takes here.

        0 where schedulers must agree without a word, or do not see all requests.
        """
        args = self.server_args
        alone = args.tp_size == args.pp_size == args.dp_size == 1
        return self.rksc_shortest_decode if alone and self.rksc_decode_seconds else 0.0

    def _watch_splices(self, splicer: Splicer) -> None:
        def fit_cost(short: tuple[int, float], long: tuple[int, float]) -> None:
            earlier = splicer.cost.copy_seconds if splicer.cost is not None else float("inf")
            copy = min(splicer.measure_copy(), earlier)
            splicer.cost = CostModel.fit(short, long, copy)

        config, model = self.rksc_config, splicer.model
        limits = Limits(config.guard_max_disagreement, config.guard_max_kl)

        def submit(req: Req) -> None:
            self.waiting_queue.append(req)  # another list after each pass

        count = self.rksc_counters.add
        doubt = Doubt(splicer.thresholds.margin, count)
        guard = Guard(config.guard_share, limits, model, submit, doubt, count)

        def show_signature(req: Req, logits: Any) -> None:
            state = state_of(req)
            if state is not None and state.contract is not None and state.contract.signature:
                last = len(req.full_untruncated_fill_ids) - 1
                slot = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, last]
                state.signature = splicer.signatures.rows[slot.long()].float().tolist()

        self.rksc_first_logits = FirstLogits(
            self.tp_worker.model_runner.model,
            (doubt.on_first_logits, guard.on_first_logits, show_signature),
            self._count_error,
        )
        longest = min(self.max_req_input_len - 1, self.max_total_num_tokens // 4)
        self.rksc_probe = CostProbe(model, longest, submit, fit_cost)
        self.rksc_doubt, self.rksc_guard = doubt, guard
        splicer.guard, splicer.doubt = guard, doubt

    def _count_error(self, where: str) -> None:
        self.rksc_counters.add("errors")

    def _count_held(self, req: Req) -> None:
        state = state_of(req)
        if state is not None and not state.held:
            state.held = True
            self.rksc_counters.add("held_requests")

    # SGLang's extension points

    def get_prefill_adder_class(self) -> type[PrefillAdder]:
        return self.rksc_adder_class or super().get_prefill_adder_class()

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return SplicingOutputStreamer if self.rksc_config.approximate else RkscOutputStreamer

    def _create_generation_req(
        self, recv_req: TokenizedGenerateReqInput, *args: Any, **kwargs: Any
    ) -> Req:
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        # The tokenizer process has refused malformed contracts already.
        contract = contract_of({"custom_params": req.sampling_params.custom_params})
        fallback = fallback_reason(contract, self.rksc_features) if contract else None
        splice, exit_ = self._splice_state(req, contract), None
        if self.rksc_verifications is not None:
            exit_, reason = self.rksc_verifications.state_of(recv_req, contract)
            fallback = fallback or reason
        req.rksc = RequestState(
            contract,
            fallback,
            self.model_config.num_hidden_layers,
            splice,
            exit_,
            recv_req if splice is not None else None,
        )
        if self.rksc_again is None:  # else it has been counted before
            if self.rksc_splicer is not None and splice is not None:
                self.rksc_splicer.arrived(req)
            if contract is not None and contract.together is not None:
                self.rksc_gathering.arrived(namespace_of(req), contract.together)
            self.rksc_counters.add("requests", contract is not None)
            self.rksc_counters.add("fallbacks", fallback is not None)
        return req

    def _splice_state(self, req: Req, contract: RequestContract | None) -> SpliceState | None:
        """For a request that may be spliced; None where it is served exactly."""
        if self.rksc_splicer is None or (contract is not None and contract.share == "exact"):
            return None
        # What is computed from more than the tokens' ids, or shown token by token.
        if (
            req.session is not None
            or req.input_embeds is not None
            or req.positional_embed_overrides is not None
            or req.token_type_ids is not None
            or req.return_hidden_states
            or req.return_routed_experts
        ):
            return None
        asked = contract.tau if contract is not None else None
        tau = self.rksc_splicer.thresholds.tau
        state = SpliceState(req.rid, tau if asked is None else asked)
        if self.rksc_again is not None:
            state.joins = False
            if self.rksc_again == DOUBTED:
                state.give_up(DOUBTED)
        return state

    def run_batch(self, batch: ScheduleBatch, pp_proxy_tensors: Any = None) -> Any:
        if self.rksc_verifications is not None:
            self.rksc_verifications.batch = batch
        if self.rksc_guard is not None and self.rksc_first_logits is not None:
            self.rksc_first_logits.batch = batch
        self.rksc_quiet.end()
        joined = self.rksc_splicer.joined if self.rksc_splicer is not None else None
        if joined is not None:
            joined.begin()
        start = time.perf_counter()
        result = super().run_batch(batch, pp_proxy_tensors)
        if joined is not None:
            joined.end()
        seconds = time.perf_counter() - start
        if batch.forward_mode.is_extend():
            self.rksc_prefill_seconds += seconds
        elif batch.forward_mode.is_decode():
            self.rksc_decode_seconds += seconds
            self.rksc_shortest_decode = min(self.rksc_shortest_decode, seconds)
        return result

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        discarded = self._discard(batch.reqs)
        super().process_batch_result(batch, result)
        for req, reason in discarded:
            self._serve_again(req.rksc.received, reason)

    def _discard(self, reqs: list[Req]) -> list[tuple[Req, str]]:
        """Of a batch that has run: the requests whose answers are discarded, and why."""
        if self.rksc_splicer is None or self.rksc_doubt is None:
            return []
        joined = self.rksc_splicer.joined
        refused = joined.review(reqs) if joined is not None else []
        doubted = self.rksc_doubt.review(reqs)
        return [*((req, REFUSED) for req in refused), *((req, DOUBTED) for req in doubted)]

    def _serve_again(self, received: TokenizedGenerateReqInput, reason: str) -> None:
        """Serve a request whose spliced answer was discarded; exactly, if it was doubted."""
        self.rksc_again = reason
        try:
            self.handle_generate_request(received)
        finally:
            self.rksc_again = None
        if self.waiting_queue and self.waiting_queue[-1].rid == received.rid:
            self.waiting_queue.insert(0, self.waiting_queue.pop())  # it has waited before

    def on_idle(self) -> None:
        if self.rksc_guard is not None and self.is_fully_idle():
            quiet = self.rksc_quiet.look()
            if self.rksc_probe is None or not self.rksc_probe.on_idle(self.forward_ct, quiet):
                self.rksc_guard.on_idle(quiet)
            if self.waiting_queue:
                return
        if self.waiting_queue:
            time.sleep(ARRIVAL_SECONDS)
        super().on_idle()

    def get_init_info(self) -> dict[str, Any]:
        # For the launcher's banner.
        return {**super().get_init_info(), KEY: self.rksc_status()}

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        output = super().get_internal_state(recv_req)
        output.internal_state[KEY] = self.rksc_status()
        return output

    def set_internal_state(self, recv_req: SetInternalStateReq) -> Any:
        cache = self.tree_cache
        if isinstance(cache, RkscRadixCache) and receive(cache, recv_req.server_args):
            return SetInternalStateReqOutput(updated=True)
        return super().set_internal_state(recv_req)

    def rksc_status(self) -> dict[str, Any]:
        cache = self.tree_cache
        return {
            "features": {
                feature.name: {"on": feature.on, "reason": feature.reason}
                for feature in self.rksc_features
            },
            "num_layers": self.model_config.num_hidden_layers,
            "counters": self.rksc_counters.snapshot(),
            "prefill_seconds": self.rksc_prefill_seconds,
            "decode_seconds": self.rksc_decode_seconds,
            "cache": {
                "backend": type(cache).__name__,
                "page_size": self.page_size,
                "capacity_tokens": self.max_total_num_tokens,
                "timings": cache.timings() if isinstance(cache, RkscRadixCache) else None,
            },
            "eviction": self._eviction_status(),
            "verify": self.rksc_verifications.to_dict() if self.rksc_verifications else None,
            "splice": self.rksc_splicer.to_dict() if self.rksc_splicer else None,
        }

    def _eviction_status(self) -> dict[str, Any] | None:
        cache = self.tree_cache
        if not isinstance(cache, RkscRadixCache):
            return None
        return {
            "policy": self.server_args.radix_eviction_policy,
            "evicted_tokens": cache.evicted_tokens,
            "freed_tokens": cache.freed_tokens,
            "life_cycle": cache.life_cycle.to_dict() if cache.life_cycle is not None else None,
            "mass_seconds": self.rksc_sampler.seconds if self.rksc_sampler is not None else None,
        }


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """``run_scheduler_process`` of SGLang, behind a check that the plugin took effect.

    SGLang only logs a plugin that raises; without this the server would come up without RKSC.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    try:
        compat.check_registrations()
    except compat.CompatError as error:
        sys.exit(f"rksc: error: {error}")
    stock.run_scheduler_process(*args, **kwargs)
