import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rksc_sglang.asks import reuse
from rksc_sglang.asks.reuse import BLOCK, OFTEN, Reuse


def tokens(*ids):
    return np.array(ids, np.int64)


@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=120),
    times=st.integers(0, OFTEN + 1),
    common=st.integers(0, 120),
)
def test_whole_blocks_of_the_common_prefix_are_found(prompt, times, common):
    known = Reuse()
    for _ in range(times):
        known.note("us", tokens(*prompt))
    other = prompt[:common] + [9] * 20
    blocks = min(common, len(prompt)) // BLOCK
    expected = blocks * BLOCK if times >= OFTEN else 0
    assert known.often("us", tokens(*other), 0) == expected
    assert known.often("them", tokens(*other), 0) == 0


def test_what_is_in_front_of_the_exact_prefix_does_not_count():
    known, prompt = Reuse(), tokens(*range(64))
    for _ in range(OFTEN):
        known.note("us", prompt[:32])
    assert known.often("us", prompt, 40) == 40


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(reuse, "REMEMBERED", 3)
    known = Reuse()
    for number in range(4):
        for _ in range(OFTEN):
            known.note("us", tokens(*[number] * BLOCK))
    assert known.often("us", tokens(*[0] * BLOCK), 0) == 0
    assert known.often("us", tokens(*[3] * BLOCK), 0) == BLOCK
    known.clear()
    assert known.often("us", tokens(*[3] * BLOCK), 0) == 0
