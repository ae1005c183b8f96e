"""``benchmarks.verify`` on rows whose outcome is known."""

from dataclasses import asdict

import numpy as np
import pytest

from benchmarks import verify
from rksc_sglang.cgee.exit_rule import Probe

LAYERS, CHECKS = 8, (2, 4, 6)


def make_rows(count, split, seed):
    """Layers that know the verdict but for a little noise; six of eight branches are right, in a
    tenth of the problems none is."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        branches = []
        for place in range(verify.MORE_BRANCHES):
            right = number % 10 != 0 and place % 8 < 6
            lead = rng.normal(3 if right else -3, 0.3)
            branch = {
                "answer": "8" if right else "9",
                "right": right,
                "confidence": rng.uniform(0.8, 0.9) if right else rng.uniform(0.5, 0.6),
                "tokens": 20,
                "text": "",
            }
            if place < verify.BRANCHES:
                branch["seen"] = [[lead * 3 + rng.normal(0, 0.05), 0.0] for _ in CHECKS]
                branch["final"] = [lead, 0.0]
                branch["paper"] = {"layer": 3, "scores": branch["seen"][0]}
            branches.append(branch)
        rows.append({"workload": split, "condition": "recorded", "branches": branches})
    return rows


@pytest.fixture(scope="module")
def rows():
    timing = [
        {
            "workload": "timing",
            "condition": condition,
            "repeat": repeat,
            "position": 0,
            "forward_seconds": seconds,
            "wall_seconds": 2 * seconds,
        }
        for repeat in range(5)
        for condition, seconds in (("full", 0.3), ("exit", 0.2))
    ]
    # 368 problems are enough for half of this risk.
    probe = asdict(Probe(CHECKS, (((1.0,), (0.0,)),) * 3, ((0.0, 0.0),) * 3))
    setting = {"workload": "setting", "condition": "asked", "risk": 0.02}
    setting |= {"num_layers": LAYERS, "labels": [1, 2], "probe": probe}
    return [setting, *make_rows(520, "calibration", 0), *make_rows(300, "test", 1), *timing]


def test_decisions_and_times_are_summarised(rows):
    summary = verify.summarise(rows)
    assert summary["exit_speedup"]["ratio"] == pytest.approx(1.5)
    assert summary["phase_speedup_all"] is None, "no group is verified at all"
    assert summary["verdict_agreement"] == 1
    assert summary["mean_exit_layer"] < LAYERS
    assert summary["cgee_error_rate"] == 0
    assert 0 < summary["cgee_error_upper95"] < 0.011
    assert summary["skip_rate"] > 0.8
    assert summary["calibration_held"] == 1
    conditions = summary["conditions"]
    assert conditions["full"]["accuracy"] == pytest.approx(0.9)
    assert conditions["full"]["cost"] == 1
    assert conditions["all"]["cost"] < conditions["exit"]["cost"] < 1
    assert conditions["paper"]["mean_exit_layer"] == 3
    assert summary["layers_saved"] == pytest.approx(1 - conditions["all"]["cost"])
    assert summary["tokens_saved"] == 0, "all branches are equally long"


def test_the_phase_is_faster_by_skips_and_by_exits(rows):
    timing = [row for row in rows if row["workload"] == "timing"]
    found = [{"skipped": place > 3} for place in range(5)]
    speed = verify._phase_speed(timing, found)
    assert speed["ratio"] == pytest.approx(5 * 0.3 / (4 * 0.2))
    assert 1.5 <= speed["low"] <= speed["high"] <= 7.5


def test_errors_that_were_mended_are_not_netted():
    found = [
        {"full": True, "right": False, "skipped": True},
        {"full": False, "right": True, "skipped": False},
        {"full": True, "right": True, "skipped": False},
    ]
    counted = verify.errors(found)
    assert (counted["errors"], counted["mended"]) == (1, 1)
    assert counted["error_upper95"] > 1 / 3


def test_groups_skipped_at_random_are_wrong_more_often_than_chosen_ones(rows):
    groups = verify.groups_of(rows, "test")
    found = verify.skip_at_random(groups, LAYERS, 0.5)
    assert sum(o["skipped"] for o in found) == 150


def test_majority_takes_the_most_frequent_answer():
    branches = [{"answer": a, "right": a == "8"} for a in ("9", "8", "8", None, None, None)]
    assert verify.majority_of(branches)
    assert not verify.majority_of([{"answer": None, "right": False}])
