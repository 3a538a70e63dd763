"""The steps of the inner loop backwards: equations in `base_learner_backward`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base_learner import one_hot, own_product, valid_rows
from .base_learner_config import PRECISION, FitConfig
from .launch import Arguments, Launch, Work, in_blocks, n_bytes


@triton.jit
def loop_backward_kernel(
    p_support,
    p_labels,
    p_mask,
    p_kernel,
    p_trajectory,
    p_d_weight,
    p_d_bias,
    p_d_first_bias,
    p_lambdas,
    p_left,
    p_own,
    inner_lr,
    n_rows,
    n_way,
    n_features,
    n_steps,
    HAS_MASK: tl.constexpr,
    IS_STREAMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The steps of one task backwards, to what multiplies x, dW_T and W₀ in dx: `p_left` [n, n + 2·C]; grid (T,)."""
    LEFT: tl.constexpr = BLOCK_N + 2 * BLOCK_C
    o_t = tl.program_id(0).to(tl.int64)
    o_n, o_c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    o_d, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    m_n = valid_rows(p_mask, o_t, o_n, n_rows, HAS_MASK)
    m_c = o_c < n_way
    rate = tl.div_rn(inner_lr, tl.maximum(tl.sum(m_n.to(tl.float32)), 1.0))
    b_label = tl.load(p_labels + o_t * n_rows + o_n, mask=m_n, other=0)
    b_db = tl.load(p_d_bias + o_t * n_way + o_c, mask=m_c, other=0.0)

    b_dr = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    p_x = p_support + o_t * n_rows * n_features + (o_n[:, None] * n_features + o_d[None, :])
    p_dw = p_d_weight + o_t * n_way * n_features + (o_c[:, None] * n_features + o_d[None, :])
    for d in range(0, n_features, BLOCK_D):
        m_d = (o_d < n_features - d)[None, :]
        b_x = tl.load(p_x + d, mask=m_n[:, None] & m_d, other=0.0).to(tl.float32)
        b_dw = tl.load(p_dw + d, mask=m_c[:, None] & m_d, other=0.0)
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_C] -> [BLOCK_N, BLOCK_C]
        b_dr = tl.dot(b_x, tl.trans(b_dw), b_dr, input_precision=PRECISION)
    b_dr = tl.where(m_n[:, None], rate * (b_dr + b_db[None, :]), 0.0)

    width = (n_steps + 1) * BLOCK_C
    o_row = o_n[:, None] * width
    p_p = p_trajectory + o_t * BLOCK_N * width
    p_l = p_lambdas + o_t * BLOCK_N * width
    p_h = p_kernel + o_t * BLOCK_N * BLOCK_N + o_n[:, None] * BLOCK_N
    if IS_STREAMED:
        p_own += o_t * BLOCK_N * BLOCK_C
    else:
        b_h = tl.load(p_h + o_n[None, :])
    b_lambda = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for back in range(n_steps):
        t = n_steps - 1 - back
        b_p = tl.load(p_p + t * BLOCK_C + (o_row + o_c[None, :]))
        tl.store(p_l + t * BLOCK_C + (o_row + o_c[None, :]), b_lambda)
        if IS_STREAMED:
            tl.store(p_own + o_n[:, None] * BLOCK_C + o_c[None, :], b_lambda)
            tl.debug_barrier()
            p_right = p_own + o_k[:, None] * BLOCK_C + o_c[None, :]
            b_de = own_product(p_h + o_k[None, :], p_right, b_dr, BLOCK_N, BLOCK_K, BLOCK_C, PRECISION)
            tl.debug_barrier()
        else:
            # [BLOCK_N, BLOCK_N] @ [BLOCK_N, BLOCK_C] -> [BLOCK_N, BLOCK_C]
            b_de = tl.dot(b_h, b_lambda, b_dr, input_precision=PRECISION)
        b_lambda += b_p * (tl.sum(b_p * b_de, 1)[:, None] - b_de)

    tl.store(p_d_first_bias + o_t * n_way + o_c, b_db + tl.sum(b_lambda, 0), mask=m_c)
    p_left += (o_t * BLOCK_N + o_n[:, None]) * LEFT
    # R_T lies after the last step.
    b_r = tl.load(p_p + n_steps * BLOCK_C + (o_row + o_c[None, :]))
    tl.store(p_left + BLOCK_N + o_c[None, :], rate * b_r)
    tl.store(p_left + BLOCK_N + BLOCK_C + o_c[None, :], b_lambda)
    # Other threads have written the λ that this one reads.
    tl.debug_barrier()
    b_d = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for k in range(0, n_steps * BLOCK_C, BLOCK_K):
        # All steps in one product: column t·BLOCK_C + c.
        m_k = (o_k < n_steps * BLOCK_C - k)[None, :]
        b_e = tl.load(p_p + k + (o_row + o_k[None, :]), mask=m_k, other=0.0)
        b_e = tl.where(m_k, one_hot(b_label, (k + o_k) % BLOCK_C, m_n, n_way) - b_e, 0.0)
        b_l = tl.load(p_l + k + (o_row + o_k[None, :]), mask=m_k, other=0.0)
        # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_N] -> [BLOCK_N, BLOCK_N]
        b_d = tl.dot(b_e, tl.trans(b_l), b_d, input_precision=PRECISION)
    tl.store(p_left + o_n[None, :], rate * (b_d + tl.trans(b_d)))


def loop_launch(
    config: FitConfig,
    given: tuple[Tensor, Tensor, Tensor | None],
    kernel: Tensor,
    trajectory: Tensor,
    d_head: tuple[Tensor, Tensor],
    d_first_bias: Tensor,
    left: Tensor,
    inner_lr: float,
    n_steps: int,
) -> Launch:
    support, labels, mask = given
    n_tasks, n_rows, n_features = support.shape
    n_way = d_first_bias.shape[1]
    own = kernel.new_empty(n_tasks, config.block_n, config.block_c) if config.is_streamed else None
    arguments: Arguments = {
        "p_support": support,
        "p_labels": labels,
        "p_mask": mask,
        "p_kernel": kernel,
        "p_trajectory": trajectory,
        "p_d_weight": d_head[0],
        "p_d_bias": d_head[1],
        "p_d_first_bias": d_first_bias,
        "p_lambdas": torch.empty_like(trajectory),
        "p_left": left,
        "p_own": own,
        "inner_lr": float(inner_lr),
        "n_rows": n_rows,
        "n_way": n_way,
        "n_features": n_features,
        "n_steps": n_steps,
    }
    constants = {
        "HAS_MASK": mask is not None,
        "IS_STREAMED": config.is_streamed,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "BLOCK_D": config.block_d,
        "BLOCK_K": config.block_k,
        "PRECISION": PRECISION,
    }

    def products(n_rows: int, n_way: int, n_features: int) -> int:
        return n_way * n_rows * (n_features + 2 * n_steps * n_rows)

    work = Work(
        flop=2 * n_tasks * products(n_rows, n_way, n_features),
        padded=2 * n_tasks * products(config.block_n, config.block_c, in_blocks(n_features, config.block_d)),
        read=n_bytes(support, labels, mask, kernel, trajectory, *d_head),
        written=n_bytes(d_first_bias, left),
    )
    shape = config.num_warps_back, config.num_stages
    return Launch(loop_backward_kernel, (n_tasks,), arguments, constants, *shape, work)
