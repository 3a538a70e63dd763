"""Gradients of fitted heads and their query logits, of first order and, in closed form, of second.

With the notation of `base_learner`, dW_T = d_head + d_logitsᵀ·Q, P_t from the trajectory and E_t = Y − P_t:

    first order:   dQ = d_logits·W_T    dW₀ = dW_T    db₀ = db_T
    second order:  dR = r·(x·dW_Tᵀ + db_T)
                   backwards from λ = 0:  dE_t = dR + H·λ    λ ← λ + P_t ⊙ (Σ_classes P_t ⊙ dE_t − dE_t)
                   D = Σ_t E_t·λ_{t+1}ᵀ   db₀ = db_T + Σ_rows λ    dW₀ = dW_T + λᵀ·x
                   dx = r·(D + Dᵀ)·x + r·R_T·dW_T + λ·W₀

The three parts are launches of their own: only the loop is one program a task. A shared head's gradient is the sum of
those of all tasks, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base_learner import fit, valid_rows
from .base_learner_config import CASES, PRECISION, FitConfig, fit_config, head_config, piece_config
from .base_learner_loop_backward import loop_launch
from .launch import Arguments, Launch, Work, chip_of, in_blocks, n_bytes, observed


@triton.jit
def head_backward_kernel(
    p_d_logits,
    p_d_head_weight,
    p_d_head_bias,
    p_query,
    p_head_weight,
    p_d_query,
    p_d_weight,
    p_d_bias,
    n_query,
    n_way,
    n_features,
    HAS_LOGITS: tl.constexpr,
    HAS_HEAD_WEIGHT: tl.constexpr,
    HAS_HEAD_BIAS: tl.constexpr,
    WANTS_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ, dW_T and db_T for some features of one task; grid (T, pieces of features)."""
    o_t = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_c, m_d = o_c < n_way, o_d < n_features
    m_w = m_c[:, None] & m_d[None, :]
    o_w = (o_t * n_way + o_c[:, None]) * n_features + o_d[None, :]
    b_dw = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    b_db = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_HEAD_WEIGHT:
        b_dw = tl.load(p_d_head_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    if HAS_HEAD_BIAS:
        b_db = tl.load(p_d_head_bias + o_t * n_way + o_c, mask=m_c, other=0.0).to(tl.float32)
    if HAS_LOGITS:
        b_w = tl.load(p_head_weight + o_w, mask=m_w, other=0.0)
        for m in range(0, n_query, BLOCK_M):
            o_m = m + tl.arange(0, BLOCK_M)
            m_m = o_m < n_query
            m_q = m_m[:, None] & m_d[None, :]
            o_q = (o_t * n_query + o_m[:, None]) * n_features + o_d[None, :]
            o_z = (o_t * n_query + o_m[:, None]) * n_way + o_c[None, :]
            b_dz = tl.load(p_d_logits + o_z, mask=m_m[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            b_q = tl.load(p_query + o_q, mask=m_q, other=0.0).to(tl.float32)
            # [BLOCK_C, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_C, BLOCK_D]
            b_dw = tl.dot(tl.trans(b_dz), b_q, b_dw, input_precision=PRECISION)
            b_db += tl.sum(b_dz, 0)
            if WANTS_QUERY:
                # [BLOCK_M, BLOCK_C] @ [BLOCK_C, BLOCK_D] -> [BLOCK_M, BLOCK_D]
                b_dq = tl.dot(b_dz, b_w, input_precision=PRECISION)
                tl.store(p_d_query + o_q, b_dq.to(p_d_query.dtype.element_ty), mask=m_q)
    tl.store(p_d_weight + o_w, b_dw, mask=m_w)
    if tl.program_id(1) == 0:
        tl.store(p_d_bias + o_t * n_way + o_c, b_db, mask=m_c)


@triton.jit
def operand_backward_kernel(
    p_support,
    p_mask,
    p_weight,
    p_d_weight,
    p_left,
    p_d_first_weight,
    p_d_support,
    n_rows,
    n_way,
    n_features,
    IS_SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WANTS_SUPPORT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW₀ and dx for some features of one task; grid (T, pieces of features)."""
    LEFT: tl.constexpr = BLOCK_N + 2 * BLOCK_C
    # A product sums over 16 at least.
    PIECE_C: tl.constexpr = max(BLOCK_C, 16)
    PIECE: tl.constexpr = min(PIECE_C, 32)
    o_t = tl.program_id(0).to(tl.int64)
    o_n, o_c, o_k = tl.arange(0, BLOCK_N), tl.arange(0, PIECE_C), tl.arange(0, BLOCK_K)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_c, m_d = o_c < n_way, o_d < n_features
    m_w = m_c[:, None] & m_d[None, :]
    o_w = (o_t * n_way + o_c[:, None]) * n_features + o_d[None, :]
    b_dw = tl.load(p_d_weight + o_w, mask=m_w, other=0.0)
    p_left += o_t * BLOCK_N * LEFT
    b_dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_first = b_dw
    for k in range(0, BLOCK_N, BLOCK_K):
        m_k = valid_rows(p_mask, o_t, k + o_k, n_rows, HAS_MASK)
        p_x = p_support + (o_t * n_rows + k + o_k[:, None]) * n_features + o_d[None, :]
        b_x = tl.load(p_x, mask=m_k[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        p_l = p_left + (k + o_k[None, :]) * LEFT + BLOCK_N + BLOCK_C + o_c[:, None]
        b_l = tl.load(p_l, mask=m_c[:, None], other=0.0)
        # [PIECE_C, BLOCK_K] @ [BLOCK_K, BLOCK_D] -> [PIECE_C, BLOCK_D]
        b_first = tl.dot(b_l, b_x, b_first, input_precision=PRECISION)
        if WANTS_SUPPORT:
            b_g = tl.load(p_left + o_n[:, None] * LEFT + k + o_k[None, :])
            # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_D] -> [BLOCK_N, BLOCK_D]
            b_dx = tl.dot(b_g, b_x, b_dx, input_precision=PRECISION)
    tl.store(p_d_first_weight + o_w, b_first, mask=m_w)
    if WANTS_SUPPORT:
        # Of many classes a piece at a time: their products' factors wait in registers.
        for c in range(0, PIECE_C, PIECE):
            o_p = c + tl.arange(0, PIECE)
            m_p = o_p < n_way
            m_wp = m_p[:, None] & m_d[None, :]
            o_wp = (o_t * n_way + o_p[:, None]) * n_features + o_d[None, :]
            o_w0 = o_p[:, None] * n_features + o_d[None, :] if IS_SHARED else o_wp
            b_dwp = tl.load(p_d_weight + o_wp, mask=m_wp, other=0.0)
            b_w = tl.load(p_weight + o_w0, mask=m_wp, other=0.0).to(tl.float32)
            p_s = p_left + o_n[:, None] * LEFT + BLOCK_N + o_p[None, :]
            b_s = tl.load(p_s, mask=m_p[None, :], other=0.0)
            b_l = tl.load(p_s + BLOCK_C, mask=m_p[None, :], other=0.0)
            # [BLOCK_N, PIECE] @ [PIECE, BLOCK_D] -> [BLOCK_N, BLOCK_D]
            b_dx = tl.dot(b_s, b_dwp, b_dx, input_precision=PRECISION)
            b_dx = tl.dot(b_l, b_w, b_dx, input_precision=PRECISION)
        m_n = valid_rows(p_mask, o_t, o_n, n_rows, HAS_MASK)
        b_dx = tl.where(m_n[:, None], b_dx, 0.0).to(p_d_support.dtype.element_ty)
        p_dx = p_d_support + (o_t * n_rows + o_n[:, None]) * n_features + o_d[None, :]
        tl.store(p_dx, b_dx, mask=(o_n < n_rows)[:, None] & m_d[None, :])


def fit_backward(
    d_logits: Tensor | None,
    d_head_weight: Tensor | None,
    d_head_bias: Tensor | None,
    support: Tensor,
    labels: Tensor,
    query: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    head_weight: Tensor,
    kernel: Tensor,
    trajectory: Tensor,
    inner_lr: float,
    n_steps: int,
    second_order: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of support, query, weight and bias from those of what `base_learner.fit` returned.

    One launch in first order, three in second, and the sums over tasks of a shared head's gradient.

    Args:
        d_logits: [T, m, C]; d_head_weight: [T, C, D]; d_head_bias: [T, C]; None is 0.
        support, labels, query, weight, bias, mask, inner_lr, n_steps, second_order: as in `fit`.
        head_weight, kernel, trajectory: what `fit` returned.
        wanted: whether those of support, query and head are.

    Returns:
        Each in its operand's shape and dtype; of 0 elements where it is not wanted.
    """
    wants_support, wants_query, wants_head = wanted
    n_tasks, n_rows, _ = support.shape

    def like(t: Tensor | None, is_wanted: bool) -> Tensor:
        if t is None or not is_wanted:
            return support.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    d_support, d_query = like(support, wants_support), like(query, wants_query)
    d_weight, d_bias = torch.empty_like(head_weight), head_weight.new_empty(head_weight.shape[:2])
    if wants_support and not second_order:
        d_support.zero_()
    if n_tasks:
        config = fit_config(n_rows, weight.shape[-2], chip_of(support.device))
        d_first = d_weight, d_bias
        _head_launch(
            config, (d_logits, d_head_weight, d_head_bias), query, head_weight, d_query, *d_first
        ).run()
        if second_order and (wants_support or wants_head):
            d_weight, d_bias = torch.empty_like(d_weight), torch.empty_like(d_bias)
            given = support.contiguous(), labels.contiguous(), None if mask is None else mask.contiguous()
            left = head_weight.new_empty(n_tasks, config.block_n, config.block_n + 2 * config.block_c)
            loop_launch(config, given, kernel, trajectory, d_first, d_bias, left, inner_lr, n_steps).run()
            _operand_launch(config, given, weight.contiguous(), d_first[0], left, d_weight, d_support).run()
    if not wants_head:
        return d_support, d_query, like(weight, False), like(bias, False)
    if weight.dim() == 2:
        d_weight, d_bias = d_weight.sum(0), d_bias.sum(0)
    return d_support, d_query, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _head_launch(
    config: FitConfig,
    reached: tuple[Tensor | None, Tensor | None, Tensor | None],
    query: Tensor | None,
    head_weight: Tensor,
    d_query: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> Launch:
    d_logits, d_head_weight, d_head_bias = (None if t is None else t.contiguous() for t in reached)
    n_tasks, n_way, n_features = head_weight.shape
    n_query = 0 if query is None else query.shape[1]
    # A product sums over 16 classes at least.
    block_c = max(16, config.block_c)
    pieces = head_config(block_c)
    arguments: Arguments = {
        "p_d_logits": d_logits,
        "p_d_head_weight": d_head_weight,
        "p_d_head_bias": d_head_bias,
        "p_query": None if query is None else query.contiguous(),
        "p_head_weight": head_weight,
        "p_d_query": d_query,
        "p_d_weight": d_weight,
        "p_d_bias": d_bias,
        "n_query": n_query,
        "n_way": n_way,
        "n_features": n_features,
    }
    constants = {
        "HAS_LOGITS": d_logits is not None,
        "HAS_HEAD_WEIGHT": d_head_weight is not None,
        "HAS_HEAD_BIAS": d_head_bias is not None,
        "WANTS_QUERY": d_query.numel() > 0,
        "BLOCK_M": pieces.block_m,
        "BLOCK_C": block_c,
        "BLOCK_D": pieces.block_d,
        "PRECISION": PRECISION,
    }
    grid = n_tasks, triton.cdiv(n_features, pieces.block_d)
    n_products = 1 + (d_query.numel() > 0)
    padded = in_blocks(n_query, pieces.block_m) * grid[1] * pieces.block_d * block_c
    work = Work(
        flop=2 * n_tasks * n_products * n_query * n_features * n_way,
        padded=2 * n_tasks * n_products * padded,
        read=n_bytes(d_logits, d_head_weight, d_head_bias, query, head_weight),
        written=n_bytes(d_query, d_weight, d_bias),
    )
    shape = pieces.num_warps, pieces.num_stages
    return Launch(head_backward_kernel, grid, arguments, constants, *shape, work, pieces.programs)


def _operand_launch(
    config: FitConfig,
    given: tuple[Tensor, Tensor, Tensor | None],
    weight: Tensor,
    d_head_weight: Tensor,
    left: Tensor,
    d_weight: Tensor,
    d_support: Tensor,
) -> Launch:
    support, _, mask = given
    n_tasks, n_rows, n_features = support.shape
    n_way = weight.shape[-2]
    pieces = piece_config(config.block_n, config.block_c)
    arguments: Arguments = {
        "p_support": support,
        "p_mask": mask,
        "p_weight": weight,
        "p_d_weight": d_head_weight,
        "p_left": left,
        "p_d_first_weight": d_weight,
        "p_d_support": d_support,
        "n_rows": n_rows,
        "n_way": n_way,
        "n_features": n_features,
    }
    constants = {
        "IS_SHARED": weight.dim() == 2,
        "HAS_MASK": mask is not None,
        "WANTS_SUPPORT": d_support.numel() > 0,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "BLOCK_D": pieces.block_d,
        "BLOCK_K": config.block_k,
        "PRECISION": PRECISION,
    }
    grid = n_tasks, triton.cdiv(n_features, pieces.block_d)

    def products(n_rows: int, n_way: int, n_features: int) -> int:
        return n_rows * n_features * (n_way + (d_support.numel() > 0) * (n_rows + 2 * n_way))

    work = Work(
        flop=2 * n_tasks * products(n_rows, n_way, n_features),
        padded=2 * n_tasks * products(config.block_n, config.block_c, grid[1] * pieces.block_d),
        read=n_bytes(support, mask, weight, d_head_weight, left),
        written=n_bytes(d_weight, d_support),
    )
    return Launch(
        operand_backward_kernel, grid, arguments, constants, pieces.num_warps, pieces.num_stages, work
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration, with a readable name."""
    for case in CASES:
        operands = case.operands()
        with observed():
            logits, head_weight, _, kernel, trajectory = fit(*operands, 0.05, case.n_steps, True)
        kept = head_weight, kernel, trajectory, 0.05, case.n_steps
        with observed() as launches:
            fit_backward(logits, None, None, *operands, *kept, True, [True, True, True])
        for launch in launches:
            part = launch.name.removesuffix("_backward_kernel")
            yield f"base_learner_backward-{part}-{case}", launch
