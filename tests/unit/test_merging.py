"""``group.merge`` on SGLang's real executors, with a backend that answers as it is told."""

from collections import Counter

import pytest
import sglang as sgl
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import get_chat_template
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams

import rksc_sglang as rksc
from rksc_sglang.contract import KEY


class Telling(BaseBackend):
    """Each branch generates the next of its own texts."""

    def __init__(self, texts):
        super().__init__()
        self.chat_template = get_chat_template("default")
        self.texts = [list(some) for some in texts]
        self.asked = Counter()

    def generate(self, s, sampling_params):
        branch = sampling_params.to_srt_kwargs()["custom_params"][KEY]["branch"]
        self.asked[branch] += 1
        return self.texts[branch].pop(0), {}


def fork(texts, **kwargs):
    executor = StreamExecutor(Telling(texts), {}, SglSamplingParams(), None, stream=False)
    state = ProgramState(executor)
    state += "Q"
    return rksc.fork(state, len(texts), **kwargs), executor.backend


def test_duplicates_stop_and_their_votes_are_kept():
    texts = [["so\n5", "A"], ["then\n5", "B"], ["7", "C"], ["5", "D"]]
    group, backend = fork(texts)
    group += sgl.gen("thought")
    found = group.merge("thought")
    assert [(merge.branch, merge.into) for merge in found] == [(1, 0), (3, 0)]
    assert {(merge.at, merge.by, merge.similarity) for merge in found} == {
        ("thought", "state", 1.0)
    }
    assert group.weights == [3, 0, 1, 0]
    assert group.stopped == {1, 3}
    assert group[3].get_meta_info("thought")[KEY]["merged_into"] == 0
    group += sgl.gen("answer")
    group += " done"
    assert group.votes(lambda state: state["answer"]) == {"A": 3, "C": 1}
    assert backend.asked == {0: 2, 1: 1, 2: 2, 3: 1}
    assert group[0].text().endswith("A done")
    assert not group[1].text().endswith("done")


def test_a_branch_can_be_merged_later_with_all_that_was_merged_into_it():
    group, _ = fork([["1", "x"], ["2", "x"], ["2"]])
    group += sgl.gen("first")
    group.merge("first")
    group += sgl.gen("second")
    group.merge("second")
    assert group.weights == [3, 0, 0]
    assert [(merge.branch, merge.into, merge.at) for merge in group.merged] == [
        (2, 1, "first"),
        (1, 0, "second"),
    ]


def test_the_groups_rule_says_what_is_the_same():
    rule = rksc.MergeRule("text", 0.6)
    group, _ = fork([["a b c d"], ["a b c e"], ["x y z"]], merge=rule)
    group += sgl.gen("thought")
    assert [(merge.branch, merge.into) for merge in group.merge("thought")] == [(1, 0)]
    assert group.merged[0].similarity == pytest.approx(0.75)


def test_wrong_rules_are_named():
    with pytest.raises(rksc.MergeError, match="by: expected one of"):
        rksc.MergeRule("meaning")
    group, _ = fork([["a"], ["b"]])
    group += sgl.gen("thought")
    with pytest.raises(rksc.MergeError, match="needs an SGLang server"):
        group.merge("thought", rksc.MergeRule("next", 0.5))
    with pytest.raises(rksc.MergeError, match=r"threshold: by='text' needs one"):
        group.merge("thought", rksc.MergeRule("text"))


@settings(max_examples=20, deadline=None)
@given(
    states=st.lists(st.lists(st.sampled_from("ab"), min_size=3, max_size=3), min_size=1, max_size=6)
)
def test_no_vote_is_lost(states):
    group, _ = fork(states)
    for level in range(3):
        group += sgl.gen(f"thought{level}")
        group.merge(f"thought{level}")
        assert sum(group.weights) == len(group)
        going = {branch for branch, weight in enumerate(group.weights) if weight}
        assert going.isdisjoint(group.stopped)
        assert going | group.stopped == set(range(len(group)))
        seen = [group[branch][f"thought{level}"] for branch in going]
        assert len(set(seen)) == len(seen)
    assert sum(group.votes(lambda state: state["thought2"]).values()) == len(group)
    group.join()
