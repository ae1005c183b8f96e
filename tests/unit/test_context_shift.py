"""asks/context_shift against a float64 reference that takes keys out of their rotation."""

import pytest
import torch

from rksc_sglang.asks.context_shift import COMPARED, FALL, REACH, SHARE, ContextShift, Spliced
from rksc_sglang.asks.rope import Rope

LAYERS, HEADS, DIM, V_DIM = 2, 3, 16, 24
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))


def rotated(keys, positions, rope):
    """Float64 keys [n, heads, dim] as they are cached at these positions."""
    half = len(rope.inverse_frequencies)
    angles = positions.double()[:, None, None] * rope.inverse_frequencies
    first = slice(half) if rope.neox else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if rope.neox else slice(1, 2 * half, 2)
    x, y = keys[..., first], keys[..., second]
    result = keys.clone()
    result[..., first] = x * angles.cos() - y * angles.sin()
    result[..., second] = y * angles.cos() + x * angles.sin()
    return result


class Case:
    """Caches with a run of which the head was computed in both contexts, and the rest copied."""

    def __init__(self, *, head=12, run=300, delta=-37, neox=True, rotary=DIM, shuffled=False):
        generator = torch.Generator().manual_seed(head + run)
        frequencies = torch.logspace(0, -3, rotary // 2, dtype=torch.float64)
        self.rope, self.delta = Rope(frequencies, neox), delta
        slots = torch.arange(2 * head + run)
        if shuffled:
            slots = torch.randperm(len(slots), generator=generator)
        self.head, self.donor_head, self.target = slots.split([head, head, run])
        self.start = 91  # position of the first copied token
        size = (LAYERS, len(slots), HEADS)
        self.keys = torch.randn(*size, DIM, generator=generator, dtype=torch.float64)
        self.values = torch.randn(*size, V_DIM, generator=generator, dtype=torch.float64)

    def shifted(self):
        """The reference; leaves the caches as they are."""
        keys, values = self.keys.clone(), self.values.clone()
        head, donors = self.head[-COMPARED:], self.donor_head[-COMPARED:]
        positions = self.start + torch.arange(-len(head), 0)
        target = self.target[:REACH]
        weights = SHARE * torch.exp(-torch.arange(len(target)) / FALL)[:, None, None]
        for layer in range(LAYERS):
            ours = rotated(keys[layer, head], -positions, self.rope)
            theirs = rotated(keys[layer, donors], self.delta - positions, self.rope)
            common = (ours - theirs).mean(0, keepdim=True) * weights
            at = self.start + torch.arange(len(target))
            keys[layer, target] += rotated(common, at, self.rope)
            change = (values[layer, head] - values[layer, donors]).mean(0)
            values[layer, target] += change * weights
        return keys, values

    def run(self, device="cpu"):
        slots = [each.to(device) for each in (self.head, self.donor_head, self.target)]
        return Spliced(*slots, self.delta)

    def shift(self, caches, device="cpu"):
        ContextShift(self.rope, device).of([self.run(device)]).add(*caches)

    def check(self, dtype=torch.float32, device="cpu", tolerance=2e-5):
        self.keys, self.values = self.keys.to(dtype).double(), self.values.to(dtype).double()
        wanted = self.shifted()
        caches = [list(each.to(device, dtype)) for each in (self.keys, self.values)]
        self.shift(caches, device)
        for got, right, before in zip(caches, wanted, (self.keys, self.values)):
            got = torch.stack(got).cpu().double()
            assert torch.allclose(got, right, atol=tolerance, rtol=tolerance)
            assert not torch.equal(got[:, self.target], before[:, self.target])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary", [DIM, 8])
def test_every_layout_of_keys(neox, rotary, device):
    Case(neox=neox, rotary=rotary).check(device=device)


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize(("head", "run"), [(1, 40), (COMPARED, REACH), (40, 1), (16, 2 * REACH)])
def test_runs_and_heads_of_any_length(head, run, shuffled):
    Case(head=head, run=run, shuffled=shuffled).check()


@pytest.mark.parametrize("delta", [0, 5000, -90])
def test_any_distance(delta):
    Case(delta=delta).check()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_caches_of_half_precision(dtype, tolerance):
    Case().check(dtype, tolerance=tolerance)


def test_a_context_that_changes_nothing_shifts_nothing():
    case = Case(delta=0)
    case.keys[:, case.head] = case.keys[:, case.donor_head]
    case.values[:, case.head] = case.values[:, case.donor_head]
    caches = [list(each.float()) for each in (case.keys, case.values)]
    before = [[layer.clone() for layer in cache] for cache in caches]
    case.shift(caches)
    for cache, old in zip(caches, before):
        assert all(map(torch.equal, cache, old))


def test_what_all_tokens_have_in_common_is_found():
    """Of one vector that the new context adds to every key and value, the share that is added."""
    case = Case(run=1)
    generator = torch.Generator().manual_seed(1)
    positions = case.start + torch.arange(-len(case.head), 0)
    key, value = (torch.randn(1, HEADS, d, generator=generator).double() for d in (DIM, V_DIM))
    at_first = rotated(key, torch.tensor([case.start]), case.rope)
    right = (
        case.keys[:, case.target] + SHARE * at_first,
        case.values[:, case.target] + SHARE * value,
    )
    moved = torch.full((len(case.head),), case.delta)
    for layer in range(LAYERS):
        own = rotated(case.keys[layer, case.donor_head], moved, case.rope)
        added = rotated(key.expand(len(own), -1, -1), positions, case.rope)
        case.keys[layer, case.head] = own + added
        case.values[layer, case.head] = case.values[layer, case.donor_head] + value
    caches = [list(each.float()) for each in (case.keys, case.values)]
    case.shift(caches)
    for cache, wanted in zip(caches, right):
        assert torch.allclose(torch.stack(cache)[:, case.target].double(), wanted, atol=1e-5)


def test_several_runs_at_once_layer_by_layer():
    cases = [Case(run=40), Case(run=2 * REACH, delta=11), Case(run=7, delta=0)]
    wanted = [case.shifted() for case in cases]
    sizes = [case.keys.shape[1] for case in cases]
    keys = list(torch.cat([case.keys for case in cases], 1).float())
    values = list(torch.cat([case.values for case in cases], 1).float())
    runs = []
    for number, case in enumerate(cases):
        run, first = case.run(), sum(sizes[:number])
        runs.append(Spliced(*(slots + first for slots in run[:3]), run.delta))
    shifts = ContextShift(cases[0].rope, "cpu").of(runs)
    for layer in range(LAYERS):
        shifts.add([keys[layer]], [values[layer]])
    for got, right in zip((keys, values), zip(*wanted)):
        assert torch.allclose(torch.stack(got).double(), torch.cat(right, 1), atol=2e-5)
