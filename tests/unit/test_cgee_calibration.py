"""Calibration on synthetic verifications whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from rksc_sglang.cgee.calibration import (
    VERDICT_DELTA,
    VERDICT_RISK,
    TooLittleData,
    calibrate_exit,
    calibrate_skip,
    changed_verdicts,
    exit_errors,
    fixed_sequence,
    needed_problems,
    replay,
    skip_errors,
    stop_early,
)
from rksc_sglang.cgee.exit_rule import NEVER, CalibratedRule
from rksc_sglang.cgee.judged import Judged, full_winner, is_unanimous, winners
from rksc_sglang.cgee.probing import fit_correction, fit_probe, probed
from rksc_sglang.cgee.skip_gate import CalibratedGate

LAYERS, CHECKS = 8, (2, 4, 6)
RISK, DELTA = 0.02, 0.05


def make_groups(count, seed, noise=1.0, branches=8):
    """Verdicts that are right more often than not. One direction of a layer's state has a quarter
    of the lead and noise that is gone at the last layer; the others say nothing."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        skill = rng.uniform(0.05, 0.95)
        group = []
        for _ in range(branches):
            right = bool(rng.random() < skill)
            lead = rng.normal(2.0 if right else -2.0, 1.5)
            states = []
            for layer in CHECKS:
                seen = lead + rng.normal(0, noise * (LAYERS - layer) / LAYERS)
                states.append([5 + 0.25 * seen, *rng.normal(0, 1, 3)])
            confidence = float(np.clip(0.5 + 0.3 * skill + rng.normal(0, 0.05), 0.01, 1))
            answer = "right" if right else f"wrong {rng.integers(3)}"
            final = [lead / 2 - 1, -lead / 2 - 1]
            tokens = int(rng.integers(10, 60))
            group.append(Judged(answer, right, confidence, states, final, tokens))
        groups.append(group)
    return groups


@pytest.fixture(scope="module")
def data():
    """Problems for the fit, for the thresholds and new ones, read by a probe."""
    groups = make_groups(300, 0), make_groups(900, 1), make_groups(900, 2)
    probe = fit_probe(groups[0], CHECKS)
    return probe, *(probed(some, probe) for some in groups)


def test_a_probe_finds_the_verdict_in_the_state():
    groups = make_groups(150, 3, noise=0.0)
    probe = fit_probe(groups, CHECKS)
    everyone = [judged for group in probed(groups, probe) for judged in group]
    scale, offset = fit_correction(everyone)
    rule = CalibratedRule(probe, scale, offset, 0.0, 0.0)
    layers, scores = replay(rule, everyone, LAYERS)
    assert set(layers) == {CHECKS[0]}
    leads = np.array([judged.final[0] - judged.final[1] for judged in everyone])
    assert ((scores[:, 0] > scores[:, 1]) == (leads > 0)).mean() > 0.98
    assert np.corrcoef(scores[:, 0] - scores[:, 1], leads)[0, 1] > 0.99


def test_a_probe_of_three_labels():
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(100):
        final = rng.normal(0, 3, 3)
        groups.append([Judged("a", True, 0.5, [[*final, 1.0]], final.tolist(), 1)])
    probe = fit_probe(groups, (3,))
    for (judged,), (read,) in zip(groups, probed(groups, probe)):
        top, second = np.sort(judged.final)[[-1, -2]]
        if top - second > 1:
            assert np.argmax(read.seen[0]) == np.argmax(judged.final)


def test_what_never_stops_is_full_verification(data):
    probe, groups, *_ = data
    checks = len(CHECKS)
    rule = CalibratedRule(probe, (1.0,) * checks, ((0.0, 0.0),) * checks, NEVER, NEVER)
    layers, _ = replay(rule, [judged for group in groups[:20] for judged in group], LAYERS)
    assert set(layers) == {LAYERS}
    assert exit_errors(groups[:20], rule, LAYERS) == (0, 0, LAYERS)


def test_a_calibrated_exit_holds_its_risk_on_new_problems(data):
    probe, fit, test, new = data
    rule, _, evidence = calibrate_exit(fit, test, probe, LAYERS, RISK, DELTA)
    caused, _, mean_layer = exit_errors(new, rule, LAYERS)
    assert mean_layer < LAYERS - 1
    assert binom.cdf(evidence["errors"], len(test), RISK) <= DELTA
    # An error rate above the risk would show so few errors once in a thousand times.
    assert caused <= binom.ppf(0.999, len(new), RISK)


def test_more_risk_stops_earlier(data):
    probe, fit, test, _ = data
    careful, bold = (
        calibrate_exit(fit, test, probe, LAYERS, risk, DELTA).evidence["mean_exit_layer"]
        for risk in (0.005, 0.1)
    )
    assert bold < careful


def test_unanimous_groups_keep_their_verdicts(data):
    """Their answer is sure, so what is promised for them is what their branches are told."""

    def agreed(groups):
        return [[replace(judged, answer="same") for judged in group] for group in groups]

    probe, fit, test, new = data
    rule, bold, evidence = calibrate_exit(fit, agreed(test), probe, LAYERS, 0.2, DELTA)
    found = evidence["unanimous"]
    assert found["problems"] == len(test)
    assert binom.cdf(found["changed"], len(test), VERDICT_RISK) <= VERDICT_DELTA
    assert bold <= rule.accept
    changed, _ = changed_verdicts(agreed(new), rule.at(bold), LAYERS)
    if bold < rule.accept:
        assert changed <= binom.ppf(0.999, len(new), VERDICT_RISK)
    # Too few of them: the rule for all is theirs too.
    rule, same, evidence = calibrate_exit(fit, test, probe, LAYERS, RISK, DELTA)
    assert same == rule.accept
    assert "unanimous" not in evidence
    assert not is_unanimous([replace(test[0][0], answer=None)] * 2)


def test_a_calibrated_skip_holds_its_risk_on_new_problems(data):
    _, fit, test, new = data
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
    probe = fit_probe(few[:50], CHECKS)
    fit, test = probed(few[:50], probe), probed(few[50:], probe)
    with pytest.raises(TooLittleData, match="it takes 598 without an error"):
        calibrate_exit(fit, test, probe, LAYERS, 0.005, 0.05)


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
