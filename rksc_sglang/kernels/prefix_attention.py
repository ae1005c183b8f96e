"""Attention over paged KV in which a prefix that several requests share is read once.

A plan cuts the work of one forward pass into *parts*. A part lets some query rows attend to some
KV slots and yields their output together with the log-sum-exp of their scores; a row that has
several parts gets the merge of them, which is exact:

    out = sum_p exp(lse_p - lse) * out_p,   lse = log sum_p exp(lse_p)

The plan depends on slot numbers only, so all layers of a forward pass use the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# KV reads that a shared part must save before it pays for itself and for the merge.
SHARE_MIN = 768
# Slots copied at a time: what was copied is still in the processor's cache when it is read.
GATHER_MAX = 4096
# Query rows per part where a sliding window cuts: bounds the mask, and the slots read in vain.
WINDOW_ROWS = 512

# Returns the log-sum-exp that torch's public attention keeps to itself. Private, but what
# scaled_dot_product_attention calls on a CPU; where it is missing the same is done in torch math.
_flash_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


class Part(NamedTuple):
    """Query rows that read the same number of KV slots."""

    rows: slice | Tensor  # query rows, [n]
    slots: slice | Tensor  # KV slots, [m]; with batch > 1 [batch * m], one m for each n/batch rows
    batch: int = 1
    diagonal: bool = False  # rows see different slots: by `mask`, or causally where that is None
    mask: Tensor | None = None  # float32, 0 or -inf: [n, m] if diagonal, else [batch, 1, 1, m]


class Plan(NamedTuple):
    """What :func:`prefix_attention` does in each layer of one forward pass."""

    parts: list[Part]
    num_partials: int  # rows of all parts
    order: Tensor | None  # [num_rows, k]: each row's places among the parts' rows, if not trivial
    bias: Tensor | None  # [num_rows, k, 1] float32: -inf where a row has fewer than k parts


def plan_attention(
    requests: Sequence[Tensor],
    new: Sequence[int],
    *,
    window: int | None = None,
    causal: bool = True,
    device: torch.device | str = "cpu",
) -> Plan:
    """Plans the attention of a batch whose requests may share leading KV slots.

    Args:
        requests: per request the KV slots of all its tokens in order, 1-D integers on the CPU.
        new: per request how many of its last tokens are queries (1 when it decodes). Query rows
            are the requests' new tokens, one request after the other.
        window: a query sees itself and at most this many tokens before it; None for all.
        causal: False lets every query see all tokens of its request; then no window.
        device: where the plan's tensors go.

    Raises:
        ValueError: a request with no query, or more queries than tokens; a window, not causal.
    """
    if any(not 0 < n <= len(slots) for slots, n in zip(requests, new)):
        raise ValueError("every request needs at least one query and a KV slot for each")
    if window is not None and not causal:
        raise ValueError("a sliding window needs causal attention")
    ends = list(accumulate(new))
    spans = [slice(end - n, end) for end, n in zip(ends, new)]
    cut = [window is not None and len(slots) > window + 1 for slots in requests]
    parts: list[Part] = []
    read = [0] * len(requests)  # leading tokens that a shared part has dealt with

    # A request that a window cuts shares nothing: what is left of its prefix moves at every step.
    limits = [
        len(slots) - n if causal and not cut_ else 0 for slots, n, cut_ in zip(requests, new, cut)
    ]
    for group, start, stop in _shared_runs(requests, limits):
        parts += _full(_join(spans, group), requests[group[0]][start:stop])
        for i in group:
            read[i] = stop

    buckets: dict[int, list[int]] = {}
    for i, (slots, n) in enumerate(zip(requests, new)):
        if n == 1:
            if window is not None and cut[i]:
                read[i] = len(slots) - 1 - window
            # Equal bit lengths: padding at most doubles a row.
            buckets.setdefault(max(len(slots) - read[i], 64).bit_length(), []).append(i)
        elif not causal:
            parts += _full(spans[i], slots)
        elif window is not None and cut[i]:
            parts += _windowed(spans[i], slots, window)
        else:
            cached = len(slots) - n
            parts += _full(spans[i], slots[read[i] : cached])
            parts.append(Part(spans[i], _as_slots(slots[cached:]), diagonal=True))
    for bucket in buckets.values():
        size = max(1, GATHER_MAX // max(len(requests[i]) - read[i] for i in bucket))
        for j in range(0, len(bucket), size):
            batch = bucket[j : j + size]
            parts += _own(_join(spans, batch), [requests[i][read[i] :] for i in batch])

    return _to(_merged(parts, ends[-1] if ends else 0), device)


def prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: Plan,
    *,
    scale: float,
    logit_cap: float = 0.0,
    scratch: dict[tuple, Tensor] | None = None,
) -> Tensor:
    """Attention of new tokens over their requests' cached KV, themselves included.

    Args:
        q: [num_rows, num_heads, head_dim] float32, bfloat16 or float16; query head h reads KV
            head h // (num_heads / num_kv_heads).
        k_cache: [num_slots, num_kv_heads, head_dim], cast to the dtype of ``q`` where it differs.
        v_cache: [num_slots, num_kv_heads, v_head_dim].
        plan: of :func:`plan_attention`, on the same device.
        scale: factor of the scores.
        logit_cap: scores become ``logit_cap * tanh(score / logit_cap)``; 0 for none.
        scratch: keeps the memory that slots are copied to from one call to the next; starts
            empty. Fresh memory costs page faults in every layer.

    Returns:
        [num_rows, num_heads, v_head_dim] in the dtype of ``q``; softmax and merge are float32.
    """
    scratch = {} if scratch is None else scratch
    merge = plan.order is not None and plan.order.shape[1] > 1
    shape = (plan.num_partials, q.shape[1])
    out = q.new_empty(*shape, v_cache.shape[2], dtype=torch.float32 if merge else q.dtype)
    lse = q.new_empty(shape, dtype=torch.float32)
    start = 0
    for part in plan.parts:
        rows = q[part.rows]
        stop = start + len(rows)
        k = _read(k_cache, part.slots, scratch, "k").to(q.dtype)
        v = _read(v_cache, part.slots, scratch, "v").to(q.dtype)
        _attend(out[start:stop], lse[start:stop], rows, k, v, part, scale, logit_cap)
        start = stop
    if plan.order is None:
        return out
    places = plan.order.flatten()
    out = out.index_select(0, places).unflatten(0, plan.order.shape)  # [rows, k, heads, dim]
    if not merge:
        return out.squeeze(1)
    lse = lse.index_select(0, places).unflatten(0, plan.order.shape)
    if plan.bias is not None:
        lse += plan.bias
    return out.mul_(torch.softmax(lse, 1).unsqueeze(-1)).sum(1).to(q.dtype)


def reference_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    requests: Sequence[Tensor],
    new: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    logit_cap: float = 0.0,
) -> Tensor:
    """The same in float64, request by request, over dense masks: slow and plain."""
    outs = []
    for slots, n, query in zip(requests, new, q.split(list(new))):
        slots = slots.long().to(q.device)
        group = q.shape[1] // k_cache.shape[1]
        k = k_cache[slots].double().repeat_interleave(group, 1)
        v = v_cache[slots].double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query.double(), k) * scale
        if logit_cap:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        key = torch.arange(len(slots), device=q.device)
        back = key[len(slots) - n :, None] - key  # how far before the query
        if causal:
            scores = scores.masked_fill(back < 0, float("-inf"))
        if window is not None:
            scores = scores.masked_fill(back > window, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outs)


def _read(cache: Tensor, slots: slice | Tensor, scratch: dict[tuple, Tensor], name: str) -> Tensor:
    """The rows of ``cache`` at ``slots``: in place if consecutive, else copied to ``scratch``."""
    if isinstance(slots, slice):
        return cache[slots]
    key = (name, cache.dtype, cache.device, cache.shape[1:])
    if key not in scratch or len(scratch[key]) < len(slots):
        scratch[key] = cache.new_empty(max(len(slots), GATHER_MAX), *cache.shape[1:])
    return torch.index_select(cache, 0, slots, out=scratch[key][: len(slots)])


def _attend(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float, cap: float
) -> None:
    """One part: fills ``out`` [n, num_heads, v_head_dim] and ``lse`` [n, num_heads]."""
    n, heads, dim = q.shape
    slots, kv_heads, v_dim = v.shape
    group = heads // kv_heads
    if part.diagonal:
        # Broadcast, not copied: a KV head's query heads read the same strides.
        q = q.view(n, kv_heads, group, dim).permute(1, 2, 0, 3)
        k, v = (x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
        o, s = _partial(q, k, v, part.mask, part.mask is None, scale, cap)
        out.view(n, kv_heads, group, v_dim).copy_(o.permute(2, 0, 1, 3))
        lse.view(n, kv_heads, group).copy_(s.permute(2, 0, 1))
    else:
        # All query heads of a KV head, and all rows of a batch element, are one block of queries.
        b, r = part.batch, n // part.batch
        q = q.view(b, r, kv_heads, group, dim).transpose(1, 2).reshape(b, kv_heads, -1, dim)
        k = k.view(b, slots // b, kv_heads, dim).transpose(1, 2)
        v = v.view(b, slots // b, kv_heads, v_dim).transpose(1, 2)
        o, s = _partial(q, k, v, part.mask, False, scale, cap)
        o = o.view(b, kv_heads, r, group, v_dim).transpose(1, 2)
        out.view(b, r, kv_heads, group, v_dim).copy_(o)
        lse.view(b, r, kv_heads, group).copy_(s.view(b, kv_heads, r, group).transpose(1, 2))


def _partial(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Attention [b, h, n, d] over [b, h, m, d] with the log-sum-exp [b, h, n] in float32."""
    if _flash_cpu is not None and q.is_cpu and not cap and q.shape[-1] == v.shape[-1]:
        return _flash_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if causal:
        mask = _additive(scores.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril())
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), v.float()), lse


def _shared_runs(
    requests: Sequence[Tensor], limits: Sequence[int]
) -> Iterator[tuple[list[int], int, int]]:
    """The prefix tree of the requests' first ``limits`` slots: (members, start, stop) per node.

    A node too small to pay is left to its children, so what a request shares has no gaps.
    """
    nodes = [(list(range(len(requests))), 0, 0)]
    while nodes:
        members, start, same = nodes.pop()
        children: dict[int, list[int]] = {}
        for i in members:
            if limits[i] > same:
                children.setdefault(int(requests[i][same]), []).append(i)
        for group in children.values():
            if len(group) < 2:
                continue
            shortest = min(limits[i] for i in group)
            table = torch.stack([requests[i][same:shortest] for i in group])
            differ = (table[1:] != table[0]).any(0)
            stop = int(differ.byte().argmax()) + same if differ.any() else shortest
            if (stop - start) * (len(group) - 1) < SHARE_MIN:
                nodes.append((group, start, stop))
            else:
                yield group, start, stop
                nodes.append((group, stop, stop))


def _full(rows: slice | Tensor, slots: Tensor) -> list[Part]:
    """Parts in which all rows see all slots."""
    if not len(slots):
        return []
    whole = _as_slots(slots)
    if isinstance(whole, slice):
        return [Part(rows, whole)]
    return [Part(rows, _as_slots(piece)) for piece in slots.split(GATHER_MAX)]


def _own(rows: slice | Tensor, slots: list[Tensor]) -> list[Part]:
    """Parts in which each row sees slots of its own, padded to the longest."""
    if len(slots) == 1:
        return _full(rows, slots[0])
    table = pad_sequence(slots, batch_first=True)
    visible = torch.arange(table.shape[1]) < torch.tensor([[len(s)] for s in slots])
    if bool(visible.all()):
        return [Part(rows, table.flatten().long(), len(slots))]
    # A row is padded with a slot of its own: masked, but sure to hold finite numbers.
    table = table.where(visible, table[:, :1])
    mask = _additive(visible)[:, None, None]
    return [Part(rows, table.flatten().long(), len(slots), mask=mask)]


def _windowed(span: slice, slots: Tensor, window: int) -> list[Part]:
    """Parts of one request whose queries do not all see its first slot."""
    parts = []
    cached = len(slots) - (span.stop - span.start)
    for first in range(cached, len(slots), WINDOW_ROWS):
        last = min(first + WINDOW_ROWS, len(slots))
        start = max(first - window, 0)
        back = torch.arange(first, last)[:, None] - torch.arange(start, last)
        rows = slice(span.start + first - cached, span.start + last - cached)
        mask = _additive((back >= 0) & (back <= window))
        parts.append(Part(rows, _as_slots(slots[start:last]), diagonal=True, mask=mask))
    return parts


def _merged(parts: list[Part], num_rows: int) -> Plan:
    """The plan of these parts: where the results of each row are, and what hides the padding."""
    index = torch.arange(num_rows)
    rows = torch.cat([index[:0], *(index[part.rows] for part in parts)])
    if torch.equal(rows, index):
        return Plan(parts, num_rows, None, None)
    place = rows.argsort(stable=True)
    count = rows.bincount(minlength=num_rows)[:, None]
    step = torch.arange(int(count.max()))
    order = place[count.cumsum(0) - count + step.minimum(count - 1)]
    present = step < count
    bias = None if bool(present.all()) else _additive(present)[..., None]
    return Plan(parts, len(rows), order, bias)


def _additive(mask: Tensor) -> Tensor:
    """Boolean mask to additive: 0 where True, -inf elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


def _join(spans: Sequence[slice], members: Sequence[int]) -> slice | Tensor:
    """Rows of several requests: a slice where they are neighbours."""
    chosen = [spans[i] for i in members]
    if all(a.stop == b.start for a, b in pairwise(chosen)):
        return slice(chosen[0].start, chosen[-1].stop)
    return torch.cat([torch.arange(s.start, s.stop) for s in chosen])


def _as_slots(slots: Tensor) -> slice | Tensor:
    """A slice, which is read without a copy, where the slots are consecutive."""
    first = int(slots[0])
    if bool((slots.diff() == 1).all()):
        return slice(first, first + len(slots))
    return slots.long()


def _to(plan: Plan, device: torch.device | str) -> Plan:
    def move(x):
        return x.to(device) if isinstance(x, Tensor) else x

    parts = [Part(*map(move, part)) for part in plan.parts]
    return Plan(parts, plan.num_partials, move(plan.order), move(plan.bias))
