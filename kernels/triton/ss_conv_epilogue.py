"""What the kernels of `ss_conv` share around their products: which pixels a row reads, and what follows the sum.

Images are dense channels-last, without a border: a row keeps a mask of the taps that lie inside its image. With
pooling four rows in succession are one 2×2 window, and what pooling drops is not computed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import Activation, Epilogue
from . import takes_tf32


@triton.jit
def tile(N_OUT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's tile: its place along the rows, its rows, its first column of COLUMNS; columns go round fastest."""
    N_TILES: tl.constexpr = (N_OUT + COLUMNS - 1) // COLUMNS
    pid_m = tl.program_id(0) // N_TILES
    first_n = tl.program_id(0) % N_TILES * COLUMNS
    return pid_m, pid_m * BLOCK_M + tl.arange(0, BLOCK_M), first_n


@triton.jit
def locate(
    o_m,
    n_rows,
    height,
    width,
    out_height,
    out_width,
    PADDING: tl.constexpr,
    SIDE: tl.constexpr,
    POOL: tl.constexpr,
):
    """Of each row: its output pixel, the input pixel under tap (0, 0), and a mask of the taps inside the image."""
    STEP: tl.constexpr = 2 if POOL else 1
    o_window = o_m // 4 if POOL else o_m
    columns, rows = out_width // STEP, out_height // STEP
    o_image = o_window // (columns * rows)
    o_y = o_window // columns % rows * STEP
    o_x = o_window % columns * STEP
    if POOL:
        o_y += o_m % 4 // 2
        o_x += o_m % 2
    o_pixel = (o_image * out_height + o_y) * out_width + o_x
    o_corner = (o_image * height + o_y - PADDING) * width + o_x - PADDING
    m_taps = tl.zeros_like(o_m)
    for tap in tl.static_range(SIDE * SIDE):
        y, x = o_y - PADDING + tap // SIDE, o_x - PADDING + tap % SIDE
        m_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (o_m < n_rows)
        m_taps |= m_inside.to(tl.int32) << tap
    return o_pixel.to(tl.int64), o_corner.to(tl.int64), m_taps


@triton.jit
def activate(b_z, SLOPE: tl.constexpr):
    """Leaky ReLU; slope 0 is the ReLU, also of −∞."""
    return tl.where(b_z <= 0, b_z * SLOPE if SLOPE != 0 else 0.0, b_z)


@triton.jit
def shifted(b_z, b_z2, o_n, o_n2, p_shift, N_OUT: tl.constexpr):
    """z [BLOCK_M, BLOCK_N] + t[o], if there is one; the same of a second z, if there is one."""
    if p_shift is not None:
        b_z += tl.load(p_shift + o_n, mask=o_n < N_OUT, other=0.0)[None, :]
        if b_z2 is not None:
            b_z2 += tl.load(p_shift + o_n2, mask=o_n2 < N_OUT, other=0.0)[None, :]
    return b_z, b_z2


@triton.jit
def finish(
    b_y,
    pid_m,
    o_n,
    o_pixel,
    n_rows,
    p_residual,
    p_out,
    p_codes,
    N_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of z [BLOCK_M, BLOCK_N], and its store; codes as in `mtl_fast.ops._epilogue_codes`."""
    m_n = (o_n < N_OUT)[None, :]
    o_out = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    EARLY: tl.constexpr = ACTIVATION == "before_residual"
    if EARLY:
        b_code = (b_y > 0).to(tl.int32) << 2
        b_y = activate(b_y, SLOPE=SLOPE)
    if p_residual is not None:
        p_r = p_residual + o_pixel[:, None] * N_OUT + o_n[None, :]
        b_y += tl.load(p_r, mask=(o_out < n_rows)[:, None] & m_n, other=0.0).to(tl.float32)
    if ACTIVATION == "after_residual":
        b_y = activate(b_y, SLOPE=SLOPE)
    if POOL:
        # Whole numbers in the order of the values, NaN above all: one maximum finds value and place.
        b_bits = b_y.to(tl.int32, bitcast=True)
        b_key = tl.where(b_y != b_y, 0x7FC00000, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF))
        b_key = tl.reshape(b_key, (BLOCK_M // 4, 4, BLOCK_N))
        b_best = tl.max(b_key, 1)
        b_y = (b_best ^ ((b_best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        # The first maximum wins: its place stands in the upper bits as well.
        o_place = 17 * tl.arange(0, 4)[None, :, None]
        if EARLY:
            o_place = tl.reshape(b_code, (BLOCK_M // 4, 4, BLOCK_N)) | o_place
        b_code = tl.min(tl.where(b_key == b_best[:, None, :], o_place, 127), 1) & 7
        o_out = pid_m * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        n_rows = n_rows // 4
    if not EARLY:
        # An activated value has the sign of what was activated, and the largest had the largest.
        b_positive = (b_y > 0).to(tl.int32) << 2
        b_code = b_code | b_positive if POOL else b_positive
    m_out = (o_out < n_rows)[:, None] & m_n
    o_y = o_out.to(tl.int64)[:, None] * N_OUT + o_n[None, :]
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_out)
    if p_codes is not None:
        tl.store(p_codes + o_y, b_code.to(tl.uint8), mask=m_out)


def padded(n_in: int) -> int:
    """Channels of a packed weight: up to four are four, more begin each tap at 16 bytes of a half type."""
    return 4 if n_in <= 4 else -(-n_in // 8) * 8


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of a product: TF32 for float32 where PyTorch's convolutions may take it."""
    return "tf32" if dtype == torch.float32 and takes_tf32() else "ieee"


def images(
    like: Tensor, n_channels: int, height: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Uninitialised images [N, n_channels, height, width], channels-last, of the dtype of `like` unless given."""
    return torch.empty(
        (like.shape[0], n_channels, height, width),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def dense(x: Tensor) -> Tensor:
    """The images in dense channels-last memory; themselves if they are."""
    return x.contiguous(memory_format=torch.channels_last)


def placed(epilogue: Epilogue, *, alone: bool) -> Activation:
    """The activation's place; where nothing is added after the convolution, one name serves for both."""
    return "after_residual" if alone and epilogue.activation == "before_residual" else epilogue.activation


def coded(epilogue: Epilogue, *, save: bool) -> bool:
    """Whether the way back needs a code for each value of the output."""
    return save and (epilogue.pool or epilogue.activation != "none")


def output_sizes(x: Tensor, side: int, padding: int, epilogue: Epilogue) -> tuple[int, int, int, int, int]:
    """(H', W') of the convolution, (H'', W'') of its epilogue, and the rows of the product."""
    height, width = (length + 2 * padding - side + 1 for length in x.shape[2:])
    pooled = (height // 2, width // 2) if epilogue.pool else (height, width)
    return height, width, *pooled, x.shape[0] * pooled[0] * pooled[1] * (4 if epilogue.pool else 1)
