"""Who watches splices: the guard's shadows, doubts about first tokens, the probe of costs."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import nn

from rksc_sglang.serving import guard as guard_module
from rksc_sglang.serving import internal
from rksc_sglang.serving import probe as probe_module
from rksc_sglang.serving.doubt import Doubt
from rksc_sglang.serving.first_logits import FirstLogits
from rksc_sglang.serving.guard import Guard, Limits
from rksc_sglang.serving.internal import IDLE_SECONDS, ModelFacts, Quiet
from rksc_sglang.serving.probe import LONG, PAUSE, REFINING_SECONDS, ROUNDS, SHORT, CostProbe
from rksc_sglang.serving.splice_state import SpliceState

VOCABULARY = 50
MODEL = ModelFacts(VOCABULARY, None)
EXTEND = SimpleNamespace(is_extend=lambda: True)


class LogitsProcessor(nn.Module):
    def forward(self, logits):
        return SimpleNamespace(next_token_logits=logits)


@pytest.fixture
def server(make_req):
    """A guard that shadows all; ``forward`` is a pass of the model."""
    submitted, counts = [], []
    model = nn.Module()
    model.logits_processor = LogitsProcessor()
    doubt = Doubt(0.2, counts.append)
    guard = Guard(1.0, Limits(0.05, 0.05), MODEL, submitted.append, doubt, counts.append)
    listeners = [doubt.on_first_logits, guard.on_first_logits]
    logits = FirstLogits(model, listeners, counts.append)

    def forward(reqs, rows):
        for req in reqs:
            req.refresh_fill_ids()
            req.extend_end = len(req.full_untruncated_fill_ids)
        logits.batch = SimpleNamespace(reqs=reqs, forward_mode=EXTEND)
        model.logits_processor(torch.stack(rows))

    def spliced(rid, tenant=None, tokens=30, tau=0.5, temperature=0.0):
        req = make_req(rid, range(60), extra_key=tenant)
        req.sampling_params = SamplingParams(temperature=temperature)
        req.sampling_params.normalize(None)
        splice = SpliceState(rid, tau, spliced_tokens=tokens)
        req.rksc = SimpleNamespace(splice=splice)
        return req

    def idle(seconds):
        guard.on_idle(0.0)
        guard.on_idle(seconds)

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


def test_what_stopped_at_a_middle_layer_is_not_judged(server):
    req = server.spliced("a")
    req.rksc.exit = SimpleNamespace(layer=4)
    server.forward([req], [torch.zeros(VOCABULARY)])
    server.idle(2)
    assert not server.submitted
    assert server.doubt.review([req]) == []


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


class Probed:
    """A server whose prefills take ``seconds(tokens)``, on a clock of its own."""

    def __init__(self, monkeypatch):
        self.clock, self.passes = 0.0, 0
        self.submitted, self.fitted = [], []
        self.seconds = lambda tokens: 0.1 + 0.001 * tokens
        monkeypatch.setattr(probe_module.time, "perf_counter", lambda: self.clock)
        self.probe = CostProbe(MODEL, 4096, self.submitted.append, self.on_fit)

    def on_fit(self, short, long):
        assert (short[0], long[0]) == (SHORT, LONG)
        self.fitted.append((short[1], long[1]))

    def idle(self, passes=1, quiet=REFINING_SECONDS):
        """An idle moment, and what it submits is done in ``passes``."""
        if self.probe.on_idle(self.passes, quiet):
            self.clock += self.seconds(len(self.submitted[-1].origin_input_ids))
            self.passes += passes

    def round(self):
        for _ in range(5):
            self.idle()


@pytest.fixture
def probed(make_req, monkeypatch):
    return Probed(monkeypatch)


def test_the_cost_of_a_pass_is_fitted_from_passes_that_ran_alone(probed):
    probed.idle(passes=2)  # somebody else's request ran too: this one does not count
    for _ in range(5):
        probed.idle(quiet=0.9 * IDLE_SECONDS)
    assert len(probed.submitted) == 1  # and is not made again at once
    probed.round()
    assert [len(r.origin_input_ids) for r in probed.submitted] == [SHORT, SHORT, SHORT, LONG, LONG]
    assert probed.fitted == [pytest.approx((0.116, 0.356))]


def test_a_server_that_is_never_left_alone_makes_few_prefills_of_its_own(probed):
    probed.round()
    for _ in range(3 * ROUNDS):
        probed.clock += PAUSE * 2**ROUNDS
        probed.idle(passes=2)
        probed.idle()
    assert len(probed.submitted) == 4 + ROUNDS - 1
    assert probed.fitted == [pytest.approx((0.116, 0.356))]


def test_a_round_beside_others_work_is_corrected_by_later_ones(probed):
    probed.seconds = lambda tokens: 1.0
    probed.round()
    assert not probed.fitted  # more tokens that take no longer are no measurement
    probed.seconds = lambda tokens: 0.1 + 0.001 * tokens
    probed.round()
    assert not probed.fitted  # not yet: rounds are apart
    for _ in range(ROUNDS):
        probed.clock += PAUSE * 2**ROUNDS
        probed.round()
        probed.seconds = lambda tokens: 2.0  # nor do slow rounds change what a fast one found
    assert probed.fitted == [pytest.approx((0.116, 0.356))] * (ROUNDS - 1)
    probed.clock += PAUSE * 2**ROUNDS
    assert not probed.probe.on_idle(probed.passes, REFINING_SECONDS)


def test_no_prefill_of_our_own_runs_in_the_short_gaps_of_others_work(probed):
    for _ in range(20):
        probed.passes += 1
        probed.clock += 0.9 * IDLE_SECONDS
        assert not probed.probe.on_idle(probed.passes, 0.9 * IDLE_SECONDS)
    assert probed.probe.on_idle(probed.passes, IDLE_SECONDS)


def test_to_refine_a_result_waits_for_longer(probed):
    for _ in range(4):
        probed.idle(quiet=IDLE_SECONDS)
    assert not probed.fitted
    probed.idle(quiet=IDLE_SECONDS)
    probed.clock += PAUSE
    assert probed.fitted
    assert not probed.probe.on_idle(probed.passes + 1, IDLE_SECONDS)
    assert probed.probe.on_idle(probed.passes + 1, REFINING_SECONDS)


def test_a_server_is_quiet_as_long_as_it_was_seen_to_be(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(internal.time, "monotonic", lambda: clock[0])
    quiet = Quiet()

    def rest(seconds, looks):
        for _ in range(looks):
            clock[0] += seconds / looks
            seen = quiet.look()
        return seen

    assert rest(2.0, 100) == pytest.approx(2.0)
    quiet.end()
    assert rest(0.5, 100) == pytest.approx(0.5)
    assert rest(5.0, 1) == 0.0  # its process was stopped: who knows what waits
    assert rest(0.5, 100) == pytest.approx(0.5)


def tied(by):
    logits = peaked(1)
    logits[2] = logits[1] - by
    return logits


def test_a_near_tie_gives_no_answer(server):
    close, clear = server.spliced("close"), server.spliced("clear")
    server.forward([close, clear], [tied(0.1), tied(0.3)])
    assert server.doubt.review([close, clear]) == [close]
    assert close.discard_output_reason is not None
    assert clear.discard_output_reason is None
    assert close.rksc.splice.discarded
    assert server.counts == ["doubts"]
    assert server.doubt.review([close, clear]) == []  # once is enough


@pytest.mark.parametrize(
    "other", [{"tokens": 0}, {"tau": 0.0}, {"temperature": 0.7}], ids=lambda other: str(other)
)
def test_only_greedy_splices_are_doubted(server, other):
    req = server.spliced("a", **other)
    server.forward([req], [tied(0.0)])
    assert server.doubt.review([req]) == []


def test_who_has_left_is_not_computed_again(server):
    req = server.spliced("a")
    server.forward([req], [tied(0.0)])
    req.to_finish = FINISH_ABORT("the client has gone")
    assert server.doubt.review([req]) == []


def test_a_discarded_answer_is_no_evidence_of_harm(server):
    server.forward([server.spliced("a")], [tied(0.1)])
    server.idle(2)
    assert not server.submitted


def test_a_failing_listener_stops_no_batch(server):
    server.listeners[0] = lambda req, logits: 1 / 0
    server.forward([server.spliced("a")], [tied(0.1)])
    assert server.counts == ["first_logits"]


def test_the_risk_of_a_doubt_is_learned(server):
    greedy, sampled = server.spliced("a"), server.spliced("b", temperature=0.7)
    at_first = server.doubt.risk(greedy, greedy.rksc.splice)
    assert 0 < at_first < 1
    assert server.doubt.risk(sampled, sampled.rksc.splice) == 0
    for number in range(20):
        req = server.spliced(str(number))
        server.forward([req], [peaked(1)])
        server.doubt.review([req])
    assert server.doubt.risk(greedy, greedy.rksc.splice) == pytest.approx(at_first / 2)
