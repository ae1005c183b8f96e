"""Signals that ask a server, and what becomes of what was merged."""

import pytest
import requests
import sglang as sgl

import rksc_sglang as rksc
from rksc_sglang.contract import KEY


@sgl.function
def program(s, rule):
    s += sgl.system("You answer questions in a few words.")
    s += sgl.user("What is the capital of France?")
    branches = rksc.fork(s, 3, hints=["", "", sgl.assistant_begin() + "A recipe for soup:"])
    branches += lambda i: (
        ("" if i == 2 else sgl.assistant_begin()) + sgl.gen("thought", max_tokens=6, temperature=0)
    )
    branches.merge("thought", rule)
    branches += sgl.gen("rest", max_tokens=4, temperature=0)
    branches.join()
    return branches


def merged_on(url, rule):
    backend = sgl.RuntimeEndpoint(url, chat_template_name="chatml")
    return program.run(rule, backend=backend).ret_value


@pytest.mark.parametrize(("by", "threshold"), [("next", None), ("sigma", 0.99)])
def test_equal_thoughts_are_merged_and_others_are_not(splicing, by, threshold):
    """Without a threshold, by the one in the server's profile."""
    branches = merged_on(splicing, rksc.MergeRule(by, threshold))
    assert [(merge.branch, merge.into) for merge in branches.merged] == [(1, 0)]
    assert branches.merged[0].similarity == pytest.approx(1, abs=0.01)
    assert branches.weights == [2, 0, 1]
    assert branches[1].get_meta_info("thought")[KEY]["merged_into"] == 0
    assert "rest" in branches[0]
    assert "rest" not in branches[1]


def test_without_signatures_it_says_why(server):
    with pytest.raises(rksc.MergeError, match=r"sigma.*mode exact"):
        merged_on(server, rksc.MergeRule("sigma", 0.9))


def test_a_threshold_that_the_profile_does_not_have_is_asked_for(splicing):
    with pytest.raises(rksc.MergeError, match="threshold: by='sigma'"):
        merged_on(splicing, rksc.MergeRule("sigma"))


def test_a_signature_is_shown_where_it_is_asked_for(splicing):
    def ask(text, **contract):
        params = {"max_new_tokens": 1, "temperature": 0, "custom_params": {KEY: contract}}
        body = {"text": text, "sampling_params": params}
        return requests.post(splicing + "/generate", json=body, timeout=120).json()["meta_info"][
            KEY
        ]

    assert "signature" not in ask("One, two, three", group="g")
    first = ask("One, two, three", signature=True)["signature"]
    again = ask("One, two, three", signature=True)["signature"]
    other = ask("The sea is blue and wide", signature=True)["signature"]
    assert sum(x * x for x in first) == pytest.approx(1, abs=0.01)
    assert sum(x * y for x, y in zip(first, again)) == pytest.approx(1, abs=0.01)
    assert sum(x * y for x, y in zip(first, other)) < 0.98
