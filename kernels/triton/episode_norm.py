"""Batch statistics per group of images, and the pass that normalises with the epilogue; channels-last throughout.

    y = (z − mean_g)/√(var_g + eps)·γ + β        output = pool(act(y + residual)), codes as in `_epilogue_codes`

Every lane of a program follows its own values (Welford 1962); lanes, and then the programs of a group, are joined in a
fixed order (Chan, Golub, LeVeque 1983): a large mean costs no digits, a constant channel's mean is exact and its
variance 0. How a group is cut up depends on its own shape only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encoder_layers import DTYPES, encoder_layers
from .launch import Arguments, Launch, Work, n_bytes, observed


@triton.jit
def merged(b_count, b_mean, b_squares):
    """Counts [M], means and Σ(z − mean)² [M, C] of M parts → those of all: (number, [C], [C])."""
    n_values = tl.sum(b_count, 0)
    b_share = tl.div_rn(b_count, tl.zeros_like(b_count) + tl.maximum(n_values, 1.0))[:, None]
    b_center = tl.sum(b_share * b_mean, 0)
    # Once more from there, for the digits that a large mean cost.
    b_center += tl.sum(b_share * (b_mean - b_center[None, :]), 0)
    b_apart = b_mean - b_center[None, :]
    return n_values, b_center, tl.sum(b_squares + b_count[:, None] * b_apart * b_apart, 0)


@triton.jit
def counting(p_mask, group, o_m, n_rows, n_images, row_length, HAS_MASK: tl.constexpr):
    """Which rows `o_m` of a group lie in it and in an image that counts; an image has `row_length` of them."""
    m_m = o_m < n_rows
    if HAS_MASK:
        m_m &= tl.load(p_mask + group * n_images + o_m // row_length, mask=m_m, other=0) != 0
    return m_m


@triton.jit
def deviation(p_var, o_c, m_c, eps):
    """1/√(var + eps) of the channels `o_c`."""
    b_var = tl.load(p_var + o_c, mask=m_c, other=1.0)
    return tl.div_rn(tl.zeros_like(b_var) + 1.0, tl.sqrt_rn(b_var + eps))


@triton.jit
def window(group, o_m, n_images, rows, columns, height, width, STEP: tl.constexpr):
    """Of the windows `o_m` of a group: row, column, image among all, and the pixel of the upper left corner."""
    column, row = o_m % columns, o_m // columns % rows
    image = group * n_images + o_m // columns // rows
    return row, column, image, (image * height + row * STEP) * width + column * STEP


@triton.jit
def store_statistics(p_mean, p_var, p_n_values, group, n_channels, o_c, m_c, n_values, b_center, b_sum):
    """A whole group's mean, biased variance and number of values; b_sum is Σ(z − mean)²."""
    tl.store(p_mean + group * n_channels + o_c, b_center, mask=m_c)
    tl.store(p_var + group * n_channels + o_c, b_sum / n_values, mask=m_c)
    if tl.program_id(1) == 0:
        tl.store(p_n_values + group, n_values)


@triton.jit
def statistics_kernel(
    p_z,
    p_mask,
    p_partial,
    p_counts,
    p_mean,
    p_var,
    p_n_values,
    n_images,
    n_pixels,
    n_channels,
    n_blocks,
    HAS_MASK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A part of a group's pixels: the statistics where it is the whole group, or what `merge_kernel` joins.

    Grid (parts, blocks of channels, groups); a part is `n_blocks` blocks of pixels.
    """
    part, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < n_channels
    n_rows = n_images * n_pixels
    p_z += group * n_rows * n_channels
    b_count = tl.zeros((BLOCK_M,), tl.float32)
    b_mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for block in range(part * n_blocks, (part + 1) * n_blocks):
        o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = counting(p_mask, group, o_m, n_rows, n_images, n_pixels, HAS_MASK)
        m_z = m_m[:, None] & m_c[None, :]
        p_row = p_z + o_m.to(tl.int64)[:, None] * n_channels + o_c[None, :]
        b_z = tl.load(p_row, mask=m_z, other=0.0).to(tl.float32)
        b_count += m_m.to(tl.float32)
        b_apart = tl.where(m_z, b_z - b_mean, 0.0)
        b_mean += b_apart * (1.0 / tl.maximum(b_count, 1.0))[:, None]
        b_squares += b_apart * tl.where(m_z, b_z - b_mean, 0.0)
    n_values, b_center, b_sum = merged(b_count, b_mean, b_squares)
    if IS_WHOLE:
        store_statistics(p_mean, p_var, p_n_values, group, n_channels, o_c, m_c, n_values, b_center, b_sum)
    else:
        o_part = group * tl.num_programs(0) + part
        tl.store(p_partial + 2 * o_part * n_channels + o_c, b_center, mask=m_c)
        tl.store(p_partial + (2 * o_part + 1) * n_channels + o_c, b_sum, mask=m_c)
        if tl.program_id(1) == 0:
            tl.store(p_counts + o_part, n_values)


@triton.jit
def merge_kernel(
    p_partial,
    p_counts,
    p_mean,
    p_var,
    p_n_values,
    n_parts,
    n_channels,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The parts of one group joined; grid (groups, blocks of channels)."""
    group = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_p, m_c = o_p < n_parts, o_c < n_channels
    m_part = m_p[:, None] & m_c[None, :]
    o_part = group * n_parts + o_p
    b_count = tl.load(p_counts + o_part, mask=m_p, other=0.0)
    p_part = p_partial + 2 * o_part[:, None] * n_channels + o_c[None, :]
    b_mean = tl.load(p_part, mask=m_part, other=0.0)
    b_squares = tl.load(p_part + n_channels, mask=m_part, other=0.0)
    n_values, b_center, b_sum = merged(b_count, b_mean, b_squares)
    store_statistics(p_mean, p_var, p_n_values, group, n_channels, o_c, m_c, n_values, b_center, b_sum)


@triton.jit
def normalise_kernel(
    p_z,
    p_weight,
    p_bias,
    p_mask,
    p_residual,
    p_mean,
    p_var,
    p_out,
    p_codes,
    eps,
    n_images,
    height,
    width,
    n_channels,
    HAS_MASK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Some windows of one group: 2×2 pixels with pooling, one without; grid (pieces, blocks of channels, groups)."""
    STEP: tl.constexpr = 2 if POOL else 1
    rows, columns = height // STEP, width // STEP
    group = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < n_channels
    n_windows = n_images * rows * columns
    m_m = counting(p_mask, group, o_m, n_windows, n_images, rows * columns, HAS_MASK)
    m_z = m_m[:, None] & m_c[None, :]
    b_mean = tl.load(p_mean + group * n_channels + o_c, mask=m_c, other=0.0)
    b_ratio = deviation(p_var + group * n_channels, o_c, m_c, eps)
    if p_weight is not None:
        b_ratio *= tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_beta = tl.zeros((BLOCK_C,), tl.float32)
    if p_bias is not None:
        b_beta = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)

    _, _, _, corner = window(group, o_m, n_images, rows, columns, height, width, STEP)
    b_best = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_code = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for place in tl.static_range(STEP * STEP):
        o_pixel = (corner + place // 2 * width + place % 2)[:, None] * n_channels + o_c[None, :]
        # The deviation first: z·ratio − mean·ratio would be a difference of large numbers.
        b_z = tl.load(p_z + o_pixel, mask=m_z, other=0.0).to(tl.float32)
        b_y = (b_z - b_mean[None, :]) * b_ratio[None, :] + b_beta[None, :]
        b_positive = b_y > 0
        if ACTIVATION == 1:
            b_y = tl.where(b_positive, b_y, b_y * SLOPE)
        if p_residual is not None:
            b_y += tl.load(p_residual + o_pixel, mask=m_z, other=0.0).to(tl.float32)
        if ACTIVATION == 2:
            b_positive = b_y > 0
            b_y = tl.where(b_positive, b_y, b_y * SLOPE)
        b_here = tl.where(b_positive, 4, 0) + place
        if place == 0:
            b_best, b_code = b_y, b_here
        else:
            # The first of equals, and what is not a number, as PyTorch's pooling has it.
            b_larger = (b_y > b_best) | (b_y != b_y)
            b_best, b_code = tl.where(b_larger, b_y, b_best), tl.where(b_larger, b_here, b_code)
    m_out = (o_m < n_windows)[:, None] & m_c[None, :]
    o_out = (group * n_windows + o_m)[:, None] * n_channels + o_c[None, :]
    tl.store(p_out + o_out, tl.where(m_z, b_best, 0.0).to(p_out.dtype.element_ty), mask=m_out)
    if p_codes is not None:
        tl.store(p_codes + o_out, tl.where(m_z, b_code, 0).to(tl.uint8), mask=m_out)


@dataclass(frozen=True)
class NormConfig:
    """How a group is cut up; all passes are bound by memory.

    Attributes:
        block_m: pixels, or windows of four of them, a block.
        block_c: channels a block: 128 bytes of a half type in a row; 32 where 64 would leave many idle.
        n_blocks: blocks a part of the sums over a group.
        n_parts: of a group: each at least 1024 rows, and so few that one program joins them at once.
        num_warps: 16 to 32 values a thread: loads of 16 bytes, and several of them on their way.
    """

    block_m: int
    block_c: int
    n_blocks: int
    n_parts: int
    num_warps: int = 4


def norm_config(n_rows: int, n_channels: int, pool: bool = False) -> NormConfig:
    """The configuration of groups of `n_rows` rows (pixels or windows) of this many channels."""
    block_m, block_c = 32 if pool else 64, 64 if n_channels % 64 == 0 else 32
    blocks = triton.cdiv(n_rows, block_m)
    n_blocks = triton.cdiv(blocks, min(max(n_rows // 1024, 1), 256))
    return NormConfig(block_m, block_c, n_blocks, triton.cdiv(blocks, n_blocks))


def outputs(z: Tensor, n_groups: int, pool: bool, save: bool) -> tuple[Tensor, ...]:
    """What `episode_norm` fills: output, mean and variance [G, C], values a channel [G], codes (of 0 images: unsaved)."""
    n, channels, height, width = z.shape
    shape = (channels, height // 2, width // 2) if pool else (channels, height, width)
    layout: dict[str, Any] = {"device": z.device, "memory_format": torch.channels_last}
    mean = torch.empty(n_groups, channels, dtype=torch.float32, device=z.device)
    return (
        torch.empty(n, *shape, dtype=z.dtype, **layout),
        mean,
        torch.empty_like(mean),
        torch.empty(n_groups, dtype=torch.float32, device=z.device),
        torch.empty(n if save else 0, *shape, dtype=torch.uint8, **layout),
    )


def episode_norm(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    n_groups: int,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: int,
    slope: float,
    pool: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    """[N, C, H, W] normalised group by group: two launches, three where a group is large.

    Args:
        z: float32, bfloat16 or float16; residual: of its shape and dtype, or None.
        weight, bias: γ and β [C] or None; mask: bool [N] or None.
        n_groups: of neighbouring images, all of one size.
        activation: place in `ACTIVATIONS`; slope: of the leaky ReLU; pool: 2×2 at the end.
        save: keep the codes.

    Returns:
        As `outputs` says.
    """
    made = outputs(z, n_groups, pool, save)
    out, mean, var, n_values, codes = made
    z = z.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    weight, bias, mask = (None if t is None else t.contiguous() for t in (weight, bias, mask))
    _statistics(z, mask, mean, var, n_values)
    n, channels, height, width = z.shape
    n_windows = out.numel() // channels // n_groups
    config = norm_config(n_windows, channels, pool)
    arguments: Arguments = {
        "p_z": z,
        "p_weight": weight,
        "p_bias": bias,
        "p_mask": mask,
        "p_residual": residual,
        "p_mean": mean,
        "p_var": var,
        "p_out": out,
        "p_codes": codes if save else None,
        "eps": float(eps),
        "n_images": n // n_groups,
        "height": height,
        "width": width,
        "n_channels": channels,
    }
    constants = {
        "HAS_MASK": mask is not None,
        "ACTIVATION": activation,
        "SLOPE": float(slope),
        "POOL": pool,
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
    }
    work = Work(
        flop=4 * z.numel(),
        read=n_bytes(z, weight, bias, mask, residual, mean, var),
        written=n_bytes(out, codes),
    )
    grid = triton.cdiv(n_windows, config.block_m), triton.cdiv(channels, config.block_c), n_groups
    Launch(normalise_kernel, grid, arguments, constants, config.num_warps, 1, work).run()
    return made


def _statistics(z: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor, n_values: Tensor) -> None:
    n, channels, height, width = z.shape
    n_groups = mean.shape[0]
    config = norm_config(n // n_groups * height * width, channels)
    is_whole = config.n_parts == 1
    partial = counts = None
    if not is_whole:
        partial = mean.new_empty(n_groups, config.n_parts, 2, channels)
        counts = mean.new_empty(n_groups, config.n_parts)
    arguments: Arguments = {
        "p_z": z,
        "p_mask": mask,
        "p_partial": partial,
        "p_counts": counts,
        "p_mean": mean if is_whole else None,
        "p_var": var if is_whole else None,
        "p_n_values": n_values if is_whole else None,
        "n_images": n // n_groups,
        "n_pixels": height * width,
        "n_channels": channels,
        "n_blocks": config.n_blocks,
    }
    constants = {
        "HAS_MASK": mask is not None,
        "IS_WHOLE": is_whole,
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
    }
    written = n_bytes(mean, var, n_values) if is_whole else n_bytes(partial, counts)
    work = Work(flop=6 * z.numel(), read=n_bytes(z, mask), written=written)
    grid = config.n_parts, triton.cdiv(channels, config.block_c), n_groups
    Launch(statistics_kernel, grid, arguments, constants, config.num_warps, 2, work).run()
    if is_whole:
        return
    arguments = {
        "p_partial": partial,
        "p_counts": counts,
        "p_mean": mean,
        "p_var": var,
        "p_n_values": n_values,
        "n_parts": config.n_parts,
        "n_channels": channels,
    }
    constants = {"BLOCK_P": triton.next_power_of_2(config.n_parts), "BLOCK_C": 16}
    work = Work(read=n_bytes(partial, counts), written=n_bytes(mean, var, n_values))
    Launch(merge_kernel, (n_groups, triton.cdiv(channels, 16)), arguments, constants, 4, 1, work).run()


def norm_cases() -> Iterator[tuple[str, Tensor, Tensor | None, int, bool]]:
    """Name, images, residual, activation and pooling behind the convolutions of the shipped encoders."""
    seen = set()
    for layer in encoder_layers():
        for name, dtype in DTYPES.items():
            case = f"{layer.n_out}@{layer.size} {name}{' end' if layer.last else ''}"
            # The kernels of layers between the narrowest and the widest differ from theirs in numbers only.
            is_shown = name == "bf16" or layer.n_out in (64, 640)
            if layer.n_taps == 3 and is_shown and case not in seen:
                seen.add(case)
                z = layer.images(layer.n_out, dtype)
                yield case, z, torch.empty_like(z) if layer.last else None, 2, layer.last


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration, with a readable name: four groups of 20 images."""
    for case, z, residual, activation, pool in norm_cases():
        gamma = torch.empty(z.shape[1], device="meta")
        with observed() as launches:
            episode_norm(z, gamma, gamma, 1e-5, 4, None, residual, activation, 0.1, pool, True)
        for launch in launches:
            yield f"episode_norm-{launch.name.removesuffix('_kernel')} {case}", launch
