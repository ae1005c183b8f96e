"""Merging, replayed on branches whose outcome is known."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.merge_replay import (
    at_random,
    by_signal,
    fewer_branches,
    replay,
    sibling_pairs,
)
from rksc_sglang.asks.alike import same_state, text_ratio


def sample(*lines, answer=None, right=False):
    """Ten tokens a line."""
    probe = {"following": {"1": 1.0}, "signature": [1.0]}
    return {
        "text": "\n".join(lines),
        "tokens": 10 * len(lines),
        "ends": [10 * n for n in range(1, len(lines) + 1)],
        "answer": answer,
        "right": right,
        "probes": [probe] * (len(lines) - 1),
    }


RIGHT = sample("1 + 2 = 3", "3 + 4 = 7", "Answer: 7", answer="7", right=True)
OTHER_WAY = sample("2 + 1 = 3", "3 + 4 = 8", "Answer: 8", answer="8")
WRONG = sample("1 + 2 = 4", "4 + 4 = 8", "Answer: 8", answer="8")


def test_without_merging_it_is_the_vote():
    found = replay([RIGHT, OTHER_WAY, WRONG])
    assert (found.answer, found.right, found.tokens, found.merges) == ("8", False, 90, 0)
    assert found.peak == 90


def test_a_merged_branch_gives_its_vote_and_spares_its_rest():
    found = replay([RIGHT, OTHER_WAY, WRONG], by_signal(same_state, 1.0))
    assert (found.answer, found.right) == ("7", True), "two votes on 3, behind the first line"
    assert found.tokens == 30 + 10 + 30
    assert found.merges == 1
    assert found.peak == 60


def test_pairs_are_of_siblings_at_the_same_line():
    pairs = list(sibling_pairs([RIGHT, OTHER_WAY, WRONG]))
    assert len(pairs) == 2 * 3
    assert [same for values, same in pairs if values["state"] == 1] == [False, True]


def test_fewer_branches_at_equal_tokens_are_the_first_ones():
    assert fewer_branches([RIGHT, OTHER_WAY, WRONG], 65).tokens == 60
    assert fewer_branches([RIGHT, OTHER_WAY, WRONG], 5).answer == "7"


@given(
    answers=st.lists(st.sampled_from("ab"), min_size=1, max_size=6), rate=st.floats(0, 1), seed=...
)
def test_merging_never_costs_tokens_and_always_answers(answers, rate, seed: int):
    samples = [sample(f"step {a}", "and", f"Answer: {a}", answer=a) for a in answers]
    whole = replay(samples)
    for decide in (at_random(rate, random.Random(seed)), by_signal(text_ratio, 0.5)):
        found = replay(samples, decide)
        assert found.tokens <= whole.tokens
        assert found.peak <= whole.peak
        assert found.answer in answers
        assert found.merges < len(answers)


def test_none_is_merged_at_random_at_rate_zero():
    assert replay([RIGHT] * 5, at_random(0.0, random.Random(0))).merges == 0
    assert replay([RIGHT] * 5, at_random(1.0, random.Random(0))).merges == 4
    assert replay([RIGHT] * 5).tokens == pytest.approx(150)
