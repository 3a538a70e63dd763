"""The base-learner: one linear layer, whose starting value is meta-learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """θ: weight [n_way, D] and bias [n_way].

    Args:
        feature_dim: D.
        n_way: classes a task, or of pre-training.
        init: ``zeros``, or ``normal`` (Kaiming, bias 0, as the public code of MTL starts).
        generator: random stream of ``normal``.

    Raises:
        ValueError: no feature or class, or another `init`.
    """

    def __init__(
        self, feature_dim: int, n_way: int, *, init: str = "normal", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if feature_dim < 1 or n_way < 1:
            raise ValueError(
                f"feature_dim and n_way: expected at least 1 each, got {feature_dim} and {n_way}"
            )
        if init not in ("normal", "zeros"):
            raise ValueError(f"init: {init!r} is neither normal nor zeros")
        self.weight = nn.Parameter(torch.zeros(n_way, feature_dim))
        self.bias = nn.Parameter(torch.zeros(n_way))
        if init == "normal":
            nn.init.kaiming_normal_(self.weight, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] → logits [N, n_way]."""
        return F.linear(features, self.weight, self.bias)
