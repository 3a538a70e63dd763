"""Small kernels of every pattern that the project's kernels use, for the emulator's own tests."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtl_fast.kernels.triton.launch import Launch


@triton.jit
def convolution(
    p_x,
    p_weight,
    p_shift,
    p_out,
    n_rows,
    H,
    W,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    SLIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """3x3 convolution as an implicit product: rows are pixels, the last ones masked, every tap masked at the edge.

    With SLIP, a fault put in on purpose, the mask of the columns is that of their neighbours.
    """
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < n_rows
    m_n = o_n < C_OUT
    o_w = (o_m % W).to(tl.int32)
    o_h = (o_m // W % H).to(tl.int32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(9 * (C_IN // BLOCK_K)):
        tap = i // (C_IN // BLOCK_K)
        channel = i % (C_IN // BLOCK_K) * BLOCK_K
        dh = tap // 3 - 1
        dw = tap % 3 - 1
        m_x = m_m & (o_h + dh >= 0) & (o_h + dh < H) & (o_w + dw + SLIP >= 0) & (o_w + dw + SLIP < W)
        p_tap = p_x + (o_m + dh * W + dw)[:, None] * C_IN + channel + o_k[None, :]
        b_x = tl.load(p_tap, mask=m_x[:, None], other=0.0)
        p_w = p_weight + (tap * C_IN + channel + o_k)[:, None] + o_n[None, :] * (9 * C_IN)
        b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
        # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    b_acc += tl.load(p_shift + o_n, mask=m_n, other=0.0)[None, :]
    b_acc = tl.where(b_acc > 0, b_acc, 0.1 * b_acc)
    p_o = p_out + o_m[:, None] * C_OUT + o_n[None, :]
    tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def gram(
    p_x, p_out, n, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """x xᵀ + 1 of a task's n rows, one program a task."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    task = tl.program_id(0).to(tl.int64)
    b_gram = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        p_rows = p_x + task * n * D + o_n[:, None] * D + d + o_d[None, :]
        b_x = tl.load(p_rows, mask=(o_n < n)[:, None], other=0.0)
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_N, BLOCK_N]
        b_gram = tl.dot(b_x, tl.trans(b_x), b_gram, input_precision=PRECISION)
    m_out = (o_n < n)[:, None] & (o_n < n)[None, :]
    tl.store(p_out + task * n * n + o_n[:, None] * n + o_n[None, :], b_gram + 1.0, mask=m_out)


@triton.jit
def soft_maximum(p_x, p_out, p_best, p_sum, n_rows, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows' softmax, the index of their largest value as uint8, and the logarithm of the softmax's denominator."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m = (o_m < n_rows)[:, None] & (o_n < n)[None, :]
    b_x = tl.load(p_x + o_m[:, None] * n + o_n[None, :], mask=m, other=float("-inf")).to(tl.float32)
    b_top = tl.max(b_x, 1)
    b_exp = tl.exp(b_x - tl.where(o_m < n_rows, b_top, 0.0)[:, None])
    b_sum = tl.sum(b_exp, 1)
    b_best = tl.min(tl.where(b_x == b_top[:, None], o_n[None, :], BLOCK_N), 1)
    tl.store(p_out + o_m[:, None] * n + o_n[None, :], b_exp / b_sum[:, None], mask=m)
    tl.store(p_best + o_m, b_best.to(tl.uint8), mask=o_m < n_rows)
    tl.store(p_sum + o_m, tl.log(b_sum), mask=o_m < n_rows)


def convolution_launch(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    block: tuple[int, int, int] = (64, 64, 32),
    warps: int = 4,
    precision: str = "tf32",
    slip: int = 0,
) -> Launch:
    """`convolution` of x [n, h, w, C_IN] and weight [C_OUT, 3, 3, C_IN] into out [n, h, w, C_OUT]."""
    n, h, w, c_in = x.shape
    return Launch(
        kernel=convolution,
        grid=(triton.cdiv(n * h * w, block[0]),),
        arguments={
            "p_x": x,
            "p_weight": weight,
            "p_shift": shift,
            "p_out": out,
            "n_rows": n * h * w,
            "H": h,
            "W": w,
        },
        constants={
            "C_IN": c_in,
            "C_OUT": weight.shape[0],
            "PRECISION": precision,
            "SLIP": slip,
            "BLOCK_M": block[0],
            "BLOCK_N": block[1],
            "BLOCK_K": block[2],
        },
        num_warps=warps,
        num_stages=3,
    )


def gram_launch(
    x: Tensor, out: Tensor, precision: str | None, *, block_d: int = 32, warps: int = 4
) -> Launch:
    """`gram` of x [t, n, d] into out [t, n, n]."""
    t, n, d = x.shape
    return Launch(
        kernel=gram,
        grid=(t,),
        arguments={"p_x": x, "p_out": out, "n": n},
        constants={
            "D": d,
            "BLOCK_N": max(16, triton.next_power_of_2(n)),
            "BLOCK_D": block_d,
            "PRECISION": precision,
        },
        num_warps=warps,
        num_stages=2,
    )


def soft_maximum_launch(x: Tensor, out: Tensor, best: Tensor, total: Tensor, *, warps: int = 4) -> Launch:
    """`soft_maximum` of x [rows, n] into out [rows, n], best and total [rows]."""
    rows, n = x.shape
    return Launch(
        kernel=soft_maximum,
        grid=(triton.cdiv(rows, 16),),
        arguments={"p_x": x, "p_out": out, "p_best": best, "p_sum": total, "n_rows": rows, "n": n},
        constants={"BLOCK_M": 16, "BLOCK_N": triton.next_power_of_2(n)},
        num_warps=warps,
        num_stages=1,
    )
