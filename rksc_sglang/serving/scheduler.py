"""The scheduler process: SGLang's scheduler with RKSC on its extension points."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import scheduler as stock
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from rksc_sglang import compat
from rksc_sglang.asks.root_first import RootFirstPrefillAdder, make_adder_class
from rksc_sglang.config import RkscConfig
from rksc_sglang.contract import KEY, RequestContract, ResponseInfo, contract_of
from rksc_sglang.serving.features import decide, fallback_reason
from rksc_sglang.serving.metrics import SCHEDULER_COUNTERS, Counters
from rksc_sglang.serving.radix_cache import RkscRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GetInternalStateReq, TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder


class RequestState:
    """What the scheduler keeps of RKSC for one request; ``req.rksc``."""

    def __init__(
        self, contract: RequestContract | None, fallback: str | None, num_layers: int
    ) -> None:
        self.contract = contract
        self.fallback = fallback
        self.num_layers = num_layers
        self.held = False

    def response_info(self, req: Req) -> dict[str, Any]:
        return ResponseInfo(
            exact_tokens=req.cached_tokens,
            recomputed_tokens=len(req.origin_input_ids) - req.cached_tokens,
            num_layers=self.num_layers,
            fallback=self.fallback,
        ).to_dict()


def state_of(req: Req) -> RequestState | None:
    """RKSC's state of a request; None for what is no generation, embeddings for instance."""
    return getattr(req, "rksc", None)


class RkscOutputStreamer(SchedulerOutputStreamer):
    """Adds ``meta_info["rksc"]`` to the responses of requests that carried the contract."""

    has_additional_customized_info = True

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list]:
        infos = [_info_of(req) for req in reqs]
        return {KEY: infos} if any(infos) else {}

    def is_request_level_customized_info_key(self, key: str) -> bool:
        return key == KEY or super().is_request_level_customized_info_key(key)


def _info_of(req: Req) -> list[dict[str, Any]]:
    state = state_of(req)
    return [state.response_info(req)] if state is not None and state.contract is not None else []


class RkscScheduler(stock.Scheduler):
    """Replaces ``sglang.srt.managers.scheduler.Scheduler`` through SGLang's hook registry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = RkscConfig.from_env()
        assert config is not None, "the plugin registers this class only with a configuration"
        self.rksc_config = config
        super().__init__(*args, **kwargs)
        self.rksc_features = decide(
            config,
            has_radix_cache=isinstance(self.tree_cache, RkscRadixCache),
            has_mamba=self.tree_cache.supports_mamba(),
        )
        collector = self.metrics_collector
        self.rksc_counters = Counters(SCHEDULER_COUNTERS, collector and collector.labels)
        self.rksc_adder_class = self._make_adder_class()
        compat.check_scheduler(self)

    def _make_adder_class(self) -> type[RootFirstPrefillAdder] | None:
        if not any(feature.name == "root_first" and feature.on for feature in self.rksc_features):
            return None
        return make_adder_class(
            self.rksc_config.root_first_min_tokens,
            on_held=self._count_held,
            on_error=lambda where: self.rksc_counters.add("errors"),
        )

    def _count_held(self, req: Req) -> None:
        state = state_of(req)
        if state is not None and not state.held:
            state.held = True
            self.rksc_counters.add("held_requests")

    # SGLang's extension points

    def get_prefill_adder_class(self) -> type[PrefillAdder]:
        return self.rksc_adder_class or super().get_prefill_adder_class()

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return RkscOutputStreamer

    def _create_generation_req(
        self, recv_req: TokenizedGenerateReqInput, *args: Any, **kwargs: Any
    ) -> Req:
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        # The tokenizer process has refused malformed contracts already.
        contract = contract_of({"custom_params": req.sampling_params.custom_params})
        fallback = fallback_reason(contract, self.rksc_features) if contract else None
        req.rksc = RequestState(contract, fallback, self.model_config.num_hidden_layers)
        if contract is not None:
            self.rksc_counters.add("requests")
        if fallback is not None:
            self.rksc_counters.add("fallbacks")
        return req

    def get_init_info(self) -> dict[str, Any]:
        # For the launcher's banner.
        return {**super().get_init_info(), KEY: self.rksc_status()}

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        output = super().get_internal_state(recv_req)
        output.internal_state[KEY] = self.rksc_status()
        return output

    def rksc_status(self) -> dict[str, Any]:
        cache = self.tree_cache
        return {
            "features": {
                feature.name: {"on": feature.on, "reason": feature.reason}
                for feature in self.rksc_features
            },
            "num_layers": self.model_config.num_hidden_layers,
            "counters": self.rksc_counters.snapshot(),
            "cache": {
                "backend": type(cache).__name__,
                "page_size": self.page_size,
                "capacity_tokens": self.max_total_num_tokens,
                "timings": cache.timings() if isinstance(cache, RkscRadixCache) else None,
            },
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
