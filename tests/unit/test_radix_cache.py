"""RKSC's cache class against SGLang's own, over random work on real pools."""

from array import array

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rksc_sglang.serving.radix_cache import RkscRadixCache

operation = st.tuples(
    st.sampled_from(["insert", "match", "evict"]),
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.sampled_from([None, "tenant"]),
)


def apply(cache, kind, tokens, tenant):
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(token_ids=array("q", tokens), extra_key=tenant, cache_salt=None)
    allocator = cache.token_to_kv_pool_allocator
    if kind == "match":
        return cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len
    if kind == "evict":
        return cache.evict(EvictParams(num_tokens=len(tokens))).num_tokens_evicted
    slots = allocator.alloc(len(tokens))
    if slots is None:
        return "full"
    # For what the tree holds already it keeps its own slots, and frees these.
    return cache.insert(InsertParams(key=key, value=slots)).prefix_len


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(work=st.lists(operation, max_size=40))
def test_it_answers_as_sglangs_and_leaks_no_slot(make_cache, work):
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    ours = make_cache(RkscRadixCache, capacity=64)
    stock = make_cache(UnifiedRadixCache, capacity=64)
    for step in work:
        assert apply(ours, *step) == apply(stock, *step)
        assert (
            ours.token_to_kv_pool_allocator.available_size() + ours.total_size()[0]
            == stock.token_to_kv_pool_allocator.available_size() + stock.total_size()[0]
            == 64
        )
    counted = ours.timings()
    for kind in ("match", "insert", "evict"):
        assert counted[kind]["calls"] <= sum(step[0] == kind for step in work)
