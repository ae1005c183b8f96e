"""The tokenizer process: checks the contract on the way in, unwraps it on the way out."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Iterator
from typing import Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager as stock_init
from sglang.srt.managers.io_struct import GenerateReqInput, SetInternalStateReq
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from rksc_sglang.config import RkscConfig
from rksc_sglang.contract import KEY, ContractError, RequestContract, contract_of
from rksc_sglang.rsbcm.policy import POLICIES
from rksc_sglang.rsbcm.trace import Tenant
from rksc_sglang.serving.evicting import Reports, encode
from rksc_sglang.serving.metrics import FRONTEND_COUNTERS, Counters

#: ``meta_info["rksc"]`` of the HTTP request being answered, by request id; set per request by
#: :class:`rksc_sglang.serving.http.RkscMiddleware`.
response_infos: contextvars.ContextVar[dict[str, dict[str, Any]] | None] = contextvars.ContextVar(
    "rksc_response_infos", default=None
)


def contracts_of(sampling_params: Any) -> Iterator[RequestContract]:
    """The contracts inside the sampling parameters of one request or of a batch of requests.

    Raises:
        ContractError: one of them is malformed.
    """
    for params in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        contract = contract_of(params)
        if contract is not None:
            yield contract


class RkscTokenizerManager(TokenizerManager):
    """SGLang's tokenizer manager with the request contract at its door."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = RkscConfig.from_env()
        assert config is not None, "launched only with a configuration"
        self.rksc_config = config
        self.rksc_reports: set[asyncio.Task] = set()
        self.rksc_counters = Counters(
            FRONTEND_COUNTERS, self.metrics_collector.labels if self.enable_metrics else None
        )

    def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        if isinstance(obj, GenerateReqInput):
            self.check_contracts(obj.sampling_params)
        responses = super().generate_request(obj, request)
        infos = response_infos.get()
        return responses if infos is None else _noting(responses, infos)

    def validate_request(self, obj: GenerateReqInput) -> None:
        """Before the response begins, where SGLang asks for it: as ``check_contracts``."""
        self.check_contracts(obj.sampling_params)

    def check_contracts(self, sampling_params: Any) -> None:
        """Raise ContractError, which SGLang's routes answer with HTTP 400, for a malformed one."""
        try:
            for _ in contracts_of(sampling_params):
                pass
        except ContractError:
            self.rksc_counters.add("rejected_requests")
            raise

    def update_request_meta_info(
        self,
        meta_info: dict[str, Any],
        state: Any,
        customized_info: dict[str, list],
        index: int,
        finish_reason: dict[str, Any] | None,
    ) -> None:
        # SGLang accumulates lists, one element a token; ours is one object a request.
        others = {key: values for key, values in customized_info.items() if key != KEY}
        super().update_request_meta_info(meta_info, state, others, index, finish_reason)
        if customized_info.get(KEY) and customized_info[KEY][index]:
            meta_info[KEY] = customized_info[KEY][index][0]

    def abort_branches(self, group: str, branches: set[int], tenant: Tenant) -> list[int]:
        """Abort the running requests of these branches, within one tenant's namespace.

        Returns:
            The branches that had a running request.
        """
        aborted = []
        for rid, state in list(self.rid_to_state.items()):
            if not isinstance(state.obj, GenerateReqInput) or any(
                (getattr(state.obj, key) or None) != value
                for key, value in zip(("extra_key", "cache_salt"), tenant)
            ):
                continue
            for contract in contracts_of(state.obj.sampling_params):
                if contract.group == group and contract.branch in branches:
                    self.abort_request(rid)
                    self.rksc_counters.add("aborted_branches")
                    aborted.append(contract.branch)
        return sorted(aborted)

    def report(self, tenant: Tenant, reports: Reports) -> None:
        """Tell the schedulers, without waiting for them, where somebody listens."""
        if self.server_args.radix_eviction_policy not in POLICIES and not self.rksc_config.trace:
            return
        request = SetInternalStateReq(server_args=encode(tenant, reports))
        task = asyncio.create_task(self.set_internal_state(request))
        self.rksc_reports.add(task)  # or it may be collected before it is done
        task.add_done_callback(self.rksc_reports.discard)


async def _noting(
    responses: AsyncIterator[Any], infos: dict[str, dict[str, Any]]
) -> AsyncIterator[Any]:
    """The responses, with their ``meta_info["rksc"]`` also in ``infos``."""
    async for response in responses:
        for one in response if isinstance(response, list) else [response]:
            if KEY in one["meta_info"]:
                infos[one["meta_info"]["id"]] = one["meta_info"][KEY]
        yield response


def init_tokenizer_manager(server_args: Any, port_args: Any) -> Any:
    """``init_tokenizer_manager_func`` for SGLang's ``launch_server``."""
    return stock_init(server_args, port_args, TokenizerManagerClass=RkscTokenizerManager)
