"""The implicit matrix product behind `ss_conv`, its input gradient and a block's end, with the epilogue.

With rows m = output pixels (n, y, x), columns o = output channels and the sum over taps (r, s) and channels i:

    z[m, o] = Σ_rsi x[n, y − p + r, x − p + s, i]·W[o, r, s, i] + t[o]
    y = pool(act(z + Σ_j x'[n, y, x, j]·W'[o, j] + residual))         order and place of the activation: `Epilogue`

Images are dense channels-last, without a border: a row keeps a mask of 9 bits, the taps that lie inside its image.
With pooling four rows in succession are one 2×2 window, and what pooling drops is not computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import Epilogue
from .launch import Launch, Work, chip_of, in_blocks, n_bytes
from .ss_conv_epilogue import (
    activate,
    coded,
    dense,
    finish,
    images,
    locate,
    output_sizes,
    placed,
    precision,
    shifted,
    tile,
)


@triton.jit
def load_taps(p_w, m_k, EVEN: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of a weight's rows, of which `m_k` are there."""
    return tl.load(p_w) if EVEN else tl.load(p_w, mask=m_k[:, None], other=0.0)


@triton.jit
def add_step(
    b_acc,
    b_acc2,
    step,
    p_rows,
    m_taps,
    width,
    p_w,
    p_w2,
    SIDE: tl.constexpr,
    N_IN: tl.constexpr,
    STRIDE_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds one chunk of channels under one tap."""
    TAPS: tl.constexpr = SIDE * SIDE
    EVEN: tl.constexpr = N_IN % BLOCK_K == 0
    # Taps go round fastest: the nine of a chunk of channels find their pixels in the nearest cache.
    tap, k = step % TAPS, step // TAPS * BLOCK_K
    m_k = tl.arange(0, BLOCK_K) < N_IN - k
    m_x = ((m_taps >> tap) & 1)[:, None] != 0
    if not EVEN:
        m_x = m_x & m_k[None, :]
    o_x = (tap // SIDE * width + tap % SIDE) * N_IN + k
    b_x = tl.load(p_rows + o_x, mask=m_x, other=0.0, cache_modifier=".ca")
    b_w = load_taps(p_w + (tap * STRIDE_IN + k), m_k, EVEN=EVEN)
    # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N] -> [BLOCK_M, BLOCK_N]
    b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    if b_acc2 is not None:
        b_w2 = load_taps(p_w2 + (tap * STRIDE_IN + k), m_k, EVEN=EVEN)
        # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N2] -> [BLOCK_M, BLOCK_N2]
        b_acc2 = tl.dot(b_x, b_w2, b_acc2, input_precision=PRECISION)
    return b_acc, b_acc2


@triton.jit
def multiply(
    b_acc,
    b_acc2,
    p_images,
    o_corner,
    m_taps,
    width,
    p_weight,
    o_n,
    o_n2,
    n_steps,
    SIDE: tl.constexpr,
    N_IN: tl.constexpr,
    N_OUT: tl.constexpr,
    STRIDE_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds the images under all taps times the weight to one accumulator, or to two that share the images."""
    o_k = tl.arange(0, BLOCK_K)
    row: tl.constexpr = SIDE * SIDE * STRIDE_IN
    p_rows = p_images + o_corner[:, None] * N_IN + o_k[None, :]
    # Columns beyond the last repeat it: they are not stored, and need no mask here.
    p_w = p_weight + tl.minimum(o_n, N_OUT - 1)[None, :] * row + o_k[:, None]
    p_w2 = None
    if b_acc2 is not None:
        p_w2 = p_weight + tl.minimum(o_n2, N_OUT - 1)[None, :] * row + o_k[:, None]
    if SIDE * SIDE * ((N_IN + BLOCK_K - 1) // BLOCK_K) == 1:
        b_acc, b_acc2 = add_step(
            b_acc, b_acc2, 0, p_rows, m_taps, width, p_w, p_w2,
            SIDE=SIDE, N_IN=N_IN, STRIDE_IN=STRIDE_IN, PRECISION=PRECISION, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    else:
        for step in range(n_steps):
            b_acc, b_acc2 = add_step(
                b_acc, b_acc2, step, p_rows, m_taps, width, p_w, p_w2,
                SIDE=SIDE, N_IN=N_IN, STRIDE_IN=STRIDE_IN, PRECISION=PRECISION, BLOCK_K=BLOCK_K,
            )  # fmt: skip
    return b_acc, b_acc2


# One compilation serves every size of batch and map.
@triton.jit(
    do_not_specialize=["n_rows", "height", "width", "out_height", "out_width", "n_steps", "n_other_steps"]
)
def ss_conv_kernel(
    p_x,
    p_weight,
    p_other,
    p_other_weight,
    p_shift,
    p_other_shift,
    p_residual,
    p_out,
    p_codes,
    n_rows,
    height,
    width,
    out_height,
    out_width,
    n_steps,
    n_other_steps,
    PADDING: tl.constexpr,
    SIDE: tl.constexpr,
    N_IN: tl.constexpr,
    N_OTHER: tl.constexpr,
    N_OUT: tl.constexpr,
    STRIDE_IN: tl.constexpr,
    STRIDE_OTHER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """One tile of the product; a second accumulator of BLOCK_N2 columns shares the tile of images."""
    pid_m, o_m, first_n = tile(N_OUT=N_OUT, COLUMNS=BLOCK_N + BLOCK_N2, BLOCK_M=BLOCK_M)
    o_n = first_n + tl.arange(0, BLOCK_N)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    o_n2 = None
    b_acc2 = None
    if BLOCK_N2:
        o_n2 = first_n + BLOCK_N + tl.arange(0, BLOCK_N2)
        b_acc2 = tl.zeros((BLOCK_M, BLOCK_N2), tl.float32)
    o_pixel, o_corner, m_taps = locate(
        o_m, n_rows, height, width, out_height, out_width, PADDING=PADDING, SIDE=SIDE, POOL=POOL
    )
    b_acc, b_acc2 = multiply(
        b_acc, b_acc2, p_x, o_corner, m_taps, width, p_weight, o_n, o_n2, n_steps,
        SIDE=SIDE, N_IN=N_IN, N_OUT=N_OUT, STRIDE_IN=STRIDE_IN, PRECISION=PRECISION, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    b_acc, b_acc2 = shifted(b_acc, b_acc2, o_n, o_n2, p_shift, N_OUT=N_OUT)
    if p_other is not None:
        if ACTIVATION == "before_residual":
            b_acc = activate(b_acc, SLOPE=SLOPE)
            if BLOCK_N2:
                b_acc2 = activate(b_acc2, SLOPE=SLOPE)
        m_rows = (o_m < n_rows).to(tl.int32)
        b_acc, b_acc2 = multiply(
            b_acc, b_acc2, p_other, o_pixel, m_rows, out_width, p_other_weight, o_n, o_n2, n_other_steps,
            SIDE=1, N_IN=N_OTHER, N_OUT=N_OUT, STRIDE_IN=STRIDE_OTHER, PRECISION=PRECISION, BLOCK_K=BLOCK_OTHER,
        )  # fmt: skip
        b_acc, b_acc2 = shifted(b_acc, b_acc2, o_n, o_n2, p_other_shift, N_OUT=N_OUT)
    # An activation before the other product is done already.
    DONE: tl.constexpr = (ACTIVATION == "before_residual") and (p_other is not None)
    REST: tl.constexpr = "none" if DONE else ACTIVATION
    finish(
        b_acc, pid_m, o_n, o_pixel, n_rows, p_residual, p_out, p_codes,
        N_OUT=N_OUT, ACTIVATION=REST, SLOPE=SLOPE, POOL=POOL, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    if BLOCK_N2:
        finish(
            b_acc2, pid_m, o_n2, o_pixel, n_rows, p_residual, p_out, p_codes,
            N_OUT=N_OUT, ACTIVATION=REST, SLOPE=SLOPE, POOL=POOL, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N2,
        )  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """How a product is cut into programs."""

    # Rows of a tile: 128 halve the weights' way from L2 against 64; fewer where the chip would not fill up, and where
    # a window's residual and signs take registers too.
    block_m: int
    # Columns of a tile: wide ones read the images less often from L2.
    block_n: int
    # Columns of a second accumulator, which reads no image again: 160 is 128 + 32.
    block_n2: int
    # Channels of a step: 128 bytes are a line of the cache; a divisor of the channels needs no mask.
    block_k: int
    # 64×64 or more accumulators of fp32 a warp would spill.
    num_warps: int
    # As many steps under way as let an H100's multiprocessor hold two programs, and no more than there are.
    num_stages: int
    # Told to the assembler where small shared memory holds so few that registers are plenty: left to guess, it spares
    # registers for programs that do not fit, and spills for it. So it does at times on sm_100 for a second program of
    # two images' products.
    programs: int | None


# Programs below which a chip of 108 or 132 multiprocessors does not fill up.
FEW_PROGRAMS = 132
SHARED = 113 * 1024
# Shared memory of a multiprocessor that has little, without what the system reserves.
SMALL = 99 * 1024
# Warps of programs that spill unless the assembler is told how many fit. Told so of all, it takes 255 registers for some
# of 8 warps and spills the rest: it is told of steps of a whole line of the cache under nine taps.
TOLD = {86: 8, 89: 8, 120: 4}
# Warps whose threads can have all of the 255 registers that one may have.
FREE_WARPS = 8


def configuration(
    n_rows: int,
    n_in: int,
    n_out: int,
    itemsize: int,
    chip: int,
    *,
    side: int,
    heavy: bool = False,
    has_other: bool = False,
) -> Configuration:
    """By rows and channels of the product and bytes of an element, chip and side of the filters.

    `heavy` is an epilogue of residual and pooling, `has_other` a product with another image too.
    """
    block_n, block_n2 = min(128, max(16, triton.next_power_of_2(n_out))), 0
    if n_out % 128 and n_out % 160 == 0:
        block_n2 = 32
    elif n_out % 128 and n_out > 64:
        block_n = 64
    block_m = 128
    if triton.cdiv(n_rows, block_m) * triton.cdiv(n_out, block_n + block_n2) < FEW_PROGRAMS:
        block_m, block_n = 64, block_n if block_n2 else min(block_n, 64)
    block_m = 64 if heavy else block_m
    num_warps = 8 if block_m * (block_n + block_n2) > 128 * 64 else 4
    block_k = chunk(n_in, itemsize)
    step = (block_m + block_n + block_n2) * block_k * itemsize
    num_stages = min(4, SHARED // step)
    held = max(1, SMALL // (step * (num_stages - 1)))
    n_steps = side * side * triton.cdiv(n_in, block_k)
    long = num_warps == 4 or (side == 3 and block_k * itemsize == 128)
    told = long and TOLD.get(chip) == num_warps and held * num_warps <= FREE_WARPS
    programs = held if told else 1 if has_other and chip == 100 else None
    return Configuration(block_m, block_n, block_n2, block_k, num_warps, min(num_stages, n_steps), programs)


def chunk(n_in: int, itemsize: int) -> int:
    """Channels of a step: the widest divisor of n_in up to 128 bytes, or whatever masks least of it."""
    widest = 128 // itemsize
    even = [k for k in (widest, widest // 2, widest // 4) if k >= 16 and n_in % k == 0]
    return even[0] if even else min(widest, max(16, triton.next_power_of_2(n_in)))


def product(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    *,
    padding: int,
    epilogue: Epilogue,
    save: bool = False,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    other_weight: Tensor | None = None,
    other_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """This module's equation in one launch.

    Args:
        x: [N, I, H, W], channels-last.
        weight: [O, k, k, I'], I' ≥ I, of x's dtype.
        shift: fp32 [O] or None.
        padding: 0 … k − 1.
        epilogue: what follows; `before_residual` with `other` cannot `save`: the signs are gone by the end.
        save: return the codes of the epilogue, where it has any.
        residual: [N, O, H', W'].
        other, other_weight, other_shift: x' [N, J, H', W'], [O, 1, 1, J'] and fp32 [O].

    Returns:
        (y [N, O, H'', W''] channels-last, codes uint8 of the same shape or None).
    """
    assert not (save and other is not None and epilogue.activation == "before_residual")
    x, n_in, (n_out, side, _, stride_in) = dense(x), x.shape[1], weight.shape
    height, width, final_height, final_width, n_rows = output_sizes(x, side, padding, epilogue)
    output = images(x, n_out, final_height, final_width)
    codes = images(x, n_out, final_height, final_width, torch.uint8) if coded(epilogue, save=save) else None
    if not output.numel():
        return output, codes
    residual = None if residual is None else dense(residual)
    n_other = stride_other = 0
    if other is not None and other_weight is not None:
        other, n_other, stride_other = dense(other), other.shape[1], other_weight.shape[3]
    heavy = epilogue.pool and residual is not None
    chip = chip_of(x.device)
    c = configuration(
        n_rows, n_in, n_out, x.element_size(), chip, side=side, heavy=heavy, has_other=other is not None
    )
    block_other = chunk(n_other, x.element_size()) if n_other else 0
    programs = triton.cdiv(n_rows, c.block_m) * triton.cdiv(n_out, c.block_n + c.block_n2)
    depth = side * side * n_in + n_other
    padded_depth = side * side * in_blocks(n_in, c.block_k)
    padded_depth += in_blocks(n_other, block_other) if n_other else 0
    constants: dict[str, Any] = {
        "PADDING": padding,
        "SIDE": side,
        "N_IN": n_in,
        "N_OTHER": n_other,
        "N_OUT": n_out,
        "STRIDE_IN": stride_in,
        "STRIDE_OTHER": stride_other,
        "ACTIVATION": placed(epilogue, alone=residual is None and other is None),
        "SLOPE": epilogue.slope,
        "POOL": epilogue.pool,
        "PRECISION": precision(x.dtype),
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "BLOCK_N2": c.block_n2,
        "BLOCK_K": c.block_k,
        "BLOCK_OTHER": block_other,
    }
    Launch(
        kernel=ss_conv_kernel,
        grid=(programs,),
        arguments={
            "p_x": x,
            "p_weight": weight,
            "p_other": other,
            "p_other_weight": other_weight,
            "p_shift": shift,
            "p_other_shift": other_shift,
            "p_residual": residual,
            "p_out": output,
            "p_codes": codes,
            "n_rows": n_rows,
            "height": x.shape[2],
            "width": x.shape[3],
            "out_height": height,
            "out_width": width,
            "n_steps": side * side * triton.cdiv(n_in, c.block_k),
            "n_other_steps": triton.cdiv(n_other, block_other) if n_other else 0,
        },
        constants=constants,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        work=Work(
            flop=2 * n_rows * n_out * depth,
            read=n_bytes(x, weight, shift, residual, other, other_weight, other_shift),
            written=n_bytes(output, codes),
            l2_read=programs * (c.block_m + c.block_n + c.block_n2) * depth * x.element_size(),
            matrix=True,
            padded=2 * programs * c.block_m * (c.block_n + c.block_n2) * padded_depth,
        ),
        programs=c.programs,
    ).run()
    return output, codes
