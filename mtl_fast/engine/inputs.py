"""Rows of an image store → network input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.residency import Gathered, gathered
from ..data.store import ImageStore
from ..ops.images import images


@dataclass(frozen=True)
class Preprocess:
    """How rows of a store become network input: (image − mean)/std, channels-last.

    Attributes:
        mean, std: per channel, of 255.
        size: height and width of the central square that is taken; None takes whole images.

    Raises:
        ValueError: not three finite numbers each, or a deviation that is not positive.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name}: expected three finite numbers, one a channel, got {tuple(values)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive numbers, got {tuple(self.std)}")

    def __call__(
        self,
        store: ImageStore | Gathered,
        rows: Tensor,
        dtype: torch.dtype = torch.float32,
        mirrored: Tensor | None = None,
    ) -> Tensor:
        """Rows [B] of the store → [B, 3, H, W] on their device, those of `mirrored` (bool [B]) left to right.

        H and W are `size`, or those of the images.
        """
        source, rows = gathered(store, rows)
        mean, std = filled((*self.mean, *self.std), source.device).split(3)
        size = None if self.size is None else (self.size, self.size)
        return images(source, rows, mean=mean, std=std, size=size, flip=mirrored, dtype=dtype)


def filled(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 [n] of plain numbers, written on the device: a captured step allows no copy from the host."""
    made = torch.zeros(len(values), dtype=torch.float32, device=device)
    # One launch takes all numbers among its arguments.
    torch._foreach_add_(list(made.unbind()), list(values))
    return made
