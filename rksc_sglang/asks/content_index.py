"""Content index: where the radix tree holds a prompt's tokens, at any offset, behind any context.

The index keeps one record per KV slot: its token, its position, and the slots before and after it
on its path. Slots do not move when a tree node is split, so only insertion and eviction matter, and
a shared prefix is stored once. On every path an *anchor*, the hash of the last ``window`` tokens,
ends at each multiple of ``window``, and at the first token of each insertion, so that a branch can
be entered between two multiples. A query hashes the prompt's window at every offset, compares the
windows that hit an anchor token by token, and joins neighbours into runs.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

_NONE = -1
# Odd multipliers of the polynomial hash and of its final mix: an anchor is found by the mixed
# hash's high bits (its bucket) and low 32 bits (its tag). A collision costs a comparison.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
# Anchors examined for a prompt: a constant, so that short prompts are searched in full, and some
# for each token, so that long ones stay linear.
_ANCHORS_PER_QUERY = 16_384
_ANCHORS_PER_TOKEN = 4

Tokens = Sequence[int] | np.ndarray


class Run(NamedTuple):
    """Consecutive prompt tokens that are cached, in this order, along one path of the tree."""

    start: int  # where the run begins in the prompt
    donor_start: int  # position of its first token in the cached sequence
    slots: np.ndarray  # [length] int64, the KV slot of each token

    @property
    def length(self) -> int:
        return len(self.slots)

    @property
    def stop(self) -> int:
        return self.start + len(self.slots)


class ContentIndex:
    """Finds cached runs of tokens. Not safe for threads.

    Memory is allocated at once: 37 to 38 bytes for each of ``num_slots`` KV slots, however the tree
    branches (:attr:`nbytes`), and one dictionary entry for each namespace that holds a token.

    Args:
        num_slots: KV slots are numbered from 0 to ``num_slots - 1``.
        window: tokens an anchor covers. Every run of ``2 * window - 1`` tokens is found.
    """

    def __init__(self, num_slots: int, window: int = 16) -> None:
        if not 0 < num_slots < 2**31:
            raise ValueError(f"num_slots must be between 1 and 2**31 - 1, got {num_slots}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.num_slots = num_slots
        self.window = window
        self._powers = np.full(window, _BASE).cumprod()[::-1].copy()
        # One bucket for 2 to 4 slots: anchors are 1 in `window`, unless the tree branches wildly.
        bucket_bits = max(1, (num_slots // 4).bit_length())
        self._bucket_shift = np.uint64(64 - bucket_bits)
        self._bucket: np.ndarray = np.empty(1 << bucket_bits, np.int32)  # newest anchor
        # For each slot:
        self._token: np.ndarray = np.empty(num_slots, np.int32)
        self._position: np.ndarray = np.empty(num_slots, np.int32)
        self._previous: np.ndarray = np.empty(num_slots, np.int32)
        self._next: np.ndarray = np.empty(num_slots, np.int32)  # within one insertion
        self._namespace: np.ndarray = np.empty(num_slots, np.int32)  # 0: not indexed
        self._inserted: np.ndarray = np.empty(num_slots, np.int32)  # time of insertion
        # For each slot that ends an anchor: a doubly linked list per bucket, newest first. No newer
        # one is -2 - bucket, no anchor is -1.
        self._tag: np.ndarray = np.empty(num_slots, np.uint32)
        self._older: np.ndarray = np.empty(num_slots, np.int32)
        self._newer: np.ndarray = np.empty(num_slots, np.int32)
        self.clear()

    def __len__(self) -> int:
        """Tokens in the index."""
        return sum(self._tokens_in.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray))

    def clear(self) -> None:
        """Forget everything: the tree was reset."""
        self._bucket.fill(_NONE)
        self._namespace.fill(0)
        self._newer.fill(_NONE)
        self._ids: dict[Hashable, int] = {}
        self._name_of: dict[int, Hashable] = {}
        self._tokens_in: dict[int, int] = {}
        self._free_ids: list[int] = []
        self._time = 0

    def insert(self, namespace: Hashable, tokens: Tokens, slots: Tokens, start: int) -> None:
        """The tree now holds the path ``tokens``, of which ``tokens[:start]`` were cached before.

        Args:
            namespace: what may share KV (``extra_key`` and ``cache_salt``); compared by ``==``.
            tokens: [length] integers of at most 32 bits, the whole sequence from its root.
            slots: [length] integers, the KV slot of each token.
            start: how many tokens the index knows already, in this namespace and these slots.

        Raises:
            ValueError: the index and the tree are out of step (a new slot is still indexed, or the
                slot before ``start`` is not where it should be), or an argument is malformed. The
                index is unchanged.
        """
        stop = len(tokens)
        if len(slots) != stop or not 0 <= start <= stop:
            raise ValueError(f"{stop} tokens in {len(slots)} slots, {start} of them cached before")
        if start == stop:
            return
        parent = int(slots[start - 1]) if start else _NONE
        new = np.asarray(slots[start:], np.int64)
        known = max(0, start - self.window + 1)  # the first token that a new anchor covers
        covered = np.asarray(tokens[known:], np.int64)
        self._check(namespace, covered, new, parent, start)

        identity = self._identity(namespace)
        self._tokens_in[identity] += len(new)
        self._time = (self._time + 1) % 2**31
        self._token[new] = covered[start - known :]
        self._previous[new[0]] = parent
        self._previous[new[1:]] = new[:-1]
        self._next[new[:-1]] = new[1:]
        self._next[new[-1]] = _NONE
        self._namespace[new] = identity
        self._inserted[new] = self._time

        first = start // self.window + 1
        ends = np.arange(first * self.window, stop + 1, self.window)
        if start + 1 >= self.window and (start + 1) % self.window:
            ends = np.concatenate(([start + 1], ends))
        if len(ends):
            columns: np.ndarray = np.arange(-self.window, 0) - known
            self._add_anchors(new[ends - start - 1], covered[ends[:, None] + columns], identity)

    def remove(self, slots: Tokens) -> None:
        """The tree freed these KV slots, a path's end before its beginning. Others are ignored."""
        freed = np.unique(np.asarray(slots, np.int64))
        freed = freed[(freed >= 0) & (freed < self.num_slots)]
        freed = freed[self._namespace[freed] != 0]
        if not len(freed):
            return
        self._remove_anchors(freed[self._newer[freed] != _NONE])
        parents = self._previous[freed]
        follows = (parents != _NONE) & (self._next[parents] == freed)
        self._next[parents[follows]] = _NONE
        identities, counts = np.unique(self._namespace[freed], return_counts=True)
        self._namespace[freed] = 0
        for identity, count in zip(identities.tolist(), counts.tolist()):
            self._tokens_in[identity] -= count
            if not self._tokens_in[identity]:
                del self._tokens_in[identity], self._ids[self._name_of.pop(identity)]
                self._free_ids.append(identity)

    def find(
        self,
        namespace: Hashable,
        tokens: Tokens,
        start: int = 0,
        min_length: int | None = None,
        max_donors: int = 4,
    ) -> list[Run]:
        """The runs of ``tokens[start:]`` that are cached, each as long as its path allows.

        Runs may overlap. A run is left out if ``max_donors`` others contain its stretch of the
        prompt and are longer, or as long and inserted later. Of tokens that are cached very often,
        the most recently inserted are examined: some 16,000 anchors for a prompt and 4 more for
        each of its tokens. Beyond that, runs may be missed or shorter than their path allows, and
        a run is also left out if more than half of it is in ``max_donors`` others.

        Args:
            namespace: as inserted.
            tokens: [length] integers, the prompt.
            start: runs begin here or later.
            min_length: shortest run wanted, ``2 * window - 1`` by default. Shorter ones are found
                only where an anchor ends in them, and none below ``window``.
            max_donors: how many donors for the same stretch, at least 1.

        Returns:
            Runs in the order of their starts, longer ones first.
        """
        if start < 0 or max_donors < 1:
            raise ValueError(f"start must be >= 0 and max_donors >= 1: {start}, {max_donors}")
        identity = self._ids.get(namespace)
        prompt = np.asarray(tokens[start:], np.int64)
        if identity is None or len(prompt) < self.window:
            return []
        if min_length is None:
            min_length = 2 * self.window - 1
        stops, paths, complete = self._hits(prompt, identity)
        if not len(stops):
            return []
        before, head, tail = self._chains(stops, paths)
        # A chain runs on, at both ends, for less than a window.
        last, first = paths[tail, -1], paths[head, 1]
        begin, end = stops[head] - self.window, stops[tail]
        ahead, ahead_slots = self._follow(self._next, last, prompt, end, 1)
        back, back_slots = self._follow(self._previous, first, prompt, begin - 1, -1)
        origin = np.where(back > 0, back_slots[np.arange(len(back)), back - 1], first)
        begin, end = begin - back, end + ahead

        chosen = []
        for i in self._choose(begin, end, origin, last, min_length, max_donors, complete):
            hits = [int(tail[i])]
            while before[hits[-1]] != _NONE:
                hits.append(int(before[hits[-1]]))
            # Each hit adds what lies behind the one before it: a window, the last one maybe less.
            added = np.diff(stops[hits[::-1]])
            pieces = [back_slots[i, : back[i]][::-1], paths[hits.pop(), 1:]]
            pieces += [paths[hit, -count:] for hit, count in zip(hits[::-1], added)]
            slots = np.concatenate([*pieces, ahead_slots[i, : ahead[i]]]).astype(np.int64)
            chosen.append(Run(start + int(begin[i]), int(self._position[slots[0]]), slots))
        return chosen

    def path(self, slot: int, multiple: int = 1) -> np.ndarray:
        """The cached tokens from the root to a slot that is in the index, [length] int64.

        The path goes on until its length is a multiple of ``multiple``, where the cache does.
        """
        while (int(self._position[slot]) + 1) % multiple and self._next[slot] != _NONE:
            slot = int(self._next[slot])
        slots: np.ndarray = np.empty(int(self._position[slot]) + 1, np.int64)
        for position in range(len(slots) - 1, -1, -1):
            slots[position] = slot
            slot = int(self._previous[slot])
        return self._token[slots].astype(np.int64)

    # Writing

    def _check(
        self, namespace: Hashable, covered: np.ndarray, new: np.ndarray, parent: int, start: int
    ) -> None:
        if new.min() < 0 or new.max() >= self.num_slots:
            raise ValueError(f"a slot is not between 0 and {self.num_slots - 1}")
        if self._namespace[new].any():
            raise ValueError("a new slot is still indexed")
        if covered.min() < -(2**31) or covered.max() >= 2**31:
            raise ValueError("a token does not fit into 32 bits")
        if start and not (
            0 <= parent < self.num_slots
            and self._namespace[parent] == self._ids.get(namespace, _NONE)
            and self._position[parent] == start - 1
        ):
            raise ValueError(f"slot {parent} does not hold token {start - 1} of this namespace")
        # Twice the same slot shows in what is read back; the slots are unused until now.
        positions = np.arange(start, start + len(new))
        self._position[new] = positions
        if (self._position[new] != positions).any():
            raise ValueError("a new slot is given twice")

    def _identity(self, namespace: Hashable) -> int:
        """A small number for the namespace, used again once the namespace is empty."""
        identity = self._ids.get(namespace)
        if identity is None:
            identity = self._free_ids.pop() if self._free_ids else len(self._ids) + 1
            self._ids[namespace] = identity
            self._name_of[identity] = namespace
            self._tokens_in[identity] = 0
        return identity

    def _hash(self, windows: np.ndarray, identity: int) -> tuple[np.ndarray, np.ndarray]:
        """Bucket and tag of each row of [n, window] tokens, others in each namespace."""
        value = windows.view(np.uint64) @ self._powers
        value += np.uint64(identity * int(_MIX) % 2**64)
        value ^= value >> _HALF
        value *= _MIX
        return (value >> self._bucket_shift).astype(np.int64), value.astype(np.uint32)

    def _add_anchors(self, slots: np.ndarray, windows: np.ndarray, identity: int) -> None:
        buckets, self._tag[slots] = self._hash(windows, identity)
        bucket_of, older, newer = self._bucket, self._older, self._newer
        # One by one: several may fall into one bucket.
        for slot, bucket in zip(slots.tolist(), buckets.tolist()):
            head = bucket_of[bucket]
            if head != _NONE:
                newer[head] = slot
            older[slot] = head
            newer[slot] = -2 - bucket
            bucket_of[bucket] = slot

    def _remove_anchors(self, slots: np.ndarray) -> None:
        bucket_of, older, newer = self._bucket, self._older, self._newer
        for slot in slots.tolist():
            before, after = int(newer[slot]), older[slot]
            if before <= -2:
                bucket_of[-2 - before] = after
            else:
                older[before] = after
            if after != _NONE:
                newer[after] = before
        newer[slots] = _NONE

    # Reading

    def _hits(self, prompt: np.ndarray, identity: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Windows of the prompt that are cached where an anchor ends.

        Returns:
            Where each window stops in the prompt, [hits]; the slots of its tokens behind the slot
            before it (or -1), [hits, 1 + window]; both sorted by stop and last slot. And whether
            all anchors were examined.
        """
        windows = sliding_window_view(prompt, self.window)
        buckets, tags = self._hash(windows, identity)
        row, anchor = np.arange(len(windows)), self._bucket[buckets]
        budget = _ANCHORS_PER_QUERY + _ANCHORS_PER_TOKEN * len(windows)
        rows, anchors = [row[:0]], [anchor[:0]]
        # All windows take one step down their bucket's list at a time, so that the budget ends with
        # the oldest donors of the most frequent content.
        while True:
            more = anchor != _NONE
            row, anchor = row[more], anchor[more]
            budget -= len(row)
            if not len(row) or budget < 0:
                break
            same = self._tag[anchor] == tags[row]
            rows.append(row[same])
            anchors.append(anchor[same])
            anchor = self._older[anchor]
        row, slot = np.concatenate(rows), np.concatenate(anchors)
        order = np.lexsort((slot, row))
        row, slot = row[order], slot[order]

        paths: np.ndarray = np.empty((len(row), 1 + self.window), np.int32)
        for column in range(self.window, -1, -1):
            paths[:, column] = slot
            slot = self._previous[slot]
        same = (self._token[paths[:, 1:]] == windows[row]).all(axis=1)
        same &= self._namespace[paths[:, -1]] == identity
        return row[same] + self.window, paths[same], budget >= 0

    def _chains(
        self, stops: np.ndarray, paths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Join hits that follow each other on a path.

        Returns:
            The hit before each hit (or -1), [hits]; the first and last hit of each chain, [chains].
        """
        hits, last = np.arange(len(stops)), paths[:, -1]
        # The hit before ends at the last multiple of `window` before this one's end.
        added = self._position[last] % self.window + 1
        stride = self.num_slots + 1  # slot + 1 in a key, so that slot -1 is no hit's
        keys = stops * stride + last + 1
        wanted = (stops - added) * stride + paths[hits, self.window - added] + 1
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        before = np.where(keys[at] == wanted, at, _NONE)
        # The first of each chain, by jumps that double.
        head = np.where(before == _NONE, hits, before)
        while (head[head] != head).any():
            head = head[head]
        # A chain ends where no whole window follows: an entry between two multiples is an end too.
        ends: np.ndarray = np.ones(len(hits), bool)
        ends[before[(added == self.window) & (before != _NONE)]] = False
        tail = np.flatnonzero(ends)
        return before, head[tail], tail

    def _choose(
        self,
        begin: np.ndarray,
        end: np.ndarray,
        origin: np.ndarray,
        last: np.ndarray,
        min_length: int,
        max_donors: int,
        complete: bool,
    ) -> list[int]:
        """Which of the stretches [begin, end) that start at slot ``origin`` to return."""
        # From one donor token on, the path that goes furthest.
        order = np.lexsort((-end, origin, begin))
        same = (np.diff(begin[order]) == 0) & (np.diff(origin[order]) == 0)
        order = order[np.concatenate(([True], ~same))]
        order = order[(end - begin)[order] >= min_length]
        # What contains a stretch comes before it, as does the newer one of two equals.
        order = order[np.lexsort((-self._inserted[last[order]], -end[order], begin[order]))]
        needed = end if complete else (begin + end) // 2
        furthest: list[int] = []
        chosen = []
        for i, stop, need in zip(order.tolist(), end[order].tolist(), needed[order].tolist()):
            if len(furthest) < max_donors:
                heapq.heappush(furthest, stop)
            elif furthest[0] < need:
                heapq.heapreplace(furthest, stop)
            else:
                continue
            chosen.append(i)
        return chosen

    def _follow(
        self, link: np.ndarray, slot: np.ndarray, prompt: np.ndarray, place: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Follow a link from each slot, while it holds what the prompt holds from ``place`` on.

        Returns:
            How many slots, [n], and which, [n, window - 1].
        """
        count: np.ndarray = np.zeros(len(slot), np.int64)
        slots: np.ndarray = np.empty((len(slot), max(1, self.window - 1)), np.int32)
        row = np.arange(len(slot))
        for column in range(self.window - 1):
            slot = link[slot]
            more = (slot != _NONE) & (place >= 0) & (place < len(prompt))
            more[more] = self._token[slot[more]] == prompt[place[more]]
            row, slot, place = row[more], slot[more], place[more] + step
            if not len(row):
                break
            slots[row, column] = slot
            count[row] += 1
        return count, slots
