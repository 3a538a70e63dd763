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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import ChannelNorm
from .encoder_layers import DTYPES, encoder_layers
from .launch import Launch, Work, observed
from .partial_sums import products_sum_launch


@triton.jit
def advanced(image, row, column, height, width, images, rows, columns):
    """Pixel positions some whole images, rows and columns on, without a division."""
    column += columns
    wraps = column >= width
    column -= tl.where(wraps, width, 0)
    row += rows + wraps.to(tl.int32)
    wraps = row >= height
    row -= tl.where(wraps, height, 0)
    return image + images + wraps.to(tl.int32), row, column


@triton.jit
def scale_gradient_kernel(
    p_x,
    p_grad,
    p_taps,
    p_lost,
    p_partial,
    n_pixels,
    height,
    width,
    in_height,
    in_width,
    n_out,
    n_in,
    padding,
    n_chunks,
    N_TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_i = tl.cdiv(n_in, BLOCK_I)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    o_o = tile // n_i * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = tile % n_i * BLOCK_I + tl.arange(0, BLOCK_I)
    m_o, m_i = o_o < n_out, o_i < n_in
    last = (split + 1) * n_chunks
    if p_lost is not None:
        # Nothing to do where the saved output serves all channels of this tile.
        b_lost = tl.load(p_lost + o_o, mask=m_o, other=0).to(tl.int32)
        last = tl.where(tl.max(b_lost, 0) > 0, last, split * n_chunks)
    rest = BLOCK_K % (height * width)
    images, rows, columns = BLOCK_K // (height * width), rest // width, rest % width
    b_scale = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for chunk in range(split * n_chunks, last):
        o_first = chunk * CHUNK + tl.arange(0, BLOCK_K)
        for tap in range(N_TAPS * N_TAPS):
            down, right = tap // N_TAPS - padding, tap % N_TAPS - padding
            o_m = o_first
            image, row, column = o_m // width // height, o_m // width % height, o_m % width
            b_acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
            for _ in range(CHUNK // BLOCK_K):
                m_m = o_m < n_pixels
                o_row, o_column = row + down, column + right
                m_x = m_m & (o_row >= 0) & (o_row < in_height) & (o_column >= 0) & (o_column < in_width)
                o_x = ((image * in_height + o_row) * in_width + o_column).to(tl.int64)
                p_b_grad = p_grad + o_m.to(tl.int64)[:, None] * n_out + o_o[None, :]
                b_grad = tl.load(p_b_grad, mask=m_m[:, None] & m_o[None, :], other=0.0)
                p_b_x = p_x + o_x[:, None] * n_in + o_i[None, :]
                b_x = tl.load(p_b_x, mask=m_x[:, None] & m_i[None, :], other=0.0)
                # [BLOCK_O, BLOCK_K] @ [BLOCK_K, BLOCK_I] -> [BLOCK_O, BLOCK_I]
                b_acc = tl.dot(tl.trans(b_grad), b_x, b_acc, input_precision=PRECISION)
                o_m += BLOCK_K
                image, row, column = advanced(image, row, column, height, width, images, rows, columns)
            p_w = p_taps + (o_o[:, None].to(tl.int64) * (N_TAPS * N_TAPS) + tap) * n_in + o_i[None, :]
            b_w = tl.load(p_w, mask=m_o[:, None] & m_i[None, :], other=0.0)
            b_scale += b_acc * b_w.to(tl.float32)
    if p_lost is not None:
        # [splits · tiles of i, O]
        p_own = p_partial + (split * n_i + tile % n_i).to(tl.int64) * n_out
        tl.store(p_own + o_o, tl.sum(b_scale, 1), mask=m_o)
    else:
        p_own = p_partial + (split.to(tl.int64) * n_out + o_o[:, None]) * n_in + o_i[None, :]
        tl.store(p_own, b_scale, mask=m_o[:, None] & m_i[None, :])


@triton.jit
def image_scale_gradient_kernel(
    p_x,
    p_grad,
    p_taps,
    p_lost,
    p_partial,
    n_pixels,
    height,
    width,
    in_height,
    in_width,
    n_out,
    padding,
    n_blocks,
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
    m_o, m_j = o_o < n_out, o_j < N_COLUMNS
    o_i, tap = o_j % N_IN, o_j // N_IN
    down, right = (tap // N_TAPS - padding)[None, :], (tap % N_TAPS - padding)[None, :]
    n_steps = n_blocks
    if p_lost is not None:
        b_lost = tl.load(p_lost + o_o, mask=m_o, other=0).to(tl.int32)
        n_steps = tl.where(tl.max(b_lost, 0) > 0, n_blocks, 0)
    rest = BLOCK_K % (height * width)
    images, rows, columns = BLOCK_K // (height * width), rest // width, rest % width
    o_m = split * n_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    image, row, column = o_m // width // height, o_m // width % height, o_m % width
    b_acc = tl.zeros((BLOCK_O, BLOCK_J), tl.float32)
    for _ in range(n_steps):
        m_m = (o_m < n_pixels)[:, None]
        o_row, o_column = row[:, None] + down, column[:, None] + right
        m_x = (o_row >= 0) & (o_row < in_height) & (o_column >= 0) & (o_column < in_width)
        o_x = ((image[:, None] * in_height + o_row) * in_width + o_column).to(tl.int64)
        p_b_grad = p_grad + o_m.to(tl.int64)[:, None] * n_out + o_o[None, :]
        b_grad = tl.load(p_b_grad, mask=m_m & m_o[None, :], other=0.0)
        b_x = tl.load(p_x + o_x * N_IN + o_i[None, :], mask=m_m & m_x & m_j[None, :], other=0.0)
        # [BLOCK_O, BLOCK_K] @ [BLOCK_K, BLOCK_J] -> [BLOCK_O, BLOCK_J]
        b_acc = tl.dot(tl.trans(b_grad), b_x, b_acc, input_precision=PRECISION)
        o_m += BLOCK_K
        image, row, column = advanced(image, row, column, height, width, images, rows, columns)
    p_w = p_taps + o_o[:, None].to(tl.int64) * N_COLUMNS + o_j[None, :]
    b_w = tl.load(p_w, mask=m_o[:, None] & m_j[None, :], other=0.0)
    b_product = b_acc * b_w.to(tl.float32)
    if p_lost is not None:
        tl.store(p_partial + split.to(tl.int64) * n_out + o_o, tl.sum(b_product, 1), mask=m_o)
    else:
        p_own = p_partial + (split.to(tl.int64) * n_out + o_o) * N_IN
        for i in tl.static_range(N_IN):
            b_own = tl.where((o_i == i)[None, :], b_product, 0.0)
            tl.store(p_own + i, tl.sum(b_own, 1), mask=m_o)


@dataclass(frozen=True)
class ProductConfig:
    """How the product over pixels is cut up.

    Attributes:
        block_o, block_i: a tile of [O, I].
        block_k: pixels a step of the main loop.
        chunk: pixels whose products one tap sums before they are folded with W.
        num_warps, num_stages: as Triton names them.
    """

    block_o: int
    block_i: int
    block_k: int
    chunk: int
    num_warps: int
    num_stages: int


# Two programs on each of an H100's 132 multiprocessors; a constant, because the order of the sums depends on it.
PROGRAMS = 264
# Columns of the product for few input channels: 9 taps of 3 channels fill 27 of them.
IMAGE_COLUMNS = 32


def product_config(n_out: int, n_in: int, n_pixels: int, dtype: torch.dtype) -> ProductConfig:
    """The configuration for a layer of so many channels and pixels of all images.

    Tiles are as wide as the channels fill them: 128 on multiples of 128, else 64, where 160 fills 83 % of 192. Both
    accumulators of a tile of 128 take 64 registers a thread of 256 each. A chunk makes up for its fold with W, one
    multiply-add and 4 bytes of W a value; it is shorter where the pixels would not fill `PROGRAMS` programs.
    """
    block_o, block_i = _block(n_out), _block(n_in)
    block_k = 32 if dtype == torch.float32 else 64
    large = block_o * block_i > 64 * 64
    share = n_pixels * -(-n_out // block_o) * -(-n_in // block_i) // PROGRAMS
    chunk = 512 if large else 256
    while chunk > max(share, 2 * block_k):
        chunk //= 2
    return ProductConfig(block_o, block_i, block_k, chunk, num_warps=8 if large else 4, num_stages=3)


def _block(n_channels: int) -> int:
    if n_channels % 128 == 0:
        return 128
    return min(64, max(16, triton.next_power_of_2(n_channels)))


def image_config(n_out: int, dtype: torch.dtype) -> ProductConfig:
    """The configuration for few input channels: no chunks, one accumulator; its loads of x are single values."""
    block_k = 32 if dtype == torch.float32 else 64
    return ProductConfig(min(64, _block(n_out)), IMAGE_COLUMNS, block_k, block_k, num_warps=4, num_stages=3)


def scale_gradient(
    x: Tensor, grad: Tensor, taps: Tensor, *, padding: int, norm: ChannelNorm | None, dtype: torch.dtype
) -> Tensor:
    """dL/dΦ_S1 of a `kernel` scale.

    Args:
        x: [N, I, H, W], dense channels-last.
        grad: G = dL/dz [N, O, H', W'], likewise, of x's dtype.
        taps: the frozen weight [O, k, k, I], contiguous.
        padding: of the convolution.
        norm: the stored norm that is folded into its weight, or None.
        dtype: of Φ and its gradient.

    Returns:
        [O, I].
    """
    out = torch.empty(taps.shape[0], taps.shape[3], dtype=dtype, device=x.device)
    _run(x, grad, taps, padding, norm, None, out)
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
    _run(x, grad, taps, padding, norm, lost, scale_grad)


def _run(
    x: Tensor,
    grad: Tensor,
    taps: Tensor,
    padding: int,
    norm: ChannelNorm | None,
    lost: Tensor | None,
    out: Tensor,
) -> None:
    few = taps[0].numel() <= IMAGE_COLUMNS
    partial = None
    if grad.numel():
        launch, partial = (_image_launch if few else _product_launch)(x, grad, taps, padding, lost)
        launch.run()
    products_sum_launch(partial, norm=norm, lost=lost, out=out).run()


def _shares(n_pixels: int, n_tiles: int, each: int) -> tuple[int, int]:
    """(shares of the pixels, pieces of `each` pixels in one)."""
    pieces = -(-n_pixels // each)
    in_one = -(-pieces // max(1, PROGRAMS // n_tiles))
    return -(-pieces // in_one), in_one


def _product_launch(
    x: Tensor, grad: Tensor, taps: Tensor, padding: int, lost: Tensor | None
) -> tuple[Launch, Tensor]:
    n_out, side, _, n_in = taps.shape
    n_pixels = grad[:, 0].numel()
    config = product_config(n_out, n_in, n_pixels, x.dtype)
    tiles = -(-n_out // config.block_o), -(-n_in // config.block_i)
    shares, n_chunks = _shares(n_pixels, tiles[0] * tiles[1], config.chunk)
    shape = (shares, n_out, n_in) if lost is None else (shares * tiles[1], n_out)
    partial = torch.empty(shape, device=x.device)
    launch = Launch(
        kernel=scale_gradient_kernel,
        grid=(tiles[0] * tiles[1], shares),
        arguments=dict(
            **_operands(x, grad, taps, lost, partial),
            n_out=n_out,
            n_in=n_in,
            padding=padding,
            n_chunks=n_chunks,
        ),
        constants={
            "N_TAPS": side,
            "CHUNK": config.chunk,
            "BLOCK_O": config.block_o,
            "BLOCK_I": config.block_i,
            "BLOCK_K": config.block_k,
            "PRECISION": "tf32",
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        work=_work(
            x, grad, taps, lost, partial, side**2 * tiles[0] * tiles[1] * (config.block_o + config.block_i)
        ),
    )
    return launch, partial


def _image_launch(
    x: Tensor, grad: Tensor, taps: Tensor, padding: int, lost: Tensor | None
) -> tuple[Launch, Tensor]:
    n_out, side, _, n_in = taps.shape
    config = image_config(n_out, x.dtype)
    n_tiles = -(-n_out // config.block_o)
    shares, n_blocks = _shares(grad[:, 0].numel(), n_tiles, config.block_k)
    shape = (shares, n_out, n_in) if lost is None else (shares, n_out)
    partial = torch.empty(shape, device=x.device)
    launch = Launch(
        kernel=image_scale_gradient_kernel,
        grid=(n_tiles, shares),
        arguments=dict(
            **_operands(x, grad, taps, lost, partial),
            n_out=n_out,
            padding=padding,
            n_blocks=n_blocks,
        ),
        constants={
            "N_IN": n_in,
            "N_TAPS": side,
            "BLOCK_O": config.block_o,
            "BLOCK_J": config.block_i,
            "BLOCK_K": config.block_k,
            "PRECISION": "tf32",
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        work=_work(x, grad, taps, lost, partial, n_tiles * (config.block_o + side**2 * n_in)),
    )
    return launch, partial


def _operands(
    x: Tensor, grad: Tensor, taps: Tensor, lost: Tensor | None, partial: Tensor
) -> dict[str, Tensor | int | None]:
    return {
        "p_x": x,
        "p_grad": grad,
        "p_taps": taps,
        "p_lost": lost,
        "p_partial": partial,
        "n_pixels": grad[:, 0].numel(),
        "height": grad.shape[2],
        "width": grad.shape[3],
        "in_height": x.shape[2],
        "in_width": x.shape[3],
    }


def _work(
    x: Tensor, grad: Tensor, taps: Tensor, lost: Tensor | None, partial: Tensor, per_pixel: int
) -> Work:
    """`per_pixel`: values that all tiles together read at a pixel. Where nothing is lost nothing is read."""
    if lost is not None:
        return Work(read=lost.nbytes, written=partial.nbytes, matrix=True)
    n_pixels = grad[:, 0].numel()
    return Work(
        flop=2 * n_pixels * taps.numel(),
        read=x.nbytes + grad.nbytes + taps.nbytes,
        written=partial.nbytes,
        l2_read=n_pixels * per_pixel * grad.itemsize,
        matrix=True,
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
            with observed() as launches:
                scale_gradient(x, grad, taps, padding=padding, norm=norm, dtype=torch.float32)
                filter_products(x, grad, taps, padding=padding, norm=norm, lost=lost, scale_grad=vector)
            for launch, granularity in zip(launches, ("kernel", "kernel", "filter", "filter"), strict=True):
                yield f"{launch.name}/{layer.name} {granularity} {name}", launch
