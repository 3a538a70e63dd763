"""What native operations keep of their epilogue for the way back: one byte a value of the output."""

from __future__ import annotations

import torch
from torch import Tensor

# In the order of the C++ enumeration.
ACTIVATIONS = ("none", "before_residual", "after_residual")
# A code: the maximum's place in its window, and whether the activation's input was positive there.
PLACE, POSITIVE = 3, 4


def unwound(
    grad: Tensor, codes: Tensor, activation: str, slope: float, pooled_from: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Gradients before the epilogue and of its residual, differentiably: the epilogue is piecewise linear.

    Args:
        grad: dL/dy [N, O, H'', W''].
        codes: of the same shape; unread where there is neither activation nor pooling.
        pooled_from: height and width before the pooling, None where there is none.
    """
    inner = grad
    if activation != "none":
        inner = torch.where((codes & POSITIVE) != 0, grad, slope * grad)
    skipped = grad if activation == "before_residual" else inner
    if pooled_from is None:
        return inner, skipped
    return _unpooled(inner, codes, *pooled_from), _unpooled(skipped, codes, *pooled_from)


def _unpooled(grad: Tensor, codes: Tensor, height: int, width: int) -> Tensor:
    """[N, O, H'//2, W'//2] at the places of the maxima in [N, O, H', W']."""
    windows = torch.stack([torch.where((codes & PLACE) == place, grad, 0) for place in range(4)], dim=-1)
    # [N, O, h, w, 2·2] -> [N, O, 2h, 2w]
    full = windows.unflatten(-1, (2, 2)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    return torch.nn.functional.pad(full, (0, width - full.shape[3], 0, height - full.shape[2]))
