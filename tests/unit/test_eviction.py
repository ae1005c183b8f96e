"""RKSC's eviction policies on SGLang's real tree and allocator."""

from array import array

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rksc_sglang.rsbcm.attention_mass import SlotMass
from rksc_sglang.rsbcm.life_cycle import DONE, ORDINARY, PRUNED, LifeCycle
from rksc_sglang.rsbcm.policy import PaperStrategy, make_strategy
from rksc_sglang.serving.radix_cache import RkscRadixCache, split_path

TENANT = (None, None)
CAPACITY = 64


@pytest.fixture
def make_evicting(make_cache):
    def make(policy, config=None):
        return make_cache(
            RkscRadixCache, CAPACITY, eviction_policy=policy, eviction_policy_config=config
        )

    return make


@pytest.fixture
def cache(make_evicting):
    return make_evicting("rksc")


def insert(cache, tokens, group=None, branch=0, program=None):
    """As a request leaves it; gives the node where it ends, None where the pool is full."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(token_ids=array("q", tokens), extra_key=None, cache_salt=None)
    match = cache.match_prefix(MatchPrefixParams(key=key))
    known = match.device_prefix_len
    new = cache.token_to_kv_pool_allocator.alloc(len(tokens) - known)
    if new is None:
        return None
    slots = torch.cat([cache.path_device_indices(match.last_device_node)[:known], new])
    result = cache.insert(InsertParams(key=key, value=slots, prev_prefix_len=known))
    node = cache.tree_core.node_by_id(result.last_device_node)
    if group is not None:
        owner = cache.life_cycle.branch(TENANT, group, branch, program)
        cache.life_cycle.claim(owner, *split_path(node, len(tokens), known))
    return node


def evict(cache, tokens):
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    return cache.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted


def held(cache, tokens):
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(token_ids=array("q", tokens), extra_key=None, cache_salt=None)
    return cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len


# What is evicted first


def test_what_is_over_goes_first_and_what_is_leased_last(make_evicting):
    cache = make_evicting("rksc", {"lease": True})
    insert(cache, [1, 2, 3, 10, 11], "g", 0)
    insert(cache, [5, 6])
    insert(cache, [7, 8], "over", 0)
    cache.report_branches(TENANT, "g", {0: "frontier"})
    cache.report_branches(TENANT, "over", {0: "joined"})
    evict(cache, 2)
    assert held(cache, [7, 8]) == 0
    evict(cache, 2)
    assert held(cache, [5, 6]) == 0
    assert held(cache, [1, 2, 3, 10, 11]) == 5
    evict(cache, 1)
    assert held(cache, [1, 2, 3, 10, 11]) == 0, "a lease is no lock"


def test_a_leaf_loses_no_more_than_it_must_and_stays_whose_it_was(make_evicting):
    cache = make_evicting("rksc", {"trim": 2, "tail": 0})
    text = list(range(20))
    insert(cache, text, "g", 0)
    assert evict(cache, 3) == 3
    assert held(cache, text) == 17
    assert evict(cache, 1) == 2, "in one step, twice as much: small steps cost as much as large"
    assert held(cache, text) == 15
    assert evict(cache, 14) == 15, "what would be left is not worth a node"
    insert(cache, text, "g", 1)
    evict(cache, 5)
    cache.report_branches(TENANT, "g", {1: "pruned"})
    assert held(cache, text) == 0


def test_the_ends_of_all_texts_go_before_the_rest_of_any(make_evicting):
    cache = make_evicting("rksc", {"trim": 2, "tail": 4})
    old, new = list(range(10)), list(range(20, 30))
    insert(cache, old)
    insert(cache, new)
    assert evict(cache, 8) == 8
    assert (held(cache, old), held(cache, new)) == (6, 6)
    assert evict(cache, 2) == 2
    assert (held(cache, old), held(cache, new)) == (4, 6), "held() has used them, the old one first"


def test_whole_pages_are_trimmed(make_cache):
    config = {"trim": 1, "tail": 0}
    cache = make_cache(
        RkscRadixCache, 64, page_size=4, eviction_policy="rksc", eviction_policy_config=config
    )
    insert(cache, list(range(20)))
    assert evict(cache, 5) == 8
    assert held(cache, list(range(20))) == 12


def test_a_tail_is_whole_pages(make_cache):
    for page_size, tail in ((1, 64), (16, 64), (48, 48), (128, 0)):
        cache = make_cache(RkscRadixCache, 384, page_size=page_size, eviction_policy="rksc")
        assert cache.strategy.tail == tail


def test_siblings_make_a_node_worth_more(cache):
    crowd = [insert(cache, [1, 2, 3, last]) for last in (10, 11, 12)]
    alone = insert(cache, [7, 8, 9])  # beside [1, 2, 3]
    for node in (*crowd, alone):
        node.last_access_time = 5
    cache.strategy.now = 20
    assert {cache.strategy.get_priority(node)[2] for node in crowd} == {-15 / 5}
    assert cache.strategy.get_priority(alone)[2] == -15 / 3


def test_what_a_program_alone_reads_goes_when_it_ends(cache):
    insert(cache, [1, 2, 3])
    insert(cache, [5, 6])
    insert(cache, [1, 2, 3, 10], "g", 0, "run")
    insert(cache, [1, 2, 3, 11], "g", 1, "run")
    cache.end_program(TENANT, "run")
    evict(cache, 5)
    assert held(cache, [5, 6]) == 2


def test_a_pruned_branch_gives_its_pages_back_at_once_and_nobody_elses(cache):
    insert(cache, [1, 2, 3])
    insert(cache, [1, 2, 3, 10, 11, 12], "g", 0)
    insert(cache, [1, 2, 3, 10, 11, 12, 13], "g", 0)
    insert(cache, [1, 2, 3, 20], "g", 1)
    free = cache.token_to_kv_pool_allocator.available_size()
    cache.report_branches(TENANT, "g", {0: "pruned"})
    assert cache.token_to_kv_pool_allocator.available_size() == free + 4
    assert cache.freed_tokens == 4
    assert held(cache, [1, 2, 3, 20]) == 4


def test_a_pruned_branch_that_is_read_stays_until_it_is_not(cache):
    node = insert(cache, [1, 2, 3, 4], "g", 0)
    lock = cache.lock(node.id)
    cache.report_branches(TENANT, "g", {0: "pruned"})
    assert held(cache, [1, 2, 3, 4]) == 4
    cache.unlock(lock)
    cache.free_pruned()
    assert held(cache, [1, 2, 3, 4]) == 0


def test_another_tenants_group_of_that_name_is_another_group(cache):
    insert(cache, [1, 2, 3, 4], "g", 0)
    cache.report_branches(("other", None), "g", {0: "pruned"})
    assert held(cache, [1, 2, 3, 4]) == 4


def test_text_that_two_branches_share_stays_when_one_is_pruned(cache):
    insert(cache, [1, 2, 3, 4, 5], "g", 0)
    insert(cache, [1, 2, 3, 9, 9], "g", 1)
    cache.report_branches(TENANT, "g", {0: "pruned"})
    assert held(cache, [1, 2, 3, 4, 5]) == 3
    assert held(cache, [1, 2, 3, 9, 9]) == 5


def test_the_papers_priority_is_importance_over_depth_plus_one(make_evicting):
    cache = make_evicting("rksc-paper")
    assert isinstance(cache.strategy, PaperStrategy)
    mass = cache.strategy.slot_mass = SlotMass(CAPACITY + 1, "cpu")
    shallow = insert(cache, [1, 2])
    insert(cache, [3])
    deep = insert(cache, [3, 4])
    for node, value in ((shallow, 1.0), (deep, 1.2)):
        mass.add(node.component_data[0].value, torch.full((len(node.key),), value))
    mean = (1.0 * 2 + 1.2) / 3
    assert cache.strategy.get_priority(shallow) == pytest.approx((1.0 / mean / 2,))
    assert cache.strategy.get_priority(deep) == pytest.approx((1.2 / mean / 3,))
    evict(cache, 1)
    assert held(cache, [3, 4]) == 1, "the less important for its depth went"
    assert held(cache, [1, 2]) == 2


def test_a_wrong_ingredient_is_refused_by_name():
    with pytest.raises(ValueError, match=r"--radix-eviction-policy-config for rksc:.*'weight'"):
        make_strategy("rksc", {"weight": 1})


def test_a_failure_inside_ends_the_life_cycle_and_not_the_cache(cache):
    failures = []
    cache.on_error = failures.append
    cache.life_cycle.report = None
    cache.report_branches(TENANT, "g", {0: "pruned"})
    assert failures == ["life_cycle"]
    insert(cache, [1, 2, 3])
    assert evict(cache, 3) == 3


# Leases


class Node:
    """What the life cycle reads of a tree node."""

    def __init__(self, tokens):
        self.key = range(tokens)


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def cycle(clock):
    return LifeCycle(100, lease_seconds=10, tenant_share=0.5, clock=lambda: clock[0])


def frontier(cycle, number, tenant=TENANT):
    node = Node(20)
    cycle.claim(cycle.branch(tenant, f"g{number}", 0), [node])
    cycle.report(tenant, f"g{number}", {0: "frontier"})
    return node


def test_no_tenant_leases_more_than_its_share_and_the_first_keep_theirs(cycle, clock):
    nodes = []
    for number in range(3):
        clock[0] = float(number)
        nodes.append(frontier(cycle, number))
    other = frontier(cycle, 0, ("other", None))
    cycle.renew()
    assert [cycle.is_leased(node) for node in nodes] == [True, True, False]
    assert cycle.is_leased(other)
    cycle.report(TENANT, "g0", {0: "joined"})
    cycle.report(TENANT, "g1", {0: "pruned"})
    cycle.renew()
    assert [cycle.rank(node) for node in nodes] == [DONE, PRUNED, ORDINARY]
    assert [cycle.is_leased(node) for node in nodes] == [False, False, True]


def test_a_lease_ends_by_itself_and_a_silent_program_is_forgotten(cycle, clock):
    node = frontier(cycle, 0)
    clock[0] = 11.0
    cycle.renew()
    assert not cycle.is_leased(node)
    assert cycle.rank(node) == ORDINARY
    clock[0] = 1000.0
    cycle.renew()
    assert not cycle.groups
    assert not cycle.programs


def test_what_a_verification_computed_is_done_until_something_else_reads_it(cycle):
    branch, node = cycle.branch(TENANT, "a", 0, "run"), Node(10)
    cycle.claim(branch, [node], [Node(20)], verifies=True)
    cycle.claim(branch, [Node(1)], [node], verifies=True)
    assert cycle.rank(node) == DONE
    cycle.claim(branch, [Node(1)], [node])
    assert cycle.rank(node) == ORDINARY
    whole = Node(30)
    cycle.claim(branch, [whole], verifies=True)
    assert cycle.rank(whole) == ORDINARY, "it had to compute the text too, which others want"


def test_a_prefix_is_its_programs_until_another_reads_it(cycle):
    own, shared = Node(10), Node(10)
    first = cycle.branch(TENANT, "a", 0, "run-1")
    again = cycle.branch(TENANT, "b", 0, "run-1")
    for branch in (first, again):
        cycle.claim(branch, [Node(5)], [own, shared])
    cycle.claim(cycle.branch(TENANT, "c", 0, "run-2"), [Node(5)], [shared])
    cycle.report(TENANT, "a", {0: "joined"})
    cycle.report(TENANT, "b", {0: "pruned"})
    assert cycle.rank(own) == ORDINARY, "the program may fork again"
    cycle.end(TENANT, "run-1")
    assert cycle.rank(own) == DONE
    assert cycle.rank(shared) == ORDINARY


# Properties

operation = st.one_of(
    st.tuples(
        st.just("insert"),
        st.lists(st.integers(0, 2), min_size=1, max_size=10),
        st.sampled_from([None, "a", "b"]),
        st.integers(0, 2),
    ),
    st.tuples(st.just("evict"), st.integers(1, 20)),
    st.tuples(st.just("lock"), st.integers(0, 10)),
    st.tuples(st.just("unlock"), st.integers(0, 10)),
    st.tuples(
        st.just("report"),
        st.sampled_from(["a", "b"]),
        st.integers(0, 2),
        st.sampled_from(["frontier", "joined", "pruned", "won"]),
    ),
)


def nodes_of(cache):
    stack, found = [cache.tree_core.root_node], []
    while stack:
        node = stack.pop()
        stack += node.children.values()
        found.append(node)
    return found[1:]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    work=st.lists(operation, max_size=50),
    policy=st.sampled_from(["rksc", "rksc-paper"]),
    trim=st.sampled_from([0, 1, 3]),
    tail=st.sampled_from([0, 4]),
)
def test_the_tree_stays_whole_and_evicts_what_it_should(make_evicting, work, policy, trim, tail):
    config = {"lease": True, "trim": trim, "tail": tail} if policy == "rksc" else None
    cache = make_evicting(policy, config)
    allocator = cache.token_to_kv_pool_allocator
    ends, locks = [], []
    for kind, *arguments in work:
        if kind == "insert":
            tokens, group, branch = arguments
            node = insert(cache, tokens, group, branch)
            if node is not None:
                ends.append(node)
        elif kind == "lock" and ends:
            node = ends[arguments[0] % len(ends)]
            if node in nodes_of(cache):
                locks.append((node, cache.lock(node.id)))
        elif kind == "unlock" and locks:
            cache.unlock(locks.pop(arguments[0] % len(locks))[1])
        elif kind == "report":
            group, branch, state = arguments
            cache.report_branches(TENANT, group, {branch: state})
        elif kind == "evict":
            leased, spare = leases(cache)
            evictable = cache.evictable_size()
            freed = evict(cache, arguments[0])
            assert freed >= min(arguments[0], evictable)
            alive = set(nodes_of(cache))
            if policy == "rksc" and arguments[0] <= spare:
                assert leased <= alive, "there was enough that nobody leases"
        alive = set(nodes_of(cache))
        assert {node for node, _ in locks} <= alive
        assert allocator.available_size() + cache.total_size()[0] == CAPACITY
        cache.sanity_check()


def leases(cache):
    """Leased nodes, and how many tokens can go without any of them."""
    cycle = cache.life_cycle
    cycle.renew()
    leased = {node for node in nodes_of(cache) if cycle.is_leased(node)}
    kept = set()
    for node in nodes_of(cache):
        if node in leased or node.component_data[0].lock_ref > 0:
            while node is not None:
                kept.add(node)
                node = node.parent
    return leased, sum(len(node.key) for node in nodes_of(cache) if node not in kept)
