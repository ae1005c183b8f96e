"""kernels/rotate_copy against its float64 reference: torch, Triton's interpreter, CUDA if any."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sglang.kernels import rotate_copy as module
from rksc_sglang.kernels.rotate_copy import (
    Rotation,
    rotate_copy,
    rotate_copy_reference,
    rotation_for,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, DIM, V_DIM, LAYERS = 3, 16, 24, 2
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel that CUDA tensors are given to, run by Triton's interpreter on CPU tensors."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module._kernel.cache_clear()
    yield module._launch
    module._kernel.cache_clear()


def allocate(layout, n, generator):
    """Disjoint source and target slots of ``n`` tokens, and the size of the cache they are in."""
    size = 2 * n + 40
    if layout == "consecutive":
        return torch.arange(3, 3 + n), torch.arange(20 + n, 20 + 2 * n), size
    page = {"shuffled": 1, "page16": 16, "runs": 90, "source": 1}[layout]
    pages = torch.randperm(size // page + 1, generator=generator)
    slots = (pages[:, None] * page + torch.arange(page)).flatten()
    slots = slots[slots < size]
    if layout == "source":  # only the donor's slots are consecutive
        return torch.arange(n), slots[slots >= n][:n], size
    return slots[:n], slots[-n:], size


def random_rotation(n, rotary, neox, per_token, generator):
    inv_freq = torch.rand(rotary // 2, generator=generator, dtype=torch.float64)
    if not per_token:
        return rotation_for(inv_freq, -7, neox)
    angle = torch.arange(n)[:, None] * inv_freq
    return Rotation(angle.cos().float(), angle.sin().float(), neox)


def check(
    move,
    *,
    layout="shuffled",
    n=21,
    dtype=torch.float32,
    neox=True,
    rotary=DIM,
    per_token=False,
    copy=False,
    device="cpu",
    ulps=0.5,
):
    """Runs ``move`` and compares all of every cache with the reference in float64."""
    generator = torch.Generator().manual_seed(n)
    source, target, size = allocate(layout, n, generator)
    rotation = None if copy else random_rotation(n, rotary, neox, per_token, generator)
    if rotation is not None and device != "cpu":
        rotation = Rotation(rotation.cos.to(device), rotation.sin.to(device), neox)
    keys, values = (
        [torch.randn(size, HEADS, dim, generator=generator).to(device, dtype) for _ in range(2)]
        for dim in (DIM, V_DIM)
    )
    before = keys[0].clone()
    exact = [[x.double() for x in caches] for caches in (keys, values)]
    slots = source.to(device), target.to(device)
    rotate_copy_reference(*exact, *slots, rotation)
    move(keys, values, *slots, rotation)

    for key, expected in zip(keys, exact[0]):
        # Rounded once: what is computed in float32 is off by half a unit of the cache's dtype.
        bound = ulps * torch.finfo(dtype).eps * expected.abs() + 2e-6
        assert bool(((key.double() - expected).abs() <= bound).all())
    for value, expected in zip(values, exact[1]):
        assert torch.equal(value.double(), expected)
    kept = DIM if copy else DIM - rotary
    if kept:
        assert torch.equal(keys[0][slots[1], :, -kept:], before[slots[0], :, -kept:])
    untouched = torch.ones(size, dtype=torch.bool)
    untouched[target] = False
    assert torch.equal(keys[0][untouched.to(device)], before[untouched.to(device)])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary", [DIM, DIM // 2])
def test_rotation(device, dtype, neox, rotary):
    for layout in ("consecutive", "shuffled", "source"):
        options = {"layout": layout, "dtype": dtype, "neox": neox, "rotary": rotary}
        check(rotate_copy, n=200, device=device, **options)
        check(rotate_copy, n=200, device=device, per_token=True, **options)


@settings(max_examples=30, deadline=None)
@given(
    layout=st.sampled_from(["consecutive", "shuffled", "page16", "runs", "source"]),
    n=st.sampled_from([1, 2, module.RUN_MIN, 300, module.STEP_MAX + 300]),
    dtype=st.sampled_from(DTYPES),
    neox=st.booleans(),
    per_token=st.booleans(),
    copy=st.booleans(),
)
def test_layouts(**options):
    check(rotate_copy, **options)


def test_runs_are_slices():
    """Long runs go from slice to slice even if the slots between them are scattered."""
    source = torch.cat([torch.arange(100, 300), torch.tensor([7, 3]), torch.arange(400, 500)])
    target = torch.cat([torch.arange(1000, 1200), torch.tensor([20, 9]), torch.arange(600, 700)])
    long, short, rest = module._pieces(source, target)
    assert (long.source, long.target) == (slice(100, 300), slice(1000, 1200))
    assert (short.source, short.target) == (slice(400, 500), slice(600, 700))
    assert rest.rows.tolist() == [200, 201]
    assert rest.source.tolist() == [7, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary", [DIM, DIM // 2])
def test_triton_interpreted(interpreted, dtype, neox, rotary):
    # The interpreter cuts bfloat16 off where a GPU rounds.
    ulps = 1.0 if dtype == torch.bfloat16 else 0.5
    for per_token in (False, True):
        check(interpreted, dtype=dtype, neox=neox, rotary=rotary, per_token=per_token, ulps=ulps)


def test_triton_interpreted_copy(interpreted):
    check(interpreted, copy=True)
    check(interpreted, n=1)


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from rksc_sglang.kernels.rotate_copy import rotate_copy
cache = torch.arange(4.0).view(4, 1, 1)
rotate_copy([cache], [cache.clone()], torch.tensor([0]), torch.tensor([3]), None)
assert cache[3] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rotation_for():
    assert rotation_for(torch.ones(4), 0, True) is None
    inv_freq = torch.tensor([0.1], dtype=torch.float64)
    # Far away a float32 angle would be wrong in its third digit.
    there = rotation_for(inv_freq, 100_003, True)
    assert there.cos.dtype == torch.float32
    assert there.cos[0].item() == pytest.approx(math.cos(10_000.3), abs=1e-7)
    back = rotation_for(inv_freq, -100_003, True)
    assert torch.equal(there.cos, back.cos)
    assert torch.equal(there.sin, -back.sin)


@pytest.mark.parametrize("neox", [True, False])
def test_turns_add_up(neox):
    """A key of position p, moved by delta, is the key of position p + delta."""
    inv_freq = 10000.0 ** -torch.arange(0, 1, 2 / DIM, dtype=torch.float64)
    cache = torch.zeros(4, 1, DIM)
    cache[0] = torch.randn(1, DIM, generator=torch.Generator().manual_seed(0))

    def turn(source, target, delta):
        slots = torch.tensor([source]), torch.tensor([target])
        rotate_copy([cache], [cache.clone()], *slots, rotation_for(inv_freq, delta, neox))

    turn(0, 1, 37)
    turn(1, 2, -20)
    turn(0, 3, 17)
    torch.testing.assert_close(cache[2], cache[3], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(cache[1], cache[2], atol=1e-2)


def test_refused():
    cache = torch.zeros(8, 2, 4)
    one, two = torch.tensor([1]), torch.tensor([2])

    def refused(match, keys=(cache,), values=(cache,), source=one, target=two, rotation=None):
        with pytest.raises(ValueError, match=match):
            rotate_copy(keys, values, source, target, rotation)

    refused("layers", values=())
    refused("equal lists", target=torch.tensor([2, 3]))
    refused("contiguous", keys=[cache.transpose(1, 2)])
    refused("not all in the cache", target=torch.tensor([8]))
    refused("not all in the cache", source=torch.tensor([-1]))
    refused("do not fit in a key", rotation=rotation_for(torch.ones(3), 1, True))
    refused("do not fit 1 tokens", rotation=Rotation(torch.ones(2, 2), torch.ones(2, 2), True))
    rotate_copy([cache], [cache], one[:0], two[:0], None)
    rotate_copy([], [], one, two, None)
