"""Partial sums of all programs added in a fixed order, and what becomes of the totals: gradients of Φ.

dL/dΦ_S2 = γ/σ·Σ G        dL/dΦ_S1 = Σ G·(z − t)/Φ_S1 (`filter`)        dL/dΦ_S1 = γ/σ·Σ of products (`kernel`)

Of a layer with the scale of a kernel one launch adds both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import ChannelNorm
from .launch import Launch, Work, n_bytes


@triton.jit
def total(p_partial, p_factor, n_rows, stride, o_c, m_c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ of `n_rows` rows of [BLOCK_C], times the factors in their places, in an order that depends on shapes only."""
    b_total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, n_rows, BLOCK_P):
        o_p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        m_p = (o_p < n_rows)[:, None] & m_c[None, :]
        o_at = o_p[:, None] * stride + o_c[None, :]
        b_rows = tl.load(p_partial + o_at, mask=m_p, other=0.0).to(tl.float32)
        if p_factor is not None:
            b_rows *= tl.load(p_factor + o_at, mask=m_p, other=0.0).to(tl.float32)
        b_total += b_rows
    return tl.sum(b_total, 0)


@triton.jit
def norm_factor(p_var, p_gamma, eps, o_c, m_c):
    """γ/σ of the channels `o_c`; 1 without a norm."""
    b_ratio = tl.full(o_c.shape, 1.0, tl.float32)
    if p_var is not None:
        b_ratio = 1.0 / tl.sqrt(tl.load(p_var + o_c, mask=m_c, other=1.0).to(tl.float32) + eps)
        if p_gamma is not None:
            b_ratio *= tl.load(p_gamma + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_ratio


@triton.jit
def add_shift(
    p_sums,
    stride,
    p_var,
    p_gamma,
    eps,
    p_shift_grad,
    n_rows,
    o_c,
    m_c,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dL/dΦ_S2 of the channels `o_c`."""
    b_shift = total(p_sums, None, n_rows, stride, o_c, m_c, BLOCK_P, BLOCK_C)
    b_shift *= norm_factor(p_var, p_gamma, eps, o_c, m_c)
    tl.store(p_shift_grad + o_c, b_shift.to(p_shift_grad.dtype.element_ty), mask=m_c)


@triton.jit
def sums_kernel(
    p_partial,
    p_var,
    p_gamma,
    eps,
    p_scale,
    p_shift_grad,
    p_scale_grad,
    p_lost,
    n_rows,
    n_channels,
    MOST_LOST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The partial sums of all programs, and what they are for."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < n_channels
    KINDS: tl.constexpr = 1 if p_scale_grad is None else 4
    stride = KINDS * n_channels
    add_shift(p_partial, stride, p_var, p_gamma, eps, p_shift_grad, n_rows, o_c, m_c, BLOCK_P, BLOCK_C)
    if p_scale_grad is not None:
        b_scale = tl.load(p_scale + o_c, mask=m_c, other=1.0).to(tl.float32)
        b_term = total(p_partial + n_channels, None, n_rows, stride, o_c, m_c, BLOCK_P, BLOCK_C)
        b_size = total(p_partial + 2 * n_channels, None, n_rows, stride, o_c, m_c, BLOCK_P, BLOCK_C)
        b_parts = total(p_partial + 3 * n_channels, None, n_rows, stride, o_c, m_c, BLOCK_P, BLOCK_C)
        # Not trusted either: a scale of exactly 0, where nothing is left to divide.
        b_kept = (b_size * MOST_LOST >= b_parts) & (b_scale != 0)
        b_grad = b_term / tl.where(b_scale != 0, b_scale, 1.0)
        tl.store(p_scale_grad + o_c, b_grad.to(p_scale_grad.dtype.element_ty), mask=m_c)
        tl.store(p_lost + o_c, tl.where(b_kept, 0, 1).to(tl.uint8), mask=m_c)


@triton.jit
def add_products(
    tile,
    p_partial,
    p_taps,
    p_var,
    p_gamma,
    eps,
    p_lost,
    p_scale_grad,
    n_rows,
    n_values,
    n_in,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """γ/σ·Σ of the partial sums of all shares; of lost channels only, where that is asked.

    With taps the rows are those of a weight gradient [O, k, k, I], and each is multiplied by its W.
    """
    o_e = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < n_values
    o_o = o_e // n_in
    if p_taps is None:
        b_total = total(p_partial, None, n_rows, n_values, o_e, m_e, BLOCK_P, BLOCK_E)
    else:
        o_first = o_o * (n_rows * n_in) + o_e % n_in
        b_total = total(p_partial, p_taps, n_rows, n_in, o_first, m_e, BLOCK_P, BLOCK_E)
    b_total *= norm_factor(p_var, p_gamma, eps, o_o, m_e)
    if p_lost is not None:
        m_e &= tl.load(p_lost + o_o, mask=m_e, other=0) != 0
    tl.store(p_scale_grad + o_e, b_total.to(p_scale_grad.dtype.element_ty), mask=m_e)


@triton.jit
def products_sum_kernel(
    p_partial,
    p_taps,
    p_var,
    p_gamma,
    eps,
    p_lost,
    p_scale_grad,
    p_sums,
    p_shift_grad,
    n_rows,
    n_values,
    n_in,
    n_sums,
    n_channels,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program adds a tile of dL/dΦ_S1; where sums are given, those after the last tile add dL/dΦ_S2."""
    tile = tl.program_id(0)
    n_tiles = tl.cdiv(n_values, BLOCK_E)
    if tile < n_tiles:
        add_products(
            tile,
            p_partial,
            p_taps,
            p_var,
            p_gamma,
            eps,
            p_lost,
            p_scale_grad,
            n_rows,
            n_values,
            n_in,
            BLOCK_P,
            BLOCK_E,
        )
    elif p_sums is not None:
        o_c = (tile - n_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < n_channels
        add_shift(p_sums, n_channels, p_var, p_gamma, eps, p_shift_grad, n_sums, o_c, m_c, BLOCK_S, BLOCK_C)


@dataclass(frozen=True)
class SumsConfig:
    """How the partial sums are added: one program for 16 channels, 64 rows of partial sums at a time.

    Attributes:
        block_p, block_c: 8 values a thread, read as rows of 64 bytes.
        num_warps: of so little work.
    """

    block_p: int = 64
    block_c: int = 16
    num_warps: int = 4


SUMS = SumsConfig()
# What `filter_products` has to compute anew: the saved output rounds to so much, and the terms must stand out of it.
# A half type may lose 4 of its 8 or 11 bits, float32 6 of 24.
MOST_LOST = {torch.float32: 64, torch.float16: 16, torch.bfloat16: 16}


@dataclass(frozen=True)
class ShareConfig:
    """How the shares of the pixels are added.

    Attributes:
        block_p, block_e: shares and values a block: 16 values a thread, rows of 256 bytes.
        num_warps: of so little work; that of `SumsConfig`, which rides along.
    """

    block_p: int = 32
    block_e: int = 64
    num_warps: int = SUMS.num_warps


SHARES = ShareConfig()
# Of a weight gradient, 9 rows of half types.
TAPS = ShareConfig(block_p=16, block_e=128)


class Sums(NamedTuple):
    """Σ G of all programs, yet to be added.

    Attributes:
        partial: float32 [P, 1, O].
        out: takes dL/dΦ_S2 [O].
    """

    partial: Tensor
    out: Tensor


def sums_launch(
    partial: Tensor,
    *,
    images: torch.dtype,
    norm: ChannelNorm | None,
    shift_grad: Tensor,
    scale: Tensor | None,
    scale_grad: Tensor | None,
    lost: Tensor | None,
) -> Launch:
    """Adds the rows of partial [P, 1, O], or [P, 4, O] for the scale of a filter too.

    Args:
        partial: float32: Σ G; Σ G·(z − t), Σ of the terms' sizes, Σ of the sizes they were subtracted from.
        images: dtype of the images, which says how much may be lost.
        norm: the stored norm that is folded into weight and shift, or None.
        shift_grad: takes dL/dΦ_S2 [O].
        scale: Φ_S1, O values; it and what follows are None unless its gradient is wanted.
        scale_grad: takes dL/dΦ_S1 [O].
        lost: uint8 [O], takes 1 where that cannot be trusted.
    """
    n_channels = shift_grad.shape[0]
    written = [shift_grad, scale_grad, lost]
    return Launch(
        kernel=sums_kernel,
        grid=(-(-n_channels // SUMS.block_c),),
        arguments=dict(
            p_partial=partial,
            **norm_arguments(norm),
            p_scale=scale,
            p_shift_grad=shift_grad,
            p_scale_grad=scale_grad,
            p_lost=lost,
            n_rows=partial.shape[0],
            n_channels=n_channels,
        ),
        constants={"MOST_LOST": MOST_LOST[images], "BLOCK_P": SUMS.block_p, "BLOCK_C": SUMS.block_c},
        num_warps=SUMS.num_warps,
        num_stages=1,
        work=Work(
            flop=partial.numel(),
            read=partial.nbytes,
            written=sum(t.nbytes for t in written if t is not None),
        ),
    )


def products_sum_launch(
    partial: Tensor | None,
    *,
    norm: ChannelNorm | None,
    lost: Tensor | None,
    out: Tensor,
    taps: Tensor | None = None,
    sums: Sums | None = None,
) -> Launch:
    """Adds the shares of partial [P, O, I], or [P, O] for a filter's scale; None is no pixel at all.

    Args:
        partial: float32; with `taps` a weight gradient [O, k, k, I] of any dtype.
        norm: as in `sums_launch`.
        lost: uint8 [O]: channels that are written; None is all.
        out: takes dL/dΦ_S1 [O, I] or [O].
        taps: the frozen weight [O, k, k, I] that the weight gradient is contracted with.
        sums: of the same layer, added by the same launch.
    """
    n_values = out.numel()
    config = SHARES if taps is None else TAPS
    added = [] if sums is None else [*sums]
    n_channels = 0 if sums is None else sums.out.numel()
    read = [] if partial is None or lost is not None else [partial, taps]
    n_added = 0 if partial is None else partial.numel() * (1 if taps is None else 2)
    return Launch(
        kernel=products_sum_kernel,
        grid=(-(-n_values // config.block_e) + -(-n_channels // SUMS.block_c),),
        arguments=dict(
            p_partial=out if partial is None else partial,
            p_taps=taps,
            **norm_arguments(norm),
            p_lost=lost,
            p_scale_grad=out,
            p_sums=None if sums is None else sums.partial,
            p_shift_grad=None if sums is None else sums.out,
            n_rows=0 if partial is None else partial.numel() // n_values,
            n_values=n_values,
            n_in=n_values // out.shape[0],
            n_sums=0 if sums is None else sums.partial.shape[0],
            n_channels=n_channels,
        ),
        constants={
            "BLOCK_P": config.block_p,
            "BLOCK_E": config.block_e,
            "BLOCK_S": SUMS.block_p,
            "BLOCK_C": SUMS.block_c,
        },
        num_warps=config.num_warps,
        num_stages=1,
        work=Work(
            flop=n_added + (0 if sums is None else sums.partial.numel()),
            read=n_bytes(*read, *added[:1]),
            written=n_bytes(*([] if lost is not None else [out]), *added[1:]),
        ),
    )


def contracted(
    x: Tensor,
    grad: Tensor,
    taps: Tensor,
    *,
    padding: int,
    norm: ChannelNorm | None,
    dtype: torch.dtype,
    sums: Sums | None = None,
) -> Tensor:
    """dL/dΦ_S1 [O, I] as of `scale_gradient`, from PyTorch's weight gradient: on the route `cudnn`.

    That gradient is in memory here, and rounded to x's dtype.
    """
    n_out, _, _, n_in = taps.shape
    out = torch.empty(n_out, n_in, dtype=dtype, device=x.device)
    if not grad.numel():
        products_sum_launch(None, norm=norm, lost=None, out=out, sums=sums).run()
        return out
    # Of the weight only its shape and the order of its elements count.
    weight = taps.new_empty(taps.shape, dtype=x.dtype).permute(0, 3, 1, 2)
    _, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    )
    rows = weight_grad.permute(0, 2, 3, 1).contiguous()
    products_sum_launch(rows, norm=norm, lost=None, out=out, taps=taps, sums=sums).run()
    return out


def norm_arguments(norm: ChannelNorm | None) -> dict[str, Any]:
    """What `norm_factor` takes."""
    if norm is None:
        return {"p_var": None, "p_gamma": None, "eps": 0.0}
    return {"p_var": norm.var, "p_gamma": norm.weight, "eps": float(norm.eps)}
