"""Gradients of `episode_norm`.

With x̂ = (z − mean)/σ, d = dL/d(γ·x̂ + β) unwound through pooling and activation by the codes, m values a channel:

    dL/dβ = Σ d      dL/dγ = Σ d·x̂      dL/dz = γ/σ·(d − Σ_g d/m − x̂·Σ_g d·x̂/m)

d is unwound twice, for the sums and for dz: writing and reading it back would move more memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .episode_norm import counting, deviation, norm_cases, norm_config, window
from .launch import Arguments, Launch, Work, chip_of, n_bytes, observed


@triton.jit
def sums_kernel(
    p_grad,
    p_z,
    p_codes,
    p_mean,
    p_var,
    p_mask,
    p_partial,
    eps,
    n_images,
    height,
    width,
    n_channels,
    n_blocks,
    HAS_MASK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ d and Σ d·x̂ over `n_blocks` blocks of a group's windows; grid (parts, blocks of channels, groups)."""
    STEP: tl.constexpr = 2 if POOL else 1
    rows, columns = height // STEP, width // STEP
    part, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < n_channels
    n_windows = n_images * rows * columns
    b_mean = tl.load(p_mean + group * n_channels + o_c, mask=m_c, other=0.0)
    b_total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for block in range(part * n_blocks, (part + 1) * n_blocks):
        o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = counting(p_mask, group, o_m, n_windows, n_images, rows * columns, HAS_MASK)
        m_d = m_m[:, None] & m_c[None, :]
        o_out = (group * n_windows + o_m)[:, None] * n_channels + o_c[None, :]
        b_d = tl.load(p_grad + o_out, mask=m_d, other=0.0).to(tl.float32)
        _, _, _, corner = window(group, o_m, n_images, rows, columns, height, width, STEP)
        o_pixel = corner[:, None] * n_channels + o_c[None, :]
        if p_codes is not None:
            b_code = tl.load(p_codes + o_out, mask=m_d, other=0).to(tl.int32)
            if ACTIVATION != 0:
                b_d = tl.where((b_code & 4) != 0, b_d, b_d * SLOPE)
            if POOL:
                # Only the maximum's pixel has a gradient.
                o_pixel += (b_code % 4 // 2 * width + b_code % 2) * n_channels
        b_z = tl.load(p_z + o_pixel, mask=m_d, other=0.0).to(tl.float32)
        b_total += b_d
        b_along += b_d * tl.where(m_d, b_z - b_mean[None, :], 0.0)
    p_own = p_partial + 2 * (group * tl.num_programs(0) + part) * n_channels + o_c
    tl.store(p_own, tl.sum(b_total, 0), mask=m_c)
    b_inverse = deviation(p_var + group * n_channels, o_c, m_c, eps)
    tl.store(p_own + n_channels, tl.sum(b_along, 0) * b_inverse, mask=m_c)


@triton.jit
def images_backward_kernel(
    p_grad,
    p_z,
    p_codes,
    p_mean,
    p_var,
    p_n_values,
    p_weight,
    p_mask,
    p_sums,
    p_d_z,
    p_d_residual,
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
    """dz and the residual's gradient; windows that pooling drops are there: grid (pieces, blocks of channels, groups)."""
    STEP: tl.constexpr = 2 if POOL else 1
    rows, columns = tl.cdiv(height, STEP), tl.cdiv(width, STEP)
    pooled_rows, pooled_columns = height // STEP, width // STEP
    group = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < n_channels
    n_windows = n_images * rows * columns
    m_counts = counting(p_mask, group, o_m, n_windows, n_images, rows * columns, HAS_MASK)
    row, column, image, corner = window(group, o_m, n_images, rows, columns, height, width, STEP)
    m_in = (m_counts & (row < pooled_rows) & (column < pooled_columns))[:, None] & m_c[None, :]
    o_out = ((image * pooled_rows + row) * pooled_columns + column)[:, None] * n_channels + o_c[None, :]

    b_grad = tl.load(p_grad + o_out, mask=m_in, other=0.0).to(tl.float32)
    b_d = b_grad
    b_place = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    if p_codes is not None:
        b_code = tl.load(p_codes + o_out, mask=m_in, other=0).to(tl.int32)
        b_place = b_code & 3
        if ACTIVATION != 0:
            b_d = tl.where((b_code & 4) != 0, b_grad, b_grad * SLOPE)
    b_inverse = deviation(p_var + group * n_channels, o_c, m_c, eps)
    b_ratio = b_inverse
    if p_weight is not None:
        b_ratio *= tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    n_values = tl.load(p_n_values + group)
    p_own = p_sums + 2 * group * n_channels + o_c
    b_mean = tl.load(p_mean + group * n_channels + o_c, mask=m_c, other=0.0)[None, :]
    b_mean_d = (tl.load(p_own, mask=m_c, other=0.0) / n_values)[None, :]
    b_along = (tl.load(p_own + n_channels, mask=m_c, other=0.0) / n_values * b_inverse)[None, :]
    for place in tl.static_range(STEP * STEP):
        m_pixel = (o_m < n_windows) & (row * STEP + place // 2 < height) & (column * STEP + place % 2 < width)
        m_image = m_pixel[:, None] & m_c[None, :]
        m_z = m_image & m_counts[:, None]
        o_pixel = (corner + place // 2 * width + place % 2)[:, None] * n_channels + o_c[None, :]
        m_here = b_place == place
        if p_d_z is not None:
            b_z = tl.load(p_z + o_pixel, mask=m_z, other=0.0).to(tl.float32)
            b_dz = tl.where(m_here, b_d, 0.0) - b_mean_d - b_along * (b_z - b_mean)
            b_dz = tl.where(m_z, b_dz * b_ratio[None, :], 0.0)
            tl.store(p_d_z + o_pixel, b_dz.to(p_d_z.dtype.element_ty), mask=m_image)
        if p_d_residual is not None:
            b_dr = tl.where(m_here, b_grad if ACTIVATION == 1 else b_d, 0.0)
            tl.store(p_d_residual + o_pixel, b_dr.to(p_d_residual.dtype.element_ty), mask=m_image)


def episode_norm_backward(
    grad: Tensor,
    z: Tensor,
    codes: Tensor,
    mean: Tensor,
    var: Tensor,
    n_values: Tensor,
    weight: Tensor | None,
    eps: float,
    mask: Tensor | None,
    activation: int,
    slope: float,
    pool: bool,
    needs_z: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, γ, β and the residual from `grad`, that of the output: two launches and two or three sums.

    Args:
        grad: [N, C, H', W']; codes, mean, var, n_values: what `episode_norm` returned.
        z, weight, eps, mask, activation, slope, pool: as in `episode_norm`.
        needs_z, needs_residual: whether theirs are wanted; one that is not comes back empty.

    Returns:
        [N, C, H, W], float32 [C] and [C], [N, C, H, W].
    """
    grad, z, codes = (t.contiguous(memory_format=torch.channels_last) for t in (grad, z, codes))
    weight, mask = (None if t is None else t.contiguous() for t in (weight, mask))
    n, channels, height, width = z.shape
    n_groups = mean.shape[0]
    n_images = n // n_groups
    config = norm_config(grad.numel() // channels // n_groups, channels, pool)
    partial = mean.new_empty(n_groups, config.n_parts, 2, channels)
    operands = {
        "p_grad": grad,
        "p_z": z,
        "p_codes": codes if codes.numel() else None,
        "p_mean": mean,
        "p_var": var,
    }
    sizes = {
        "eps": float(eps),
        "n_images": n_images,
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
    # A pooled window has one pixel of z.
    read = n_bytes(grad, codes, mean, var, mask) + grad.numel() * z.element_size()
    work = Work(flop=4 * grad.numel(), read=read, written=n_bytes(partial))
    arguments: Arguments = (
        operands | {"p_mask": mask, "p_partial": partial} | sizes | {"n_blocks": config.n_blocks}
    )
    blocks_c = triton.cdiv(channels, config.block_c)
    Launch(
        sums_kernel, (config.n_parts, blocks_c, n_groups), arguments, constants, config.num_warps, 2, work
    ).run()
    sums = partial.sum(1) if config.n_parts > 1 else partial.squeeze(1)
    d_weight, d_bias = sums[:, 1].sum(0), sums[:, 0].sum(0)
    d_z, d_residual = (
        torch.empty_like(z, memory_format=torch.channels_last) if needs else z.new_empty(0)
        for needs in (needs_z, needs_residual)
    )
    if needs_z or needs_residual:
        arguments = (
            operands
            | {"p_n_values": n_values, "p_weight": weight, "p_mask": mask, "p_sums": sums}
            | {"p_d_z": d_z if needs_z else None, "p_d_residual": d_residual if needs_residual else None}
            | sizes
        )
        work = Work(
            flop=8 * z.numel(),
            read=n_bytes(grad, z if needs_z else None, codes, mean, var, n_values, weight, mask, sums),
            written=n_bytes(d_z, d_residual),
        )
        step = 2 if pool else 1
        n_windows = n_images * triton.cdiv(height, step) * triton.cdiv(width, step)
        grid = triton.cdiv(n_windows, config.block_m), blocks_c, n_groups
        # Of float32 sm_120's assembler spills at three programs, for which 168 registers are left a thread.
        programs = 2 if z.dtype == torch.float32 and chip_of(z.device) == 120 else None
        Launch(images_backward_kernel, grid, arguments, constants, config.num_warps, 1, work, programs).run()
    return d_z, d_weight, d_bias, d_residual


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration, with a readable name: four groups of 20 images."""
    for case, z, residual, activation, pool in norm_cases():
        size = (z.shape[1], z.shape[2] // 2, z.shape[3] // 2) if pool else z.shape[1:]
        grad = z.new_empty(z.shape[0], *size).contiguous(memory_format=torch.channels_last)
        codes = torch.empty_like(grad, dtype=torch.uint8)
        mean = torch.empty(4, z.shape[1], device="meta")
        statistics = mean, mean.clone(), mean.new_empty(4)
        options: Any = 1e-5, None, activation, 0.1, pool, True, residual is not None
        with observed() as launches:
            episode_norm_backward(grad, z, codes, *statistics, mean[0], *options)
        for launch in launches:
            yield f"episode_norm_backward-{launch.name.removesuffix('_kernel')} {case}", launch
