"""Rows of the uint8 store → gathered, cropped, mirrored, normalised images, channels-last, in one launch.

    output[b, i, j, c] = (padded[index[b]][top_b + i, left_b + j', c] − mean[c])/std[c]

The quotient is the rounded one (not a product with 1/std): float32 results are the reference's to the bit.
A row that is not in the store makes an image of NaN, and nothing outside the store is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Arguments, Launch, Work, n_bytes, observed


@triton.jit
def images_kernel(
    p_store,
    p_index,
    p_mean,
    p_std,
    p_crop,
    p_flip,
    p_out,
    n_stored,
    padding,
    STORED_HEIGHT: tl.constexpr,
    STORED_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_CROP: tl.constexpr,
    HAS_FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of one image; grid (B, pieces of an image)."""
    o_b = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < HEIGHT * WIDTH * 3
    o_pixel, o_c = o_e // 3, o_e % 3
    o_i, o_j = o_pixel // WIDTH, o_pixel % WIDTH
    if HAS_FLIP and tl.load(p_flip + o_b):
        o_j = WIDTH - 1 - o_j
    last_top = STORED_HEIGHT + 2 * padding - HEIGHT
    last_left = STORED_WIDTH + 2 * padding - WIDTH
    if HAS_CROP:
        top = tl.minimum(tl.maximum(tl.load(p_crop + 2 * o_b), 0), last_top).to(tl.int32)
        left = tl.minimum(tl.maximum(tl.load(p_crop + 2 * o_b + 1), 0), last_left).to(tl.int32)
    else:
        top, left = last_top // 2, last_left // 2
    o_y, o_x = top - padding + o_i, left - padding + o_j
    row = tl.load(p_index + o_b)
    is_stored = (row >= 0) & (row < n_stored)
    # Outside the image it is black.
    m_pixel = m_e & is_stored & (o_y >= 0) & (o_y < STORED_HEIGHT) & (o_x >= 0) & (o_x < STORED_WIDTH)
    p_image = p_store + row * (STORED_HEIGHT * STORED_WIDTH * 3)
    b_value = tl.load(p_image + ((o_y * STORED_WIDTH + o_x) * 3 + o_c), mask=m_pixel, other=0).to(tl.float32)
    b_mean = tl.load(p_mean + o_c)
    b_std = tl.load(p_std + o_c)
    b_out = tl.div_rn(b_value - b_mean, b_std)
    b_out = tl.where(is_stored, b_out, float("nan"))
    p_image_out = p_out + o_b * (HEIGHT * WIDTH * 3)
    tl.store(p_image_out + o_e, b_out.to(p_out.dtype.element_ty), mask=m_e)


@dataclass(frozen=True)
class ImagesConfig:
    """How programs share out images.

    Attributes:
        block: values a program: 8 a thread, so that enough bytes are on their way; an 84×84 image is 21 pieces.
        num_warps: as many as leave a thread one store of 16 bytes in half types.
    """

    block: int = 1024
    num_warps: int = 4


CONFIG = ImagesConfig()


def images(
    store: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    crop: Tensor | None,
    flip: Tensor | None,
    size: tuple[int, int],
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `index` of the store as a batch, in one launch.

    Args:
        store: uint8 [N, H, W, 3], dense; index: int64 [B].
        mean, std: float32 [3].
        crop: int64 [B, 2] or None (the central window); flip: bool [B] or None.
        size: (h, w) of the output; padding: black pixels on each side.
        dtype: float32, bfloat16 or float16.

    Returns:
        [B, 3, h, w], channels-last in memory.
    """
    n_images, (height, width) = index.shape[0], size
    shape = n_images, 3, height, width
    out = torch.empty(shape, dtype=dtype, device=store.device, memory_format=torch.channels_last)
    if not n_images:
        return out
    index, mean, std = index.contiguous(), mean.contiguous(), std.contiguous()
    crop, flip = (None if t is None else t.contiguous() for t in (crop, flip))
    n_values = height * width * 3
    arguments: Arguments = {
        "p_store": store,
        "p_index": index,
        "p_mean": mean,
        "p_std": std,
        "p_crop": crop,
        "p_flip": flip,
        "p_out": out,
        "n_stored": store.shape[0],
        "padding": padding,
    }
    constants = {
        "STORED_HEIGHT": store.shape[1],
        "STORED_WIDTH": store.shape[2],
        "HEIGHT": height,
        "WIDTH": width,
        "HAS_CROP": crop is not None,
        "HAS_FLIP": flip is not None,
        "BLOCK": CONFIG.block,
    }
    work = Work(
        flop=2 * n_images * n_values,
        read=n_images * n_values + n_bytes(index, crop, flip, mean, std),
        written=n_bytes(out),
    )
    grid = n_images, triton.cdiv(n_values, CONFIG.block)
    Launch(images_kernel, grid, arguments, constants, CONFIG.num_warps, 1, work).run()
    return out


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration, with a readable name."""
    for side in (84, 80, 32):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for kind, padding in (("plain", 0), ("shift", side // 8)):
                store = torch.empty(38400, side, side, 3, dtype=torch.uint8, device="meta")
                index = torch.empty(160, dtype=torch.int64, device="meta")
                mean = torch.empty(3, device="meta")
                crop = torch.empty(160, 2, dtype=torch.int64, device="meta") if padding else None
                flip = torch.empty(160, dtype=torch.bool, device="meta") if padding else None
                with observed() as launches:
                    images(store, index, mean, mean.clone(), crop, flip, (side, side), padding, dtype)
                (launch,) = launches
                yield f"images-{side}-{str(dtype).removeprefix('torch.')}-{kind}", launch
