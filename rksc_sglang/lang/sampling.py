"""Sampling parameters that carry the request contract.

SGLang's frontend copies a program's default sampling parameters into each request, and asks them
for the request's JSON. A subclass is all it takes for the contract to travel with every ``gen`` of
a branch, on any of SGLang's executors and backends.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.lang.ir import SglSamplingParams

from rksc_sglang.contract import KEY, RequestContract


@dataclasses.dataclass
class BranchSamplingParams(SglSamplingParams):
    contract: RequestContract | None = None

    def to_srt_kwargs(self) -> dict[str, Any]:
        kwargs = super().to_srt_kwargs()
        if self.contract is not None:
            kwargs["custom_params"] = {KEY: self.contract.to_dict()}
        return kwargs

    @classmethod
    def of_branch(
        cls, defaults: SglSamplingParams, contract: RequestContract, *, confidence: bool
    ) -> BranchSamplingParams:
        """The defaults of a program, for one of its branches.

        Args:
            confidence: have the server return each token's highest probability, unless the
                program asks for log-probabilities in its own way.
        """
        values = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(SglSamplingParams)}
        params = cls(**values, contract=contract)
        if confidence and params.return_logprob is None:
            params.return_logprob = True
            params.top_logprobs_num = params.top_logprobs_num or 1
        return params
