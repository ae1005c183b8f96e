"""When a verification may stop at a middle layer: rules on what the layers say about its labels.

After some of the layers, the final norm and the output matrix are applied to the last token's
residual stream as if it were the last layer's (the logit lens), for the labels' columns only. A
rule sees these *lens logits* of the checks so far and says which requests are decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: A threshold that no lead reaches.
NEVER = 1e9
#: The paper's constants (section 3.2): least layers, nats of entropy, nats between two layers.
PAPER_FIRST_LAYER, PAPER_ENTROPY, PAPER_CHANGE = 2, 8.0, 3.0


def lens_logits(state: Tensor, weight: Tensor, labels: Tensor | list[int]) -> Tensor:
    """The labels' logits, of no other token.

    Args:
        state: [requests, hidden_size] float32, behind the final norm.
        weight: [vocabulary, hidden_size], the output matrix.
        labels: token ids.

    Returns:
        [requests, labels] float32.
    """
    return state @ weight[labels].float().T


class ExitRule(Protocol):
    """Decides about several requests at once.

    Attributes:
        layers: after how many layers it looks, ascending.
        needs_entropy: it looks at the entropy over the whole vocabulary as well.
    """

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def needs_entropy(self) -> bool: ...

    def scores(self, lens: Tensor) -> Tensor:
        """Estimates of the last layer's label logits, up to a constant for each request.

        Args:
            lens: [checks so far, requests, labels] float32, lens logits.

        Returns:
            [requests, labels] float32, as of the last check.
        """

    def decided(self, lens: Tensor, entropy: Tensor | None) -> Tensor:
        """Which requests may stop, [requests] bool.

        Args:
            entropy: [checks so far, requests] float32, nats; None unless ``needs_entropy``.
        """


@dataclass(frozen=True)
class CalibratedRule:
    """Exit when the corrected lead of a label is wide, and it has led for some checks.

    A candidate that is rejected cannot win, whatever the exact score; one that is accepted is
    ranked among the others by it. So the two have thresholds of their own.

    A middle layer's lens has a scale and a bias of its own: its logits are corrected by a factor
    for each check and an offset for each check and label, fitted in calibration.

    Attributes:
        scale: [checks]; offset: [checks][labels].
        accept: [checks] least lead of the first label, the good one, over all others, nats.
        reject: [checks] least lead of another label over the first.
        patience: checks in which the same label must have led, the present one included.
    """

    layers: tuple[int, ...]
    scale: tuple[float, ...]
    offset: tuple[tuple[float, ...], ...]
    accept: tuple[float, ...]
    reject: tuple[float, ...]
    patience: int = 1
    needs_entropy: bool = False

    def _corrected(self, lens: Tensor) -> Tensor:
        checks = lens.shape[0]
        scale = torch.tensor(self.scale[:checks], device=lens.device)
        offset = torch.tensor(self.offset[:checks], device=lens.device)
        centred = lens - lens.mean(2, keepdim=True)
        return centred * scale[:, None, None] + offset[:, None, :]

    def scores(self, lens: Tensor) -> Tensor:
        return self._corrected(lens)[-1]

    def decided(self, lens: Tensor, entropy: Tensor | None) -> Tensor:
        if len(lens) < self.patience:
            return torch.zeros(lens.shape[1], dtype=torch.bool, device=lens.device)
        corrected = self._corrected(lens)
        lead = corrected[-1, :, 0] - corrected[-1, :, 1:].max(1).values
        leaders = corrected[-self.patience :].argmax(2)
        check = len(lens) - 1
        wide = (lead >= self.accept[check]) | (-lead >= self.reject[check])
        return wide & (leaders == leaders[-1]).all(0)


@dataclass(frozen=True)
class PaperRule:
    """The paper's: the entropy over the vocabulary is low, and has moved little in one layer.

    One of its mistakes is mended: the final norm is applied.

    Attributes:
        entropy: nats that it must be below.
        change: nats that it may have moved.
    """

    layers: tuple[int, ...]
    entropy: float = PAPER_ENTROPY
    change: float = PAPER_CHANGE
    needs_entropy: bool = True

    def scores(self, lens: Tensor) -> Tensor:
        return lens[-1]

    def decided(self, lens: Tensor, entropy: Tensor | None) -> Tensor:
        assert entropy is not None
        if len(entropy) < 2:
            return torch.zeros(lens.shape[1], dtype=torch.bool, device=lens.device)
        return (entropy[-1] < self.entropy) & ((entropy[-1] - entropy[-2]).abs() < self.change)


def paper_rule(num_layers: int) -> PaperRule:
    """Looks after every layer from the paper's first on, and never after the last."""
    return PaperRule(tuple(range(PAPER_FIRST_LAYER, num_layers)))
