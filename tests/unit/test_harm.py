"""asks/harm: error rates over simulated streams, power, and what it refuses."""

import json
import math
import random

import pytest

from rksc_sglang.asks.harm import HarmMonitor

OBSERVATIONS, ALPHA = 500, 0.05


def binary(mean, rng):
    return float(rng.random() < mean)


def graded(mean, rng):
    """Mostly 0, and else anything up to 1."""
    return rng.random() if rng.random() < 2 * mean else 0.0


def watch(draw, mean, limit, count, seed=0):
    rng = random.Random(seed)
    monitor = HarmMonitor(limit, ALPHA)
    for _ in range(count):
        monitor.add(draw(mean, rng))
    return monitor


@pytest.mark.parametrize(("draw", "mean", "streams"), [(binary, 0.02, 400), (graded, 0.2, 100)])
def test_errors_are_rare(draw, mean, streams):
    """Over streams whose mean is the limit: neither trips nor bounds that miss it."""
    monitors = [watch(draw, mean, mean, OBSERVATIONS, seed) for seed in range(streams)]
    # Three standard deviations above what is allowed.
    most = streams * ALPHA + 3 * math.sqrt(streams * ALPHA * (1 - ALPHA))
    assert sum(m.tripped for m in monitors) <= most
    assert sum(m.lower_bound() > mean for m in monitors) <= most
    assert sum(m.upper_bound() < mean for m in monitors) <= most


def test_trips_soon_and_for_good():
    for seed in range(20):
        rng = random.Random(seed)
        monitor = HarmMonitor(0.02)
        while not monitor.tripped:
            monitor.add(binary(0.3, rng))
        assert monitor.count <= 50
        assert monitor.lower_bound() >= 0.02
        bound = monitor.lower_bound()
        for _ in range(1000):
            monitor.add(0.0)
        assert monitor.tripped
        assert monitor.lower_bound() == bound


def test_slightly_above_the_limit():
    assert watch(binary, 0.05, 0.02, 3000).tripped
    assert watch(graded, 0.05, 0.02, 3000).tripped
    assert not watch(binary, 0.01, 0.02, 3000).tripped


def test_bounds_close_in():
    monitor = HarmMonitor(0.02)
    assert (monitor.lower_bound(), monitor.upper_bound(), monitor.mean) == (0, 1, 0)
    widths = []
    for count in (50, 500, 5000):
        monitor = watch(graded, 0.1, 0.02, count)
        assert monitor.lower_bound() < 0.1 < monitor.upper_bound()
        assert monitor.lower_bound() < monitor.mean < monitor.upper_bound()
        widths.append(monitor.upper_bound() - monitor.lower_bound())
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]
    assert widths[2] < 0.03


@pytest.mark.parametrize("limit", [0.1, 0.11])
def test_by_hand(limit):
    """It trips at the observation that brings the wealth to 1 / alpha, not before."""
    monitor = HarmMonitor(limit)
    shares = [0.99, 0.4, 0.15, 0.05, 0.02, 0.006]

    def wealth(harms):
        return sum(math.prod((1 - c) + c * x / limit for x in harms) for c in shares) / len(shares)

    harms = []
    while not monitor.tripped:
        assert wealth(harms) < 1 / monitor.alpha
        harms.append(1.2 * limit)
        monitor.add(harms[-1])
    assert wealth(harms) >= 1 / monitor.alpha


def test_no_harm():
    """Nothing but 0 shows that the mean is small, at about the rate log(1 / alpha) / count."""
    monitor = watch(binary, 0.0, 0.02, 1000)
    assert monitor.lower_bound() == 0
    assert monitor.upper_bound() < 0.008


def test_all_harm():
    monitor = watch(binary, 1.0, 0.02, 1000)
    assert monitor.lower_bound() > 0.9
    assert monitor.upper_bound() == 1


def test_to_dict():
    monitor = watch(binary, 0.3, 0.02, 100)
    snapshot = json.loads(json.dumps(monitor.to_dict()))
    assert snapshot == {
        "count": 100,
        "mean": monitor.mean,
        "lower": monitor.lower_bound(),
        "upper": monitor.upper_bound(),
        "limit": 0.02,
        "alpha": 0.05,
        "tripped": True,
    }


@pytest.mark.parametrize("harm", [-0.01, 1.01, float("nan"), float("inf")])
def test_refuses_harm(harm):
    monitor = HarmMonitor(0.02)
    with pytest.raises(ValueError, match="harm must be in"):
        monitor.add(harm)
    assert monitor.count == 0


@pytest.mark.parametrize(("limit", "alpha"), [(0, 0.05), (1, 0.05), (0.1, 0), (0.1, 1)])
def test_refuses_settings(limit, alpha):
    with pytest.raises(ValueError, match="between 0 and 1"):
        HarmMonitor(limit, alpha)
