"""Which prefixes are asked for so often that computing them exactly pays.

What is spliced is a request's own: the next one behind the same context must be spliced again, and
each attends to a copy of its own while it decodes. What is computed exactly is in the tree for all
of them. How often a prefix will come back is not known beforehand, so the first are spliced; those
that have arrived at the same time, and wait, are known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

#: Prefixes are told apart at every so many tokens.
BLOCK = 16
#: What so many have asked for is computed. A token that is spliced costs about a fifth of one that
#: is computed, most of it while the request decodes over a copy of its own.
OFTEN = 5
#: Blocks that are remembered.
REMEMBERED = 1 << 16

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Reuse:
    """Counts, of one server, how many requests have begun with each prefix."""

    def __init__(self) -> None:
        self._counts: OrderedDict[tuple[Hashable, int], int] = OrderedDict()

    def note(self, namespace: Hashable, tokens: np.ndarray) -> None:
        """A request has arrived.

        Args:
            tokens: [n] int64, its prompt.
        """
        for hash_ in _prefix_hashes(tokens):
            key = (namespace, hash_)
            self._counts[key] = self._counts.get(key, 0) + 1
            self._counts.move_to_end(key)
        while len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)

    def often(self, namespace: Hashable, tokens: np.ndarray, start: int) -> int:
        """Where the part of a prompt ends, from ``start`` on, that is asked for often."""
        stop = start
        for block, hash_ in enumerate(_prefix_hashes(tokens)[start // BLOCK :], start // BLOCK):
            if self._counts.get((namespace, hash_), 0) >= OFTEN:
                stop = (block + 1) * BLOCK
        return stop

    def clear(self) -> None:
        self._counts.clear()


def _prefix_hashes(tokens: np.ndarray) -> list[int]:
    """Of the first 16, 32, ... tokens."""
    powers = np.full(len(tokens), _FACTOR).cumprod()
    sums = ((tokens.astype(np.uint64) + np.uint64(1)) * powers).cumsum()
    return sums[BLOCK - 1 :: BLOCK].tolist()
