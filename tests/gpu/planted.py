"""A small matrix product, good or with one fault: what the gates of compiled kernels have to see."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_fast.kernels.triton.launch import Launch, Work


@triton.jit
def product(
    p_a,
    p_b,
    p_out,
    K,
    DIVISOR,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DIVIDES: tl.constexpr,
    SCATTERS: tl.constexpr,
):
    """[BLOCK_M, K] @ [K, BLOCK_N] of one program, K a multiple of BLOCK_K."""
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        start = k // BLOCK_K % DIVISOR * BLOCK_K if DIVIDES else k
        if SCATTERS:
            # A thread's elements are no neighbours: each is less than the 4 bytes that can be copied asynchronously.
            start = start + DIVISOR
        b_a = tl.load(p_a + o_m[:, None] * K + start + o_k[None, :])
        b_b = tl.load(p_b + o_n[None, :] * K + start + o_k[:, None])
        # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
    tl.store(p_out + o_m[:, None] * BLOCK_N + o_n[None, :], b_acc)


def launch(
    *,
    dtype: torch.dtype = torch.bfloat16,
    block_m: int = 64,
    block_n: int = 64,
    block_k: int = 32,
    precision: str = "tf32",
    divides: bool = False,
    scatters: bool = False,
    num_warps: int = 4,
    num_stages: int = 3,
    k: int = 512,
) -> Launch:
    """The product of two tensors that hold nothing; the defaults pass every gate."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    constants: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return Launch(
        kernel=product,
        grid=(1,),
        arguments={
            "p_a": meta(block_m, k),
            "p_b": meta(block_n, k),
            "p_out": meta(block_m, block_n, dtype=torch.float32),
            "K": k,
            "DIVISOR": 7,
        },
        constants=constants | {"PRECISION": precision, "DIVIDES": divides, "SCATTERS": scatters},
        num_warps=num_warps,
        num_stages=num_stages,
        work=Work(
            flop=2 * block_m * block_n * k,
            read=(block_m + block_n) * k * dtype.itemsize,
            written=4 * block_m * block_n,
            matrix=True,
        ),
    )
