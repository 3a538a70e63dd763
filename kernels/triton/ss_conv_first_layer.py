"""A 3×3 convolution of images with up to four channels: the first layer's, whose sum is too short for chunks of one.

One row of a filter, three pixels of four channels and one pixel of zeros, is a product of depth 16; three of them are
the whole sum. Images keep their three channels in memory, the weight has four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import Epilogue
from .launch import Launch, Work, n_bytes
from .ss_conv_epilogue import (
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

SIDE = 3
CHANNELS = 4  # of the weight


@triton.jit(do_not_specialize=["n_rows", "height", "width", "out_height", "out_width"])
def ss_conv_first_layer_kernel(
    p_x,
    p_weight,
    p_shift,
    p_residual,
    p_out,
    p_codes,
    n_rows,
    height,
    width,
    out_height,
    out_width,
    PADDING: tl.constexpr,
    N_IN: tl.constexpr,
    N_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile: BLOCK_M pixels of the output, BLOCK_N channels."""
    pid_m, o_m, first_n = tile(N_OUT=N_OUT, COLUMNS=BLOCK_N, BLOCK_M=BLOCK_M)
    o_n = first_n + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, 16)
    o_s, o_c = o_k // 4, o_k % 4
    m_k = (o_s < 3) & (o_c < N_IN)
    o_pixel, o_corner, m_taps = locate(
        o_m, n_rows, height, width, out_height, out_width, PADDING=PADDING, SIDE=3, POOL=POOL
    )
    p_rows = p_x + o_corner[:, None] * N_IN + (o_s * N_IN + o_c)[None, :]
    p_w = p_weight + tl.minimum(o_n, N_OUT - 1)[None, :] * 36 + o_k[:, None]
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in tl.static_range(3):
        m_x = ((m_taps[:, None] >> (3 * r + o_s)[None, :]) & 1) != 0
        b_x = tl.load(p_rows + r * width * N_IN, mask=m_x & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + r * 12, mask=m_k[:, None], other=0.0)
        # [BLOCK_M, 16] @ [16, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    b_acc, _ = shifted(b_acc, None, o_n, None, p_shift, N_OUT=N_OUT)
    finish(
        b_acc, pid_m, o_n, o_pixel, n_rows, p_residual, p_out, p_codes,
        N_OUT=N_OUT, ACTIVATION=ACTIVATION, SLOPE=SLOPE, POOL=POOL, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """How the product is cut into programs."""

    # The pass is bound by what it writes: tiles as wide as the channels are, for the images are gathered anew by each.
    block_m: int
    block_n: int
    num_warps: int
    # No loop, nothing under way.
    num_stages: int = 1


def configuration(n_out: int) -> Configuration:
    """By the channels of the output."""
    block_n = min(64, max(16, triton.next_power_of_2(n_out)))
    return Configuration(block_m=128, block_n=block_n, num_warps=4)


def fits(weight: Tensor) -> bool:
    """Whether a packed weight [O, k, k, I'] is of such a layer."""
    return tuple(weight.shape[1:]) == (SIDE, SIDE, CHANNELS)


def forward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    *,
    residual: Tensor | None,
    epilogue: Epilogue,
    padding: int,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `ss_conv.forward`, for x [N, I ≤ 4, H, W] and weight [O, 3, 3, 4]."""
    x, n_out = dense(x), weight.shape[0]
    height, width, final_height, final_width, n_rows = output_sizes(x, SIDE, padding, epilogue)
    output = images(x, n_out, final_height, final_width)
    codes = images(x, n_out, final_height, final_width, torch.uint8) if coded(epilogue, save=save) else None
    if not output.numel():
        return output, codes
    residual = None if residual is None else dense(residual)
    c = configuration(n_out)
    programs = triton.cdiv(n_rows, c.block_m) * triton.cdiv(n_out, c.block_n)
    depth = SIDE * SIDE * x.shape[1]
    Launch(
        kernel=ss_conv_first_layer_kernel,
        grid=(programs,),
        arguments={
            "p_x": x,
            "p_weight": weight,
            "p_shift": shift,
            "p_residual": residual,
            "p_out": output,
            "p_codes": codes,
            "n_rows": n_rows,
            "height": x.shape[2],
            "width": x.shape[3],
            "out_height": height,
            "out_width": width,
        },
        constants={
            "PADDING": padding,
            "N_IN": x.shape[1],
            "N_OUT": n_out,
            "ACTIVATION": placed(epilogue, alone=residual is None),
            "SLOPE": epilogue.slope,
            "POOL": epilogue.pool,
            "PRECISION": precision(x.dtype),
            "BLOCK_M": c.block_m,
            "BLOCK_N": c.block_n,
        },
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        work=Work(
            flop=2 * n_rows * n_out * depth,
            read=n_bytes(x, weight, shift, residual),
            written=n_bytes(output, codes),
            l2_read=programs * (c.block_m + c.block_n) * depth * x.element_size(),
            matrix=True,
            # A row of a filter is four pixels of four channels.
            padded=2 * programs * c.block_m * c.block_n * SIDE * 16,
        ),
    ).run()
    return output, codes
