"""Augmentation of pre-training batches: crop, mirroring, colour jitter; all images at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PretrainConfig
from ..data.residency import Gathered, gathered, moved
from ..data.store import ImageStore
from ..engine.inputs import Preprocess, filled
from ..ops.images import images


def augmented(
    store: ImageStore | Gathered,
    rows: Tensor,
    preprocess: Preprocess,
    config: PretrainConfig,
    generator: torch.Generator,
    share: slice = slice(None),
) -> Tensor:
    """Rows [B] of the store → augmented, normalised network input [B, 3, H, W].

    Args:
        store: the images.
        rows: int64 [B].
        preprocess: mean and standard deviation, of 255, and the size of the input. A shift moves the central square of
            that size; a resized crop is brought to `config.crop_size`, whose centre is then taken.
        config: `crop`, `crop_size`, `flip` and `jitter`.
        generator: the augmentation stream, on the CPU; it draws the same numbers whatever the device.
        share: the part of the batch to return; the numbers are drawn for all of it.
    """
    n = len(rows)
    source, rows = gathered(store, rows[share])
    device = source.device
    height, width = source.shape[1:3]
    size = (height, width) if preprocess.size is None else (preprocess.size, preprocess.size)
    flip = moved(torch.rand(n, generator=generator).lt(0.5)[share], device) if config.flip else None
    plain = config.jitter == 0 and config.crop != "resized"
    mean, std = (preprocess.mean, preprocess.std) if plain else ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
    crop, padding = None, 0
    if config.crop == "shift":
        padding = height // 8
        shift = torch.randint(2 * padding + 1, (n, 2), generator=generator)[share]
        crop = moved(shift + torch.tensor([(height - size[0]) // 2, (width - size[1]) // 2]), device)
    x = images(
        source,
        rows,
        mean=filled(mean, device),
        std=filled(std, device),
        crop=crop,
        # A resized crop is a part of the whole image.
        size=(height, width) if config.crop == "resized" else size,
        padding=padding,
        flip=flip,
    )
    if plain:
        return x
    if config.crop == "resized":
        side = config.crop_size
        x = resized_crop(
            x,
            torch.rand(n, 4, generator=generator)[share],
            size if side is None else (side, side),
        )
        x = centre(x, size)
    if config.jitter:
        x = colour_jitter(x, config.jitter, torch.rand(3, n, generator=generator)[:, share])
    middle, spread = (
        filled(values, device).view(3, 1, 1) / 255 for values in (preprocess.mean, preprocess.std)
    )
    return ((x - middle) / spread).contiguous(memory_format=torch.channels_last)


def centre(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] → the central [B, C, *size]; an odd remainder is rounded down, as `images` does."""
    top, left = ((have - want) // 2 for have, want in zip(x.shape[2:], size, strict=True))
    return x[:, :, top : top + size[0], left : left + size[1]]


def resized_crop(x: Tensor, u: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """A random box of 8 to 100 % of the area and 3/4 to 4/3 of the aspect, brought to one size.

    [B, C, H, W] → [B, C, *size], sampled bilinearly. A box that would not fit is cut to the image.

    Args:
        x: images.
        u: [B, 4] uniform in [0, 1), on the CPU: area, aspect and place.
        size: (height, width); None: those of the images.
    """
    area = 0.08 + 0.92 * u[:, 0]
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide, high
    # Centres in [−1, 1] such that the box stays inside.
    theta[:, 0, 2], theta[:, 1, 2] = (2 * u[:, 2] - 1) * (1 - wide), (2 * u[:, 3] - 1) * (1 - high)
    shape = [*x.shape[:2], *(x.shape[2:] if size is None else size)]
    grid = F.affine_grid(moved(theta, x.device).to(x.dtype), shape, align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def colour_jitter(x: Tensor, strength: float, u: Tensor) -> Tensor:
    """Brightness, contrast and saturation each times a factor within 1 ± strength.

    Args:
        x: [B, 3, H, W] in [0, 1].
        strength: in 0..1.
        u: [3, B] uniform in [0, 1), on the CPU.
    """
    factors = 1 + strength * (2 * u.view(3, -1, 1, 1, 1) - 1)
    brightness, contrast, saturation = moved(factors, x.device).to(x.dtype)
    weights = filled((0.299, 0.587, 0.114), x.device).to(x.dtype).view(3, 1, 1)
    x = (x * brightness).clamp(0, 1)
    grey = (x * weights).sum(dim=1, keepdim=True)
    middle = grey.mean(dim=(2, 3), keepdim=True)
    x = torch.lerp(middle.expand_as(x), x, contrast.expand_as(x)).clamp(0, 1)
    grey = (x * weights).sum(dim=1, keepdim=True)
    return torch.lerp(grey.expand_as(x), x, saturation.expand_as(x)).clamp(0, 1)
