"""Thresholds that hold a stated risk, found on recorded verifications (Learn-then-Test).

Each problem's branches have been verified in full, with the states of the layers where an exit
looks. A probe is fitted to some of the problems (:mod:`rksc_sglang.cgee.probing`); on the others
settings are replayed from the most careful to the boldest, and the boldest is taken whose every
predecessor passes a binomial test: the chance that an error rate above the risk passes is at most
``delta`` (fixed-sequence testing, arXiv 2110.01052). An error is a problem whose final answer was
right under full verification and is wrong under the setting; what a setting mends is not netted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy.optimize import minimize
from scipy.stats import binom

from rksc_sglang.cgee.exit_rule import NEVER, CalibratedRule, ExitRule, Probe
from rksc_sglang.cgee.judged import (
    Group,
    Judged,
    full_winner,
    is_unanimous,
    reads_of,
    winners,
)
from rksc_sglang.cgee.probing import fit_correction
from rksc_sglang.cgee.skip_gate import CalibratedGate, SkipGate, gather

Setting = TypeVar("Setting")

#: Chances of another verdict at the end that are tried for exits.
DOUBTS = tuple(1e-4 * 1.35**i for i in range(26))
#: Of unanimous groups: the share that may get another verdict on a branch, and the chance that this
#: promise is wrong.
VERDICT_RISK, VERDICT_DELTA = 0.02, 0.05
#: Chances of being right that the skip gate is tried at.
CHANCES = tuple(1 - 0.002 * 1.15**i for i in range(38))


class TooLittleData(Exception):
    """No setting can pass; the message says how many problems could tell."""


def replay(
    rule: ExitRule, judged: Sequence[Judged], num_layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a rule would have done.

    Returns:
        The layer at which each stops, [judged] int64, the number of layers where it does not; and
        the scores that the verdict is then made of, [judged, labels] float32.
    """
    layers = np.full(len(judged), num_layers)
    scores = np.array([j.final for j in judged], dtype=np.float32)
    checks = reads_of(judged).transpose(0, 1)
    for check, layer in enumerate(rule.layers):
        seen = checks[: check + 1]
        stops = rule.decided(seen, None).numpy() & (layers == num_layers)
        layers[stops] = layer
        scores[stops] = rule.scores(seen).numpy()[stops]
    return layers, scores


def needed_problems(risk: float, delta: float) -> int:
    """The fewest problems, all without an error, that show a rate below the risk."""
    return math.ceil(math.log(delta) / math.log1p(-risk))


def fixed_sequence(
    settings: Sequence[Setting],
    errors_of: Callable[[Setting], int],
    problems: int,
    risk: float,
    delta: float,
) -> tuple[Setting, list[dict[str, float]]]:
    """The last setting before the first that fails.

    Args:
        settings: the most careful first.
        errors_of: errors among ``problems``.

    Returns:
        The setting, and for each one tried its errors and p-value.

    Raises:
        TooLittleData: not even the first one passes.
    """
    tried: list[dict[str, float]] = []
    passed = None
    for setting in settings:
        errors = errors_of(setting)
        p_value = float(binom.cdf(errors, problems, risk))
        tried.append({"errors": errors, "p_value": p_value})
        if p_value > delta:
            break
        passed = setting
    if passed is None:
        raise TooLittleData(
            f"{problems} problems with {tried[0]['errors']:.0f} errors do not show a rate below "
            f"{risk:g} at {1 - delta:.0%}: it takes {needed_problems(risk, delta)} without an error"
        )
    return passed, tried


def exit_errors(groups: Sequence[Group], rule: ExitRule, num_layers: int) -> tuple[int, int, float]:
    """Errors caused, errors mended, and the mean layer at which a verification ends."""
    everyone = [judged for group in groups for judged in group]
    layers, scores = replay(rule, everyone, num_layers)
    before = winners(groups, np.array([judged.final for judged in everyone]))
    caused = mended = 0
    for group, full, early in zip(groups, before, winners(groups, scores)):
        caused += group[full].right and not group[early].right
        mended += group[early].right and not group[full].right
    return caused, mended, float(layers.mean())


def changed_verdicts(groups: Sequence[Group], rule: ExitRule, num_layers: int) -> tuple[int, float]:
    """Groups with a branch that gets another verdict, and the mean layer."""
    everyone = [judged for group in groups for judged in group]
    layers, scores = replay(rule, everyone, num_layers)
    full = np.array([judged.final for judged in everyone])
    changed = np.split(scores.argmax(1) != full.argmax(1), np.cumsum([len(g) for g in groups]))
    return int(sum(some.any() for some in changed)), float(layers.mean())


class Exits(NamedTuple):
    """A calibrated rule of all groups, the least lead in unanimous ones, the evidence for both."""

    rule: CalibratedRule
    unanimous: float
    evidence: dict[str, Any]


def calibrate_exit(
    fit: Sequence[Group],
    test: Sequence[Group],
    probe: Probe,
    num_layers: int,
    risk: float,
    delta: float,
) -> Exits:
    """Rules for a probe: correction from the one set of problems, thresholds from the other.

    In a unanimous group no verdict changes the answer, so there the verdicts themselves are what is
    promised (``VERDICT_RISK``); with too few such groups the rule for all is theirs too.

    Args:
        fit, test: groups that the probe has read.

    Raises:
        TooLittleData: see :func:`fixed_sequence`.
    """
    scale, offset = fit_correction([judged for group in fit for judged in group])
    never = CalibratedRule(probe, scale, offset, NEVER, NEVER)

    def lead_of(doubt: float) -> float:
        return math.log((1 - doubt) / doubt)

    found: dict[float, tuple[int, int, float]] = {}
    agreed: dict[float, tuple[int, float]] = {}
    unanimous = [group for group in test if is_unanimous(group)]

    def errors_of(doubt: float) -> int:
        found[doubt] = exit_errors(test, never.at(lead_of(doubt)), num_layers)
        return found[doubt][0]

    def changes_of(doubt: float) -> int:
        agreed[doubt] = changed_verdicts(unanimous, never.at(lead_of(doubt)), num_layers)
        return agreed[doubt][0]

    doubt, tried = fixed_sequence(DOUBTS, errors_of, len(test), risk, delta)
    caused, mended, mean_layer = found[doubt]
    evidence: dict[str, Any] = {
        "problems": len(test),
        "fitted_on": len(fit),
        "doubt": doubt,
        "errors": caused,
        "mended": mended,
        "mean_exit_layer": mean_layer,
        "curve": [
            {"doubt": at, **point, "mean_exit_layer": found[at][2]}
            for at, point in zip(found, tried)
        ],
    }
    bold = doubt
    if unanimous:
        with suppress(TooLittleData):
            bold, tried = fixed_sequence(
                DOUBTS, changes_of, len(unanimous), VERDICT_RISK, VERDICT_DELTA
            )
            evidence["unanimous"] = {
                "problems": len(unanimous),
                "risk": VERDICT_RISK,
                "delta": VERDICT_DELTA,
                "doubt": bold,
                "changed": agreed[bold][0],
                "mean_exit_layer": agreed[bold][1],
                "curve": [
                    {"doubt": at, **point, "mean_exit_layer": agreed[at][1]}
                    for at, point in zip(agreed, tried)
                ],
            }
    return Exits(never.at(lead_of(doubt)), lead_of(max(doubt, bold)), evidence)


def stop_early(group: Group, gate: SkipGate) -> tuple[int | None, int]:
    """What a gate does that looks each time a branch has finished.

    Returns:
        The branch that wins, None: the group is verified; and the tokens that are generated.
    """
    order = sorted(range(len(group)), key=lambda branch: group[branch].tokens)
    spent = sum(judged.tokens for judged in group)
    for finished in range(1, len(group) + 1):
        known = sorted(order[:finished])
        place = gate.winner(evidence_of([group[branch] for branch in known], len(group)))
        if place is not None:
            now = group[order[finished - 1]].tokens
            return known[place], sum(min(judged.tokens, now) for judged in group)
    return None, spent


class SkipErrors(NamedTuple):
    """What a gate does to problems.

    Attributes:
        caused: errors, by looking at the end or after each branch: the union of both.
        mended: by looking at the end.
        skipped, stopped: groups that are decided at the end, and before it.
        tokens: generated, as a share of all, where branches are stopped.
    """

    caused: int
    mended: int
    skipped: int
    stopped: int
    tokens: float


def skip_errors(groups: Sequence[Group], gate: SkipGate) -> SkipErrors:
    caused = mended = skipped = stopped = spent = 0
    for group in groups:
        at_end, (early, tokens) = gate.winner(evidence_of(group)), stop_early(group, gate)
        before = group[full_winner(group)].right
        after = [group[winner].right for winner in (at_end, early) if winner is not None]
        caused += before and not all(after)
        mended += at_end is not None and group[at_end].right and not before
        skipped += at_end is not None
        stopped += early is not None
        spent += tokens
    whole = sum(judged.tokens for group in groups for judged in group)
    return SkipErrors(caused, mended, skipped, stopped, spent / max(whole, 1))


def evidence_of(group: Group, branches: int | None = None) -> Any:
    return gather([j.answer for j in group], [j.confidence for j in group], branches)


def fit_chance(groups: Sequence[Group]) -> tuple[float, float, float, float]:
    """Weights of :class:`CalibratedGate`: a logistic model of the leading answer being right."""
    known = [(e, group) for group in groups if (e := evidence_of(group)).leader is not None]
    x = np.array([[e.share, e.support, e.edge, 1.0] for e, _ in known])
    y = np.array([group[e.leader].right for e, group in known], dtype=float)
    # Confidences differ by hundredths: what tells them apart takes large weights.
    share, support, edge, bias = fit_logistic(x, y, 1e-6)
    return share, support, edge, bias


def fit_logistic(x: np.ndarray, y: np.ndarray, penalty: float) -> list[float]:
    """Weights of a logistic model.

    Args:
        x: [n, features], with a column of ones for the bias.
        y: [n] whether it is so.
        penalty: on the sum of the squared weights.
    """

    def loss(weights: np.ndarray) -> float:
        scores = x @ weights
        return float(np.mean(np.logaddexp(0, scores) - y * scores) + penalty * (weights**2).sum())

    return minimize(loss, np.zeros(x.shape[1])).x.tolist()


def calibrate_skip(
    fit: Sequence[Group], test: Sequence[Group], risk: float, delta: float
) -> tuple[CalibratedGate, dict[str, Any]]:
    """A skip gate: the chance's model from the one set of problems, its threshold from the other.

    The threshold holds for groups that are looked at when all of their branches have finished, and
    for groups that are looked at after each.

    Raises:
        TooLittleData: see :func:`fixed_sequence`.
    """
    weights = fit_chance(fit)
    found: dict[float, SkipErrors] = {}

    def errors_of(chance: float) -> int:
        found[chance] = skip_errors(test, CalibratedGate(weights, chance))
        return found[chance].caused

    chance, tried = fixed_sequence(CHANCES, errors_of, len(test), risk, delta)
    held = found[chance]
    evidence = {
        "problems": len(test),
        "fitted_on": len(fit),
        "errors": held.caused,
        "mended": held.mended,
        "skipped": held.skipped,
        "stopped": held.stopped,
        "tokens": held.tokens,
        "curve": [
            {"chance": c, **point, "skipped": found[c].skipped, "tokens": found[c].tokens}
            for c, point in zip(found, tried)
        ],
    }
    return CalibratedGate(weights, chance), evidence
