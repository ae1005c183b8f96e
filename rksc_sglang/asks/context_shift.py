"""What a new context does to all tokens of a run alike, added to KV copied from another context.

The head of a run is computed behind the new context, and its donor's KV is there too. Their mean
difference, keys taken without their rotation, estimates what the contexts make of any token. Half
of it is added to the tokens behind the head, less and less the further they are, as a run becomes
its own context. What is common to many tokens is what attention does not average away. Measured in
docs/sharing.md.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class ContextShift:
    """The shift for one model's KV pool.

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

    def add(
        self,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        head: Tensor,
        donor_head: Tensor,
        target: Tensor,
        delta: int,
    ) -> None:
        """Shift a run that was copied to ``target``.

        Args:
            k_caches: per layer [num_slots, kv_heads, head_dim]. Changed in place.
            v_caches: per layer [num_slots, kv_heads, v_head_dim]. Changed in place.
            head: [m] int64 slots of the tokens right in front of the run, as computed.
            donor_head: [m] int64 slots of the same tokens behind the donor's context.
            target: [n] int64 slots of the run in order, distinct.
            delta: positions by which keys moved, new minus old.
        """
        head, donor_head, target = head[-COMPARED:], donor_head[-COMPARED:], target[:REACH]
        slots = torch.cat([head, donor_head])
        where = target if target.is_cuda else as_slots(target)
        weights = self._weights[: len(target), None, None]
        keys = torch.stack([cache[slots] for cache in k_caches]).float()
        # From their positions to the run's first, and from there to each token's.
        ahead = torch.arange(len(head), 0, -1, device=slots.device)
        keys = self._rotated(keys, self._turn(torch.cat([ahead, ahead + delta])))
        shifts = _mean_difference(keys).expand(-1, len(target), -1, -1)
        shifts = self._rotated(shifts, self._turns[: len(target)]).mul_(weights)
        for cache, shift in zip(k_caches, shifts):
            cache[where] += shift.to(cache.dtype)
        values = torch.stack([cache[slots] for cache in v_caches]).float()
        for cache, shift in zip(v_caches, _mean_difference(values)):
            cache[where] += (weights * shift).to(cache.dtype)

    def _turn(self, positions: Tensor) -> Tensor:
        angles = positions[:, None, None] * self._frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def _rotated(self, keys: Tensor, turns: Tensor) -> Tensor:
        """Float32 keys [..., n, heads, dim] turned by [n, 1, rotary_dim / 2]."""
        rotary = self._rope.rotary_dim
        pairs = keys[..., :rotary].unflatten(-1, (2, -1) if self._rope.neox else (-1, 2))
        if self._rope.neox:
            pairs = pairs.transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
        if self._rope.neox:
            turned = turned.transpose(-1, -2)
        return torch.cat([turned.flatten(-2), keys[..., rotary:]], -1)


def _mean_difference(rows: Tensor) -> Tensor:
    """[layers, 2 m, ...] -> [layers, 1, ...]: the mean of the first m minus that of the others."""
    ours, donors = rows.chunk(2, dim=1)
    return (ours - donors).mean(1, keepdim=True)
