"""The guard: which requests are shadowed, when, and what is made of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rksc_sglang.serving import guard as guard_module
from rksc_sglang.serving.guard import Guard, Limits
from rksc_sglang.serving.probe import LONG, SHORT, CostProbe
from rksc_sglang.serving.splicing import SpliceState

VOCABULARY = 50
EXTEND = SimpleNamespace(is_extend=lambda: True)


class LogitsProcessor(nn.Module):
    def forward(self, logits):
        return SimpleNamespace(next_token_logits=logits)


@pytest.fixture
def server(make_req, monkeypatch):
    """A guard that shadows all, on a clock of its own; ``forward`` is a pass of the model."""
    clock = [100.0]
    monkeypatch.setattr(guard_module.time, "monotonic", lambda: clock[0])
    submitted, counts = [], []
    model = nn.Module()
    model.logits_processor = LogitsProcessor()
    guard = Guard(1.0, Limits(0.05, 0.05), VOCABULARY, submitted.append, counts.append)
    guard.watch(model)

    def forward(reqs, logits):
        for req in reqs:
            req.refresh_fill_ids()
            req.extend_end = len(req.full_untruncated_fill_ids)
        guard.batch = SimpleNamespace(reqs=reqs, forward_mode=EXTEND)
        guard.on_busy()
        model.logits_processor(torch.stack(logits))

    def spliced(rid, tenant=None, tokens=30):
        req = make_req(rid, range(60), extra_key=tenant)
        splice = SpliceState(rid, 0.5, spliced_tokens=tokens)
        req.rksc = SimpleNamespace(splice=splice)
        return req

    def idle(seconds):
        guard.on_idle()
        clock[0] += seconds
        guard.on_idle()

    return SimpleNamespace(**locals())


def peaked(token):
    logits = torch.zeros(VOCABULARY)
    logits[token] = 8.0
    return logits


def test_a_shadow_runs_only_after_a_second_without_work(server):
    server.forward([server.spliced("a")], [peaked(1)])
    server.idle(0.4)
    assert not server.submitted
    server.idle(1.1)
    (shadow,) = server.submitted
    assert list(shadow.origin_input_ids) == list(range(60))
    assert shadow.skip_radix_cache_insert


def test_work_in_between_starts_the_wait_again(server):
    server.forward([server.spliced("a")], [peaked(1)])
    server.idle(0.6)
    server.forward([server.spliced("b", tokens=0)], [peaked(1)])
    server.idle(0.6)
    assert not server.submitted


def test_what_was_not_spliced_is_not_shadowed(server):
    server.forward([server.spliced("a", tokens=0)], [peaked(1)])
    server.idle(2)
    assert not server.submitted


def test_only_so_many_wait(server):
    for number in range(40):
        server.forward([server.spliced(str(number))], [peaked(1)])
    assert server.guard.to_dict()["waiting"] == guard_module.MAX_WAITING


def rounds(server, tenant, count, served, exact):
    for number in range(count):
        if not server.guard.allows((tenant, None)):
            return number
        server.forward([server.spliced(f"{tenant}{number}", tenant)], [served])
        server.idle(1.1)
        server.forward([server.submitted.pop()], [exact])
    return count


def test_harm_ends_sharing_for_that_tenant_alone(server):
    assert rounds(server, "harmed", 60, peaked(1), peaked(2)) < 20
    assert not server.guard.allows(("harmed", None))
    assert server.guard.allows(("other", None))
    assert server.counts.count("guard_trips") == 1
    names = server.guard.to_dict()["tenants"]
    assert "harmed" not in str(names)  # what names a tenant may be its secret


def test_what_is_equal_never_ends_it(server):
    assert rounds(server, None, 60, peaked(1), peaked(1) + 0.01) == 60
    monitor = server.guard.to_dict()["tenants"]["default"]
    assert monitor["kl"]["count"] == 60
    assert not monitor["tripped"]


def test_the_cost_of_a_pass_is_fitted_from_passes_that_ran_alone(make_req):
    submitted, fitted = [], []
    probe = CostProbe(VOCABULARY, 4096, submitted.append, lambda *points: fitted.append(points))
    passes = 10
    probe.on_idle(passes)
    passes += 2  # somebody else's request ran too: this one does not count
    probe.on_idle(passes)
    while not fitted:
        passes += 1
        probe.on_idle(passes)
    assert [len(req.origin_input_ids) for req in submitted] == [SHORT, SHORT, SHORT, LONG, LONG]
    ((short, _), (long, _)) = fitted[0]
    assert (short, long) == (SHORT, LONG)
    probe.on_idle(passes)
    assert len(fitted) == 1
