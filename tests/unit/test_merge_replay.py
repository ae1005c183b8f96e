"""Merging, replayed on branches whose outcome is known."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.merge_replay import (
    at_random,
    fewer_branches,
    result_of,
    several_go_on,
    sibling_pairs,
)
from rksc_sglang.asks.alike import SIGNALS, Thought
from rksc_sglang.asks.merge_calibration import by_signal, compare, group_of, replay


def sample(*lines, answer=None, right=False):
    """Ten tokens a line."""
    return {
        "text": "\n".join(lines),
        "tokens": 10 * len(lines),
        "ends": [10 * n for n in range(1, len(lines) + 1)],
        "answer": answer,
        "right": right,
    }


def group(*branches):
    """As they are recorded."""
    thoughts = [
        [
            Thought("\n".join(lines[: n + 1]), result_of(lines[n]), {1: 1.0}, (1.0,))
            for n in range(len(lines) - 1)
        ]
        for lines in (branch["text"].splitlines() for branch in branches)
    ]
    return group_of({"branches": branches, "alike": compare(thoughts)})


RIGHT = sample("1 + 2 = 3", "3 + 4 = 7", "Answer: 7", answer="7", right=True)
OTHER_WAY = sample("2 + 1 = 3", "3 + 4 = 8", "Answer: 8", answer="8")
WRONG = sample("1 + 2 = 4", "4 + 4 = 8", "Answer: 8", answer="8")
VOTE = group(RIGHT, OTHER_WAY, WRONG)


def test_without_merging_it_is_the_vote():
    found = replay(VOTE)
    assert (found.answer, found.right, found.tokens, found.merges) == ("8", False, 90, 0)
    assert found.peak == 90


def test_a_merged_branch_gives_its_vote_and_spares_its_rest():
    found = replay(VOTE, by_signal(VOTE.alike["state"], 1.0))
    assert (found.answer, found.right) == ("7", True), "two votes on 3, behind the first line"
    assert found.tokens == 30 + 10 + 30
    assert found.merges == 1
    assert found.peak == 60


def test_pairs_are_of_siblings_at_the_same_line():
    values, same = sibling_pairs(VOTE)
    assert values.shape == (2 * 3, len(SIGNALS))
    assert same[values[:, list(SIGNALS).index("state")] == 1].tolist() == [False, True]


def test_several_of_a_kind_go_on_and_share_the_votes():
    five = group(*[RIGHT] * 5, WRONG)
    decide = several_go_on(by_signal(five.alike["state"], 1.0), 2)
    places = [0, 1, 2, 3, 4, 5]
    assert [(found.place, found.of) for found in decide(1, places)] == [(2, 0), (3, 1), (4, 0)]
    assert replay(five, decide).merges == 3
    one = several_go_on(by_signal(five.alike["state"], 1.0), 1)
    assert replay(five, one) == replay(five, by_signal(five.alike["state"], 1.0))


def test_pairs_need_two_branches_with_answers():
    values, same = sibling_pairs(group(RIGHT, sample("what", "now")))
    assert values.shape == (0, len(SIGNALS))
    assert same.shape == (0,)


def test_a_branch_of_fewer_lines_is_compared_at_those():
    short = sample("1 + 2 = 3", "Answer: 3", answer="3")
    values, same = sibling_pairs(group(RIGHT, short, WRONG))
    assert same.tolist() == [False, False, False, False], "three at the first line, one behind"
    assert values[0].tolist() == [1.0, 1.0, 1.0, 1.0]


def test_fewer_branches_at_equal_tokens_are_whole_ones():
    found = [fewer_branches(VOTE, 65, random.Random(seed)) for seed in range(20)]
    assert {outcome.tokens for outcome in found} == {60}
    assert {outcome.answer for outcome in found} == {"7", "8"}
    assert fewer_branches(VOTE, 5, random.Random(0)).tokens == 30


@given(
    answers=st.lists(st.sampled_from("ab"), min_size=1, max_size=6), rate=st.floats(0, 1), seed=...
)
def test_merging_never_costs_tokens_and_always_answers(answers, rate, seed: int):
    asked = group(*(sample(f"step {a}", "and", f"Answer: {a}", answer=a) for a in answers))
    whole = replay(asked)
    alike = by_signal(asked.alike["text"], 0.5)
    for decide in (at_random(rate, random.Random(seed)), alike):
        found = replay(asked, decide)
        assert found.tokens <= whole.tokens
        assert found.peak <= whole.peak
        assert found.answer in answers
        assert found.merges < len(answers)


def test_none_is_merged_at_random_at_rate_zero():
    five = group(*[RIGHT] * 5)
    assert replay(five, at_random(0.0, random.Random(0))).merges == 0
    assert replay(five, at_random(1.0, random.Random(0))).merges == 4
    assert replay(five).tokens == pytest.approx(150)
