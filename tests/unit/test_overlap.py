"""Whether two waiting prompts hold the same text."""

from hypothesis import given
from hypothesis import strategies as st

from rksc_sglang.asks.overlap import WINDOW, Windows

TEXT = list(range(1000, 1100))


@given(before=st.integers(0, 40), other=st.integers(0, 40), length=st.integers(48, 100))
def test_a_common_text_is_seen_at_any_offsets(before, other, length):
    own = Windows([*range(before), *TEXT[:length], 7])
    its = Windows([*range(500, 500 + other), *TEXT[:length], 8])
    assert own.shares(its, length // 2, start=0)


def test_prompts_of_other_texts_share_nothing():
    own, its = Windows(TEXT), Windows(TEXT[::-1])
    assert not own.shares(its, 40, start=0)
    assert not own.shares(Windows([]), 0, start=0)


def test_what_is_in_front_of_the_start_does_not_count():
    own, its = Windows([*TEXT, 1]), Windows([*TEXT, 2])
    assert own.shares(its, 64, start=0)
    assert not own.shares(its, 64, start=len(TEXT) - WINDOW)


def test_a_shorter_common_text_is_not_enough():
    own, its = Windows([*TEXT[:32], *range(40)]), Windows([*TEXT[:32], *range(90, 130)])
    assert own.shares(its, 40, start=0)
    assert not own.shares(its, 64, start=0)
