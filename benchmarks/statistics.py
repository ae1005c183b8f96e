"""Ratios of pairs and means, with bootstrap intervals; areas under curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 4000


def paired_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of the ratios ``a[i] / b[i]`` of paired measurements.

    Args:
        a, b: positive measurements; ``a[i]`` and ``b[i]`` were taken one after the other.
        seed: of the bootstrap.

    Returns:
        ``ratio``, and the bounds ``low`` and ``high`` of its 95 % bootstrap interval, resampling
        pairs.
    """
    ratios = np.asarray(a, dtype=np.float64) / np.asarray(b, dtype=np.float64)
    if ratios.size == 0 or not np.isfinite(ratios).all() or (ratios <= 0).any():
        raise ValueError("paired_ratio needs pairs of positive finite numbers")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, ratios.size, size=(RESAMPLES, ratios.size))
    medians = np.median(ratios[picks], axis=1)
    return {"ratio": float(np.median(ratios)), **_interval(medians)}


def geometric_mean_ratio(groups: Sequence[Sequence[float]], seed: int = 0) -> dict[str, float]:
    """Geometric mean over groups of each group's median ratio, pairs resampled within groups.

    Args:
        groups: per workload its paired ratios.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    logs = np.zeros(RESAMPLES)
    for array in arrays:
        picks = rng.integers(0, array.size, size=(RESAMPLES, array.size))
        logs += np.log(np.median(array[picks], axis=1))
    center = float(np.exp(np.mean([np.log(np.median(array)) for array in arrays])))
    return {"ratio": center, **_interval(np.exp(logs / len(arrays)))}


def ratio_of_sums(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict[str, float]:
    """``sum(a) / sum(b)`` of paired measurements, some of which may be zero, as of
    :func:`paired_ratio`."""
    pairs = np.array([a, b], dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(a), size=(RESAMPLES, len(a)))
    above, below = pairs[:, picks].sum(axis=2)
    with np.errstate(divide="ignore"):  # a resample may have nothing but zeros
        return {"ratio": float(pairs[0].sum() / pairs[1].sum()), **_interval(above / below)}


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """A mean and its 95 % bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, array.size, size=(RESAMPLES, array.size))
    means = array[picks].mean(axis=1)
    return {"mean": float(array.mean()), **_interval(means)}


def mean_gain(values: Sequence[float]) -> dict[str, float]:
    """As :func:`mean_interval`, with the mean as ``value``: a gain, in a summary."""
    found = mean_interval(values)
    return {"value": found.pop("mean"), **found}


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Chance that a positive scores higher than a negative; ties count half.

    Returns:
        None where there are not both.
    """
    mask = np.asarray(positive, dtype=bool)
    yes, no = int(mask.sum()), int((~mask).sum())
    if not yes or not no:
        return None
    ranks = rankdata(scores)
    return float((ranks[mask].sum() - yes * (yes + 1) / 2) / (yes * no))


def _interval(resampled: np.ndarray) -> dict[str, float]:
    return {
        "low": float(np.quantile(resampled, 0.025)),
        "high": float(np.quantile(resampled, 0.975)),
    }
