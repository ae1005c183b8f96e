"""kernels/prefix_attention against a dense float64 reference, on every device at hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sglang.kernels import prefix_attention as pa
from rksc_sglang.kernels.prefix_attention import (
    plan_attention,
    prefix_attention,
    reference_attention,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HEADS = [(1, 1), (4, 4), (9, 3), (8, 1)]  # query heads, KV heads
DIM = 16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=["flash", "math"])
def path(request, monkeypatch):
    """With torch's CPU flash kernel, and as if it were missing."""
    if request.param == "math":
        monkeypatch.setattr(pa, "_flash_cpu", None)


def allocate(groups, layout, generator):
    """Slots of requests: groups of (shared length, tails), numbered by the layout."""
    total = sum(shared + sum(tails) for shared, tails in groups)
    page = {"page16": 16, "shuffled": 1}.get(layout, total)
    pages = torch.arange(math.ceil(total / page))
    if layout != "consecutive":
        pages = torch.randperm(len(pages), generator=generator)
    slots = iter((1 + pages[:, None] * page + torch.arange(page)).flatten().int().split(1))
    take = lambda n: [next(slots) for _ in range(n)]  # noqa: E731
    requests = []
    for shared, tails in groups:
        prefix = take(shared)
        requests += [torch.cat(prefix + take(tail)) for tail in tails]
    return requests


def check(requests, new, *, heads=(9, 3), dtype=torch.float32, device="cpu", v_dim=DIM, **options):
    """Compares with the reference; returns the plan."""
    generator = torch.Generator().manual_seed(0)
    size = max(int(r.max()) for r in requests) + 1
    q, k, v = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in (
            (sum(new), heads[0], DIM),
            (size, heads[1], DIM),
            (size, heads[1], v_dim),
        )
    )
    cap = options.pop("logit_cap", 0.0)
    used = torch.cat(requests).long().unique()
    unused = torch.ones(size, dtype=torch.bool)
    unused[used] = False
    k[unused], v[unused] = float("nan"), float("nan")  # only the requests' own slots may be read
    plan = plan_attention(requests, new, device=device, **options)
    out = prefix_attention(q, k, v, plan, scale=0.3, logit_cap=cap)
    expected = reference_attention(q, k, v, requests, new, scale=0.3, logit_cap=cap, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    return plan


groups = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 40, 300]),
        st.lists(st.integers(1, 90), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    groups=groups,
    layout=st.sampled_from(["consecutive", "page16", "shuffled"]),
    kind=st.sampled_from(["decode", "extend", "mixed"]),
    heads=st.sampled_from(HEADS),
    window=st.sampled_from([None, 0, 7, 100]),
    seed=st.integers(0, 99),
)
def test_equals_reference(device, groups, layout, kind, heads, window, seed):
    generator = torch.Generator().manual_seed(seed)
    requests = allocate(groups, layout, generator)
    draw = torch.rand(len(requests), generator=generator).tolist()
    new = {
        "decode": [1 for _ in requests],
        "extend": [1 + int(x * (len(r) - 1)) for x, r in zip(draw, requests)],
        "mixed": [1 if x < 0.5 else len(r) for x, r in zip(draw, requests)],
    }[kind]
    check(requests, new, heads=heads, window=window, device=device)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("new", [1, 30])
def test_half_precision(device, dtype, new):
    requests = allocate([(300, [40, 50, 60]), (0, [45])], "consecutive", None)
    check(requests, [new] * 4, dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_logit_cap_encoder_and_unequal_head_sizes(device):
    requests = allocate([(300, [40, 50, 60])], "consecutive", None)
    for new in ([1] * 3, [9, 1, 60]):
        check(requests, new, logit_cap=2.0, device=device)
        check(requests, new, causal=False, device=device)
        check(requests, new, v_dim=8, device=device)


def test_long_windowed_prompt_is_cut_into_row_blocks():
    requests = allocate([(0, [1300])], "page16", torch.Generator().manual_seed(1))
    plan = check(requests, [1200], window=50)
    assert max(part.mask.numel() for part in plan.parts) <= pa.WINDOW_ROWS * (pa.WINDOW_ROWS + 50)


def reads(plan):
    """KV slots read by each part."""
    return [
        part.slots.stop - part.slots.start if isinstance(part.slots, slice) else len(part.slots)
        for part in plan.parts
    ]


def test_shared_prefix_is_read_once_and_in_place():
    plan = check(allocate([(1000, [5] * 8)], "consecutive", None), [1] * 8)
    assert sum(reads(plan)) == 1000 + 8 * 5
    assert isinstance(plan.parts[0].slots, slice)


def test_several_groups_are_shared():
    requests = allocate([(400, [5] * 8)] * 4, "consecutive", None)
    plan = check(requests, [1] * 32)
    assert sum(reads(plan)) == 4 * 400 + 32 * 5


def test_prefix_tree_has_levels():
    root, middle = torch.arange(1, 401), torch.arange(401, 1001)
    leaves = torch.arange(1001, 1051).view(10, 5)
    requests = [torch.cat([root, leaf]) for leaf in leaves[:5]]
    requests += [torch.cat([root, middle, leaf]) for leaf in leaves[5:]]
    plan = check(requests, [1] * 10)
    assert sum(reads(plan)) == 400 + 600 + 10 * 5


def test_small_shared_head_is_read_with_the_large_prefix_behind_it():
    head = torch.arange(1, 5)
    requests = []
    for start in (100, 1100):
        prefix = torch.arange(start, start + 900)
        for tail in range(3):
            requests.append(torch.cat([head, prefix, torch.tensor([start + 950 + tail])]))
    plan = check(requests, [1] * 6)
    assert sum(reads(plan)) == 2 * 904 + 6


def test_siblings_extend_behind_one_read():
    plan = check(allocate([(600, [7, 1, 30])], "consecutive", None), [7, 1, 30])
    assert sum(reads(plan)) == 600 + 7 + 1 + 30


def test_unshared_decode_is_one_part():
    plan = check(allocate([(0, [30, 31, 40, 64])], "consecutive", None), [1] * 4)
    assert len(plan.parts) == 1
    assert plan.order is None


def test_gathered_parts_are_bounded():
    requests = allocate([(0, [1500, 1400, 1600, 5000])], "shuffled", None)
    plan = check(requests, [1] * 4)
    assert max(reads(plan)) <= pa.GATHER_MAX


def test_same_bits_every_time_and_with_reused_scratch():
    requests = allocate([(300, [40, 50, 60]), (0, [700])], "shuffled", None)
    k, v = torch.randn(2, 2000, 3, DIM).unbind()
    q = torch.randn(4, 9, DIM)
    scratch = {}
    first, *others = (
        prefix_attention(
            q, k, v, plan_attention(requests, [1] * 4), scale=0.3, scratch=scratch
        ).clone()
        for _ in range(5)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("new", [[0], [4]])
def test_impossible_query_counts_are_refused(new):
    with pytest.raises(ValueError, match="query"):
        plan_attention([torch.arange(3)], new)


def test_window_without_causality_is_refused():
    with pytest.raises(ValueError, match="causal"):
        plan_attention([torch.arange(3)], [1], window=2, causal=False)


def test_empty_batch():
    out = prefix_attention(
        torch.empty(0, 2, DIM),
        torch.empty(4, 1, DIM),
        torch.empty(4, 1, DIM),
        plan_attention([], []),
        scale=1.0,
    )
    assert out.shape == (0, 2, DIM)
