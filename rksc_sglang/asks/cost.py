"""Whether a splice pays: the time it saves in prefill against the passes and copies it adds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Seconds, measured on this server at start.

    Attributes:
        pass_seconds: of a forward pass of nearly no tokens.
        token_seconds: of one more token in a forward pass.
        copy_seconds: to take over the KV of one token: copy and rotation, all layers.
    """

    pass_seconds: float
    token_seconds: float
    copy_seconds: float

    @classmethod
    def fit(cls, short: tuple[int, float], long: tuple[int, float], copy: float) -> CostModel:
        """From two prefills, each (tokens, seconds), and the seconds to copy one token's KV.

        Raises:
            ValueError: the long prefill is not longer than the short one.
        """
        (n, t), (m, u) = short, long
        if m <= n:
            raise ValueError(f"cannot fit a line through prefills of {n} and {m} tokens")
        token = max((u - t) / (m - n), 0.0)
        return cls(max(t - n * token, 0.0), token, copy)

    def prefill(self, tokens: int) -> float:
        """Seconds of a prefill of ``tokens`` in one pass."""
        return self.pass_seconds + tokens * self.token_seconds

    def saved(self, tokens: int, passes: float) -> float:
        """Seconds saved by taking over ``tokens`` at the price of ``passes`` more passes."""
        return tokens * (self.token_seconds - self.copy_seconds) - passes * self.pass_seconds

    def least(self, passes: float, seconds: float = 0.0) -> float:
        """Tokens from which on taking them over pays for passes and some further ``seconds``."""
        each = self.token_seconds - self.copy_seconds
        return (passes * self.pass_seconds + seconds) / each if each > 0 else float("inf")
