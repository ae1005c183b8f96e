"""``benchmarks.merge`` on rows whose outcome is known."""

import numpy as np
import pytest

from benchmarks import merge
from benchmarks.statistics import auc
from rksc_sglang.asks.alike import Thought
from rksc_sglang.asks.merge_calibration import compare


def branch(first, answer, right):
    return {
        "text": f"so = {first}\nand = {first}\nAnswer: {answer}",
        "tokens": 30,
        "ends": [10, 20, 30],
        "answer": answer,
        "right": right,
    }


def thoughts(first):
    """Behind each line but the last."""
    signature = (1.0, 0.0) if first == "a" else (0.0, 1.0)
    following = {ord(first): 0.9}
    return [
        Thought(text, first, following, signature)
        for text in (f"so = {first}", f"so = {first}\nand = {first}")
    ]


def make_rows(split, count, seed):
    """The first line decides the answer; three of four branches have the right one."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        right = [bool(x) for x in rng.permutation([1, 1, 1, 0] * 2)]
        branches = [branch("a" if r else "b", "7" if r else "8", r) for r in right]
        alike = compare([thoughts("a" if r else "b") for r in right])
        row = {"workload": split, "condition": "recorded", "branches": branches, "alike": alike}
        rows.append(row)
    return rows


def live_rows():
    return [
        {
            "workload": program,
            "condition": condition,
            "repeat": repeat,
            "position": 0,
            "seconds": seconds,
            "tokens": tokens,
            "right": True,
        }
        for repeat in range(4)
        for program in ("vote", "tree")
        for condition, seconds, tokens in (("plain", 2.0, 400), ("merge", 1.0, 100))
    ]


def test_signals_conditions_and_controls_are_summarised():
    rows = [*make_rows("calibration", 70, 0), *make_rows("test", 50, 1), *live_rows()]
    rows += make_rows(merge.TEXT, 3, 2)
    summary = merge.summarise(rows)
    for name in ("state", "next", "sigma", "combined"):
        assert summary["predictor_auc"][name] == pytest.approx(1)
    assert summary["predictor_auc"]["text"] > 0.5
    assert summary["pairs"] == 50 * 2 * 28
    assert summary["text_model"]["predictor_auc"]["sigma"] == pytest.approx(1)
    found = summary["risks"]["0.05"][summary["signal"]]
    assert found["threshold"] <= 1
    # Two of eight branches go on: the others end behind their first line.
    assert summary["tokens_saved"] == pytest.approx(1 - (2 * 30 + 6 * 10) / 240)
    assert summary["majority_changed_rate"] == 0
    assert summary["accuracy_delta"]["value"] == 0
    assert found["controls"]["fewer_branches"]["tokens_saved"] >= summary["tokens_saved"]
    assert found["controls"]["at_random"]["accuracy"] <= 1
    assert summary["curves"]["text"][0]["threshold"] == 1
    several = summary["going_on"]["state"]
    saved = [several[keep]["tokens_saved"] for keep in ("1", "2", "4")]
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] == pytest.approx(1 - (6 * 30 + 2 * 10) / 240)
    assert summary["speedup"]["ratio"] == pytest.approx(2)
    assert summary["live"]["tree"]["tokens_saved"] == pytest.approx(0.75)


def test_without_a_signal_that_holds_the_risk_nothing_is_merged():
    rows = [*make_rows("calibration", 5, 0), *make_rows("test", 5, 1)]
    summary = merge.summarise(rows)
    assert summary["signal"] is None
    assert summary["risks"] == {"0.02": {}, "0.05": {}, "0.1": {}}


def test_auc():
    same = np.array([True, False, True, False])
    assert auc(np.array([3.0, 1.0, 2.0, 0.0]), same) == 1
    assert auc(np.array([1.0, 1.0, 1.0, 1.0]), same) == 0.5
