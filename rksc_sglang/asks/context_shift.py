"""What a new context does to all tokens of a run alike, added to KV copied from another context.

The head of a run is computed behind the new context, and its donor's KV is there too. Their mean
difference, keys taken without their rotation, estimates what the contexts make of any token. Half
of it is added to the tokens behind the head, less and less the further they are, as a run becomes
its own context. What is common to many tokens is what attention does not average away. Measured in
docs/sharing.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rksc_sglang.asks.rope import Rope
from rksc_sglang.kernels.rotate_copy import as_slots

#: Of the head, the last so many tokens are compared: its first ones are next to what differs.
COMPARED = 4
#: Of their difference, what is added right behind the head: the estimate is a noisy one.
SHARE = 0.5
#: Tokens behind the head at which the shift has fallen by e.
FALL = 64
#: Tokens that are shifted: what is left of it further on is below 2 %.
REACH = 4 * FALL


class Spliced(NamedTuple):
    """A run that was copied behind a new context.

    Attributes:
        head: [m] int64 slots of the tokens right in front of the run, as computed.
        donor_head: [m] int64 slots of the same tokens behind the donor's context.
        target: [n] int64 slots of the run in order, distinct.
        delta: positions by which keys moved, new minus old.
    """

    head: Tensor
    donor_head: Tensor
    target: Tensor
    delta: int


class ContextShift:
    """What is known of the shifts in one model's KV pool beforehand.

    Args:
        rope: how the model rotates keys.
        device: of the pool.
    """

    def __init__(self, rope: Rope, device: torch.device | str) -> None:
        self._rope = rope
        self._frequencies = rope.inverse_frequencies.to(device)
        steps = torch.arange(REACH, device=device)
        self._weights = SHARE * torch.exp(-steps / FALL)[:, None, None]  # float32, [REACH, 1, 1]
        # From the first token's position to each token's. Complex64, [REACH, 1, rotary_dim / 2].
        self._turns = self._turn(steps) * self._weights

    def of(self, runs: Sequence[Spliced]) -> Shifts:
        """The shifts of some runs, all of whose heads are of one length."""
        heads, turns, targets = [], [], []
        for run in runs:
            slots = [run.head[-COMPARED:], run.donor_head[-COMPARED:]]
            # From their positions to the run's first.
            ahead = torch.arange(len(slots[0]), 0, -1, device=slots[0].device)
            heads += slots
            turns += [ahead, ahead + run.delta]
            target = run.target[:REACH]
            targets.append(target if target.is_cuda else as_slots(target))
        lengths = [min(len(run.target), REACH) for run in runs]
        return Shifts(
            self._rope,
            torch.stack(heads),
            self._turn(torch.cat(turns)),
            targets,
            [self._turns[:length] for length in lengths],
            [self._weights[:length] for length in lengths],
        )

    def _turn(self, positions: Tensor) -> Tensor:
        angles = positions[:, None, None] * self._frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


class Shifts(NamedTuple):
    """The shifts of some runs, for any layers. Made by :meth:`ContextShift.of`."""

    rope: Rope
    heads: Tensor  # int64 [2 runs, m] slots: a run's head, its donor's, the next run's, ...
    head_turns: Tensor  # complex64 [2 runs * m, 1, rotary_dim / 2]: to the run's first position
    targets: list[slice | Tensor]  # per run, slots of the n tokens that are shifted
    turns: list[Tensor]  # complex64 [n, 1, rotary_dim / 2]: from the first, and the weight
    weights: list[Tensor]  # float32 [n, 1, 1]

    def add(self, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]) -> None:
        """Shift the runs in some layers.

        Args:
            k_caches: per layer [num_slots, kv_heads, head_dim]. Changed in place.
            v_caches: per layer [num_slots, kv_heads, v_head_dim]. Changed in place.
        """
        keys, rotary = self._rows(k_caches), self.rope.rotary_dim
        pairs = self._common(self._pairs(keys[..., :rotary]) * self.head_turns)
        rest, values = self._common(keys[..., rotary:]), self._common(self._rows(v_caches))
        for layer, (k_cache, v_cache) in enumerate(zip(k_caches, v_caches)):
            for run, where in enumerate(self.targets):
                weights = self.weights[run]
                turned = self._flat(pairs[layer, run] * self.turns[run])
                if rest.shape[-1]:
                    turned = torch.cat([turned, rest[layer, run] * weights], -1)
                _add(k_cache, where, turned)
                _add(v_cache, where, values[layer, run] * weights)

    def _rows(self, caches: Sequence[Tensor]) -> Tensor:
        """Float32 [layers, 2 runs * m, heads, dim]: what is in the slots of the heads."""
        return torch.stack([cache[self.heads.flatten()] for cache in caches]).float()

    def _common(self, rows: Tensor) -> Tensor:
        """[layers, runs, heads, dim]: the mean difference of the two heads of each run."""
        ours, donors = rows.unflatten(1, (-1, 2, self.heads.shape[1])).unbind(2)
        return (ours - donors).mean(2)

    def _pairs(self, keys: Tensor) -> Tensor:
        """What RoPE turns, as complex numbers: [..., rotary_dim] to [..., rotary_dim / 2]."""
        if self.rope.neox:
            return torch.complex(*keys.chunk(2, dim=-1))
        return torch.view_as_complex(keys.unflatten(-1, (-1, 2)).contiguous())

    def _flat(self, pairs: Tensor) -> Tensor:
        """The inverse of :meth:`_pairs`."""
        if self.rope.neox:
            return torch.cat([pairs.real, pairs.imag], -1)
        return torch.view_as_real(pairs).flatten(-2)


def _add(cache: Tensor, where: slice | Tensor, shift: Tensor) -> None:
    if isinstance(where, slice):
        cache[where].add_(shift.to(cache.dtype))
    else:
        cache.index_add_(0, where, shift.to(cache.dtype))
