"""Thresholds that hold a stated risk, found on recorded verifications (Learn-then-Test).

Each problem's branches have been verified in full, with what every layer said. Settings are
replayed on these records from the most careful to the boldest, and the boldest is taken whose every
predecessor passes a binomial test: the chance that an error rate above the risk passes is at most
``delta`` (fixed-sequence testing, arXiv 2110.01052). An error is a problem whose final answer was
right under full verification and is wrong under the setting; what a setting mends is not netted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import binom

from rksc_sglang.cgee.exit_rule import NEVER, CalibratedRule, ExitRule
from rksc_sglang.cgee.skip_gate import CalibratedGate, SkipGate, gather

Setting = TypeVar("Setting")

#: Exit thresholds that are tried, (accept, reject) in standard deviations of what the correction
#: leaves; one order, fixed beforehand: rejections first, which cost least when they are wrong.
WIDTHS = (
    *((NEVER, reject) for reject in (12, 8, 6, 5, 4, 3.5, 3, 2.5, 2)),
    *((accept, 2) for accept in (12, 8, 6, 5, 4, 3.5, 3)),
    *((3, reject) for reject in (1.75, 1.5, 1.25, 1, 0.75)),
    *((accept, 0.75) for accept in (2.5, 2, 1.75, 1.5, 1.25, 1, 0.75)),
)
#: Chances of being right that the skip gate is tried at.
CHANCES = tuple(1 - 0.002 * 1.15**i for i in range(38))


class TooLittleData(Exception):
    """No setting can pass; the message says how many problems could tell."""


@dataclass(frozen=True)
class Judged:
    """A branch that has been verified in full.

    Attributes:
        answer: extracted; None where there is none.
        right: whether it is the problem's.
        confidence: mean top-1 probability of its tokens.
        lens: [layers - 1][labels] lens logits behind each layer but the last.
        final: [labels] log-probabilities of the labels.
        tokens: that it took; branches that run at once finish in the order of these.
    """

    answer: str | None
    right: bool
    confidence: float
    lens: Sequence[Sequence[float]]
    final: Sequence[float]
    tokens: int


Group = Sequence[Judged]


def full_winner(group: Group) -> int:
    """The branch that full verification prefers, as ``rksc.verify`` chooses it."""
    (winner,) = winners([group], np.array([judged.final for judged in group]))
    return winner


def winners(groups: Sequence[Group], scores: np.ndarray) -> list[int]:
    """The branch of each group that these scores prefer.

    Args:
        scores: [branches of all groups, labels] logits.
    """
    others = np.logaddexp.reduce(scores[:, 1:], axis=1)
    odds = (scores[:, 0] - others).tolist()  # in the order of the first label's probability
    found, start = [], 0
    for group in groups:
        places = range(len(group))
        found.append(max(places, key=lambda b: (odds[start + b], group[b].confidence, -b)))
        start += len(group)
    return found


def replay(rule: ExitRule, judged: Sequence[Judged]) -> tuple[np.ndarray, np.ndarray]:
    """What a rule would have done.

    Returns:
        The layer at which each stops, [judged] int64, the number of layers where it does not; and
        the scores that the verdict is then made of, [judged, labels] float32.
    """
    num_layers = len(judged[0].lens) + 1
    lens = torch.tensor([j.lens for j in judged]).transpose(0, 1)  # [layers - 1, judged, labels]
    checks = lens[[layer - 1 for layer in rule.layers]]
    layers = np.full(len(judged), num_layers)
    scores = np.array([j.final for j in judged], dtype=np.float32)
    for check, layer in enumerate(rule.layers):
        seen = checks[: check + 1]
        stops = rule.decided(seen, None).numpy() & (layers == num_layers)
        layers[stops] = layer
        scores[stops] = rule.scores(seen).numpy()[stops]
    return layers, scores


def fit_correction(
    judged: Sequence[Judged], layers: Sequence[int]
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]:
    """Least squares from each layer's lens to the last layer's, both without their means.

    Returns:
        Scale and offset as of :class:`CalibratedRule`, and the standard deviation of what is left
        of the first label's lead, each [layers].
    """
    final = np.array([j.final for j in judged])
    final = final - final.mean(1, keepdims=True)
    lens = np.array([j.lens for j in judged])  # [judged, layers - 1, labels]
    scales, offsets, deviations = [], [], []
    for layer in layers:
        seen = lens[:, layer - 1] - lens[:, layer - 1].mean(1, keepdims=True)
        x, y = seen - seen.mean(0), final - final.mean(0)
        scale = float((x * y).sum() / max((x * x).sum(), 1e-9))
        offset = final.mean(0) - scale * seen.mean(0)
        left = final - (scale * seen + offset)
        scales.append(scale)
        offsets.append(tuple(float(value) for value in offset))
        deviations.append(float(np.std(left[:, 0] - left[:, 1:].max(1))))
    return tuple(scales), tuple(offsets), tuple(deviations)


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


def exit_errors(groups: Sequence[Group], rule: ExitRule) -> tuple[int, int, float]:
    """Errors caused, errors mended, and the mean layer at which a verification ends."""
    everyone = [judged for group in groups for judged in group]
    layers, scores = replay(rule, everyone)
    before = winners(groups, np.array([judged.final for judged in everyone]))
    caused = mended = 0
    for group, full, early in zip(groups, before, winners(groups, scores)):
        caused += group[full].right and not group[early].right
        mended += group[early].right and not group[full].right
    return caused, mended, float(layers.mean())


def calibrate_exit(
    fit: Sequence[Group], test: Sequence[Group], layers: Sequence[int], risk: float, delta: float
) -> tuple[CalibratedRule, dict[str, Any]]:
    """A rule for these layers: correction from the one set of problems, thresholds from the other.

    Returns:
        The rule, and the evidence for it.

    Raises:
        TooLittleData: see :func:`fixed_sequence`.
    """
    everyone = [judged for group in fit for judged in group]
    scale, offset, deviation = fit_correction(everyone, layers)

    def rule_of(accept: float, reject: float) -> CalibratedRule:
        accepts, rejects = (tuple(w * value for value in deviation) for w in (accept, reject))
        return CalibratedRule(tuple(layers), scale, offset, accepts, rejects)

    found: dict[tuple[float, float], tuple[int, int, float]] = {}

    def errors_of(setting: tuple[float, float]) -> int:
        found[setting] = exit_errors(test, rule_of(*setting))
        return found[setting][0]

    setting, tried = fixed_sequence(WIDTHS, errors_of, len(test), risk, delta)
    caused, mended, mean_layer = found[setting]
    evidence = {
        "problems": len(test),
        "fitted_on": len(fit),
        "errors": caused,
        "mended": mended,
        "mean_exit_layer": mean_layer,
        "deviations": list(deviation),
        "curve": [
            {"accept": accept, "reject": reject, **point, "mean_exit_layer": at[2]}
            for ((accept, reject), at), point in zip(found.items(), tried)
        ],
    }
    return rule_of(*setting), evidence


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
    x = np.array([[e.share, e.support, e.top - e.second, 1.0] for e, _ in known])
    y = np.array([group[e.leader].right for e, group in known], dtype=float)
    share, support, lead, bias = fit_logistic(x, y, 1e-3)
    return share, support, lead, bias


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
