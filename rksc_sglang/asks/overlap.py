"""Whether prompts that are not cached yet hold the same text, at any offsets: a guess by hashes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

WINDOW = 16
_POWERS = np.full(WINDOW, 0x9E3779B97F4A7C15, np.uint64).cumprod()


class Windows:
    """Hashes of a prompt's windows of ``WINDOW`` tokens, made once and compared often.

    Args:
        tokens: [length] integers.
    """

    def __init__(self, tokens: Sequence[int] | np.ndarray) -> None:
        ids = np.asarray(tokens, np.int64)
        hashes: list[int] = []
        if len(ids) >= WINDOW:
            hashes = (sliding_window_view(ids, WINDOW).view(np.uint64) @ _POWERS).tolist()
        self._everywhere = frozenset(hashes)
        self._apart = hashes[::WINDOW]

    def common(self, other: Windows, start: int) -> int:
        """About how many tokens of this prompt the other one holds.

        Args:
            start: tokens of this one in front of this position do not count.
        """
        behind = self._apart[-(-start // WINDOW) :]
        return WINDOW * sum(value in other._everywhere for value in behind)

    def shares(self, other: Windows, length: float, start: int) -> bool:
        """Whether the other prompt holds about ``length`` tokens of this one behind ``start``."""
        return self.common(other, start) > max(length - WINDOW, 0)
