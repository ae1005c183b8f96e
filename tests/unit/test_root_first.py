from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rksc_sglang.asks.root_first import (
    is_publishing,
    make_adder_class,
    tokens_worth_waiting_for,
    will_publish,
)
from rksc_sglang.serving.radix_cache import RkscRadixCache

PREFIX = list(range(100, 160))


@pytest.fixture
def admit(make_cache):
    """One prefill pass over a waiting queue, as SGLang's scheduler makes it."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    cache = make_cache(RkscRadixCache, capacity=4096)
    held, errors, awaiting = [], [], set()
    adder_class = make_adder_class(
        32, lambda req: req.rid in awaiting, on_held=held.append, on_error=errors.append
    )

    def run(queue, running=()):
        held.clear()
        adder = adder_class(
            page_size=1,
            tree_cache=cache,
            token_to_kv_pool_allocator=cache.token_to_kv_pool_allocator,
            running_batch=SimpleNamespace(reqs=list(running)) if running else None,
            new_token_ratio=1.0,
            rem_input_tokens=2048,
            rem_chunk_tokens=None,
        )
        for req in queue:
            req.init_next_round_input(cache)
            if adder.add_one_req(req, False, None) != AddReqResult.CONTINUE:
                break
        assert not errors
        return [req.rid for req in adder.can_run_list], [req.rid for req in held]

    run.cache, run.errors, run.awaiting = cache, errors, awaiting
    return run


def publish(cache, req):
    """What the scheduler does after the forward pass: the prompt's KV enters the tree."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    tokens = req.full_untruncated_fill_ids
    slots = cache.token_to_kv_pool_allocator.alloc(len(tokens))
    key = RadixKey(token_ids=tokens, extra_key=req.extra_key, cache_salt=req.cache_salt)
    cache.insert(InsertParams(key=key, value=slots))
    req.prefix_len = req.extend_end


def siblings(make_req, n=4, **kwargs):
    return [make_req(f"r{i}", [*PREFIX, 1000 + i, 7, 7], **kwargs) for i in range(n)]


def test_siblings_wait_for_the_first_and_then_share_its_prefix(admit, make_req):
    reqs = siblings(make_req)
    assert admit(reqs) == (["r0"], ["r1", "r2", "r3"])
    publish(admit.cache, reqs[0])
    assert admit(reqs[1:]) == (["r1", "r2", "r3"], [])
    assert [req.prefix_len for req in reqs[1:]] == [len(PREFIX)] * 3


def test_siblings_wait_for_a_prefix_that_is_in_the_forward_pass(admit, make_req):
    first, *others = siblings(make_req)
    admit([first])
    assert is_publishing(first)
    assert admit(others, running=[first]) == ([], ["r1", "r2", "r3"])
    publish(admit.cache, first)
    assert not is_publishing(first)
    assert admit(others, running=[first])[1] == []


def test_nobody_waits_for_a_request_that_decodes_in_a_mixed_batch(admit, make_req):
    first, *others = siblings(make_req)
    admit([first])
    first.output_ids.append(5)
    assert not is_publishing(first)
    assert admit(others, running=[first])[1] == ["r2", "r3"]  # for r1


def test_unrelated_requests_are_admitted_together(admit, make_req):
    reqs = [make_req(f"r{i}", range(1000 * i, 1000 * i + 60)) for i in range(4)]
    assert admit(reqs) == (["r0", "r1", "r2", "r3"], [])


def test_a_stranger_behind_held_siblings_is_admitted(admit, make_req):
    reqs = [*siblings(make_req, 3), make_req("stranger", range(5000, 5060))]
    assert admit(reqs) == (["r0", "stranger"], ["r1", "r2"])


def test_who_awaits_others_stays_in_the_queue(admit, make_req):
    reqs = [make_req(f"r{i}", range(1000 * i, 1000 * i + 60)) for i in range(3)]
    admit.awaiting |= {"r0", "r2"}
    assert admit(reqs) == (["r1"], ["r0", "r2"])
    admit.awaiting.clear()
    assert admit([reqs[0], reqs[2]]) == (["r0", "r2"], [])


@pytest.mark.parametrize("key", ["extra_key", "cache_salt"])
def test_tenants_do_not_wait_for_each_other(admit, make_req, key):
    ours, theirs = make_req("a", PREFIX, **{key: "a"}), make_req("b", PREFIX, **{key: "b"})
    assert admit([ours, theirs]) == (["a", "b"], [])


def test_nobody_waits_for_a_request_that_does_not_publish(admit, make_req):
    reqs = siblings(make_req)
    reqs[0].skip_radix_cache_insert = True
    assert admit(reqs) == (["r0", "r1"], ["r2", "r3"])


def test_input_logprobs_over_the_prefix_leave_nothing_to_wait_for(admit, make_req):
    reqs = siblings(make_req, return_logprob=True)
    for req in reqs:
        req.logprob_start_len = 0
    assert admit(reqs)[1] == []


def test_a_failure_admits_at_once_and_is_counted(admit, make_req):
    first, _ = siblings(make_req, 2)
    broken = SimpleNamespace(finished=lambda: 1 / 0)
    first.init_next_round_input(admit.cache)
    adder_class = make_adder_class(
        32, lambda req: False, on_held=lambda req: None, on_error=admit.errors.append
    )
    adder = adder_class(
        1, admit.cache, admit.cache.token_to_kv_pool_allocator, None, 1.0, 2048, None
    )
    adder.running_batch = SimpleNamespace(reqs=[broken], batch_size=lambda: 1)
    adder.add_one_req(first, False, None)
    assert adder.can_run_list == [first]
    assert admit.errors == ["root_first"]
    admit.errors.clear()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ours=st.lists(st.integers(0, 1), max_size=24),
    theirs=st.lists(st.integers(0, 1), max_size=24),
    cached=st.integers(0, 24),
    min_tokens=st.integers(1, 8),
    page_size=st.sampled_from([1, 4]),
)
def test_gain_equals_what_a_match_behind_the_leader_would_find(
    make_req, ours, theirs, cached, min_tokens, page_size
):
    common = 0
    while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
        common += 1
    req, leader = make_req("a", ours), make_req("b", theirs)
    req.refresh_fill_ids()
    leader.refresh_fill_ids()
    # What is cached already is a whole number of pages, and known to the match.
    req.prefix_len = min(cached, max(len(ours) - 1, 0)) // page_size * page_size
    after = min(common, max(len(ours) - 1, 0)) // page_size * page_size
    wanted = tokens_worth_waiting_for(req, min_tokens, page_size)
    gains = wanted is not None and will_publish(leader, req, wanted)
    assert gains == (after >= req.prefix_len + min_tokens)
