"""Splices whose stage shares a pass with what follows it."""

from types import SimpleNamespace

import pytest

from rksc_sglang.asks.cost import CostModel
from tests.unit.splicing_scheduler import DOC, LONG, Scheduler


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
