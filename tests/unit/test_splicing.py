"""What is spliced, by whom, and that nothing of it gets into the exact tree."""

from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rksc_sglang.asks.cost import CostModel
from rksc_sglang.asks.reuse import OFTEN
from rksc_sglang.serving.internal import is_internal
from tests.unit.splicing_scheduler import DOC, LONG, Scheduler


def test_a_document_behind_another_context_is_taken_over(scheduler):
    first = scheduler.send("a", [1, 2, 3, *DOC, 5])
    scheduler.serve(first)
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, 9])
    passes = scheduler.serve(second)
    splice = second.rksc.splice
    assert passes == 2  # context and head, then what is behind the run
    assert 30 <= splice.spliced_tokens <= len(DOC) - 2
    assert splice.spliced_tokens + splice.exact_tokens + scheduler.computed["b"] + (
        scheduler.computed["b-rksc-1"]
    ) == len(second.origin_input_ids)
    # What SGLang reports as cached is what was not computed.
    assert second.cached_tokens == splice.spliced_tokens + splice.exact_tokens
    assert scheduler.copied[0][2] == 1  # one position further
    scheduler.check()


def test_an_exact_request_over_the_same_text_is_computed(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5]))
    scheduler.serve(scheduler.send("b", [4, 6, 7, 8, *DOC, 9]))
    again = scheduler.send("c", [4, 6, 7, 8, *DOC, 9], tau=None)
    scheduler.serve(again)
    # The context and the head were computed exactly, and are in the tree.
    assert again.cached_tokens in (4, 6, 8)
    scheduler.check()


def test_two_documents_in_another_order(scheduler):
    other = [50 + i % 13 + i // 13 for i in range(40)]
    scheduler.serve(scheduler.send("a", [1, *DOC, *other, 5]))
    second = scheduler.send("b", [2, *other, *DOC, 6])
    scheduler.serve(second)
    assert second.rksc.splice.spliced_tokens > 60
    assert len(scheduler.copied) == 2
    scheduler.check()


def test_tenants_share_nothing(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5], tenant="x"))
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, 9], tenant="y")
    scheduler.serve(second)
    assert second.rksc.splice.spliced_tokens == 0
    assert not scheduler.copied


def test_a_context_that_is_too_different_is_computed(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5]))
    scheduler.similarity = dict.fromkeys(range(300), 0.4)
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, 9], tau=0.5)
    scheduler.serve(second)
    assert second.rksc.splice.spliced_tokens == 0
    assert "gate_refusals" in scheduler.counts
    third = scheduler.send("c", [14, 16, 17, 18, *DOC, 9], tau=0.3)
    scheduler.serve(third)
    assert third.rksc.splice.similarity == pytest.approx(0.4)
    scheduler.check()


def test_a_longer_head_is_tried_where_the_gate_refuses(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, *LONG, 5]))
    asked = []

    def similarity(here, donors):
        asked.append(here)
        return [0.4 if len(asked) == 1 else 0.8] * len(donors)

    scheduler.splicer.signatures.similarity = similarity
    second = scheduler.send("b", [4, 6, 7, 8, *LONG, 9], tau=0.5)
    scheduler.serve(second)
    planner = scheduler.splicer.planner
    assert len(asked) == 2
    assert second.rksc.splice.similarity == pytest.approx(0.8)
    head = len(LONG) - second.rksc.splice.spliced_tokens - planner.tail + 1
    assert 4 * planner.head <= head < 4 * planner.head + 2 * planner.page_size
    scheduler.check()


def test_the_most_similar_donor_is_taken(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, 4, *DOC, 5], tau=None))
    slots = scheduler.cache.all_values_flatten().tolist()
    scheduler.serve(scheduler.send("b", [6, 7, 8, 9, *DOC, 5], tau=None))
    scheduler.similarity = {slot: 0.9 if slot in slots else 0.6 for slot in range(300)}
    third = scheduler.send("c", [31, 32, 33, 34, *DOC, 9])
    scheduler.serve(third)
    assert third.rksc.splice.similarity == pytest.approx(0.9)
    assert set(scheduler.copied[0][0]) <= set(slots)


def test_eight_at_once_wait_for_one_donor(scheduler):
    reqs = [scheduler.send(str(i), [i, i + 1, i, i + 2, *DOC, 60 + i]) for i in range(4)]
    scheduler.serve(*reqs)
    assert sum(req.rksc.splice.spliced_tokens > 25 for req in reqs) == 3
    assert sum(scheduler.computed.values()) < 2 * len(reqs[0].origin_input_ids)
    scheduler.check()


@pytest.mark.parametrize(("pass_seconds", "waits"), [(0.0, True), (0.1, False)])
def test_a_better_donor_is_waited_for_where_that_pays(joining, pass_seconds, waits):
    joining.splicer.cost = CostModel(pass_seconds, token_seconds=1e-3, copy_seconds=0.0)
    joining.serve(joining.send("a", [1, 2, 3, *DOC, 5]))
    first = joining.send("b", [1, 2, 3, *DOC, *LONG, 6])
    second = joining.send("c", [4, 6, 7, 8, *DOC, *LONG, 9])
    assert joining.serve(first, second) == 1 + waits
    assert (second.rksc.splice.spliced_tokens > len(DOC)) == waits
    assert second.rksc.splice.spliced_tokens > 25
    joining.check()


@pytest.mark.parametrize(("others", "exact"), [(1, False), (3, True)])
def test_who_will_be_a_donor_for_many_takes_nothing_over(scheduler, others, exact):
    """Half of a text is there; what is computed behind it could not be taken over by the others."""
    scheduler.serve(scheduler.send("a", [1, 2, 3, *LONG[:32], 5]))
    readers = [[10 + i, 20 + i, 30 + i, 40 + i, *LONG, 50 + i] for i in range(1 + others)]
    reqs = [scheduler.send(f"b{i}", tokens) for i, tokens in enumerate(readers)]
    scheduler.serve(*reqs)
    assert (reqs[0].rksc.splice.spliced_tokens == 0) == exact
    for req in reqs[1:]:
        assert (req.rksc.splice.spliced_tokens > 40) == exact
    scheduler.check()


def test_who_waits_behind_another_tenant_wants_nothing_of_it(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, *LONG[:32], 5]))
    first = scheduler.send("b", [10, 11, 12, 13, *LONG, 20])
    others = [scheduler.send(f"c{i}", [*LONG, 20 + i], tenant="other") for i in range(3)]
    unspliceable = scheduler.send("d", [*LONG, 30], tau=None)
    scheduler.serve(first, *others, unspliceable)
    assert first.rksc.splice.spliced_tokens > 20
    scheduler.check()


def test_nobody_waits_for_a_donor_whose_run_would_not_pay(scheduler):
    scheduler.splicer.cost = CostModel(pass_seconds=1.0, token_seconds=1e-3, copy_seconds=0.0)
    reqs = [scheduler.send(str(i), [i, i + 1, i, i + 2, *DOC, 60 + i]) for i in range(4)]
    assert scheduler.serve(*reqs) == 1


def test_what_is_asked_for_again_and_again_is_computed(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, *LONG, 5]))
    spliced = []
    for number in range(OFTEN + 2):
        req = scheduler.send(f"b{number}", [4, 6, 7, 8, *LONG, 20 + number])
        scheduler.serve(req)
        spliced.append(req.rksc.splice.spliced_tokens)
    assert min(spliced[: OFTEN - 1]) > 40
    assert max(spliced[OFTEN - 1 :]) < 16  # what does not fill a block
    assert req.cached_tokens > 60  # exactly, for all that come behind the first
    # Behind another context nobody has asked for it before, and after a reset nobody has at all.
    other = scheduler.send("c", [9, 9, 9, *LONG, 5])
    scheduler.serve(other)
    assert other.rksc.splice.spliced_tokens > 40
    scheduler.cache.reset()
    scheduler.cache.token_to_kv_pool_allocator.clear()
    scheduler.serve(scheduler.send("d", [1, 2, 3, *LONG, 5]))
    again = scheduler.send("e", [4, 6, 7, 8, *LONG, 5])
    scheduler.serve(again)
    assert again.rksc.splice.spliced_tokens > 40
    scheduler.check()


def test_a_prefix_for_which_many_wait_is_computed_once(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, *LONG, 5]))
    reqs = [scheduler.send(f"b{i}", [4, 6, 7, 8, *LONG, 20 + i]) for i in range(OFTEN)]
    scheduler.serve(*reqs)
    assert max(req.rksc.splice.spliced_tokens for req in reqs) < 16
    assert sum(req.cached_tokens > 60 for req in reqs) == OFTEN - 1
    scheduler.check()


def test_input_logprobs_over_the_run_are_computed(scheduler):
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5]))
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, 9])
    second.return_logprob, second.logprob_start_len = True, 0
    scheduler.serve(second)
    assert second.rksc.splice.spliced_tokens == 0


def test_a_splice_that_does_not_pay_is_left(scheduler):
    scheduler.splicer.cost = CostModel(pass_seconds=1.0, token_seconds=1e-3, copy_seconds=0.0)
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5]))
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, 9])
    assert scheduler.serve(second) == 1
    assert second.rksc.splice.spliced_tokens == 0


def test_who_takes_every_splice_gets_it_whatever_it_costs(scheduler):
    scheduler.splicer.cost = CostModel(pass_seconds=1.0, token_seconds=1e-3, copy_seconds=0.0)
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5]))
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, 9], tau=0)
    scheduler.serve(second)
    assert second.rksc.splice.spliced_tokens > 0


@pytest.mark.parametrize(("risk", "spliced"), [(0.2, True), (0.9, False)])
@pytest.mark.parametrize("cost", [None, CostModel(1e-6, 1e-3, 0.0)])
def test_a_splice_must_be_worth_the_risk_that_its_answer_is_discarded(
    scheduler, cost, risk, spliced
):
    """DOC is two thirds of the second prompt."""
    scheduler.splicer.cost = cost
    scheduler.splicer.doubt = SimpleNamespace(risk=lambda req, state: risk)
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5]))
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, *range(100, 100 + len(DOC) // 2)])
    scheduler.serve(second)
    assert (second.rksc.splice.spliced_tokens > 0) is spliced
    scheduler.check()


def test_a_failing_copy_means_ordinary_prefill(scheduler):
    errors = []
    scheduler.cache.on_error = errors.append
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5]))
    scheduler.cache.enable_splicing(scheduler.cache.index, lambda *args: 1 / 0)
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, 9])
    scheduler.serve(second)
    assert errors == ["splice"]
    assert second.rksc.splice.spliced_tokens == 0
    assert second.rksc.splice.reason
    scheduler.check()


def test_a_failing_index_ends_splicing_and_nothing_else(scheduler):
    errors = []
    scheduler.cache.on_error = errors.append
    scheduler.cache.index.insert = lambda *args: 1 / 0
    scheduler.serve(scheduler.send("a", [1, 2, 3, *DOC, 5]))
    assert errors == ["index"]
    second = scheduler.send("b", [4, 6, 7, 8, *DOC, 9])
    scheduler.serve(second)
    assert second.rksc.splice.spliced_tokens == 0


class Interleavings(RuleBasedStateMachine):
    """Everything that can happen to requests, in any order."""

    fixtures: tuple = ()

    @initialize(
        page_size=st.sampled_from([1, 4]),
        capacity=st.sampled_from([96, 240]),
        joins=st.booleans(),
    )
    def start(self, page_size, capacity, joins):
        self.scheduler = Scheduler(
            *self.fixtures, capacity=capacity, page_size=page_size, joins=joins
        )
        self.number = 0

    @rule(slot=st.integers(1, 240), similarity=st.sampled_from([0.4, 0.6]))
    def change_a_context(self, slot, similarity):
        """0.4 is refused by the gate."""
        self.scheduler.similarity[slot] = similarity

    @rule(
        contexts=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        parts=st.lists(st.sampled_from([DOC[:20], DOC[5:30], DOC[20:]]), min_size=1, max_size=2),
        tau=st.sampled_from([None, 0.5, 0.5]),
        tenant=st.sampled_from([None, None, "x"]),
    )
    def send(self, contexts, parts, tau, tenant):
        tokens = []
        for i, part in enumerate(parts):
            tokens += [contexts[i % len(contexts)]] * 3 + part
        self.number += 1
        self.scheduler.send(f"r{self.number}", [*contexts, *tokens, 7], tau, tenant)

    @rule()
    def prefill(self):
        self.scheduler.prefill()

    @rule()
    def decode(self):
        free = self.scheduler.cache.token_to_kv_pool_allocator.available_size()
        if free >= len(self.scheduler.running) * self.scheduler.cache.page_size:
            self.scheduler.decode()

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def retract(self, data):
        self.scheduler.retract(data.draw(st.sampled_from(self.scheduler.running)))

    @precondition(lambda self: self.scheduler.waiting)
    @rule(data=st.data())
    def abort(self, data):
        self.scheduler.abort_waiting(data.draw(st.sampled_from(self.scheduler.waiting)))

    @rule(count=st.integers(1, 60))
    def evict(self, count):
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.scheduler.cache.evict(EvictParams(num_tokens=count))

    @precondition(lambda self: not self.scheduler.waiting and not self.scheduler.running)
    @rule()
    def reset(self):
        self.scheduler.cache.reset()
        self.scheduler.cache.token_to_kv_pool_allocator.clear()

    @invariant()
    def sound(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        waiting = list(self.scheduler.waiting)
        self.scheduler.serve(*waiting, *self.scheduler.running, limit=200)
        assert all(not is_internal(req) for req in self.scheduler.running)
        self.scheduler.check()
        assert not self.scheduler.cache.active
        assert not self.scheduler.cache.loads
        assert not self.scheduler.cache.joints


def test_random_interleavings(make_cache, make_req):
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Machine", (Interleavings,), {"fixtures": (make_cache, make_req)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
