"""From the store of uint8 images to a network's input: one gather, then normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def images(
    store: Tensor,
    index: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    crop: Tensor | None = None,
    size: tuple[int, int] | None = None,
    padding: int = 0,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The contract of `mtl_fast.ops.images.images`; nothing is validated here."""
    height, width = store.shape[1:3]
    h, w = size or (height, width)
    if crop is None and flip is None and padding == 0 and (h, w) == (height, width):
        rows = store.index_select(0, index).flatten(2)  # whole images: long copies, no index arithmetic
    else:
        rows = _windows(store, index, crop, h, w, padding, flip)
    # Statistics repeated along a row: vectors of w·3 values instead of three channels at a time.
    compute = torch.promote_types(dtype, torch.float32)
    rows = rows.to(compute)  # [B, h, w·3]
    rows = rows.sub_(mean.to(rows).repeat(w)).div_(std.to(rows).repeat(w))
    return rows.to(dtype).unflatten(2, (w, 3)).permute(0, 3, 1, 2)


def _windows(
    store: Tensor, index: Tensor, crop: Tensor | None, h: int, w: int, padding: int, flip: Tensor | None
) -> Tensor:
    """uint8 [B, h, w·3]: the window of each image, mirrored where `flip`."""
    height, width = store.shape[1:3]
    last_top, last_left = height + 2 * padding - h, width + 2 * padding - w
    if crop is None:
        top, left = index.new_tensor([[last_top // 2], [last_left // 2]])
    else:
        # A window off the image would read its neighbour in the store.
        top, left = crop[:, 0].clamp(0, last_top), crop[:, 1].clamp(0, last_left)
    column = torch.arange(w, device=store.device)
    if flip is not None:
        column = torch.where(flip.unsqueeze(1), w - 1 - column, column)
    y = (top - padding).unsqueeze(1) + torch.arange(h, device=store.device)  # [B or 1, h]
    x = (left - padding).unsqueeze(1) + column  # [B or 1, w]
    row = index.unsqueeze(1) * height + y.clamp(0, height - 1)
    flat = (row * width).unsqueeze(2) + x.clamp(0, width - 1).unsqueeze(1)  # [B, h, w]
    rows = store.flatten(0, 2).index_select(0, flat.flatten()).view(*flat.shape[:2], 3 * w)
    if padding:
        # Black outside, rows and columns apart: one mask a pixel costs more than the gather.
        inside_y = ((y >= 0) & (y < height)).to(torch.uint8)
        inside_x = ((x >= 0) & (x < width)).to(torch.uint8).repeat_interleave(3, 1)
        rows.mul_(inside_y.unsqueeze(2)).mul_(inside_x.unsqueeze(1))
    return rows
