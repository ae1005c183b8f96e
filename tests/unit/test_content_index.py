"""The content index against a brute-force search over a plain model of the radix tree."""

from __future__ import annotations

import tracemalloc
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksc_sglang.asks.content_index import ContentIndex, Run


def spans(runs: list[Run]) -> list[tuple[int, int, int]]:
    """Where each run starts and stops in the prompt, and starts in its donor."""
    return [(run.start, run.stop, run.donor_start) for run in runs]


def words(text: str) -> list[int]:
    return [ord(letter) for letter in text]


class CollidingIndex(ContentIndex):
    """Every window has the same hash."""

    def _hash(self, windows: np.ndarray, identity: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(windows), np.int64), np.zeros(len(windows), np.uint32)


def test_the_same_text_behind_another_context() -> None:
    index = ContentIndex(num_slots=100, window=4)
    index.insert("a", words("persona one: the problem"), np.arange(40, 64), start=0)
    (run,) = index.find("a", words("somebody else: the problem, again"))
    assert (run.start, run.stop, run.length) == (12, 26, 14)
    assert run.donor_start == 10
    assert run.slots.tolist() == list(range(50, 64))
    assert run.slots.dtype == np.int64


def test_a_run_crosses_the_branches_of_its_path() -> None:
    index = ContentIndex(100, window=2)
    index.insert("a", words("abcdef"), [10, 11, 12, 13, 14, 15], 0)
    index.insert("a", words("abcxyz"), [10, 11, 12, 20, 21, 22], 3)
    index.insert("a", words("abcxyw"), [10, 11, 12, 20, 21, 30], 5)
    assert len(index) == 10
    (run,) = index.find("a", words("__bcxyw__"))
    assert run.donor_start == 1
    assert run.slots.tolist() == [11, 12, 20, 21, 30]


def test_runs_begin_at_start_or_later() -> None:
    index = ContentIndex(100, window=2)
    index.insert("a", words("abcdefgh"), np.arange(8), 0)
    assert spans(index.find("a", words("abcdefgh"), start=3)) == [(3, 8, 3)]
    assert index.find("a", words("abcdefgh"), start=3, min_length=6) == []
    assert index.find("a", words("abcdefgh"), start=8) == []


def test_the_path_to_a_slot_is_the_text_that_is_cached_there() -> None:
    index = ContentIndex(100, window=2)
    index.insert("a", words("abcdef"), [10, 11, 12, 13, 14, 15], 0)
    index.insert("a", words("abcxyz"), [10, 11, 12, 20, 21, 22], 3)
    assert index.path(12).tolist() == words("abc")
    assert index.path(21).tolist() == words("abcxy")
    # On to a whole number of pages, along the insertion that the slot came with.
    assert index.path(13, multiple=3).tolist() == words("abcdef")
    assert index.path(15, multiple=4).tolist() == words("abcdef")


def test_namespaces_share_nothing() -> None:
    index = ContentIndex(100, window=2)
    # The two namespaces have the same hash in CPython.
    assert hash(-1) == hash(-2)
    index.insert(-1, words("abcdef"), np.arange(6), 0)
    assert index.find(-2, words("abcdef")) == []
    index.insert(-2, words("abcdef"), np.arange(10, 16), 0)
    (run,) = index.find(-2, words("abcdef"))
    assert run.slots.tolist() == list(range(10, 16))


def test_removed_slots_are_found_no_more_and_can_be_used_again() -> None:
    index = ContentIndex(20, window=2)
    index.insert("a", words("abcdef"), np.arange(6), 0)
    index.remove([5, 4, 5, 19, 1000, -1])
    assert len(index) == 4
    assert spans(index.find("a", words("abcdef"))) == [(0, 4, 0)]
    index.insert("b", words("xyzw"), [5, 4, 6, 7], 0)
    assert spans(index.find("a", words("abcdef"))) == [(0, 4, 0)]
    assert spans(index.find("b", words("xyzw"))) == [(0, 4, 0)]
    index.clear()
    assert len(index) == 0
    assert index.find("b", words("xyzw")) == []


def test_a_slot_forgets_its_anchor() -> None:
    index = ContentIndex(20, window=2)
    index.insert("a", words("abcd"), [0, 1, 2, 3], 0)
    index.remove([2, 3])
    index.insert("a", words("xxcd"), [10, 11, 12, 13], 0)
    # Slot 3 ended an anchor "cd" and now ends none.
    index.insert("a", words("y"), [3], 0)
    index.remove([3])
    (run,) = index.find("a", words("__cd"), min_length=2)
    assert run.slots.tolist() == [12, 13]


def test_branches_that_share_tokens_but_no_page() -> None:
    index = ContentIndex(20, window=4)
    index.insert("a", words("abcdefgh"), np.arange(8), 0)
    # With pages of two, "ef" and "ex" are two branches.
    index.insert("a", words("abcdex"), [0, 1, 2, 3, 10, 11], 4)
    (run,) = index.find("a", words("_abcdefg_"))
    assert run.slots.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_longer_donors_first_then_newer_ones() -> None:
    index = ContentIndex(1000, window=2)
    for i, context in enumerate("pqrs"):
        index.insert("a", words(context + "same"), np.arange(5) + 10 * i, 0)
    index.insert("a", words("tsame!"), np.arange(100, 106), 0)
    found = index.find("a", words("_same!"), max_donors=3)
    assert [run.slots[0] for run in found] == [101, 31, 21]
    assert spans(found) == [(1, 6, 1), (1, 5, 1), (1, 5, 1)]


def test_collisions_do_not_matter() -> None:
    index = CollidingIndex(200, window=4)
    index.insert("a", words("persona one: the problem"), np.arange(24), 0)
    index.insert("b", words("persona one: the problem"), np.arange(100, 124), 0)
    index.insert("a", words("something else entirely"), np.arange(50, 73), 0)
    (run,) = index.find("a", words("persona two: the problem"), min_length=12)
    assert (run.start, run.donor_start) == (11, 11)
    assert run.slots.tolist() == list(range(11, 24))


@pytest.mark.parametrize(
    ("tokens", "slots", "start", "message"),
    [
        ([1, 2, 3], [0, 1], 0, "3 tokens in 2 slots"),
        ([1, 2], [8, 9], 3, "3 of them cached"),
        ([1, 2], [8, 10], 0, "between 0 and 9"),
        ([1, 2], [-1, 8], 0, "between 0 and 9"),
        ([1, 2], [8, 8], 0, "twice"),
        ([1, 2**31], [8, 9], 0, "32 bits"),
        ([7, 8, 9], [0, 1, 2], 0, "still indexed"),
        ([7, 8, 9], [1, 0, 8], 2, "does not hold token 1"),
        ([7, 8, 9], [0, 7, 8], 2, "does not hold token 1"),
        ([7, 8, 9], [0, -1, 8], 2, "does not hold token 1"),
    ],
)
def test_an_insertion_out_of_step_is_refused(
    tokens: list[int], slots: list[int], start: int, message: str
) -> None:
    index = ContentIndex(10, window=2)
    index.insert("a", [7, 8, 7, 8], [0, 1, 2, 3], 0)
    with pytest.raises(ValueError, match=message):
        index.insert("a", tokens, slots, start)
    with pytest.raises(ValueError, match="does not hold"):
        index.insert("b", [7, 8, 9], [0, 1, 9], 2)
    assert len(index) == 4
    assert spans(index.find("a", [7, 8, 7, 8])) == [(0, 4, 0)]


@pytest.mark.parametrize("branch_length", [1, 7, 500])
def test_memory_is_bounded_per_slot(branch_length: int) -> None:
    num_slots = 3_000
    tracemalloc.start()
    try:
        index = ContentIndex(num_slots)
        trunk = np.arange(100)
        index.insert("a", trunk, trunk, 0)
        for first in range(100, num_slots - branch_length, branch_length):
            slots = np.append(trunk, np.arange(first, first + branch_length))
            index.insert("a", slots, slots, 100)
        assert len(index) > 0.8 * num_slots
        assert index.nbytes < 40 * num_slots
        assert tracemalloc.get_traced_memory()[0] < 40 * num_slots + 10_000
    finally:
        tracemalloc.stop()


def test_empty_namespaces_leave_nothing_behind() -> None:
    index = ContentIndex(10, window=2)
    before = {name: len(v) for name, v in vars(index).items() if hasattr(v, "__len__")}
    for i in range(1000):
        index.insert(f"salt {i}", [1, 2, 3], [4, 5, 6], 0)
        index.remove([6, 5, 4])
    after = {name: len(v) for name, v in vars(index).items() if hasattr(v, "__len__")}
    assert sum(after.values()) <= sum(before.values()) + 1  # one free id


def test_the_same_text_a_thousand_times() -> None:
    """Frequent content uses up the budget at its oldest donors: the newest are found whole."""
    index = ContentIndex(200_000)
    text = np.arange(150) % 61
    for i in range(1000):
        context = np.full(1 + i % 16, 100)
        tokens = np.concatenate((context, text))
        index.insert("a", tokens, np.arange(len(tokens)) + 200 * i, 0)
    found = index.find("a", np.concatenate((np.arange(2000, 2030), text)))
    whole = [run for run in found if run.length == len(text)]
    assert [int(run.slots[0]) // 200 for run in whole] == [999, 998, 997, 996]


def test_one_token_repeated_stays_linear() -> None:
    index = ContentIndex(50_000)
    index.insert("a", np.zeros(20_000, np.int64), np.arange(20_000), 0)
    index.insert("a", np.arange(1, 1000), np.arange(20_000, 20_999), 0)
    prompt = np.concatenate((np.zeros(10_000, np.int64), np.arange(500, 1000)))
    found = index.find("a", prompt)
    assert sum(run.length for run in found) < 16 * len(prompt)
    # What is not repeated is found beside it.
    assert (10_000, 10_500, 499) in spans(found)


class Tree:
    """The cached sequences, page by page: what the index must agree with."""

    def __init__(self, num_slots: int, page_size: int) -> None:
        self.page_size = page_size
        self.free = list(range(num_slots))
        self.pages: dict[tuple[Hashable, tuple[int, ...]], list[int]] = {}

    def insert(self, namespace: Hashable, tokens: tuple[int, ...]) -> tuple[list[int], int]:
        """The slots of the whole sequence, and how many of them were there before."""
        slots: list[int] = []
        start = 0
        for stop in range(self.page_size, len(tokens) + 1, self.page_size):
            key = (namespace, tokens[:stop])
            if key in self.pages:
                start = stop
            else:
                # Freed slots are used again first.
                self.pages[key] = [self.free.pop() for _ in range(self.page_size)]
            slots += self.pages[key]
        return slots, start

    def leaves(self) -> list[tuple[Hashable, tuple[int, ...]]]:
        inner = {(namespace, tokens[: -self.page_size]) for namespace, tokens in self.pages}
        return [key for key in self.pages if key not in inner]

    def evict(self, namespace: Hashable, tokens: tuple[int, ...], pages: int) -> list[int]:
        """Free up to so many pages of a leaf, from its end to where another branch begins."""
        freed: list[int] = []
        while tokens and pages and (namespace, tokens) in self.leaves():
            freed += reversed(self.pages.pop((namespace, tokens)))
            tokens, pages = tokens[: -self.page_size], pages - 1
        self.free += freed
        return freed

    def paths(self, namespace: Hashable) -> list[tuple[tuple[int, ...], list[int]]]:
        """Tokens and slots of each leaf's whole path."""
        return [
            (tokens, self.insert(name, tokens)[0])
            for name, tokens in self.leaves()
            if name == namespace
        ]


def brute_force(
    tree: Tree, namespace: Hashable, prompt: tuple[int, ...], start: int
) -> dict[tuple[int, int], int]:
    """For each place in the prompt and donor slot where a run begins, the furthest it goes."""
    stops: dict[tuple[int, int], int] = {}
    for tokens, slots in tree.paths(namespace):
        for i in range(start, len(prompt)):
            for j in range(len(tokens)):
                if i > start and j and prompt[i - 1] == tokens[j - 1]:
                    continue
                n = 0
                while (
                    i + n < len(prompt) and prompt[i + n : i + n + 1] == tokens[j + n : j + n + 1]
                ):
                    n += 1
                if n:
                    key = (i, slots[j])
                    stops[key] = max(stops.get(key, 0), i + n)
    return stops


def check(
    index: ContentIndex,
    tree: Tree,
    namespace: Hashable,
    prompt: tuple[int, ...],
    start: int,
    min_length: int,
    max_donors: int,
) -> None:
    found = index.find(namespace, np.array(prompt), start, min_length, max_donors)
    truth = brute_force(tree, namespace, prompt, start)
    paths = tree.paths(namespace)
    for run in found:
        begin, end = run.donor_start, run.donor_start + run.length
        donors = [tokens for tokens, slots in paths if slots[begin:end] == run.slots.tolist()]
        assert donors
        for tokens in donors:
            assert tokens[begin:end] == prompt[run.start : run.stop]
            # As long as the path allows.
            assert not begin or run.start == start or tokens[begin - 1] != prompt[run.start - 1]
            assert tokens[end : end + 1] != prompt[run.stop : run.stop + 1] or end == len(tokens)
        assert run.length >= min_length
        assert run.start >= start
    assert len({(run.start, int(run.slots[0])) for run in found}) == len(found)
    assert [(run.start, -run.stop) for run in found] == sorted(
        (run.start, -run.stop) for run in found
    )

    def containing(start: int, stop: int, stretches: Sequence[tuple[int, int]]) -> int:
        return sum(a <= start and stop <= b for a, b in stretches)

    stretches = [(run.start, run.stop) for run in found]
    assert all(containing(a, b, stretches) <= max_donors for a, b in stretches)
    promised = max(min_length, 2 * index.window - 1)
    runs = [(a, b) for (a, _), b in truth.items() if b - a >= promised]
    for a, b in runs:
        assert containing(a, b, stretches) >= min(max_donors, containing(a, b, runs))


NAMESPACES = [-1, -2, None]
tokens_of = st.lists(st.integers(0, 2), max_size=12)
steps = st.one_of(
    # A branch of a cached sequence (which, how much of it) or a new one, and its new tokens.
    st.tuples(st.just("insert"), st.sampled_from(NAMESPACES), *[st.integers(0, 20)] * 2, tokens_of),
    st.tuples(st.just("insert"), st.sampled_from(NAMESPACES), *[st.integers(0, 20)] * 2, tokens_of),
    st.tuples(st.just("evict"), st.integers(0, 20), st.integers(1, 12)),
    st.tuples(st.just("clear")),
    # A prompt of pieces of cached sequences (which, from, to) with other tokens between them.
    st.tuples(
        st.just("find"),
        st.sampled_from(NAMESPACES),
        st.lists(st.tuples(*[st.integers(0, 20)] * 3, tokens_of), max_size=3),
        st.integers(0, 6),
        st.integers(1, 8),
        st.integers(1, 4),
    ),
)


@pytest.mark.parametrize("index_class", [ContentIndex, CollidingIndex])
@settings(max_examples=300, deadline=None)
@given(
    window=st.integers(1, 4),
    page_size=st.sampled_from([1, 1, 2, 3]),
    steps=st.lists(steps, min_size=5, max_size=30),
)
def test_against_brute_force(
    index_class: type[ContentIndex], window: int, page_size: int, steps: list[Any]
) -> None:
    index, tree = index_class(120, window), Tree(120, page_size)

    def cached(choice: int) -> tuple[int, ...]:
        leaves = tree.leaves()
        return leaves[choice % len(leaves)][1] if leaves else ()

    for step in steps:
        match step:
            case ("insert", namespace, choice, kept, added):
                tokens = cached(choice)[:kept] + tuple(added)
                tokens = tokens[: len(tokens) // page_size * page_size]
                if len(tokens) <= len(tree.free):
                    slots, start = tree.insert(namespace, tokens)
                    index.insert(namespace, np.array(tokens), np.array(slots), start)
            case ("evict", choice, pages):
                if leaves := tree.leaves():
                    index.remove(tree.evict(*leaves[choice % len(leaves)], pages))
            case ("clear",):
                index.clear()
                tree = Tree(120, page_size)
            case ("find", namespace, pieces, start, min_length, max_donors):
                prompt: tuple[int, ...] = ()
                for choice, begin, end, added in pieces:
                    prompt += cached(choice)[begin:end] + tuple(added)
                check(index, tree, namespace, prompt, start, min_length, max_donors)
        assert len(index) == sum(len(page) for page in tree.pages.values())
    for namespace in NAMESPACES:
        for choice in range(len(tree.leaves())):
            check(index, tree, namespace, cached(choice)[1:], 0, 1, 2)
