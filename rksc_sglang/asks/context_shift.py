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
        self._weights = SHARE * torch.exp(-steps / FALL)  # float32, [REACH]
        # Keys at the first token's position become keys at each token's.
        self._turns = self._turn(steps)  # complex64, [REACH, 1, rotary_dim / 2]

    def of(self, runs: Sequence[Spliced]) -> Shifts:
        """The shifts of some runs, all of whose heads are of one length."""
        heads, turns, lengths = [], [], []
        for run in runs:
            slots = [run.head[-COMPARED:], run.donor_head[-COMPARED:]]
            # From their positions to the run's first.
            ahead = torch.arange(len(slots[0]), 0, -1, device=slots[0].device)
            heads += slots
            turns += [ahead, ahead + run.delta]
            lengths.append(min(len(run.target), REACH))
        target = torch.cat([run.target[:REACH] for run in runs])
        return Shifts(
            self._rope,
            torch.stack(heads),
            self._turn(torch.cat(turns)),
            target if target.is_cuda else as_slots(target),
            lengths,
            torch.cat([self._turns[:length] for length in lengths]),
            torch.cat([self._weights[:length] for length in lengths])[:, None, None],
        )

    def _turn(self, positions: Tensor) -> Tensor:
        angles = positions[:, None, None] * self._frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


class Shifts(NamedTuple):
    """The shifts of some runs, for any layers. Made by :meth:`ContextShift.of`."""

    rope: Rope
    heads: Tensor  # int64 [2 runs, m] slots: a run's head, its donor's, the next run's, ...
    head_turns: Tensor  # complex64 [2 runs * m, 1, rotary_dim / 2]: to the run's first position
    target: slice | Tensor  # slots of all that is shifted
    lengths: list[int]  # how many of them each run has
    turns: Tensor  # complex64 [sum of lengths, 1, rotary_dim / 2]: from the run's first position
    weights: Tensor  # float32 [sum of lengths, 1, 1]

    def add(self, k_caches: Sequence[Tensor], v_caches: Sequence[Tensor]) -> None:
        """Shift the runs in some layers.

        Args:
            k_caches: per layer [num_slots, kv_heads, head_dim]. Changed in place.
            v_caches: per layer [num_slots, kv_heads, v_head_dim]. Changed in place.
        """
        shifts = self._each(self._rotated(self._rows(k_caches), self.head_turns))
        shifts = self._rotated(shifts, self.turns).mul_(self.weights)
        for cache, shift in zip(k_caches, shifts):
            cache[self.target] += shift.to(cache.dtype)
        for cache, shift in zip(v_caches, self._each(self._rows(v_caches))):
            cache[self.target] += (self.weights * shift).to(cache.dtype)

    def _rows(self, caches: Sequence[Tensor]) -> Tensor:
        """Float32 [layers, 2 runs * m, heads, dim]: what is in the slots of the heads."""
        return torch.stack([cache[self.heads.flatten()] for cache in caches]).float()

    def _each(self, rows: Tensor) -> Tensor:
        """The mean difference of the two heads of a run, once for each of its tokens."""
        ours, donors = rows.unflatten(1, (-1, 2, self.heads.shape[1])).unbind(2)
        common = (ours - donors).mean(2)
        return torch.cat(
            [
                each[:, None].expand(-1, length, -1, -1)
                for each, length in zip(common.unbind(1), self.lengths)
            ],
            dim=1,
        )

    def _rotated(self, keys: Tensor, turns: Tensor) -> Tensor:
        """Float32 keys [..., n, heads, dim] turned by [n, 1, rotary_dim / 2]."""
        rotary = self.rope.rotary_dim
        pairs = keys[..., :rotary].unflatten(-1, (2, -1) if self.rope.neox else (-1, 2))
        if self.rope.neox:
            pairs = pairs.transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
        if self.rope.neox:
            turned = turned.transpose(-1, -2)
        return torch.cat([turned.flatten(-2), keys[..., rotary:]], -1)
