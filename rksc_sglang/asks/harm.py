"""Has sharing been shown to do more harm than allowed? Asked after every observation.

Testing by betting (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", arXiv 2010.09686): whoever doubts that the mean is at most m stakes a share c of his
wealth on each harm x at odds that are fair for the mean m, so his wealth is multiplied by

    1 + (c / m) (x - m) = (1 - c) + c x / m.

If the mean is at most m his expected wealth never grows, and by Ville's inequality the chance that
it ever reaches 1 / alpha is at most alpha, however often one looks. The wealth is split evenly
over several shares c. The same game on 1 - x and 1 - m bounds the mean from above. Wealth falls
(rises) in m, so the bounds are the last m that have been refuted; what is refuted stays so.
"""

from __future__ import annotations

import numpy as np

# Small shares find a mean little above m after long, large ones a gross one at once.
_SHARES = np.array([0.99, 0.4, 0.15, 0.05, 0.02, 0.006])
# Candidate means are this far apart; bounds are rounded away from the mean to the next of them.
_STEP = 1.1
_SMALLEST = 1e-4


class _Bets:
    """Bets against every candidate mean that still stands."""

    def __init__(self, means: np.ndarray, alpha: float) -> None:
        self.means = means  # ascending: the first is the first to be refuted
        self.refuted = 0.0  # the largest that has been
        # [means, shares], logarithms in units of 1 / alpha: a mean is refuted at a total of 0.
        self.wealth = np.full((len(means), len(_SHARES)), np.log(alpha / len(_SHARES)))

    def add(self, x: float) -> None:
        self.wealth += np.log1p(_SHARES * (x / self.means - 1)[:, None])
        rich = (self.wealth.max(1) >= -np.log(len(_SHARES))).nonzero()[0]  # the others fall short
        won = rich[np.logaddexp.reduce(self.wealth[rich], 1) >= 0]
        if len(won):
            count = won[-1] + 1
            self.refuted = float(self.means[count - 1])
            self.means, self.wealth = self.means[count:], self.wealth[count:]


class HarmMonitor:
    """Watches whether the mean of harms in [0, 1] exceeds a limit.

    Args:
        limit: the mean harm that is allowed, in (0, 1).
        alpha: chance, at most, of tripping ever though each harm has, given those before it, an
            expectation of at most ``limit``.

    Raises:
        ValueError: ``limit`` or ``alpha`` is not in (0, 1).
    """

    def __init__(self, limit: float, alpha: float = 0.05) -> None:
        if not (0 < limit < 1 and 0 < alpha < 1):
            raise ValueError(f"limit {limit} and alpha {alpha} must be between 0 and 1")
        self.limit = limit
        self.alpha = alpha
        self.count = 0
        self._sum = 0.0
        below = int(np.log(limit / min(_SMALLEST, limit)) / np.log(_STEP))
        above = int(np.log(1 / limit) / np.log(_STEP))
        means = limit * _STEP ** np.arange(-below, above + 1)  # the limit is among them
        means = means[means < 1]
        self._low, self._high = _Bets(means, alpha), _Bets(1 - means[::-1], alpha)

    def add(self, harm: float) -> None:
        """Count one observation.

        Raises:
            ValueError: it is not in [0, 1].
        """
        if not 0 <= harm <= 1:
            raise ValueError(f"harm must be in [0, 1], not {harm}")
        self.count += 1
        self._sum += harm
        self._low.add(harm)
        self._high.add(1 - harm)

    @property
    def tripped(self) -> bool:
        """Whether a mean above the limit has been shown; stays so."""
        return self._low.refuted >= self.limit

    @property
    def mean(self) -> float:
        """Mean harm so far, 0 without any."""
        return self._sum / max(self.count, 1)

    def lower_bound(self) -> float:
        """What the mean exceeds, at every time at once with a chance of at least 1 - alpha."""
        return self._low.refuted

    def upper_bound(self) -> float:
        """What the mean is below, at every time at once with a chance of at least 1 - alpha."""
        return 1 - self._high.refuted

    def to_dict(self) -> dict[str, float | bool]:
        """A snapshot for JSON."""
        return {
            "count": self.count,
            "mean": self.mean,
            "lower": self.lower_bound(),
            "upper": self.upper_bound(),
            "limit": self.limit,
            "alpha": self.alpha,
            "tripped": self.tripped,
        }
