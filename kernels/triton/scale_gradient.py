"""dL/dΦ_S1 [O, I] (`kernel`) without a weight gradient in memory, and what `filter` needs of it.

    dL/dΦ_S1[o, i] = γ/σ[o]·Σ_taps W[o, tap, i]·Σ_m G[m, o]·x[m + tap, i]        m over the pixels of all images

A program takes a tile of [o, i] and a share of the pixels, a chunk at a time: for each tap the products of a chunk
are summed in one accumulator and folded with W into a second. Shares are added in a fixed order. For `filter` no
product is needed where the saved output can be trusted; for the channels where it cannot, the same kernel runs and
sums over i too, and its programs for all others end at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import ChannelNorm
from .encoder_layers import DTYPES, encoder_layers
from .launch import Launch, Work, chip_of, observed
from .partial_sums import Sums, contracted, products_sum_launch
from .ss_conv_epilogue import precision


@triton.jit
def valid(o_n, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which offsets lie below N; where blocks divide N all do, and no mask is left of it."""
    if N % BLOCK_N == 0:
        return tl.full((BLOCK_N,), True, tl.int1)
    return o_n < N


@triton.jit
def scale_gradient_kernel(
    p_x,
    p_grad,
    p_taps,
    p_lost,
    p_partial,
    n_pixels,
    n_chunks,
    n_steps,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    N_OUT: tl.constexpr,
    N_IN: tl.constexpr,
    N_TAPS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_i: tl.constexpr = (N_IN + BLOCK_I - 1) // BLOCK_I
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first_o, first_i = tile // n_i * BLOCK_O, tile % n_i * BLOCK_I
    # Offsets count from the tile's corner: the compiler then folds them into the instructions that load.
    o_o, o_i = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    m_o, m_i = valid(first_o + o_o, N_OUT, BLOCK_O), valid(first_i + o_i, N_IN, BLOCK_I)
    p_x += first_i
    p_grad += first_o
    p_taps += first_o.to(tl.int64) * (N_TAPS * N_TAPS * N_IN) + first_i
    last = (split + 1) * n_chunks
    if p_lost is not None:
        # Nothing to do where the saved output serves all channels of this tile.
        b_lost = tl.load(p_lost + first_o + o_o, mask=m_o, other=0).to(tl.int32)
        last = tl.where(tl.max(b_lost, 0) > 0, last, split * n_chunks)
    IN_HEIGHT: tl.constexpr = HEIGHT + N_TAPS - 1 - 2 * PADDING
    IN_WIDTH: tl.constexpr = WIDTH + N_TAPS - 1 - 2 * PADDING
    b_scale = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for chunk in range(split * n_chunks, last):
        for tap in range(N_TAPS * N_TAPS):
            down, right = tap // N_TAPS - PADDING, tap % N_TAPS - PADDING
            b_acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
            for step in range(n_steps):
                o_m = (chunk * n_steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
                m_m = o_m < n_pixels
                # The size of the maps is known when this is compiled: these are multiplications.
                o_row, o_column = o_m // WIDTH % HEIGHT + down, o_m % WIDTH + right
                m_x = m_m & (o_row >= 0) & (o_row < IN_HEIGHT) & (o_column >= 0) & (o_column < IN_WIDTH)
                o_x = (o_m // (WIDTH * HEIGHT) * IN_HEIGHT + o_row) * IN_WIDTH + o_column
                p_b_grad = p_grad + o_m.to(tl.int64)[:, None] * N_OUT + o_o[None, :]
                b_grad = tl.load(p_b_grad, mask=m_m[:, None] & m_o[None, :], other=0.0)
                p_b_x = p_x + o_x.to(tl.int64)[:, None] * N_IN + o_i[None, :]
                b_x = tl.load(p_b_x, mask=m_x[:, None] & m_i[None, :], other=0.0)
                # [BLOCK_O, BLOCK_K] @ [BLOCK_K, BLOCK_I] -> [BLOCK_O, BLOCK_I]
                b_acc = tl.dot(tl.trans(b_grad), b_x, b_acc, input_precision=PRECISION)
            p_w = p_taps + tap * N_IN + o_o[:, None] * (N_TAPS * N_TAPS * N_IN) + o_i[None, :]
            b_w = tl.load(p_w, mask=m_o[:, None] & m_i[None, :], other=0.0)
            b_scale += b_acc * b_w.to(tl.float32)
    if p_lost is not None:
        # [splits · tiles of i, O]
        p_own = p_partial + (split * n_i + tile % n_i).to(tl.int64) * N_OUT + first_o
        tl.store(p_own + o_o, tl.sum(b_scale, 1), mask=m_o)
    else:
        p_own = p_partial + (split.to(tl.int64) * N_OUT + first_o) * N_IN + first_i
        tl.store(p_own + o_o[:, None] * N_IN + o_i[None, :], b_scale, mask=m_o[:, None] & m_i[None, :])


@triton.jit
def image_scale_gradient_kernel(
    p_x,
    p_grad,
    p_taps,
    p_lost,
    p_partial,
    n_pixels,
    n_steps,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    N_OUT: tl.constexpr,
    N_IN: tl.constexpr,
    N_TAPS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of few input channels: all taps of all channels are the columns of one product, folded with W at the end."""
    split = tl.program_id(1)
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_j = tl.arange(0, BLOCK_J)
    N_COLUMNS: tl.constexpr = N_TAPS * N_TAPS * N_IN
    m_o, m_j = o_o < N_OUT, o_j < N_COLUMNS
    o_i, tap = o_j % N_IN, o_j // N_IN
    down, right = (tap // N_TAPS - PADDING)[None, :], (tap % N_TAPS - PADDING)[None, :]
    IN_HEIGHT: tl.constexpr = HEIGHT + N_TAPS - 1 - 2 * PADDING
    IN_WIDTH: tl.constexpr = WIDTH + N_TAPS - 1 - 2 * PADDING
    last = (split + 1) * n_steps
    if p_lost is not None:
        b_lost = tl.load(p_lost + o_o, mask=m_o, other=0).to(tl.int32)
        last = tl.where(tl.max(b_lost, 0) > 0, last, split * n_steps)
    b_acc = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    for step in range(split * n_steps, last):
        o_m = step * BLOCK_K + tl.arange(0, BLOCK_K)
        m_m = (o_m < n_pixels)[:, None]
        o_row, o_column = (o_m // WIDTH % HEIGHT)[:, None] + down, (o_m % WIDTH)[:, None] + right
        m_x = m_m & (o_row >= 0) & (o_row < IN_HEIGHT) & (o_column >= 0) & (o_column < IN_WIDTH)
        o_x = ((o_m // (WIDTH * HEIGHT))[:, None] * IN_HEIGHT + o_row) * IN_WIDTH + o_column
        p_b_grad = p_grad + o_m.to(tl.int64)[:, None] * N_OUT + o_o[None, :]
        b_grad = tl.load(p_b_grad, mask=m_m & m_o[None, :], other=0.0)
        b_x = tl.load(p_x + o_x.to(tl.int64) * N_IN + o_i[None, :], mask=m_x & m_j[None, :], other=0.0)
        # [BLOCK_O, BLOCK_K] @ [BLOCK_K, BLOCK_J] -> [BLOCK_O, BLOCK_J]
        b_acc = tl.dot(tl.trans(b_grad), b_x, b_acc, input_precision=PRECISION)
    p_w = p_taps + o_o[:, None].to(tl.int64) * N_COLUMNS + o_j[None, :]
    b_w = tl.load(p_w, mask=m_o[:, None] & m_j[None, :], other=0.0)
    b_product = b_acc * b_w.to(tl.float32)
    if p_lost is not None:
        tl.store(p_partial + split.to(tl.int64) * N_OUT + o_o, tl.sum(b_product, 1), mask=m_o)
    else:
        p_own = p_partial + (split.to(tl.int64) * N_OUT + o_o) * N_IN
        for i in tl.static_range(N_IN):
            b_own = tl.where((o_i == i)[None, :], b_product, 0.0)
            tl.store(p_own + i, tl.sum(b_own, 1), mask=m_o)


@dataclass(frozen=True)
class ProductConfig:
    """How the product over pixels is cut up.

    Attributes:
        block_o, block_i: a tile of [O, I].
        block_k: pixels a step of the main loop.
        chunk: steps at most whose products one tap sums before they are folded with W.
        num_warps, num_stages: as Triton names them.
        programs: that registers are shared out to; None leaves it to the assembler.
    """

    block_o: int
    block_i: int
    block_k: int
    chunk: int
    num_warps: int
    num_stages: int
    programs: int | None = None


# Two programs on each of an H100's 132 multiprocessors; a constant, because the order of the sums depends on it.
PROGRAMS = 264
# Columns of the product for few input channels: 9 taps of 3 channels fill 27 of them.
IMAGE_COLUMNS = 32


def product_config(n_out: int, n_in: int, dtype: torch.dtype, chip: int) -> ProductConfig:
    """The configuration for a layer of so many channels.

    Tiles are as wide as the channels fill them and registers hold two accumulators and W: 128×64 on multiples of 128
    output channels; 64×64 where both are multiples of 64, in half types; else 64×32, which the assembler does not have
    to spill on any chip. The wider ones take 32 pixels a step, for the same reason. A chunk makes up for its fold with
    W, a multiply-add and 4 bytes of W a value of the tile.
    """
    half = dtype != torch.float32
    block_o = 128 if n_out % 128 == 0 else _block(n_out)
    full = block_o == 128 or (half and n_out % 64 == 0 and n_in % 64 == 0)
    block_i = _block(n_in) if full else min(32, _block(n_in))
    block_k = 64 if half and block_i < 64 else 32
    num_stages = 4 if half and block_i == 64 else 3
    # At three programs, for which 80 registers are left a thread, the assembler spills some bytes.
    programs = 2 if chip == 120 and block_k == 64 else None
    return ProductConfig(block_o, block_i, block_k, 512 // block_k, 8, num_stages, programs)


def _block(n_channels: int) -> int:
    return min(64, max(16, triton.next_power_of_2(n_channels)))


def image_config(n_out: int, dtype: torch.dtype) -> ProductConfig:
    """The configuration for few input channels: one chunk, folded at the end.

    One stage: its loads of x are single values, which cannot be copied asynchronously.
    """
    block_k = 32 if dtype == torch.float32 else 64
    return ProductConfig(_block(n_out), IMAGE_COLUMNS, block_k, 2**30, num_warps=4, num_stages=1)


def scale_gradient(
    x: Tensor,
    grad: Tensor,
    taps: Tensor,
    *,
    padding: int,
    norm: ChannelNorm | None,
    dtype: torch.dtype,
    sums: Sums | None = None,
) -> Tensor:
    """dL/dΦ_S1 of a `kernel` scale, and what is left of dL/dΦ_S2.

    Args:
        x: [N, I, H, W], dense channels-last.
        grad: G = dL/dz [N, O, H', W'], likewise, of x's dtype.
        taps: the frozen weight [O, k, k, I], contiguous.
        padding: of the convolution.
        norm: the stored norm that is folded into its weight, or None.
        dtype: of Φ and its gradient.
        sums: of `unwind`, which left them for the last launch here.

    Returns:
        [O, I].
    """
    out = torch.empty(taps.shape[0], taps.shape[3], dtype=dtype, device=x.device)
    _run(x, grad, taps, padding, norm, None, out, sums)
    return out


def filter_products(
    x: Tensor,
    grad: Tensor,
    taps: Tensor,
    *,
    padding: int,
    norm: ChannelNorm | None,
    lost: Tensor,
    scale_grad: Tensor,
) -> None:
    """Computes dL/dΦ_S1 of a `filter` scale where `lost` [O] (uint8) is not 0, into `scale_grad` [O].

    The other arguments are those of `scale_gradient`. Which channels these are, only the device knows.
    """
    _run(x, grad, taps, padding, norm, lost, scale_grad, None)


def _run(
    x: Tensor,
    grad: Tensor,
    taps: Tensor,
    padding: int,
    norm: ChannelNorm | None,
    lost: Tensor | None,
    out: Tensor,
    sums: Sums | None,
) -> None:
    partial = None
    if grad.numel():
        launch, partial = _product_launch(x, grad, taps, padding, lost)
        launch.run()
    products_sum_launch(partial, norm=norm, lost=lost, out=out, sums=sums).run()


def _shares(n_pixels: int, n_tiles: int, config: ProductConfig) -> tuple[int, int, int]:
    """(shares of the pixels, chunks of a share, steps of a chunk): shares fill `PROGRAMS`, chunks are alike."""
    steps = -(-n_pixels // config.block_k)
    in_share = -(-steps // max(1, PROGRAMS // n_tiles))
    n_chunks = -(-in_share // config.chunk)
    n_steps = -(-in_share // n_chunks)
    return -(-steps // (n_chunks * n_steps)), n_chunks, n_steps


def _product_launch(
    x: Tensor, grad: Tensor, taps: Tensor, padding: int, lost: Tensor | None
) -> tuple[Launch, Tensor]:
    """The launch and the partial sums that it writes."""
    n_out, side, _, n_in = taps.shape
    few = n_in * side**2 <= IMAGE_COLUMNS
    config = image_config(n_out, x.dtype) if few else product_config(n_out, n_in, x.dtype, chip_of(x.device))
    tiles_o = -(-n_out // config.block_o)
    tiles_i = 1 if few else -(-n_in // config.block_i)
    n_pixels = grad[:, 0].numel()
    shares, n_chunks, n_steps = _shares(n_pixels, tiles_o * tiles_i, config)
    shape = (shares, n_out, n_in) if lost is None else (shares * tiles_i, n_out)
    partial = torch.empty(shape, device=x.device)
    columns = "BLOCK_J" if few else "BLOCK_I"
    per_pixel = (
        tiles_o * (config.block_o + side**2 * n_in)
        if few
        else side**2 * tiles_o * tiles_i * (config.block_o + config.block_i)
    )
    n_padded = shares * n_chunks * n_steps * config.block_k
    n_padded *= tiles_o * tiles_i * config.block_o * config.block_i * (1 if few else side**2)
    launch = Launch(
        kernel=image_scale_gradient_kernel if few else scale_gradient_kernel,
        grid=(tiles_o * tiles_i, shares),
        arguments={
            "p_x": x,
            "p_grad": grad,
            "p_taps": taps,
            "p_lost": lost,
            "p_partial": partial,
            "n_pixels": n_pixels,
            **({} if few else {"n_chunks": n_chunks}),
            "n_steps": n_steps,
        },
        constants={
            "HEIGHT": grad.shape[2],
            "WIDTH": grad.shape[3],
            "PADDING": padding,
            "N_OUT": n_out,
            "N_IN": n_in,
            "N_TAPS": side,
            "BLOCK_O": config.block_o,
            columns: config.block_i,
            "BLOCK_K": config.block_k,
            "PRECISION": precision(x.dtype),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        work=_work(x, grad, taps, lost, partial, per_pixel, n_padded),
        programs=config.programs,
    )
    return launch, partial


def _work(
    x: Tensor, grad: Tensor, taps: Tensor, lost: Tensor | None, partial: Tensor, per_pixel: int, n_padded: int
) -> Work:
    """`per_pixel`: values that all tiles together read at a pixel; `n_padded`: products of whole blocks.

    Where nothing is lost nothing is read.
    """
    if lost is not None:
        return Work(read=lost.nbytes, written=partial.nbytes, matrix=True)
    n_pixels = grad[:, 0].numel()
    return Work(
        flop=2 * n_pixels * taps.numel(),
        read=x.nbytes + grad.nbytes + taps.nbytes,
        written=partial.nbytes,
        l2_read=n_pixels * per_pixel * grad.itemsize,
        matrix=True,
        padded=2 * n_padded,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every layer of the shipped encoders, both granularities."""
    for layer in encoder_layers():
        for name, dtype in DTYPES.items():
            x, grad = layer.images(layer.n_in, dtype), layer.images(layer.n_out, dtype)
            taps = torch.empty(layer.n_out, layer.n_taps, layer.n_taps, layer.n_in, device="meta")
            vector = torch.empty(layer.n_out, device="meta")
            norm = ChannelNorm(vector, vector, vector, vector)
            lost = vector.to(torch.uint8)
            padding = layer.n_taps // 2
            # As the operators do for layers with Φ, which shortcuts are without.
            sums = None if layer.n_taps == 1 else Sums(torch.empty(66, 1, layer.n_out, device="meta"), vector)
            options: dict[str, Any] = {"padding": padding, "norm": norm, "dtype": torch.float32, "sums": sums}
            with observed() as launches:
                scale_gradient(x, grad, taps, **options)
                filter_products(x, grad, taps, padding=padding, norm=norm, lost=lost, scale_grad=vector)
                contracted(x, grad, taps, **options)
            kinds = ("kernel", "kernel", "filter", "filter", "kernel cudnn")
            for launch, kind in zip(launches, kinds, strict=True):
                yield f"{launch.name}/{layer.name} {kind} {name}", launch
