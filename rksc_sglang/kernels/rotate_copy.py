"""Copies the KV of a run of tokens to new slots, its keys turned to their new positions.

RoPE turns each pair of a key's values by ``position * frequency``, so a key cached at position p
becomes the key at p + delta by one more turn, by ``delta * frequency``; values carry no position
(Su et al., RoFormer, arXiv 2104.09864). All layers share one rotation and one list of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Runs of consecutive slots at least this long are copied in place, as slices. Gathering and
# scattering cost some 0.6 us a token and layer more, the calls for one more slice some 16 us.
RUN_MIN = 64
# Slots per step: bounds the scratch memory.
STEP_MAX = 1024


class Rotation(NamedTuple):
    """The turn of each pair of a key's first ``2 * cos.shape[-1]`` values."""

    cos: Tensor  # float32, [rotary_dim / 2] for all tokens or [n, rotary_dim / 2]
    sin: Tensor  # like cos
    neox: bool  # pairs are (j, j + rotary_dim / 2); False for GPT-J's (2 j, 2 j + 1)


class _Piece(NamedTuple):
    """Tokens that are moved in one step."""

    size: int
    rows: slice | Tensor  # where they are among all tokens
    source: slice | Tensor  # their slots
    target: slice | Tensor


class _Turn(NamedTuple):
    """A rotation as :func:`_rotate` applies it to the tokens of a piece; broadcasts over heads."""

    rotary: int  # values of a key that turn
    factor: Tensor  # [m or 1, 1, ...]: cos of both halves if neox, else cos + i sin
    sin: Tensor | None


def rotation_for(inv_freq: Tensor, delta: int, neox: bool) -> Rotation | None:
    """The rotation that moves a key by ``delta`` positions.

    Args:
        inv_freq: [rotary_dim / 2] inverse frequencies, in float64 where they are known so well.
        delta: new position minus old; any sign.
        neox: see :class:`Rotation`.

    Returns:
        cos and sin of the float64 angles, on the device of ``inv_freq``; None for ``delta`` 0.
    """
    if delta == 0:
        return None
    angle = inv_freq.double() * delta
    return Rotation(angle.cos().float(), angle.sin().float(), neox)


def rotate_copy(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    source: Tensor,
    target: Tensor,
    rotation: Rotation | None,
) -> None:
    """Fills the slots ``target`` of every layer with the KV at ``source``, keys rotated.

    On CUDA one Triton launch does all layers and moves each byte once. On a CPU, runs of
    consecutive slots are rotated straight from slice to slice.

    Args:
        k_caches: per layer [num_slots, kv_heads, head_dim] float32, bfloat16 or float16, the
            values of a slot contiguous. Changed in place.
        v_caches: per layer [num_slots, kv_heads, v_head_dim]. Changed in place.
        source: [n] int64 slots. On CUDA out-of-range slots are not noticed, as in any kernel.
        target: [n] int64 slots, distinct, none of them in ``source``.
        rotation: None copies. Computed in float32 and rounded once to the dtype of the cache.

    Raises:
        ValueError: shapes that do not fit each other; on a CPU also slots out of range.
    """
    _check(k_caches, v_caches, source, target, rotation)
    if not k_caches or not len(source):
        return
    if k_caches[0].is_cuda:
        _launch(k_caches, v_caches, source, target, rotation)
        return
    slots = torch.stack([source, target])
    low, high = (int(x) for x in slots.aminmax())
    if low < 0 or high >= min(len(cache) for cache in (*k_caches, *v_caches)):
        raise ValueError(f"slots {low}..{high} are not all in the cache")
    pieces = _pieces(source, target)
    turns = [_turn(rotation, piece.rows) for piece in pieces]
    scratch: dict[tuple, Tensor] = {}
    for k_cache, v_cache in zip(k_caches, v_caches):
        for piece, turn in zip(pieces, turns):
            _move(k_cache, piece, turn, scratch)
            _move(v_cache, piece, None, scratch)


def rotate_copy_reference(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    source: Tensor,
    target: Tensor,
    rotation: Rotation | None,
) -> None:
    """What :func:`rotate_copy` does, in float64 and plainly. Caches may be float64 too."""
    for k_cache, v_cache in zip(k_caches, v_caches):
        keys = k_cache[source].double()
        if rotation is not None:
            cos, sin = (x.double().unsqueeze(-2) for x in rotation[:2])
            half = cos.shape[-1]
            if rotation.neox:
                first, second = slice(0, half), slice(half, 2 * half)
            else:
                first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
            x, y = keys[..., first].clone(), keys[..., second].clone()
            keys[..., first] = x * cos - y * sin
            keys[..., second] = y * cos + x * sin
        k_cache[target] = keys.to(k_cache.dtype)
        v_cache[target] = v_cache[source]


def _check(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    source: Tensor,
    target: Tensor,
    rotation: Rotation | None,
) -> None:
    if len(k_caches) != len(v_caches):
        raise ValueError(f"{len(k_caches)} layers of keys, {len(v_caches)} of values")
    if source.dim() != 1 or source.shape != target.shape:
        raise ValueError(f"slots must be two equal lists: {source.shape}, {target.shape}")
    for cache in (*k_caches, *v_caches):
        if cache.dim() != 3 or cache.stride()[1:] != (cache.shape[2], 1):
            raise ValueError("a cache must be [num_slots, kv_heads, dim], each slot contiguous")
    if rotation is not None:
        cos, sin, _ = rotation
        if cos.shape != sin.shape or cos.shape[:-1] not in ((), source.shape):
            raise ValueError(f"cos {cos.shape} and sin {sin.shape} do not fit {len(source)} tokens")
        if any(2 * cos.shape[-1] > cache.shape[2] for cache in k_caches):
            raise ValueError(f"{2 * cos.shape[-1]} rotated values do not fit in a key")


def _pieces(source: Tensor, target: Tensor) -> list[_Piece]:
    """Cuts the tokens into long runs, which are slices on both sides, and the rest."""
    breaks = (source.diff() != 1) | (target.diff() != 1)
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(source)]
    pieces, rest = [], torch.ones(len(source), dtype=torch.bool)
    for start, stop in pairwise(edges):
        if stop - start < RUN_MIN:
            continue
        rest[start:stop] = False
        first_source, first_target = int(source[start]) - start, int(target[start]) - start
        for low in range(start, stop, STEP_MAX):
            high = min(low + STEP_MAX, stop)
            pieces.append(
                _Piece(
                    high - low,
                    slice(low, high),
                    slice(first_source + low, first_source + high),
                    slice(first_target + low, first_target + high),
                )
            )
    for rows in rest.nonzero().flatten().split(STEP_MAX):
        if len(rows):
            pieces.append(_Piece(len(rows), rows, as_slots(source[rows]), as_slots(target[rows])))
    return pieces


def as_slots(slots: Tensor) -> slice | Tensor:
    """A slice where the slots are consecutive."""
    first = int(slots[0])
    return slice(first, first + len(slots)) if bool((slots.diff() == 1).all()) else slots


def _turn(rotation: Rotation | None, rows: slice | Tensor) -> _Turn | None:
    if rotation is None:
        return None
    cos, sin = (x[rows].unsqueeze(1) if x.dim() == 2 else x[None, None] for x in rotation[:2])
    rotary = 2 * cos.shape[-1]
    if rotation.neox:
        return _Turn(rotary, torch.cat([cos, cos], -1), sin)
    return _Turn(rotary, torch.complex(cos, sin), None)


def _move(cache: Tensor, piece: _Piece, turn: _Turn | None, scratch: dict[tuple, Tensor]) -> None:
    """One piece of one cache; rotated if there is a turn."""

    def room(name: str, dim: int, dtype: torch.dtype) -> Tensor:
        key = (name, cache.shape[1], dim, dtype)
        if key not in scratch:
            scratch[key] = torch.empty(STEP_MAX, cache.shape[1], dim, dtype=dtype)
        return scratch[key][: piece.size]

    dim, dtype = cache.shape[2], cache.dtype
    if isinstance(piece.source, slice):
        old = cache[piece.source]
    else:
        old = room("old", dim, dtype)
        torch.index_select(_words(cache), 0, piece.source, out=_words(old))
    in_place = isinstance(piece.target, slice)
    new = cache[piece.target] if in_place else room("new", dim, dtype)
    if turn is None:
        new.copy_(old)
    else:
        x, y = old[..., : turn.rotary], new[..., : turn.rotary]
        if dtype == torch.float32:
            _rotate(x, y, turn)
        else:
            x = room("x", turn.rotary, torch.float32).copy_(x)
            wide = room("y", turn.rotary, torch.float32)
            _rotate(x, wide, turn)
            y.copy_(wide)
        if turn.rotary < dim:
            new[..., turn.rotary :] = old[..., turn.rotary :]
    if not in_place:
        _words(cache).index_copy_(0, piece.target, _words(new))


def _rotate(x: Tensor, out: Tensor, turn: _Turn) -> None:
    """Rotates float32 [m, heads, rotary_dim] into ``out``."""
    _, factor, sin = turn
    if sin is None:
        pairs, turned = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) for t in (x, out))
        torch.mul(pairs, factor, out=turned)
        return
    half = sin.shape[-1]
    torch.mul(x, factor, out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)


def _words(rows: Tensor) -> Tensor:
    """[n, words] of 16 bytes if possible: indexing costs per element, whatever its size."""
    flat = rows.view(len(rows), -1)
    word = 16 // flat.element_size()
    if any(x % word for x in (flat.shape[1], flat.stride(0), flat.storage_offset())):
        return flat
    return flat.view(torch.complex128)


def _launch(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    source: Tensor,
    target: Tensor,
    rotation: Rotation | None,
) -> None:
    """The Triton kernel: a program moves a few tokens of one layer, K and V."""
    import triton  # type: ignore[import-untyped]

    k, v = k_caches[0], v_caches[0]
    if any(
        (c.dtype, c.shape, c.stride()) != (k.dtype, k.shape, k.stride()) for c in k_caches
    ) or any((c.dtype, c.shape, c.stride()) != (v.dtype, v.shape, v.stride()) for c in v_caches):
        raise ValueError("on CUDA all layers must have caches of one dtype and shape")
    pointers = [tuple(cache.data_ptr() for cache in caches) for caches in (k_caches, v_caches)]
    heads, dim = k.shape[1:]
    half, per_token, neox = 0, False, True
    cos = sin = source  # not read
    if rotation is not None:
        cos, sin = (x.to(k.device, torch.float32).contiguous() for x in rotation[:2])
        half, per_token, neox = cos.shape[-1], cos.dim() == 2, rotation.neox

    def block(width: int) -> int:
        return triton.next_power_of_2(max(width, 1))

    pairs, rest, values = heads * half, heads * (dim - 2 * half), v.shape[1] * v.shape[2]
    tokens = max(1, 1024 // block(max(pairs, rest, values)))
    _kernel()[(triton.cdiv(len(source), tokens), len(k_caches))](
        _addresses(pointers[0], k.device),
        _addresses(pointers[1], k.device),
        source.contiguous(),
        target.contiguous(),
        cos,
        sin,
        len(source),
        k.stride(0),
        v.stride(0),
        K_TYPE=_triton_type(k.dtype),
        V_TYPE=_triton_type(v.dtype),
        HEADS=heads,
        DIM=dim,
        HALF=half,
        VALUES=values,
        NEOX=neox,
        PER_TOKEN=per_token,
        ALIGNED=all(p % 16 == 0 for p in (*pointers[0], *pointers[1])),
        TOKENS=tokens,
        PAIR_BLOCK=block(pairs),
        REST_BLOCK=block(rest),
        VALUE_BLOCK=block(values),
    )


@lru_cache(maxsize=8)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """The layers' addresses on the device, kept: caches do not move while a server runs."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl  # type: ignore[import-untyped]

    names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return names[dtype]


@lru_cache(maxsize=1)
def _kernel() -> Any:
    # Built here, so that only CUDA machines need Triton.
    import triton
    import triton.language as tl

    @triton.jit
    def rotate_copy_kernel(
        k_addresses,
        v_addresses,
        source,
        target,
        cos,
        sin,
        n,
        k_stride,
        v_stride,
        K_TYPE: tl.constexpr,
        V_TYPE: tl.constexpr,
        HEADS: tl.constexpr,
        DIM: tl.constexpr,
        HALF: tl.constexpr,  # pairs of a head that turn; 0 copies
        VALUES: tl.constexpr,
        NEOX: tl.constexpr,
        PER_TOKEN: tl.constexpr,
        ALIGNED: tl.constexpr,  # addresses are multiples of 16: loads may be 16 bytes wide
        TOKENS: tl.constexpr,
        PAIR_BLOCK: tl.constexpr,
        REST_BLOCK: tl.constexpr,
        VALUE_BLOCK: tl.constexpr,
    ):
        layer = tl.program_id(1)
        token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
        valid = token < n
        old = tl.load(source + token, valid, 0)
        new = tl.load(target + token, valid, 0)
        k_cache = tl.load(k_addresses + layer).to(tl.pointer_type(K_TYPE))
        v_cache = tl.load(v_addresses + layer).to(tl.pointer_type(V_TYPE))
        if ALIGNED:
            k_cache, v_cache = tl.multiple_of(k_cache, 16), tl.multiple_of(v_cache, 16)

        if HALF > 0:
            pair = tl.arange(0, PAIR_BLOCK)[None, :]
            j = pair % HALF
            mask = valid & (pair < HEADS * HALF)
            if NEOX:
                first = pair // HALF * DIM + j
                second = first + HALF
            else:
                first = pair // HALF * DIM + 2 * j
                second = first + 1
            if PER_TOKEN:
                c = tl.load(cos + token * HALF + j, mask, 0.0)
                s = tl.load(sin + token * HALF + j, mask, 0.0)
            else:
                c, s = tl.load(cos + j), tl.load(sin + j)
            x = tl.load(k_cache + old * k_stride + first, mask, 0.0).to(tl.float32)
            y = tl.load(k_cache + old * k_stride + second, mask, 0.0).to(tl.float32)
            tl.store(k_cache + new * k_stride + first, (x * c - y * s).to(K_TYPE), mask)
            tl.store(k_cache + new * k_stride + second, (y * c + x * s).to(K_TYPE), mask)
        if 2 * HALF < DIM:
            rest = tl.arange(0, REST_BLOCK)[None, :]
            mask = valid & (rest < HEADS * (DIM - 2 * HALF))
            at = rest // (DIM - 2 * HALF) * DIM + 2 * HALF + rest % (DIM - 2 * HALF)
            kept = tl.load(k_cache + old * k_stride + at, mask, 0.0)
            tl.store(k_cache + new * k_stride + at, kept, mask)
        value = tl.arange(0, VALUE_BLOCK)[None, :]
        mask = valid & (value < VALUES)
        moved = tl.load(v_cache + old * v_stride + value, mask, 0.0)
        tl.store(v_cache + new * v_stride + value, moved, mask)

    return rotate_copy_kernel
