"""Where the decoder layers are in SGLang's models."""

from __future__ import annotations

from torch import nn


class UnsupportedModel(Exception):
    """RKSC cannot work inside this model's layers; the message says why."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Raises UnsupportedModel where there is no list of them."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers")
    return layers
