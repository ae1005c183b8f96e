"""Replays a trace of requests on SGLang's real radix tree and allocator, without a model.

A request's prompt is matched, what is missing gets slots (others are evicted for them), and it is
locked until it finishes; then its output is in the tree too. Events keep the trace's order under
every policy. The clairvoyant bound is computed beside, token by token.
"""

from __future__ import annotations

import gzip
import heapq
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rksc_sglang.rsbcm.attention_mass import SlotMass
from rksc_sglang.rsbcm.life_cycle import Branch
from rksc_sglang.rsbcm.policy import RkscStrategy
from rksc_sglang.rsbcm.trace import Event, Finish, Report, Start, read_events
from rksc_sglang.serving.radix_cache import RkscRadixCache, split_path

#: Tokens of a block of the public traces.
BLOCK = 512


class Policy(NamedTuple):
    """An eviction policy as SGLang's flags name it.

    Attributes:
        strategy: is used in the place of that one.
    """

    name: str
    policy: str
    config: Mapping[str, Any] | None = None
    strategy: type[RkscStrategy] | None = None


class LruFreeing(RkscStrategy):
    """LRU, with the pages of pruned branches freed at once: the plain half of the life cycle."""

    def __init__(self) -> None:
        super().__init__(trim=0)

    def get_priority(self, node: Any) -> tuple[float, ...]:
        assert self.life_cycle is not None
        return (self.life_cycle.rank(node) > 0, node.last_access_time)


@dataclass
class Outcome:
    """What a policy made of a trace, in tokens and seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    evicted_tokens: int = 0
    evict_seconds: float = 0.0

    @property
    def recomputed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / max(self.prompt_tokens, 1)


class Trace(NamedTuple):
    """Events, and the tokens that each of their tokens stands for."""

    events: list[Event]
    unit: int


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """A trace recorded by ``--rksc-trace``, or a public one with ``hash_ids`` of blocks.

    Of the latter a block has one slot, and requests do not overlap.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        first = json.loads(next(lines))
        lines.seek(0)
        if "hash_ids" not in first:
            return Trace(list(read_events(lines)), 1)
        return Trace(list(_block_events(lines, limit)), BLOCK)


def _block_events(lines: Any, limit: int | None) -> Iterator[Event]:
    for number, line in enumerate(lines):
        if number == limit:
            return
        raw = json.loads(line)
        when, rid = raw["timestamp"] / 1000, str(number)
        yield Start(when, rid, array("q", raw["hash_ids"]))
        yield Finish(when, rid, array("q"))


def replay(events: Sequence[Event], capacity: int, policy: Policy, unit: int = 1) -> Outcome:
    """What a policy makes of a trace; ``unit`` as of a :class:`Trace`.

    Raises:
        ValueError: a request does not fit the pool.
    """
    return _Replay(capacity, policy, unit).run(events)


@dataclass
class _Running:
    """A request between its start and its end."""

    key: array
    slots: torch.Tensor
    lock: Any
    start: Start


class _Replay:
    def __init__(self, capacity: int, policy: Policy, unit: int) -> None:
        self.cache = make_cache(capacity, policy)
        self.now = 0.0
        self.running: dict[str, _Running] = {}
        self.outcome = Outcome()
        cache = self.cache
        if cache.life_cycle is not None:
            cache.life_cycle.clock = lambda: self.now
        if cache.strategy is not None:
            cache.strategy.slot_mass = SlotMass(capacity + 1, "cpu")
            cache.strategy.in_units_of(unit)

    def run(self, events: Sequence[Event]) -> Outcome:
        for event in events:
            self.now = event.time
            if isinstance(event, Start):
                self._start(event)
            elif isinstance(event, Finish):
                self._finish(event)
            elif isinstance(event, Report):
                self.cache.report_branches(event.tenant, event.group, event.states)
            else:
                self.cache.end_program(event.tenant, event.program)
        self.outcome.evicted_tokens = self.cache.evicted_tokens
        self.outcome.evict_seconds = self.cache.nanoseconds["evict"] / 1e9
        return self.outcome

    def _start(self, start: Start) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        cache = self.cache
        # The last token is always computed: its logits are what the prompt is for.
        key = _key(start.tokens[:-1], start)
        match = cache.match_prefix(MatchPrefixParams(key=key))
        known = match.device_prefix_len
        self.outcome.prompt_tokens += len(start.tokens)
        self.outcome.cached_tokens += known
        lock = cache.lock(match.last_device_node)
        new = self._alloc(len(start.tokens) - known)
        slots = torch.cat([cache.path_device_indices(match.last_device_node)[:known], new])
        self.running[start.rid] = self._insert(start, start.tokens, slots, lock, known)

    def _finish(self, finish: Finish) -> None:
        now = self.running.pop(finish.rid)
        key = now.key + finish.output
        slots = torch.cat([now.slots, self._alloc(len(finish.output))])
        now = self._insert(now.start, key, slots, now.lock, len(now.key))
        strategy = self.cache.strategy
        if finish.mass is not None and strategy is not None and strategy.slot_mass is not None:
            mass = torch.tensor(finish.mass, dtype=torch.float32)
            strategy.slot_mass.mass[now.slots[: len(mass)]] = mass[: len(now.slots)]
        self.cache.unlock(now.lock)
        if self._pruned(now.start):
            self.cache.free_pruned()

    def _insert(
        self, start: Start, key: array, slots: torch.Tensor, lock: Any, known: int
    ) -> _Running:
        """Into the tree, and locked there; the tree frees what it has already."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        cache = self.cache
        params = InsertParams(
            key=_key(key, start), value=slots, prev_prefix_len=known, inserted_len=known
        )
        result = cache.insert(params)
        cache.unlock(lock)
        lock = cache.lock(result.last_device_node)
        if cache.life_cycle is not None and start.group is not None:
            node = cache.tree_core.node_by_id(result.last_device_node)
            path = split_path(node, len(key), known)
            cache.life_cycle.claim(self._branch(start), *path, start.verifies)
        return _Running(key, cache.path_device_indices(result.last_device_node), lock, start)

    def _pruned(self, start: Start) -> bool:
        if self.cache.life_cycle is None or start.group is None:
            return False
        return self._branch(start).state == "pruned"

    def _branch(self, start: Start) -> Branch:
        assert self.cache.life_cycle is not None
        assert start.group is not None
        return self.cache.life_cycle.branch(start.tenant, start.group, start.branch, start.program)

    def _alloc(self, count: int) -> torch.Tensor:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        allocator = self.cache.token_to_kv_pool_allocator
        short = count - allocator.available_size()
        if short > 0:
            self.cache.evict(EvictParams(num_tokens=short))
        slots = allocator.alloc(count)
        if slots is None:
            raise ValueError(f"the requests that run at once do not fit {allocator.size} tokens")
        return slots


def make_cache(capacity: int, policy: Policy) -> RkscRadixCache:
    """A cache over ``capacity`` real KV slots of one small layer."""
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    pool = MHATokenToKVPool(
        size=capacity,
        page_size=1,
        dtype=torch.float32,
        head_num=1,
        head_dim=1,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    allocator = TokenToKVPoolAllocator(
        capacity, dtype=torch.float32, device="cpu", kvcache=pool, need_sort=False
    )
    cache = RkscRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(1, 1, "cpu", False),
            token_to_kv_pool_allocator=allocator,
            page_size=1,
            tree_components=(ComponentType.FULL,),
            eviction_policy=policy.policy,
            eviction_policy_config=dict(policy.config) if policy.config else None,
        )
    )
    if policy.strategy is not None:
        cache.evict_by(policy.strategy())
    return cache


def _key(tokens: array, start: Start) -> Any:
    from sglang.srt.mem_cache.radix_cache import RadixKey

    extra_key, cache_salt = start.tenant
    return RadixKey(token_ids=tokens, extra_key=extra_key, cache_salt=cache_salt)


# The clairvoyant bound


class _Token:
    """One token behind one prefix: a node of the trie of all that a trace computes."""

    __slots__ = ("children", "pins", "resident", "uses")

    def __init__(self) -> None:
        self.children: dict[Any, _Token] = {}
        self.uses: list[int] = []  # of starts that need it, last one first
        self.resident = False
        self.pins = 0


def clairvoyant(events: Sequence[Event], capacity: int) -> Outcome:
    """Evicts what is needed farthest ahead, token by token, knowing all that comes.

    A prefix is never needed later than what stands on it, so that what goes is always at the end
    of a branch, and every token costs the same to recompute: no policy has fewer misses.

    Raises:
        ValueError: as :func:`replay`.
    """
    root = _Token()
    paths: dict[str, list[_Token]] = {}
    outputs: dict[str, list[_Token]] = {}
    for event in events:
        if isinstance(event, Start):
            paths[event.rid] = _walk(root, (event.tenant, event.tokens))
        elif isinstance(event, Finish):
            outputs[event.rid] = _walk_on(paths[event.rid][-1], event.output)
    for number, path in reversed(list(enumerate(paths.values()))):
        for token in path:
            token.uses.append(number)
    return _Bound(capacity).run(events, paths, outputs)


@dataclass
class _Bound:
    capacity: int
    used: int = 0
    number: int = 0  # of the next start
    heap: list[tuple[float, int, _Token]] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)
    ties: int = 0

    def run(
        self,
        events: Sequence[Event],
        paths: Mapping[str, list[_Token]],
        outputs: Mapping[str, list[_Token]],
    ) -> Outcome:
        for event in events:
            if isinstance(event, Start):
                path = paths[event.rid]
                known = next((i for i, t in enumerate(path) if not t.resident), len(path))
                self.outcome.prompt_tokens += len(path)
                self.outcome.cached_tokens += min(known, len(path) - 1)
                self.number += 1
                self._take(path)
            elif isinstance(event, Finish):
                self._take(outputs[event.rid])
                for token in [*paths[event.rid], *outputs[event.rid]]:
                    token.pins -= 1
                    self._offer(token)
        return self.outcome

    def _take(self, path: Sequence[_Token]) -> None:
        for token in path:
            token.pins += 1
        for token in path:
            if not token.resident:
                if self.used == self.capacity:
                    self._evict()
                token.resident = True
                self.used += 1

    def _offer(self, token: _Token) -> None:
        """It may be evicted, if nobody else reads it."""
        if token.pins == 0:
            self.ties += 1
            heapq.heappush(self.heap, (-self._next_use(token), self.ties, token))

    def _evict(self) -> None:
        while self.heap:
            when, _, token = heapq.heappop(self.heap)
            # An entry is stale when its token was used, or evicted, since.
            if token.resident and token.pins == 0 and -when == self._next_use(token):
                token.resident = False
                self.used -= 1
                self.outcome.evicted_tokens += 1
                return
        raise ValueError(f"the requests that run at once do not fit {self.capacity} tokens")

    def _next_use(self, token: _Token) -> float:
        while token.uses and token.uses[-1] < self.number:
            token.uses.pop()
        return token.uses[-1] if token.uses else math.inf


def _walk(root: _Token, key: tuple[Any, Sequence[int]]) -> list[_Token]:
    tenant, tokens = key
    return _walk_on(root.children.setdefault(tenant, _Token()), tokens)


def _walk_on(token: _Token, tokens: Sequence[int]) -> list[_Token]:
    path = []
    for value in tokens:
        token = token.children.setdefault(value, _Token())
        path.append(token)
    return path


def smallest_pool(events: Sequence[Event]) -> tuple[int, int]:
    """Tokens of the smallest pool in which the trace's requests fit, and of all that it computes.

    Requests that run at once hold what they share once, as soon as it is computed.
    """
    root = _Token()
    paths: dict[str, list[_Token]] = {}
    held = peak = whole = 0
    for event in events:
        if isinstance(event, Start):
            paths[event.rid] = _walk(root, (event.tenant, event.tokens))
            new = paths[event.rid]
        elif isinstance(event, Finish):
            new = _walk_on(paths[event.rid][-1], event.output)
            paths[event.rid] += new
        else:
            continue
        for token in new:
            held += token.pins == 0
            token.pins += 1
            whole += not token.resident
            token.resident = True
        # What is computed twice at once has slots twice until it is in the tree.
        peak = max(peak, held + len(new))
        if isinstance(event, Finish):
            for token in paths.pop(event.rid):
                token.pins -= 1
                held -= token.pins == 0
    return peak, whole
