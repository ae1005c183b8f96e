"""What tells that two thoughts are the same, and which of them are gone on from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sglang.asks.alike import (
    SIGNALS,
    Thought,
    duplicates,
    next_token,
    same_state,
    sigma,
    text_ratio,
)


def test_each_signal_is_largest_for_the_same_thought():
    one = Thought("2 + 3 = 5", "5", {7: 0.6, 8: 0.3}, (0.6, 0.8))
    other = Thought("3 + 2 = 5 then", "5 then", {7: 0.1, 9: 0.8}, (0.8, 0.6))
    for signal in SIGNALS.values():
        assert signal(one, one) == pytest.approx(1)
        assert signal(one, other) < 1
        assert signal(one, other) == pytest.approx(signal(other, one), abs=0.2)


def test_what_the_signals_are():
    assert text_ratio(Thought("a b c d"), Thought("a b x d")) == pytest.approx(0.75)
    assert same_state(Thought("a", None), Thought("a", None)) == 0
    assert same_state(Thought("a", 5), Thought("b", 5)) == 1
    apart = Thought("", following={1: 1.0}), Thought("", following={2: 1.0})
    assert next_token(*apart) == pytest.approx(0)
    assert sigma(Thought("", signature=(1, 0)), Thought("", signature=(-1, 0))) == -1
    with pytest.raises(ValueError, match="no signature"):
        sigma(Thought(""), Thought("", signature=(1.0,)))


@given(states=st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=12))
def test_of_the_same_only_the_first_goes_on(states):
    thoughts = [None if state is None else Thought("", state) for state in states]
    found = duplicates(thoughts, same_state, 1.0)
    gone = {duplicate.place for duplicate in found}
    left = [state for place, state in enumerate(states) if place not in gone and state is not None]
    assert len(set(left)) == len(left)
    for duplicate in found:
        assert duplicate.of not in gone, "who is merged is nobody's other half"
        assert states[duplicate.of] == states[duplicate.place]
        assert duplicate.of < duplicate.place


@given(
    texts=st.lists(st.lists(st.sampled_from("abc"), max_size=5), max_size=8),
    threshold=st.floats(0.1, 1),
)
def test_likenesses_do_not_add_up(texts, threshold):
    thoughts = [Thought(" ".join(words)) for words in texts]
    for duplicate in duplicates(thoughts, text_ratio, threshold):
        ratio = text_ratio(thoughts[duplicate.of], thoughts[duplicate.place])
        assert ratio == duplicate.similarity >= threshold
