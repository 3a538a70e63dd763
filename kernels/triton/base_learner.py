"""Heads fitted to the support sets of many tasks: the whole inner loop of a task, and its query logits, in one program.

With x [n, D] (masked rows 0), one-hot targets Y, the rate r = inner_lr/n and Z₀ = x·W₀ᵀ + b₀ [n, C], in the dual form:

    H = r·(x·xᵀ + 1)      P_t = softmax(Z₀ + H·R_t)      R_{t+1} = R_t + Y − P_t, rows of masked images 0
    W_T = W₀ + r·R_Tᵀ·x   b_T = b₀ + r·Σ_rows R_T        logits = Q·W_Tᵀ + b_T

H, the logits and R stay in registers for all steps; where they do not fit, H and R are read in pieces from memory that
only this program uses. Products of float32 are exact ("ieee"): a TF32 Gram matrix is 1e-3 off.
A label out of range makes its task's results NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base_learner_config import CASES, PRECISION, fit_config
from .launch import BASE, Arguments, Launch, Work, chip_of, in_blocks, n_bytes, observed


@triton.jit
def valid_rows(p_mask, o_t, o_n, n_rows, HAS_MASK: tl.constexpr):
    """Which of the support rows `o_n` of task `o_t` count."""
    m_n = o_n < n_rows
    if HAS_MASK:
        m_n &= tl.load(p_mask + o_t * n_rows + o_n, mask=m_n, other=0) != 0
    return m_n


@triton.jit
def one_hot(b_label, o_c, m_n, n_way):
    """Y [len(b_label), len(o_c)]; NaN where a label is out of range, 0 in rows that do not count."""
    b_y = (b_label[:, None] == o_c[None, :]).to(tl.float32)
    b_y = tl.where(((b_label >= 0) & (b_label < n_way))[:, None], b_y, float("nan"))
    return tl.where(m_n[:, None], b_y, 0.0)


@triton.jit
def own_product(
    p_left, p_right, b_acc, WIDTH, BLOCK_K: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr
):
    """`b_acc` + left [·, WIDTH] @ right [WIDTH, STRIDE], both read in pieces from the program's own memory."""
    for k in tl.range(0, WIDTH, BLOCK_K, num_stages=1):
        # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_C] -> [BLOCK_N, BLOCK_C]
        b_acc = tl.dot(tl.load(p_left + k), tl.load(p_right + k * STRIDE), b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def fit_kernel(
    p_support,
    p_labels,
    p_query,
    p_weight,
    p_bias,
    p_mask,
    p_logits,
    p_head_weight,
    p_head_bias,
    p_kernel,
    p_trajectory,
    p_residuals,
    inner_lr,
    n_rows,
    n_query,
    n_way,
    n_features,
    n_steps,
    IS_SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_QUERY: tl.constexpr,
    SAVES: tl.constexpr,
    IS_STREAMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One task; grid (T,)."""
    o_t = tl.program_id(0).to(tl.int64)
    o_n, o_c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    o_d, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    # Without steps the head does not depend on the support set, whatever it holds.
    m_n = valid_rows(p_mask, o_t, o_n, n_rows, HAS_MASK) & (n_steps > 0)
    m_c = o_c < n_way
    rate = tl.div_rn(inner_lr, tl.maximum(tl.sum(m_n.to(tl.float32)), 1.0))
    if not IS_SHARED:
        p_weight += o_t * n_way * n_features
        p_bias += o_t * n_way
    p_x = p_support + o_t * n_rows * n_features + o_d[None, :]
    p_w = p_weight + o_c[:, None] * n_features + o_d[None, :]

    b_h = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    b_start = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for d in range(0, n_features, BLOCK_D):
        m_d = (o_d < n_features - d)[None, :]
        b_x = tl.load(p_x + o_n[:, None] * n_features + d, mask=m_n[:, None] & m_d, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + d, mask=m_c[:, None] & m_d, other=0.0).to(tl.float32)
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_N, BLOCK_N]
        b_h = tl.dot(b_x, tl.trans(b_x), b_h, input_precision=PRECISION)
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_C] -> [BLOCK_N, BLOCK_C]
        b_start = tl.dot(b_x, tl.trans(b_w), b_start, input_precision=PRECISION)
    b_bias = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    # Classes of the padding have probability 0.
    b_start = tl.where(m_c[None, :], b_start + b_bias[None, :], float("-inf"))
    b_h = (b_h + 1.0) * rate
    b_label = tl.load(p_labels + o_t * n_rows + o_n, mask=m_n, other=0)
    b_y = one_hot(b_label, o_c, m_n, n_way)

    p_own = p_residuals + o_t * BLOCK_N * BLOCK_C
    p_r = p_own + o_n[:, None] * BLOCK_C + o_c[None, :]
    b_r = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if IS_STREAMED or SAVES:
        p_h = p_kernel + (o_t * BLOCK_N + o_n[:, None]) * BLOCK_N
        tl.store(p_h + o_n[None, :], b_h)
    if SAVES:
        o_p = o_n[:, None] * ((n_steps + 1) * BLOCK_C) + o_c[None, :]
        p_p = p_trajectory + o_t * BLOCK_N * (n_steps + 1) * BLOCK_C
    for t in range(n_steps):
        if IS_STREAMED:
            tl.store(p_r, b_r)
            tl.debug_barrier()
            p_right = p_own + o_k[:, None] * BLOCK_C + o_c[None, :]
            b_z = own_product(p_h + o_k[None, :], p_right, b_start, BLOCK_N, BLOCK_K, BLOCK_C, PRECISION)
            tl.debug_barrier()
        else:
            # [BLOCK_N, BLOCK_N] @ [BLOCK_N, BLOCK_C] -> [BLOCK_N, BLOCK_C]
            b_z = tl.dot(b_h, b_r, b_start, input_precision=PRECISION)
        b_e = tl.exp(b_z - tl.max(b_z, 1)[:, None])
        b_p = tl.where(m_n[:, None], b_e / tl.sum(b_e, 1)[:, None], 0.0)
        if SAVES:
            tl.store(p_p + t * BLOCK_C + o_p, b_p)
        b_r += b_y - b_p
    if SAVES:
        tl.store(p_p + n_steps * BLOCK_C + o_p, b_r)

    tl.store(p_head_bias + o_t * n_way + o_c, b_bias + rate * tl.sum(b_r, 0), mask=m_c)
    tl.store(p_r, b_r)
    tl.debug_barrier()
    p_head = p_head_weight + o_t * n_way * n_features + o_c[:, None] * n_features + o_d[None, :]
    for d in range(0, n_features, BLOCK_D):
        m_d = (o_d < n_features - d)[None, :]
        b_s = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        for k in range(0, BLOCK_N, BLOCK_K):
            m_k = valid_rows(p_mask, o_t, k + o_k, n_rows, HAS_MASK) & (n_steps > 0)
            b_x = tl.load(p_x + (k + o_k)[:, None] * n_features + d, mask=m_k[:, None] & m_d, other=0.0)
            # [BLOCK_C, BLOCK_K] @ [BLOCK_K, BLOCK_D] -> [BLOCK_C, BLOCK_D]
            b_left = tl.load(p_own + (k + o_k)[None, :] * BLOCK_C + o_c[:, None])
            b_s = tl.dot(b_left, b_x.to(tl.float32), b_s, input_precision=PRECISION)
        b_w = tl.load(p_w + d, mask=m_c[:, None] & m_d, other=0.0).to(tl.float32)
        tl.store(p_head + d, b_w + rate * b_s, mask=m_c[:, None] & m_d)
    if HAS_QUERY:
        tl.debug_barrier()
        query_logits(
            p_query,
            p_logits,
            p_head,
            p_head_bias,
            o_t,
            n_query,
            n_way,
            n_features,
            BLOCK_M,
            BLOCK_C,
            BLOCK_D,
            PRECISION,
        )


@triton.jit
def query_logits(
    p_query,
    p_logits,
    p_head,
    p_head_bias,
    o_t,
    n_query,
    n_way,
    n_features,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of a task's query rows by the head that the program has written."""
    o_c, o_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    m_c = o_c < n_way
    b_bias = tl.load(p_head_bias + o_t * n_way + o_c, mask=m_c, other=0.0)
    for m in range(0, n_query, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        m_m = o_m < n_query
        p_q = p_query + (o_t * n_query + o_m[:, None]) * n_features + o_d[None, :]
        b_z = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for d in range(0, n_features, BLOCK_D):
            m_d = (o_d < n_features - d)[None, :]
            b_q = tl.load(p_q + d, mask=m_m[:, None] & m_d, other=0.0).to(tl.float32)
            b_w = tl.load(p_head + d, mask=m_c[:, None] & m_d, other=0.0)
            # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_C] -> [BLOCK_M, BLOCK_C]
            b_z = tl.dot(b_q, tl.trans(b_w), b_z, input_precision=PRECISION)
        p_z = p_logits + (o_t * n_query + o_m[:, None]) * n_way + o_c[None, :]
        b_z = (b_z + b_bias[None, :]).to(p_logits.dtype.element_ty)
        tl.store(p_z, b_z, mask=m_m[:, None] & m_c[None, :])


def outputs(
    support: Tensor, query: Tensor | None, weight: Tensor, n_steps: int, second_order: bool
) -> tuple[Tensor, ...]:
    """What `fit` fills: logits [T, m, C], head [T, C, D], [T, C], H [T, n', n'], P_t and R_T [T, n', n_steps + 1, C'].

    n' and C' are the block sizes. Without a query set m is 0; the last two are of 0 tasks without `second_order`.
    """
    n_tasks, n_rows, n_features = support.shape
    n_way = weight.shape[-2]
    config = fit_config(n_rows, n_way, BASE)
    n_kept = n_tasks if second_order else 0
    wide: dict[str, Any] = {"dtype": torch.float32, "device": support.device}
    logits = torch.promote_types(weight.dtype if query is None else query.dtype, weight.dtype)
    n_query = 0 if query is None else query.shape[1]
    return (
        torch.empty(n_tasks, n_query, n_way, dtype=logits, device=support.device),
        torch.empty(n_tasks, n_way, n_features, **wide),
        torch.empty(n_tasks, n_way, **wide),
        torch.empty(n_kept, config.block_n, config.block_n, **wide),
        torch.empty(n_kept, config.block_n, n_steps + 1, config.block_c, **wide),
    )


def fit(
    support: Tensor,
    labels: Tensor,
    query: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    inner_lr: float,
    n_steps: int,
    second_order: bool,
) -> tuple[Tensor, ...]:
    """Fits all tasks' heads and applies them, in one launch.

    Args:
        support: [T, n, D]; query: [T, m, D] or None; float32, bfloat16 or float16, as weight and bias.
        labels: int64 [T, n].
        weight, bias: [C, D], [C], or one a task, [T, C, D], [T, C].
        mask: bool [T, n], the rows that count, or None.
        inner_lr, n_steps: of the inner loop.
        second_order: keep what `base_learner_backward` needs of the steps.

    Returns:
        As `outputs` says; the heads are float32, the logits of the common type of `query` and `weight`.
    """
    made = outputs(support, query, weight, n_steps, second_order)
    if not support.shape[0]:
        return made
    given = [None if t is None else t.contiguous() for t in (support, labels, query, weight, bias, mask)]
    _launch(given, made, inner_lr, n_steps, second_order).run()
    return made


def _launch(
    given: list[Tensor | None], made: tuple[Tensor, ...], inner_lr: float, n_steps: int, second_order: bool
) -> Launch:
    support, labels, query, weight, bias, mask = given
    assert support is not None
    assert weight is not None
    logits, head_weight, head_bias, kernel, trajectory = made
    n_tasks, n_rows, n_features = support.shape
    n_way, n_query = weight.shape[-2], logits.shape[1]
    config = fit_config(n_rows, n_way, chip_of(support.device))
    block_n, block_c = config.block_n, config.block_c
    if config.is_streamed and not second_order:
        kernel = head_bias.new_empty(n_tasks, block_n, block_n)
    arguments: Arguments = {
        "p_support": support,
        "p_labels": labels,
        "p_query": query,
        "p_weight": weight,
        "p_bias": bias,
        "p_mask": mask,
        "p_logits": logits,
        "p_head_weight": head_weight,
        "p_head_bias": head_bias,
        "p_kernel": kernel if config.is_streamed or second_order else None,
        "p_trajectory": trajectory if second_order else None,
        "p_residuals": head_bias.new_empty(n_tasks, block_n, block_c),
        "inner_lr": float(inner_lr),
        "n_rows": n_rows,
        "n_query": n_query,
        "n_way": n_way,
        "n_features": n_features,
        "n_steps": n_steps,
    }
    constants = {
        "IS_SHARED": weight.dim() == 2,
        "HAS_MASK": mask is not None,
        "HAS_QUERY": query is not None,
        "SAVES": second_order,
        "IS_STREAMED": config.is_streamed,
        "BLOCK_N": block_n,
        "BLOCK_C": block_c,
        "BLOCK_D": config.block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "PRECISION": PRECISION,
    }

    def products(n_rows: int, n_way: int, n_features: int, n_query: int) -> int:
        """Of the Gram matrix, the first logits and the head; of the steps; of the query's logits."""
        head = n_rows * n_features * (n_rows + 2 * n_way)
        return head + n_steps * n_rows**2 * n_way + n_query * n_features * n_way

    n_blocks = in_blocks(n_features, config.block_d), in_blocks(n_query, config.block_m)
    work = Work(
        flop=2 * n_tasks * products(n_rows, n_way, n_features, n_query),
        padded=2 * n_tasks * products(block_n, block_c, *n_blocks),
        read=n_bytes(support, labels, query, weight, bias, mask),
        written=n_bytes(logits, head_weight, head_bias, *(made[3:] if second_order else ())),
    )
    launch = fit_kernel, (n_tasks,), arguments, constants, config.num_warps, config.num_stages, work
    return Launch(*launch, None if second_order else config.programs)


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration, with a readable name."""
    for case in CASES:
        for order in ("first", "second"):
            with observed() as launches:
                fit(*case.operands(), 0.05, case.n_steps, order == "second")
            (launch,) = launches
            yield f"base_learner-{case}-{order}", launch
