"""A small kernel of reductions and functions, for the emulator's own tests."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mtl_fast.kernels.triton.launch import Launch


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
