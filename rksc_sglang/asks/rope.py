"""Which rotary embedding a loaded model has, and whether its cached keys can be moved.

A key may be re-rotated to a new position only if the model rotates it by ``position * frequency``
with frequencies that never change. What SGLang's classes promise is checked on the loaded model:
each embedding against its own table, and, where a layer can be called alone, the key that the
layer hands to its KV cache. That finds layers that skip RoPE or change the key after it.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.base import (
    LinearScalingRotaryEmbedding,
    RotaryEmbedding,
)
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding
from torch import Tensor, nn

from rksc_sglang.kernels.rotate_copy import Rotation, rotate_copy_reference

logger = logging.getLogger(__name__)

# Exact classes: a subclass is there to do something else.
SUPPORTED = (
    RotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)


class UnsupportedRope(ValueError):
    """Cached keys cannot be moved by a position difference; the message says why."""


class Rope(NamedTuple):
    """How every layer of a model rotates its keys."""

    inverse_frequencies: Tensor  # float64, [rotary_dim / 2], on the CPU
    neox: bool  # pairs are (j, j + rotary_dim / 2); False for GPT-J's (2 j, 2 j + 1)

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inverse_frequencies)


def find_rope(model: nn.Module) -> Rope:
    """The rotary embedding that all attention layers of a loaded SGLang model share.

    Raises:
        UnsupportedRope: there is none (learned positions, ALiBi), it is of a class whose rotation
            is no constant frequency per pair, layers differ, or a check on the model failed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if "RotaryEmbedding" in type(module).__name__ and type(module) not in SUPPORTED:
            raise UnsupportedRope(
                f"{name} is a {type(module).__name__}, "
                "whose keys do not move by a constant difference of positions"
            )
    if not any(isinstance(module, RotaryEmbedding) for module in modules.values()):
        raise UnsupportedRope(
            f"{type(model).__name__} has no rotary embedding (learned positions, or none)"
        )

    layers: dict[str, Rope] = {}
    checked: dict[int, Rope] = {}  # SGLang shares one module among layers
    for name, attn in modules.items():
        if not isinstance(attn, RadixAttention):
            continue
        layer = name.rpartition(".")[0]
        own = [m for m in modules[layer].modules() if isinstance(m, RotaryEmbedding)]
        if not own:
            raise UnsupportedRope(f"{layer} has no rotary embedding of its own")
        for rotary in own:
            if id(rotary) not in checked:
                checked[id(rotary)] = _read(rotary)
                _check_table(rotary, checked[id(rotary)])
            rope = layers.setdefault(layer, checked[id(rotary)])
            first = next(iter(layers))
            if not all(_same(rope, other) for other in (checked[id(rotary)], layers[first])):
                raise UnsupportedRope(f"{layer} rotates by other frequencies than {first}")
    if not layers:
        raise UnsupportedRope(f"{type(model).__name__} has no attention layer over cached keys")
    for layer, rope in layers.items():
        attns = [m for m in modules[layer].children() if isinstance(m, RadixAttention)]
        for attn in attns:
            _check_layer(model, layer, modules[layer], attn, rope)
    return next(iter(layers.values()))


def _read(rotary: RotaryEmbedding) -> Rope:
    # On the device of the table, where SGLang computed the same float32 values.
    with torch.device(rotary.cos_sin_cache.device):
        inv_freq = _sglang_inverse_frequencies(rotary).double().cpu()
    if isinstance(rotary, LinearScalingRotaryEmbedding):
        if len(rotary.scaling_factors) != 1:
            raise UnsupportedRope(f"linear RoPE with the factors {rotary.scaling_factors}")
        inv_freq = inv_freq / rotary.scaling_factors[0]
    return Rope(inv_freq, rotary.is_neox_style)


def _sglang_inverse_frequencies(rotary: RotaryEmbedding) -> Tensor:
    """SGLang's private method: its table is rounded, to bfloat16 at worst, and its cos are no
    place to read a small frequency from."""
    yarn = isinstance(rotary, YaRNScalingRotaryEmbedding)
    return rotary._compute_inv_freq(rotary.scaling_factor if yarn else rotary.base)


def _same(a: Rope, b: Rope) -> bool:
    return a.neox == b.neox and torch.equal(a.inverse_frequencies, b.inverse_frequencies)


def _check_table(rotary: RotaryEmbedding, rope: Rope) -> None:
    """Moves random keys and compares with what the module itself makes of them there."""
    table = rotary.cos_sin_cache
    last = min(len(table), 2048) - 1
    old = torch.tensor([0, 1, last, last // 2])
    new = torch.tensor([last, 5, 2, last // 3])
    key = torch.randn(1, rotary.head_size, generator=torch.Generator().manual_seed(0))
    before, after = (
        rotary.forward_native(
            positions.to(table.device),
            *(key.repeat(len(positions), 1).to(table.device) for _ in range(2)),
        )[1].cpu()
        for positions in (old, new)
    )
    # cos and sin are rounded to the table's dtype, and their float32 angles before that.
    scale = float(before.abs().max())
    tolerance = scale * (4 * torch.finfo(table.dtype).eps + 2**-22 * last)
    error = float((_moved(before, old, new, rope) - after).abs().max())
    if not error <= tolerance:
        raise UnsupportedRope(
            f"{type(rotary).__name__}: keys moved by their frequencies are off by {error:.1e}"
        )


def _moved(keys: Tensor, old: Tensor, new: Tensor, rope: Rope) -> Tensor:
    """Keys [n, ..., head_dim] of positions ``old``, turned to ``new``; float64."""
    rows = keys.double().view(len(keys), -1, keys.shape[-1])
    cache = torch.cat([rows, torch.zeros_like(rows)])
    angle = (new - old)[:, None] * rope.inverse_frequencies
    source, target = torch.arange(len(cache)).chunk(2)
    rotation = Rotation(angle.cos(), angle.sin(), rope.neox)
    rotate_copy_reference([cache], [cache.clone()], source, target, rotation)
    return cache[len(keys) :].view(keys.shape)


class _Key(Exception):
    """Carries the key that a layer wants cached out of its forward pass."""


def _check_layer(
    model: nn.Module, layer: str, attention: nn.Module, attn: RadixAttention, rope: Rope
) -> None:
    """Lets the layer compute one token's key at two positions, up to where it is cached."""

    def stop(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Key(kwargs["k"] if "k" in kwargs else args[1])

    weight = next(p for p in model.parameters() if p.dtype.is_floating_point and p.itemsize > 1)
    old, new = torch.tensor([3]), torch.tensor([40])
    handle = attn.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        hidden = torch.randn(
            1, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
        ).to(weight)
        with torch.no_grad():
            attention(
                positions=torch.cat([old, new]).to(weight.device),
                hidden_states=hidden.repeat(2, 1),
                forward_batch=None,
            )
    except _Key as caught:
        keys = caught.args[0].detach().cpu().double().view(2, -1, attn.qk_head_dim)
    except Exception as error:
        # Not every layer can be called like this. What its embedding promises is all there is.
        logger.info("RKSC: %s cannot be called alone, its keys are not checked: %r", layer, error)
        return
    finally:
        handle.remove()
    off = _moved(keys[:1], old, new, rope) - keys[1:]
    # Keys are rounded once or twice to the model's dtype; a layer that skips RoPE is off by ~1.
    if not float(off.norm() / keys[1:].norm()) <= max(8 * torch.finfo(weight.dtype).eps, 1e-4):
        raise UnsupportedRope(f"{layer} does not cache keys as its rotary embedding makes them")
