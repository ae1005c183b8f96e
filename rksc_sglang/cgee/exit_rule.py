"""When a verification may stop at a middle layer: rules on what the layers say about its labels.

After some of the layers the final norm is applied to the last token's residual stream as if it were
the last layer's. What a rule *reads* of that state it keeps, check by check; then it says which
requests are decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

#: A threshold that no lead reaches.
NEVER = 1e9
#: The paper's constants (section 3.2): least layers, nats of entropy, nats between two layers.
PAPER_FIRST_LAYER, PAPER_ENTROPY, PAPER_CHANGE = 2, 8.0, 3.0


def check_layers(num_layers: int) -> tuple[int, ...]:
    """Where exits look: behind a quarter, a half and three quarters of the layers."""
    places = (round(num_layers * quarters / 4) for quarters in (1, 2, 3))
    return tuple(sorted({max(min(place, num_layers - 1), 1) for place in places}))


def lens_logits(state: Tensor, weight: Tensor, labels: Tensor | Sequence[int]) -> Tensor:
    """The labels' logits, of no other token: the logit lens.

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

    def read(self, check: int, state: Tensor, weight: Tensor, labels: Sequence[int]) -> Tensor:
        """What is kept of a check.

        Args:
            check: which of the rule's.
            state, weight, labels: as of :func:`lens_logits`.

        Returns:
            [requests, n] float32; but for ``Observe``, n is the number of labels.
        """

    def scores(self, seen: Tensor) -> Tensor:
        """Estimates of the last layer's label logits, up to a constant for each request.

        Args:
            seen: [checks so far, requests, n] float32, what was read.

        Returns:
            [requests, labels] float32, as of the last check.
        """

    def decided(self, seen: Tensor, entropy: Tensor | None) -> Tensor:
        """Which requests may stop, [requests] bool.

        Args:
            entropy: [checks so far, requests] float32, nats; None unless ``needs_entropy``.
        """


@dataclass(frozen=True)
class Probe:
    """A linear model, for each check, of the verdict that the last layer will give.

    Attributes:
        layers: behind which it is applied.
        weights: [checks][labels][hidden_size], of the normed state; bias: [checks][labels]. The
            softmax of what they give is the chance of each label.
    """

    layers: tuple[int, ...]
    weights: tuple[tuple[tuple[float, ...], ...], ...]
    bias: tuple[tuple[float, ...], ...]

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.weights), torch.tensor(self.bias)

    def read(self, check: int, state: Tensor) -> Tensor:
        """Log-odds of the labels, up to a constant; ``state`` is [requests, hidden_size]."""
        weights, bias = (tensor[check].to(state.device) for tensor in self._tensors)
        return state @ weights.T + bias


@dataclass(frozen=True)
class CalibratedRule:
    """Exit when the probe is sure of a verdict, and has been for some checks.

    A candidate that is rejected cannot win, whatever the exact score; one that is accepted is
    ranked among the others by it. So the two have thresholds of their own.

    Attributes:
        scale: [checks]; offset: [checks][labels]: from the probe's centred log-odds to the last
            layer's centred logits.
        accept: least lead of the first label, the good one, over all others, nats of log-odds.
        reject: least lead of another label over the first.
        patience: checks in which the same label must have led, the present one included.
    """

    probe: Probe
    scale: tuple[float, ...]
    offset: tuple[tuple[float, ...], ...]
    accept: float
    reject: float
    patience: int = 1
    needs_entropy: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        return self.probe.layers

    def at(self, lead: float) -> CalibratedRule:
        """The same with this least lead, of whichever label."""
        return replace(self, accept=lead, reject=lead)

    def read(self, check: int, state: Tensor, weight: Tensor, labels: Sequence[int]) -> Tensor:
        return self.probe.read(check, state)

    def scores(self, seen: Tensor) -> Tensor:
        check = len(seen) - 1
        centred = seen[-1] - seen[-1].mean(1, keepdim=True)
        return centred * self.scale[check] + torch.tensor(self.offset[check], device=seen.device)

    def decided(self, seen: Tensor, entropy: Tensor | None) -> Tensor:
        if len(seen) < self.patience:
            return torch.zeros(seen.shape[1], dtype=torch.bool, device=seen.device)
        lead = seen[-1, :, 0] - seen[-1, :, 1:].max(1).values
        leaders = seen[-self.patience :].argmax(2)
        sure = (lead >= self.accept) | (-lead >= self.reject)
        return sure & (leaders == leaders[-1]).all(0)


@dataclass(frozen=True)
class Observe:
    """Stops nobody, and keeps the states: what a probe is fitted to."""

    layers: tuple[int, ...]
    needs_entropy: bool = False

    def read(self, check: int, state: Tensor, weight: Tensor, labels: Sequence[int]) -> Tensor:
        return state

    def scores(self, seen: Tensor) -> Tensor:
        return seen[-1]

    def decided(self, seen: Tensor, entropy: Tensor | None) -> Tensor:
        return torch.zeros(seen.shape[1], dtype=torch.bool, device=seen.device)


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

    def read(self, check: int, state: Tensor, weight: Tensor, labels: Sequence[int]) -> Tensor:
        return lens_logits(state, weight, labels)

    def scores(self, seen: Tensor) -> Tensor:
        return seen[-1]

    def decided(self, seen: Tensor, entropy: Tensor | None) -> Tensor:
        assert entropy is not None
        if len(entropy) < 2:
            return torch.zeros(seen.shape[1], dtype=torch.bool, device=seen.device)
        return (entropy[-1] < self.entropy) & ((entropy[-1] - entropy[-2]).abs() < self.change)


def paper_rule(num_layers: int) -> PaperRule:
    """Looks after every layer from the paper's first on, and never after the last."""
    return PaperRule(tuple(range(PAPER_FIRST_LAYER, num_layers)))
