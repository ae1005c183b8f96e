"""Calibration on synthetic verifications whose truth is known."""

import numpy as np
import pytest
from scipy.stats import binom

from rksc_sglang.cgee.calibration import (
    Judged,
    TooLittleData,
    calibrate_exit,
    calibrate_skip,
    exit_errors,
    fit_correction,
    fixed_sequence,
    full_winner,
    needed_problems,
    replay,
    skip_errors,
    stop_early,
    winners,
)
from rksc_sglang.cgee.exit_rule import NEVER, CalibratedRule
from rksc_sglang.cgee.skip_gate import CalibratedGate

LAYERS = 8
RISK, DELTA = 0.02, 0.05


def make_groups(count, seed, noise=1.0, branches=8):
    """Verdicts that are right more often than not; a layer shows half the lead, shifted, and noise
    that is gone at the last layer."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        skill = rng.uniform(0.05, 0.95)
        group = []
        for _ in range(branches):
            right = bool(rng.random() < skill)
            lead = rng.normal(2.0 if right else -2.0, 1.5)
            lens = []
            for layer in range(1, LAYERS):
                seen = lead + rng.normal(0, noise * (LAYERS - layer) / LAYERS)
                lens.append([0.25 * seen + 0.3 + 5, -0.25 * seen + 5])
            confidence = float(np.clip(0.5 + 0.3 * skill + rng.normal(0, 0.05), 0.01, 1))
            answer = "right" if right else f"wrong {rng.integers(3)}"
            final = [lead / 2 - 1, -lead / 2 - 1]
            tokens = int(rng.integers(10, 60))
            group.append(Judged(answer, right, confidence, lens, final, tokens))
        groups.append(group)
    return groups


@pytest.fixture(scope="module")
def data():
    return make_groups(300, 0), make_groups(900, 1), make_groups(900, 2)


def test_the_correction_undoes_scale_and_offset(data):
    everyone = [judged for group in make_groups(50, 3, noise=0.0) for judged in group]
    scale, offset, deviation = fit_correction(everyone, (4, 6))
    assert scale == pytest.approx((2.0, 2.0))
    assert offset[0] == pytest.approx((-0.3, 0.3))
    assert deviation == pytest.approx((0, 0), abs=1e-6)
    rule = CalibratedRule((4, 6), scale, offset, (0.0, 0.0), (0.0, 0.0))
    layers, scores = replay(rule, everyone)
    assert set(layers) == {4}
    leads = [judged.final[0] - judged.final[1] for judged in everyone]
    assert scores[:, 0] - scores[:, 1] == pytest.approx(leads, abs=1e-4)


def test_what_never_stops_is_full_verification(data):
    groups = data[0][:20]
    rule = CalibratedRule((4,), (1.0,), ((0.0, 0.0),), (NEVER,), (NEVER,))
    layers, _ = replay(rule, [judged for group in groups for judged in group])
    assert set(layers) == {LAYERS}
    assert exit_errors(groups, rule) == (0, 0, LAYERS)


def test_a_calibrated_exit_holds_its_risk_on_new_problems(data):
    fit, test, new = data
    rule, evidence = calibrate_exit(fit, test, (4, 5, 6, 7), RISK, DELTA)
    caused, _, mean_layer = exit_errors(new, rule)
    assert mean_layer < LAYERS - 1
    assert binom.cdf(evidence["errors"], len(test), RISK) <= DELTA
    # An error rate above the risk would show so few errors once in a thousand times.
    assert caused <= binom.ppf(0.999, len(new), RISK)


def test_more_risk_stops_earlier(data):
    fit, test, _ = data
    careful, bold = (
        calibrate_exit(fit, test, (4, 6), risk, DELTA)[1]["mean_exit_layer"]
        for risk in (0.005, 0.1)
    )
    assert bold < careful


def test_a_calibrated_skip_holds_its_risk_on_new_problems(data):
    fit, test, new = data
    gate, evidence = calibrate_skip(fit, test, RISK, DELTA)
    found = skip_errors(new, gate)
    assert evidence["skipped"] > 0
    assert found.stopped >= found.skipped > 0
    assert evidence["tokens"] < 1
    assert found.tokens < 1
    assert found.caused <= binom.ppf(0.999, len(new), RISK)


def test_branches_are_looked_at_as_they_finish():
    gate = CalibratedGate((10.0, 0.0, 0.0, -5.0), 0.5)  # a share of half of the group
    tokens = [40, 10, 30, 20]
    group = [
        Judged(answer, True, 0.5, [[0, 0]], [-1.0, -2.0], count)
        for answer, count in zip("abab", tokens)
    ]
    winner, spent = stop_early(group, gate)
    assert winner in (1, 3), "both have finished, and say the same"
    assert spent == 20 + 10 + 20 + 20
    never = CalibratedGate((10.0, 0.0, 0.0, -5.0), 0.999)
    assert stop_early(group, never) == (None, 100)


def test_too_few_problems_are_told_apart():
    assert needed_problems(0.005, 0.05) == 598
    few = make_groups(100, 5)
    with pytest.raises(TooLittleData, match="it takes 598 without an error"):
        calibrate_exit(few[:50], few[50:], (6,), 0.005, 0.05)


def test_the_sequence_ends_at_the_first_failure():
    errors = {"a": 0, "b": 1, "c": 50, "d": 0}
    setting, tried = fixed_sequence(list(errors), errors.__getitem__, 1000, 0.01, 0.05)
    assert setting == "b"
    assert [point["errors"] for point in tried] == [0, 1, 50]


def test_a_wrong_answer_promise_is_rare():
    """Of 200 calibrations on settings whose true error rate is above the risk, few accept one."""
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(200):
        try:
            fixed_sequence([0], lambda _: int(rng.binomial(400, 0.021)), 400, 0.02, 0.1)
            accepted += 1
        except TooLittleData:
            pass
    assert accepted <= binom.ppf(0.999, 200, 0.1)


def test_the_winner_is_the_one_of_rksc_verify():
    group = [
        Judged("a", True, 0.5, [[0, 0]], [-1.0, -2.0], 1),
        Judged("b", False, 0.9, [[0, 0]], [-1.0, -2.0], 1),
        Judged("c", False, 0.9, [[0, 0]], [-3.0, -1.0], 1),
    ]
    assert full_winner(group) == 1
    assert winners([group, group], np.array([[0.0, 5], [0, 5], [5, 0]] * 2)) == [2, 2]
