"""Counters of one process, for ``GET /rksc/status`` and, with ``--enable-metrics``, Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

#: Counted in the scheduler process.
SCHEDULER_COUNTERS = {
    "requests": "requests that carried an rksc contract",
    "held_requests": "requests that root-first fan-out held back at least once",
    "gathered_groups": "groups sent together of which all had arrived before the first pass",
    "scattered_groups": "groups sent together that were not waited for any longer",
    "joined_prefixes": "requests that read a prefix in the pass that computed it for another one",
    "fallbacks": "requests that asked for an approximation and were served exactly",
    "spliced_requests": "requests that took over KV computed behind another context",
    "stages": "prefills of our own that prepared a splice",
    "joined_splices": "splices whose head was computed in the pass that read them",
    "gate_refusals": "runs of cached text not spliced because their contexts were too different",
    "doubts": "spliced requests computed again because their first token was nearly a tie",
    "layer_exits": "verifications that stopped at a middle layer",
    "shadows": "spliced requests that the guard computed again exactly",
    "guard_trips": "tenants for whom the guard ended splicing",
    "errors": "failures inside RKSC that were answered by exact serving",
}

#: Counted in the tokenizer process.
FRONTEND_COUNTERS = {
    "rejected_requests": "requests refused for a malformed rksc contract",
    "aborted_branches": "running requests stopped because their branch was pruned",
}


class Counters:
    """Monotonic counters; the Prometheus ones are named ``rksc:NAME_total``.

    Args:
        names: counter name -> help text.
        prometheus_labels: label values for Prometheus, None to count for the status page only.
    """

    def __init__(
        self, names: Mapping[str, str], prometheus_labels: Mapping[str, Any] | None = None
    ) -> None:
        self._counts: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._prometheus: dict[str, Any] = {}
        if prometheus_labels is not None:
            # SGLang sets PROMETHEUS_MULTIPROC_DIR first, so this must not be imported earlier.
            from prometheus_client import Counter as PrometheusCounter

            labels = {name: str(value) for name, value in prometheus_labels.items()}
            for name, text in names.items():
                counter = PrometheusCounter(f"rksc:{name}_total", text, list(labels))
                self._prometheus[name] = counter.labels(**labels)

    def add(self, name: str, amount: int = 1) -> None:
        if name not in self._counts:
            raise KeyError(f"no counter {name!r}")
        self._counts[name] += amount
        if name in self._prometheus:
            self._prometheus[name].inc(amount)

    def snapshot(self) -> dict[str, int]:
        return dict(self._counts)
