"""The similarity key: what a token's context did to its hidden state, kept beside its KV.

The paper (section on ASKS) compares two contexts by ``sum_l w_l cos(h_l, h'_l)``, ``w_l`` ~
``exp(1.5 l / L)``, over the hidden states of a token at each layer. Here a few layers are read,
each state is projected to a few dimensions, scaled to length ``sqrt(w_l)`` and stored with the
token's KV slot: the inner product of two stored rows estimates the paper's sum (random projections
keep angles but for a small error). A node's signature is its last slot's; a run may begin in the
middle of a node, so every slot has one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rksc_sglang.decoder import UnsupportedModel, decoder_layers

#: Layers read, and dimensions kept of each: 8 * 32 * 2 bytes = 512 bytes a KV slot.
LAYERS = 8
DIMENSIONS = 32


def layer_weights(layers: Sequence[int], num_layers: int) -> Tensor:
    """The paper's weights of these layers, [len(layers)] float32, normalised to a sum of 1."""
    weights = torch.tensor([1.5 * layer / num_layers for layer in layers]).exp()
    return weights / weights.sum()


class Signatures:
    """Signatures of all KV slots of one model runner, recorded by hooks on its decoder layers.

    Args:
        model: a causal language model of SGLang.
        hidden_size: width of its residual stream.
        num_slots: rows of the KV pool.
        device: where the rows live.

    Attributes:
        rows: [num_slots, layers * DIMENSIONS] float16; zero where nothing was recorded.

    Raises:
        UnsupportedModel: there are no decoder layers whose residual stream can be read.
    """

    def __init__(
        self, model: nn.Module, hidden_size: int, num_slots: int, device: torch.device | str
    ) -> None:
        layers = _decoder_layers(model)
        # The stream that enters a layer is what the layers before it made: the first is not read.
        count = min(LAYERS, len(layers) - 1)
        self.layers = [1 + round(i * (len(layers) - 2) / max(count - 1, 1)) for i in range(count)]
        if not self.layers:
            raise UnsupportedModel("the model has fewer than two decoder layers")
        weights = layer_weights(self.layers, len(layers))
        self.rows = torch.zeros(
            num_slots, len(self.layers) * DIMENSIONS, dtype=torch.float16, device=device
        )
        generator = torch.Generator().manual_seed(0)  # every rank and every start the same
        for place, index in enumerate(self.layers):
            projection = torch.randn(hidden_size, DIMENSIONS, generator=generator)
            projection = torch.linalg.qr(projection)[0].to(device)
            columns = slice(place * DIMENSIONS, (place + 1) * DIMENSIONS)
            record = partial(self._record, columns, projection, float(weights[place]) ** 0.5)
            layers[index].register_forward_pre_hook(partial(_capture, record), with_kwargs=True)

    @property
    def bytes_per_slot(self) -> int:
        return self.rows.shape[1] * self.rows.element_size()

    def similarity(
        self, slots: Sequence[int], others: Sequence[Sequence[int]]
    ) -> list[float | None]:
        """The paper's sigma between the contexts of some tokens and those of the same tokens
        elsewhere, mean over the tokens.

        Args:
            slots: [tokens] KV slots.
            others: [donors][tokens] KV slots.

        Returns:
            Per donor a number from -1 to 1, None where a signature is missing.
        """
        rows = self.rows[torch.tensor([slots, *others])].float()  # [1 + donors, tokens, dim]
        sigma = (rows[1:] * rows[0]).sum(2).mean(1).tolist()
        known = rows.any(2).all(1).tolist()
        return [s if known[0] and k else None for s, k in zip(sigma, known[1:])]

    def _record(
        self, columns: slice, projection: Tensor, scale: float, slots: Tensor, stream: Tensor
    ) -> None:
        """``stream`` [tokens, hidden_size] is the residual stream of the tokens in ``slots``."""
        if stream.shape[0] != slots.shape[0]:
            return  # padded or scattered rows: nothing recorded means nothing is shared
        low = nn.functional.normalize(stream.float() @ projection, dim=1)
        self.rows[slots, columns] = (low * scale).half()


def _capture(record: Any, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: asks the layer for the residual stream that enters it."""
    batch = kwargs.get("forward_batch", args[2] if len(args) > 2 else None)
    if batch is None or batch.out_cache_loc is None:
        return None
    asked = kwargs.get("capture_output")

    def capture(value: Tensor, owned: bool = False) -> None:
        record(batch.out_cache_loc, value)
        if asked is not None:
            asked(value, owned=owned)

    return args, {**kwargs, "capture_output": capture}


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    layers = decoder_layers(model)
    for layer in layers:
        if "capture_output" not in inspect.signature(layer.forward).parameters:
            raise UnsupportedModel(f"{type(layer).__name__} does not show its residual stream")
    return layers
