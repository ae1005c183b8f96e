"""Attention over paged KV in which a prefix that several requests share is read once.

A plan cuts the work of one forward pass into *parts*. A part lets some query rows attend to some
KV slots and yields their output together with the log-sum-exp of their scores; a row that has
several parts gets the merge of them, which is exact:

    out = sum_p exp(lse_p - lse) * out_p,   lse = log sum_p exp(lse_p)

The plan depends on slot numbers only, so all layers of a forward pass use the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# Reads of a KV slot that sharing must save before it pays for one more part.
SHARE_MIN = 64
# Consecutive slots that one request reads in place rather than in the batch's gathered copy.
RUN_MIN = 128
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
    num_rows: int
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

    single: dict[int, list[tuple[slice, Tensor]]] = {}
    for i, (slots, n) in enumerate(zip(requests, new)):
        if n == 1:
            start = len(slots) - 1 - window if window is not None and cut[i] else read[i]
            runs, rest = _runs(slots[start:])
            parts += [Part(spans[i], run) for run in runs]
            if len(rest):
                # Equal bit lengths: padding at most doubles a row.
                single.setdefault(max(len(rest), 64).bit_length(), []).append((spans[i], rest))
        elif not causal:
            parts += _full(spans[i], slots)
        elif window is not None and cut[i]:
            parts += _windowed(spans[i], slots, window)
        else:
            cached = len(slots) - n
            parts += _full(spans[i], slots[read[i] : cached])
            parts.append(Part(spans[i], _as_slots(slots[cached:]), diagonal=True))
    parts += [_padded(bucket) for bucket in single.values()]

    order, bias = _merge_order(parts, ends[-1] if ends else 0)
    return _to(Plan(parts, ends[-1] if ends else 0, order, bias), device)


def prefix_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: Plan,
    *,
    scale: float,
    logit_cap: float = 0.0,
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

    Returns:
        [num_rows, num_heads, v_head_dim] in the dtype of ``q``; softmax and merge are float32.
    """
    done = [_attend(q, k_cache, v_cache, part, scale, logit_cap) for part in plan.parts]
    if not done:
        return q.new_empty(0, q.shape[1], v_cache.shape[2])
    if len(done) == 1:
        return done[0][0].to(q.dtype)
    out = torch.cat([o for o, _ in done])
    if plan.order is None:
        return out.to(q.dtype)
    if plan.order.shape[1] == 1:
        return out[plan.order[:, 0]].to(q.dtype)
    weight = torch.cat([lse for _, lse in done])[plan.order]  # [num_rows, k, num_heads]
    if plan.bias is not None:
        weight += plan.bias
    weight = torch.softmax(weight, 1).unsqueeze(-1)
    return (out[plan.order] * weight).sum(1).to(q.dtype)


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


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, part: Part, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """One part: outputs [n, num_heads, v_head_dim] and log-sum-exps [n, num_heads], float32."""
    q = q[part.rows]
    k, v = (
        (c[part.slots] if isinstance(part.slots, slice) else c.index_select(0, part.slots)).to(
            q.dtype
        )
        for c in (k_cache, v_cache)
    )
    n, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    if part.diagonal:
        # Broadcast, not copied: a KV head's query heads read the same strides.
        q = q.view(n, kv_heads, group, dim).permute(1, 2, 0, 3)
        k, v = (c.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for c in (k, v))
        out, lse = _partial(q, k, v, part.mask, part.mask is None, scale, cap)
        out, lse = out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)
    else:
        # All query heads of a KV head, and all rows of a batch element, are one block of queries.
        b, r = part.batch, n // part.batch
        q = q.view(b, r, kv_heads, group, dim).transpose(1, 2).reshape(b, kv_heads, -1, dim)
        k, v = (c.view(b, -1, kv_heads, c.shape[-1]).transpose(1, 2) for c in (k, v))
        out, lse = _partial(q, k, v, part.mask, False, scale, cap)
        out = out.unflatten(2, (r, group)).transpose(1, 2)
        lse = lse.unflatten(2, (r, group)).transpose(1, 2)
    return out.reshape(n, heads, -1), lse.reshape(n, heads)


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
        mask = _visible(scores.new_ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril())
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


def _runs(slots: Tensor) -> tuple[list[slice], Tensor]:
    """Long runs of consecutive slots, as slices, and the slots outside them, in order."""
    breaks = (slots.diff() != 1).nonzero().flatten() + 1
    bounds = torch.cat([breaks.new_zeros(1), breaks, breaks.new_tensor([len(slots)])])
    long = (bounds.diff() >= RUN_MIN).nonzero().flatten().tolist()
    runs, rest, last = [], [], 0
    for j in long:
        start, stop = int(bounds[j]), int(bounds[j + 1])
        first = int(slots[start])
        runs.append(slice(first, first + stop - start))
        rest.append(slots[last:start])
        last = stop
    return runs, torch.cat([*rest, slots[last:]])


def _full(rows: slice | Tensor, slots: Tensor) -> list[Part]:
    """Parts in which all rows see all slots."""
    if not len(slots):
        return []
    runs, rest = _runs(slots)
    return [Part(rows, s) for s in [*runs, *([_as_slots(rest)] if len(rest) else [])]]


def _windowed(span: slice, slots: Tensor, window: int) -> list[Part]:
    """Parts of one request whose queries do not all see its first slot."""
    parts = []
    cached = len(slots) - (span.stop - span.start)
    for first in range(cached, len(slots), WINDOW_ROWS):
        last = min(first + WINDOW_ROWS, len(slots))
        start = max(first - window, 0)
        back = torch.arange(first, last)[:, None] - torch.arange(start, last)
        rows = slice(span.start + first - cached, span.start + last - cached)
        mask = _visible((back >= 0) & (back <= window))
        parts.append(Part(rows, _as_slots(slots[start:last]), diagonal=True, mask=mask))
    return parts


def _padded(bucket: list[tuple[slice, Tensor]]) -> Part:
    """One-row requests with slots of their own each, padded to the longest."""
    spans, slots = zip(*bucket)
    size = torch.tensor([len(s) for s in slots])
    longest = int(size.max())
    # A row is padded with a slot of its own: masked, but sure to hold finite numbers.
    table = torch.stack([torch.cat([s, s[:1].expand(longest - len(s))]) for s in slots])
    visible = torch.arange(longest) < size[:, None]
    mask = None if bool(visible.all()) else _visible(visible)[:, None, None]
    return Part(_join(spans, range(len(spans))), table.flatten().long(), len(spans), mask=mask)


def _merge_order(parts: list[Part], num_rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Where each row's results are among all parts' rows, and the bias that hides the padding."""
    if len(parts) < 2:
        return None, None
    index = torch.arange(num_rows)
    rows = torch.cat([index[part.rows] for part in parts])
    if torch.equal(rows, index):
        return None, None
    place = rows.argsort(stable=True)
    count = rows.bincount(minlength=num_rows)
    step = torch.arange(int(count.max()))
    order = place[(count.cumsum(0) - count)[:, None] + step.minimum(count[:, None] - 1)]
    present = step < count[:, None]
    return order, None if bool(present.all()) else _visible(present)[..., None]


def _visible(mask: Tensor) -> Tensor:
    """Boolean mask to additive: 0 where True, -inf elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


def _join(spans: Sequence[slice], members: Sequence[int]) -> slice | Tensor:
    """Rows of several requests: a slice where they are neighbours."""
    chosen = [spans[i] for i in members]
    if all(a.stop == b.start for a, b in zip(chosen, chosen[1:])):
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
    return Plan(parts, plan.num_rows, move(plan.order), move(plan.bias))
