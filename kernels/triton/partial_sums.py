"""Partial sums of all programs added in a fixed order, and what becomes of the totals: gradients of Φ.

dL/dΦ_S2 = γ/σ·Σ G        dL/dΦ_S1 = Σ G·(z − t)/Φ_S1 (`filter`)        dL/dΦ_S1 = γ/σ·Σ of products (`kernel`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import ChannelNorm
from .launch import Launch, Work


@triton.jit
def total(p_partial, n_rows, stride, o_c, m_c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ of `n_rows` rows of [BLOCK_C], in an order that depends on shapes only."""
    b_total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, n_rows, BLOCK_P):
        o_p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        m_p = (o_p < n_rows)[:, None] & m_c[None, :]
        b_total += tl.load(p_partial + o_p[:, None] * stride + o_c[None, :], mask=m_p, other=0.0)
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
    b_shift = total(p_partial, n_rows, KINDS * n_channels, o_c, m_c, BLOCK_P, BLOCK_C)
    b_shift *= norm_factor(p_var, p_gamma, eps, o_c, m_c)
    tl.store(p_shift_grad + o_c, b_shift.to(p_shift_grad.dtype.element_ty), mask=m_c)
    if p_scale_grad is not None:
        b_scale = tl.load(p_scale + o_c, mask=m_c, other=1.0).to(tl.float32)
        b_term = total(p_partial + n_channels, n_rows, KINDS * n_channels, o_c, m_c, BLOCK_P, BLOCK_C)
        b_size = total(p_partial + 2 * n_channels, n_rows, KINDS * n_channels, o_c, m_c, BLOCK_P, BLOCK_C)
        b_parts = total(p_partial + 3 * n_channels, n_rows, KINDS * n_channels, o_c, m_c, BLOCK_P, BLOCK_C)
        # Not trusted either: a scale of exactly 0, where nothing is left to divide.
        b_kept = (b_size * MOST_LOST >= b_parts) & (b_scale != 0)
        b_grad = b_term / tl.where(b_scale != 0, b_scale, 1.0)
        tl.store(p_scale_grad + o_c, b_grad.to(p_scale_grad.dtype.element_ty), mask=m_c)
        tl.store(p_lost + o_c, tl.where(b_kept, 0, 1).to(tl.uint8), mask=m_c)


@triton.jit
def products_sum_kernel(
    p_partial,
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
    """γ/σ·Σ of the partial sums of all shares; of lost channels only, where that is asked."""
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < n_values
    o_o = o_e // n_in
    b_total = total(p_partial, n_rows, n_values, o_e, m_e, BLOCK_P, BLOCK_E)
    b_total *= norm_factor(p_var, p_gamma, eps, o_o, m_e)
    if p_lost is not None:
        m_e &= tl.load(p_lost + o_o, mask=m_e, other=0) != 0
    tl.store(p_scale_grad + o_e, b_total.to(p_scale_grad.dtype.element_ty), mask=m_e)


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
        num_warps: of so little work.
    """

    block_p: int = 32
    block_e: int = 64
    num_warps: int = 4


SHARES = ShareConfig()


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
    partial: Tensor | None, *, norm: ChannelNorm | None, lost: Tensor | None, out: Tensor
) -> Launch:
    """Adds the shares of partial [P, O, I], or [P, O] for a filter's scale; None is no pixel at all.

    Args:
        partial: float32.
        norm: as in `sums_launch`.
        lost: uint8 [O]: channels that are written; None is all.
        out: takes dL/dΦ_S1 [O, I] or [O].
    """
    n_values = out.numel()
    return Launch(
        kernel=products_sum_kernel,
        grid=(-(-n_values // SHARES.block_e),),
        arguments=dict(
            p_partial=out if partial is None else partial,
            **norm_arguments(norm),
            p_lost=lost,
            p_scale_grad=out,
            n_rows=0 if partial is None else partial.numel() // n_values,
            n_values=n_values,
            n_in=n_values // out.shape[0],
        ),
        constants={"BLOCK_P": SHARES.block_p, "BLOCK_E": SHARES.block_e},
        num_warps=SHARES.num_warps,
        num_stages=1,
        work=Work(
            flop=0 if partial is None else partial.numel(),
            read=0 if partial is None or lost is not None else partial.nbytes,
            written=0 if lost is not None else out.nbytes,
        ),
    )


def norm_arguments(norm: ChannelNorm | None) -> dict[str, Any]:
    """What `norm_factor` takes."""
    if norm is None:
        return {"p_var": None, "p_gamma": None, "eps": 0.0}
    return {"p_var": norm.var, "p_gamma": norm.weight, "eps": float(norm.eps)}
