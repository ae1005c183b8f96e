"""The skip gate: evidence of a group, the paper's rules, and the calibrated one."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from rksc_sglang.cgee.skip_gate import CalibratedGate, PaperGate, gather


def test_evidence_of_a_group():
    found = gather(["a", "b", "a", None], [0.6, 0.9, 0.8, 0.7])
    assert found.share == 0.5
    assert (found.top, found.second) == (0.9, 0.8)
    assert found.support == pytest.approx(0.7)
    assert (found.winner, found.leader) == (1, 2)


def test_of_equally_frequent_answers_the_more_confident_branchs_leads():
    assert gather(["a", "b"], [0.6, 0.7]).leader == 1
    assert gather(["b", "a"], [0.7, 0.6]).leader == 0


def test_without_any_answer_nobody_leads():
    found = gather([None, None], [0.6, 0.7])
    assert (found.share, found.leader, found.winner) == (0.0, None, 1)
    assert CalibratedGate((9.0, 9.0, 9.0, 9.0), 0.0).winner(found) is None


@pytest.mark.parametrize("groups", [([], []), (["a"], [0.5, 0.6])])
def test_a_confidence_for_each_answer_is_needed(groups):
    with pytest.raises(ValueError, match="one confidence for each branch"):
        gather(*groups)


@pytest.mark.parametrize(
    ("confidences", "skips"),
    [
        ([0.75, 0.68], True),  # 0.70 and a lead of 0.06
        ([0.75, 0.72], False),
        ([0.66, 0.60], True),  # 0.63 and a relative lead of 0.08
        ([0.62, 0.30], False),
    ],
)
def test_the_papers_rules(confidences, skips):
    winner = PaperGate().winner(gather(["a", "b"], confidences))
    assert winner == (0 if skips else None)


def test_the_calibrated_gate_takes_the_answer_of_most():
    gate = CalibratedGate((8.0, 1.0, 0.0, -6.0), 0.8)
    assert gate.winner(gather(["a", "a", "a", "b"], [0.6, 0.7, 0.5, 0.9])) is None
    assert gate.winner(gather(["a", "a", "a", "a"], [0.6, 0.7, 0.5, 0.9])) == 3


def test_the_edge_is_over_those_who_say_something_else():
    assert gather(["a", "a", "b", None], [0.5, 0.9, 0.6, 0.7]).edge == pytest.approx(0.2)
    assert gather(["a", "a"], [0.5, 0.9]).edge == pytest.approx(0.9)
    assert gather([None], [0.5]).edge == 0


answers = st.lists(st.one_of(st.none(), st.sampled_from("abc")), min_size=1, max_size=8)


@given(answers=answers, data=st.data())
def test_evidence_does_not_depend_on_the_order(answers, data):
    confidences = data.draw(
        st.lists(st.floats(0.01, 1), min_size=len(answers), max_size=len(answers), unique=True)
    )
    order = data.draw(st.permutations(range(len(answers))))
    one = gather(answers, confidences)
    two = gather([answers[i] for i in order], [confidences[i] for i in order])
    assert (one.share, one.top, one.second) == (two.share, two.top, two.second)
    assert one.support == pytest.approx(two.support)
    assert one.edge == pytest.approx(two.edge)
    assert one.winner == order[two.winner]
    assert (one.leader is None) == (two.leader is None)
    if one.leader is not None:
        assert one.leader == order[two.leader]
        assert one.share == answers.count(answers[one.leader]) / len(answers)
