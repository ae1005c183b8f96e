"""Splicing at admission on SGLang's real tree, allocator, pools and prefill adder, without a model.

What a forward pass would write is written down beside the pool: the KV of a token is known by the
tokens that it was computed behind, or as tainted, when one of them was spliced.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rksc_sglang.asks.content_index import ContentIndex
from rksc_sglang.asks.cost import CostModel
from rksc_sglang.asks.plan import Planner
from rksc_sglang.asks.profile import Thresholds
from rksc_sglang.asks.reuse import OFTEN
from rksc_sglang.asks.root_first import make_adder_class
from rksc_sglang.serving.admission import SplicingPrefillAdder
from rksc_sglang.serving.donors import Donors
from rksc_sglang.serving.internal import ModelFacts, is_internal
from rksc_sglang.serving.joined import JoinedPass
from rksc_sglang.serving.joining import JoiningSplicer
from rksc_sglang.serving.splice_state import SpliceState
from rksc_sglang.serving.splicing import Splicer
from rksc_sglang.serving.splicing_cache import SplicingRadixCache

TAINTED = "tainted"


class SymbolicKv:
    """A layer's cache of keys or values, in place of a tensor."""

    def __init__(self, kv):
        self.kv = kv

    def __getitem__(self, slots):
        return [self.kv.get(slot) for slot in slots.tolist()]

    def __setitem__(self, slots, values):
        self.kv.update(zip(slots.tolist(), values))


class Scheduler:
    """SGLang's scheduling steps around the splicer, on one small pool."""

    def __init__(
        self,
        make_cache,
        make_req,
        capacity=256,
        page_size=1,
        head=2,
        tail=1,
        min_tokens=4,
        joins=False,
    ):
        self.make_req = make_req
        self.cache = make_cache(SplicingRadixCache, capacity, page_size)
        self.capacity = capacity
        self.kv = {}  # slot -> the tokens up to its own, or TAINTED
        self.similarity = {}  # donor slot -> similarity; 1 where not given
        self.cache.enable_splicing(ContentIndex(capacity + page_size, window=2), self.copy)
        self.cache.on_error = self.fail
        self.counts = []
        signatures = SimpleNamespace(
            similarity=lambda own, others: [self.similarity.get(o[-1], 1.0) for o in others]
        )
        planner = Planner(head, tail, min_tokens, page_size)
        self.splicer = (JoiningSplicer if joins else Splicer)(
            self.cache,
            signatures,
            planner,
            Thresholds(0.5, 0.0, "test", "test"),
            ModelFacts(100, None),
            Donors(lambda: self.waiting),
            self.counts.append,
        )
        self.adder_class = make_adder_class(
            8,
            awaits=lambda req: False,
            on_held=lambda req: None,
            on_error=self.fail,
            base=SplicingPrefillAdder,
            splicer=self.splicer,
        )
        # What the attention backend does between the writing of KV and attention, for one layer.
        self.backend = SimpleNamespace(on_kv_written=None)
        pool = SimpleNamespace(k_buffer=[SymbolicKv(self.kv)], v_buffer=[SymbolicKv({})])
        shift = SimpleNamespace(of=self.shift)
        judge = self.splicer.judge if joins else None
        self.joined = JoinedPass(self.cache, self.backend, pool, shift, judge)
        self.splicer.joined = self.joined if joins else None
        self.waiting, self.running, self.computed = [], [], {}
        self.copied = []
        self.again = {}  # request id -> the request that took the place of a refused one

    def fail(self, where):
        pytest.fail(f"an error inside RKSC was swallowed: {where}")

    def copy(self, source, target, delta, head, donor_head):
        assert not set(source.tolist()) & set(target.tolist())
        if head is not None:
            self._check_heads(head.tolist(), donor_head.tolist(), source[0].item())
        for slot in target.tolist():
            self.kv[slot] = TAINTED
        for slot in source.tolist():
            assert self.kv[slot] != TAINTED, "a donor is not exact"
        self.copied.append((source.tolist(), target.tolist(), delta))

    def shift(self, runs):
        def add(k_caches, v_caches):
            for run in runs:
                # The latest: slots are used again.
                source = next(s for s, t, _ in self.copied[::-1] if t == run.target.tolist())
                self._check_heads(run.head.tolist(), run.donor_head.tolist(), source[0])

        return SimpleNamespace(add=add)

    def _check_heads(self, head, donor_head, first):
        """The head is the same tokens, right before those that are copied, in both contexts."""
        assert len(head) == len(donor_head) == self.splicer.planner.head
        assert self.kv[donor_head[-1]] == self.kv[first][:-1]
        for own, donors in zip(head, donor_head):
            assert self.kv[own] == TAINTED or self.kv[own][-1] == self.kv[donors][-1]

    def send(self, rid, tokens, tau=0.5, tenant=None, max_new_tokens=2):
        req = self.make_req(rid, tokens, extra_key=tenant)
        req.sampling_params.max_new_tokens = max_new_tokens
        req.sampling_params.normalize(None)
        req.rksc = SimpleNamespace(splice=None if tau is None else SpliceState(rid, tau))
        if tau is not None:
            self.splicer.arrived(req)
        self.waiting.append(req)
        return req

    def prefill(self):
        """One pass: admit, allocate, run, and publish or finish. Gives the admitted requests."""
        from sglang.srt.managers.schedule_policy import AddReqResult
        from sglang.srt.mem_cache.allocation import alloc_for_extend

        allocator = self.cache.token_to_kv_pool_allocator
        adder = self.adder_class(
            page_size=self.cache.page_size,
            tree_cache=self.cache,
            token_to_kv_pool_allocator=allocator,
            running_batch=SimpleNamespace(
                reqs=list(self.running),
                is_empty=lambda: not self.running,
                batch_size=lambda: len(self.running),
            ),
            new_token_ratio=1.0,
            rem_input_tokens=4096,
            rem_chunk_tokens=None,
        )
        for req in self.waiting:
            req.init_next_round_input(self.cache)
            if adder.add_one_req(req, False, None) != AddReqResult.CONTINUE:
                break
        batch = adder.can_run_list
        self.waiting = [req for req in self.waiting if all(req is not r for r in batch)]
        if not batch:
            return []
        lens = [req.extend_end for req in batch]
        alloc_for_extend(
            SimpleNamespace(
                reqs=batch,
                tree_cache=self.cache,
                req_to_token_pool=self.cache.req_to_token_pool,
                device="cpu",
                hisparse_coordinator=None,
                maybe_evict_swa=lambda: None,
                is_dllm=lambda: False,
                prefix_lens=[req.prefix_len for req in batch],
                extend_lens=[req.extend_len for req in batch],
                extend_num_tokens=sum(req.extend_len for req in batch),
                seq_lens=torch.tensor(lens),
                seq_lens_cpu=torch.tensor(lens),
            )
        )
        for req in batch:
            # As ScheduleBatch.prepare_for_extend counts.
            req.cached_tokens += req.prefix_len - req.already_computed
            req.already_computed = req.extend_end
            self.computed[req.rid] = self.computed.get(req.rid, 0) + req.extend_len
        self._run(batch)
        for req in self.joined.review(batch):
            self._serve_again(req)
        for req in batch:
            self._commit(req)
        return batch

    def _run(self, batch):
        """A layer of a forward pass: all KV is written, then it is read."""
        self.joined.begin()
        for joint in self.joined._joints:
            for slot in joint.own.tolist():
                self.kv.pop(slot, None)  # what it held for others before
        for req in batch:
            self._write(req, req.prefix_len, req.extend_end)
        if self.backend.on_kv_written is not None:
            self.backend.on_kv_written(0)
        self.joined.end()
        for req in batch:
            if not self._is_refused(req):  # of whom nothing is kept
                self._read(req, req.prefix_len)

    def _is_refused(self, req):
        return req.rksc.refused if is_internal(req) else getattr(req.rksc.splice, "refused", False)

    def _row(self, req):
        return self.cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx].tolist()

    def _write(self, req, start, stop):
        row, tokens = self._row(req), [*req.origin_input_ids, *req.output_ids]
        tainted = any(self.kv.get(slot) == TAINTED for slot in row[:start])
        for position in range(start, stop):
            self.kv[row[position]] = TAINTED if tainted else tuple(tokens[: position + 1])

    def _read(self, req, stop):
        row, tokens = self._row(req), [*req.origin_input_ids, *req.output_ids]
        for position in range(stop):
            known = self.kv[row[position]]
            assert known == TAINTED or known == tuple(tokens[: position + 1]), "wrong KV in a row"

    def _serve_again(self, req):
        again = self.send(req.rid, list(req.origin_input_ids), 0.5, req.extra_key)
        again.sampling_params = req.sampling_params
        again.rksc.splice.joins = False
        self.waiting.insert(0, self.waiting.pop())
        self.again[req.rid] = again

    def latest(self, req):
        return self.again.get(req.rid, req)

    def _commit(self, req):
        from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache

        if req.discard_output_reason is not None:  # as SGLang's batch result processor
            req.to_finish = req.discard_output_reason
            req.update_finish_state(0)
            release_kv_cache(req, self.cache, checkpoint=False)
            return
        req.output_ids.append(90 + len(req.output_ids) % 5)
        req.update_finish_state()
        if req.finished():
            release_kv_cache(req, self.cache, checkpoint=True)
            self.running = [r for r in self.running if r is not req]
        elif req not in self.running:
            checkpoint_kv_cache(req, self.cache)
            self.running.append(req)

    def decode(self):
        from sglang.srt.mem_cache.allocation import alloc_token_slots

        for req in list(self.running):
            position, page_size = req.kv.kv_allocated_len, self.cache.page_size
            table = self.cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
            if position % page_size:
                table[position] = table[position - 1] + 1
            else:
                table[position] = alloc_token_slots(self.cache, page_size)[0]
            req.kv.kv_allocated_len += 1
            req.kv.kv_committed_len += 1
            self._write(req, position, position + 1)
            self._read(req, position)
            self._commit(req)

    def retract(self, req):
        from sglang.srt.mem_cache.common import release_kv_cache

        release_kv_cache(req, self.cache, checkpoint=True)
        req.reset_for_retract()
        self.running = [r for r in self.running if r is not req]
        self.waiting.append(req)

    def abort_waiting(self, req):
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome

        self.waiting = [r for r in self.waiting if r is not req]
        self.cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)

    def serve(self, *reqs, limit=40):
        """Until all of these have finished; gives the number of prefill passes."""
        passes = 0
        while not all(self.latest(req).finished() for req in reqs):
            passes += bool(self.prefill())
            self.decode()
            limit -= 1
            assert limit, "requests are not served"
        return passes

    def check(self):
        tree = self.cache.all_values_flatten().tolist()
        assert all(self.kv[slot] != TAINTED for slot in tree), "tainted KV is in the exact tree"
        owned = [slot for state in self.cache.active.values() for slot in state.private.tolist()]
        for req in self.running:
            row = self.cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx].tolist()
            owned += row[req.kv.cache_protected_len : req.kv.kv_allocated_len]
        held = tree + owned
        assert len(held) == len(set(held)), "a slot has two owners"
        pages = {slot // self.cache.page_size for slot in held}
        free = self.cache.token_to_kv_pool_allocator.available_size()
        assert len(pages) * self.cache.page_size + free == self.capacity, "slots leaked"
        assert len(self.cache.index) == len(tree), "the index is out of step with the tree"


DOC = [10 + i % 17 + i // 17 for i in range(40)]
LONG = list(range(100, 160))


@pytest.fixture(params=[1, 4], ids=lambda size: f"page{size}")
def scheduler(request, make_cache, make_req):
    return Scheduler(make_cache, make_req, page_size=request.param)


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


@pytest.fixture(params=[1, 4], ids=lambda size: f"page{size}")
def joining(request, make_cache, make_req):
    return Scheduler(make_cache, make_req, 400, page_size=request.param, joins=True)


def test_context_head_and_tail_share_a_pass(joining):
    joining.serve(joining.send("a", [1, 2, 3, *DOC, 5]))
    second = joining.send("b", [4, 6, 7, 8, *DOC, 9])
    assert joining.serve(second) == 1
    splice = second.rksc.splice
    assert 30 <= splice.spliced_tokens <= len(DOC) - 2
    assert splice.similarity == 1.0
    computed = joining.computed["b"] + joining.computed["b-rksc-1"]
    assert splice.spliced_tokens + splice.exact_tokens + computed == len(second.origin_input_ids)
    assert second.cached_tokens == splice.spliced_tokens + splice.exact_tokens
    assert joining.counts == ["stages", "joined_splices", "spliced_requests"]
    joining.check()
    # What was computed in front of the run is exact, and in the tree.
    again = joining.send("c", [4, 6, 7, 8, *DOC, 9], tau=None)
    joining.serve(again)
    assert again.cached_tokens in (4, 6, 8)
    joining.check()


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("capacity", range(84, 168, 4))
def test_a_pool_that_is_too_small_for_both_at_once(make_cache, make_req, page_size, capacity):
    """The donor must stay until the pass has run, which needs what was promised to the stage."""
    joining = Scheduler(make_cache, make_req, capacity, page_size, joins=True)
    joining.serve(joining.send("a", [1, 2, 3, *DOC, 5]))
    reqs = [joining.send(str(i), [i, i + 1, i, i + 2, *DOC, 60 + i]) for i in range(4, 6)]
    joining.serve(*reqs)
    assert capacity < 120 or "joined_splices" in joining.counts
    joining.check()


def test_of_two_runs_the_first_is_joined(joining):
    other = [50 + i % 13 + i // 13 for i in range(40)]
    joining.serve(joining.send("a", [1, *DOC, *other, 5]))
    second = joining.send("b", [2, *other, *DOC, 6])
    assert joining.serve(second) == 2
    assert second.rksc.splice.spliced_tokens > 60
    assert len(joining.copied) == 2
    joining.check()


def test_siblings_share_the_pass_too(joining):
    joining.serve(joining.send("a", [1, 2, 3, *DOC, 5]))
    reqs = [joining.send(str(i), [i, i + 1, i, i + 2, *DOC, 60 + i]) for i in range(4, 7)]
    assert joining.serve(*reqs) == 1
    assert all(req.rksc.splice.spliced_tokens > 25 for req in reqs)
    joining.check()


def test_a_shared_prefix_is_computed_once_in_the_pass_that_reads_it(joining):
    alone = joining.send("alone", [*LONG, 1])
    joining.serve(alone)
    prefix = [*range(200, 240)]
    reqs = [joining.send(str(i), [*LONG, *prefix, *range(10 * i, 10 * i + i)]) for i in range(1, 5)]
    batch = joining.prefill()
    assert [req.rid for req in batch] == ["1", "2", "3", "4"]
    joining.check()
    assert joining.counts == ["joined_prefixes"] * 3
    assert joining.serve(*reqs) == 0  # further passes
    page = joining.cache.page_size
    cached = len(LONG) // page * page
    assert reqs[0].cached_tokens == cached
    for number, req in enumerate(reqs[1:], 2):
        shared = (len(LONG) + len(prefix)) // page * page
        assert req.cached_tokens == shared
        assert joining.computed[req.rid] == len(LONG) + len(prefix) + number - shared
        assert req.rksc.splice.spliced_tokens == 0
        assert not req.skip_radix_cache_insert
    joining.check()
    # All of it is exact, and in the tree.
    again = joining.send("again", [*LONG, *prefix, *range(40, 44), 90, 2])
    joining.serve(again)
    assert again.cached_tokens >= len(again.origin_input_ids) - 1 - page


def test_who_would_find_more_behind_the_prefix_waits_for_it(joining):
    joining.serve(joining.send("a", [1, 2, 3, *DOC, 5]))
    reqs = [joining.send(str(i), [*LONG, *DOC, i]) for i in range(2)]
    assert joining.serve(*reqs) == 2
    assert reqs[1].rksc.splice.spliced_tokens + reqs[1].cached_tokens > len(LONG)
    joining.check()


def test_input_logprobs_over_a_shared_prefix_are_computed(joining):
    reqs = [joining.send(str(i), [*LONG, i]) for i in range(2)]
    reqs[1].return_logprob, reqs[1].logprob_start_len = True, 4
    joining.serve(*reqs)
    assert joining.computed["1"] >= len(LONG) - 4


@pytest.mark.parametrize("capacity", range(72, 160, 8))
def test_followers_of_a_prefix_need_slots_of_their_own(make_cache, make_req, capacity):
    joining = Scheduler(make_cache, make_req, capacity, joins=True)
    reqs = [joining.send(str(i), [*LONG, i]) for i in range(3)]
    passes = joining.serve(*reqs)
    assert passes == 1 or capacity < 3 * len(LONG)
    assert sum(joining.computed.values()) == len(LONG) + 3
    joining.check()


@pytest.mark.parametrize("runs", [1, 2])
def test_whom_the_gate_refuses_in_the_pass_is_looked_at_again(joining, runs):
    """Then as one that has waited for its stage: here with longer heads, refused as well."""
    other = [50 + i % 13 + i // 13 for i in range(40)]
    joining.serve(joining.send("a", [1, *DOC, *other, 5]))
    joining.similarity = dict.fromkeys(range(300), 0.4)
    tokens = [2, *other, *DOC, 6] if runs == 2 else [4, 6, 7, 8, *DOC, 9]
    second = joining.send("b", tokens)
    joining.serve(second)
    assert second.rksc.splice.discarded is (runs == 1)  # else its stage was refused
    final = joining.latest(second)
    assert final.finished()
    assert len(final.output_ids) == 2
    assert final.rksc.splice.spliced_tokens == 0
    assert "spliced_requests" not in joining.counts
    assert "joined_splices" not in joining.counts
    joining.check()


def test_another_donor_may_be_accepted_then(joining):
    joining.serve(joining.send("a", [1, 2, 3, 4, *DOC, 5], tau=None))
    close = set(joining.cache.all_values_flatten().tolist())
    joining.serve(joining.send("b", [6, 7, 8, 9, *DOC, 5], tau=None))
    joining.similarity = {slot: 0.9 if slot in close else 0.4 for slot in range(300)}
    reqs = [joining.send("c", [31, 32, 33, 34, *DOC, 9])]
    joining.similarity = {slot: 1.3 - s for slot, s in joining.similarity.items()}
    reqs.append(joining.send("d", [41, 42, 43, 44, *DOC, 9]))
    joining.serve(*reqs)
    for req in reqs:
        assert joining.latest(req).rksc.splice.similarity == pytest.approx(0.9)
    joining.check()


def test_a_run_that_pays_only_in_a_shared_pass(joining):
    joining.splicer.cost = CostModel(pass_seconds=0.1, token_seconds=2e-3, copy_seconds=0.0)
    joining.serve(joining.send("a", [1, 2, 3, *DOC, 5]))
    second = joining.send("b", [4, 6, 7, 8, *DOC, 9])
    assert joining.serve(second) == 1
    assert second.rksc.splice.spliced_tokens > 0
    # A gate that refuses most runs makes it a bad bet.
    joining.splicer.refused, joining.splicer.judged = 19, 20
    third = joining.send("c", [14, 16, 17, 18, *DOC, 9])
    joining.serve(third)
    assert third.rksc.splice.spliced_tokens == 0


def test_waiting_for_a_donor_costs_a_pass_of_its_own(joining):
    joining.splicer.cost = CostModel(pass_seconds=0.035, token_seconds=1e-3, copy_seconds=0.0)
    reqs = [joining.send(str(i), [i, i + 1, i, i + 2, *DOC, 60 + i]) for i in range(3)]
    assert joining.serve(*reqs) == 1
    late = joining.send("late", [4, 6, 7, 8, *DOC, 9])  # for a donor that is there it pays
    assert joining.serve(late) == 1
    assert late.rksc.splice.spliced_tokens > 0


def test_a_second_run_that_does_not_pay_is_no_argument_against_the_first(joining):
    joining.splicer.cost = CostModel(pass_seconds=0.1, token_seconds=2e-3, copy_seconds=0.0)
    joining.splicer.doubt = SimpleNamespace(risk=lambda req, state: 0.1)
    joining.serve(joining.send("a", [1, 2, 3, *DOC, 5, *LONG[:16], 6]))
    second = joining.send("b", [4, 6, 7, 8, *DOC, 9, 9, *LONG[:16], 7])
    assert joining.serve(second) == 1
    assert 30 <= second.rksc.splice.spliced_tokens < len(DOC)
    joining.check()


@pytest.mark.parametrize("where", ["begin", "layer", "judge"])
def test_a_failure_in_mid_pass_is_looked_at_again(joining, where):
    errors = []
    joining.cache.on_error = errors.append
    joining.serve(joining.send("a", [1, 2, 3, *DOC, 5]))
    if where == "begin":
        joining.joined.shift.of = lambda runs: 1 / 0
    elif where == "layer":
        joining.joined.shift.of = lambda runs: SimpleNamespace(add=lambda k, v: 1 / 0)
    else:
        joining.joined.judge = lambda joint: 1 / 0
    second = joining.send("b", [4, 6, 7, 8, *DOC, 9])
    joining.serve(second)
    assert errors == ["splice"]
    assert second.rksc.splice.discarded
    assert joining.latest(second).rksc.splice.spliced_tokens > 0  # in two passes
    joining.check()


def test_followers_of_a_prefix_are_looked_at_again_after_a_failure(joining):
    errors = []
    joining.cache.on_error = errors.append
    joining.backend = joining.joined.backend = SimpleNamespace(on_kv_written=None)
    joining.joined.pool.k_buffer = None
    reqs = [joining.send(str(i), [*LONG, i]) for i in range(2)]
    joining.serve(*reqs)
    assert errors == ["splice"]
    assert reqs[1].rksc.splice.discarded
    assert joining.latest(reqs[1]).cached_tokens == len(LONG)
    joining.check()


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
