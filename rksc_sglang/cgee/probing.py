"""Fitting the probes of layer exit to verifications that were observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize

from rksc_sglang.cgee.exit_rule import Probe
from rksc_sglang.cgee.judged import Group, Judged, reads_of

#: On the squared weights of a probe.
PENALTY = 3e-3


def fit_probe(groups: Sequence[Group], layers: Sequence[int]) -> Probe:
    """A softmax model of the full verdict, for each layer, from its normed states.

    Args:
        groups: whose ``seen`` are the states behind ``layers``.
    """
    everyone = [judged for group in groups for judged in group]
    states = reads_of(everyone).double().numpy()
    verdicts = np.array([j.final for j in everyone])
    wanted = (verdicts == verdicts.max(1, keepdims=True)).astype(float)
    weights, biases = [], []
    for check in range(len(layers)):
        state = states[:, check]
        mean, size = state.mean(0), float(np.sqrt(np.mean(state**2))) or 1.0
        weight, bias = _fit_softmax((state - mean) / size, wanted)
        weight = weight / size
        weights.append(tuple(tuple(map(float, row)) for row in weight))
        biases.append(tuple(map(float, bias - weight @ mean)))
    return Probe(tuple(layers), tuple(weights), tuple(biases))


def _fit_softmax(x: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [labels, features] and bias [labels], with a penalty on the squared weights."""
    shape = wanted.shape[1], x.shape[1] + 1
    with_bias = np.hstack([x, np.ones((len(x), 1))])
    penalty = np.full(shape, PENALTY)
    penalty[:, -1] = 0

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = with_bias @ weights.T
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        slope = (np.exp(logprobs) - wanted).T @ with_bias / len(x)
        value = -(wanted * logprobs).sum() / len(x) + (penalty * weights**2).sum()
        return float(value), (slope + 2 * penalty * weights).ravel()

    start = np.zeros(shape).ravel()
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weights = found.x.reshape(shape)
    return weights[:, :-1], weights[:, -1]


def probed(groups: Sequence[Group], probe: Probe) -> list[Group]:
    """The groups with what a probe makes of their states in the place of them."""
    found: list[Group] = []
    for group in groups:
        states = reads_of(group).transpose(0, 1)
        reads = [probe.read(check, state) for check, state in enumerate(states)]
        seen = torch.stack(reads, 1).numpy()  # [branches, checks, labels]
        found.append([replace(judged, seen=seen[place]) for place, judged in enumerate(group)])
    return found


def fit_correction(
    judged: Sequence[Judged],
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Least squares from what a probe says to the last layer's logits, both without their means.

    Returns:
        Scale and offset as of :class:`CalibratedRule`.
    """
    final = np.array([j.final for j in judged])
    final = final - final.mean(1, keepdims=True)
    scales, offsets = [], []
    for seen in reads_of(judged).double().numpy().transpose(1, 0, 2):
        seen = seen - seen.mean(1, keepdims=True)
        x, y = seen - seen.mean(0), final - final.mean(0)
        scale = float((x * y).sum() / max((x * x).sum(), 1e-9))
        scales.append(scale)
        offsets.append(tuple(map(float, final.mean(0) - scale * seen.mean(0))))
    return tuple(scales), tuple(offsets)
