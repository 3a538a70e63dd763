"""From dL/dy to G = dL/dz through pooling and activation, with the sums over pixels that Φ needs, in one pass.

For z = S ⊙ conv(x, W) + t, S = Φ_S1·γ/σ, and y = pool(act(z + r)) with codes as in `mtl_fast.ops._epilogue_codes`:

    G[place of the maximum] = act'·dL/dy, 0 elsewhere        dL/dr = G, or without act' where act came before r
    dL/dΦ_S2 = γ/σ·Σ G
    dL/dΦ_S1 = Σ G·(z − t)/Φ_S1     (`filter`), with z undone from the saved y: the residual is subtracted

The last is a difference of larger things where S is small: the pass also sums how large, and a channel whose bits
are lost that way is marked, for `scale_gradient.filter_products` to compute it as a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import Activation, ChannelNorm, Epilogue
from .encoder_layers import DTYPES, Layer, encoder_layers
from .launch import Launch, Work, chip_of, observed
from .partial_sums import Sums, sums_launch


@triton.jit
def unwind_kernel(
    p_grad,
    p_codes,
    p_output,
    p_residual,
    p_shift,
    p_inner,
    p_skipped,
    p_partial,
    n_windows,
    height,
    width,
    n_channels,
    n_blocks,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    BY_OUTPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A window is 2×2 pixels with pooling, one without; those that pooling drops are there and get zeros."""
    pid = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = (o_c < n_channels)[None, :]
    STEP: tl.constexpr = 2 if POOL else 1
    pooled_height, pooled_width = height // STEP, width // STEP
    rows, columns = tl.cdiv(height, STEP), tl.cdiv(width, STEP)
    INVERSE: tl.constexpr = 1.0 / SLOPE if SLOPE > 1e-30 else 0.0
    if BY_OUTPUT:
        b_shift = tl.load(p_shift + o_c, mask=o_c < n_channels, other=0.0)[None, :]
    # [BLOCK_M, BLOCK_C] each, summed over the program's windows first and over BLOCK_M at the end
    b_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_terms = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_sizes = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_lost = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for block in range(pid * n_blocks, (pid + 1) * n_blocks):
        o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < n_windows
        column, row, image = o_m % columns, o_m // columns % rows, o_m // columns // rows
        # Where pooling drops an odd last row or column there is no value of the output.
        m_in = (m_m & (row < pooled_height) & (column < pooled_width))[:, None] & m_c
        at = ((image * pooled_height + row) * pooled_width + column).to(tl.int64)
        o_at = at[:, None] * n_channels + o_c[None, :]
        corner = ((image * height + row * STEP) * width + column * STEP).to(tl.int64)

        b_grad = tl.load(p_grad + o_at, mask=m_in, other=0.0).to(tl.float32)
        b_inner = b_grad
        if p_codes is not None:
            b_code = tl.load(p_codes + o_at, mask=m_in, other=0).to(tl.int32)
            b_positive = (b_code & 4) != 0
            b_place = b_code & 3
        if ACTIVATION != 0:
            # Slope 0 is exact also for an infinite gradient.
            b_inner = tl.where(b_positive, b_grad, b_grad * SLOPE if SLOPE != 0 else 0.0)
        b_sum += b_inner

        if BY_OUTPUT:
            b_y = tl.load(p_output + o_at, mask=m_in, other=0.0).to(tl.float32)
            b_r = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
            if p_residual is not None:
                for place in tl.static_range(STEP * STEP):
                    o_pixel = (corner + place // 2 * width + place % 2)[:, None] * n_channels + o_c[None, :]
                    m_here = (m_in & (b_place == place)) if POOL else m_in
                    b_r += tl.load(p_residual + o_pixel, mask=m_here, other=0.0).to(tl.float32)
            # How much undoing the activation enlarges what it is undone from.
            b_up = tl.where(b_positive, 1.0, INVERSE) if ACTIVATION != 0 else 1.0
            if ACTIVATION == 1:
                b_z = (b_y - b_r) * b_up
                b_parts = (tl.abs(b_y) + tl.abs(b_r)) * b_up
            else:
                b_z = b_y * b_up - b_r
                b_parts = tl.abs(b_y) * b_up + tl.abs(b_r)
            b_term = b_inner * (b_z - b_shift)
            b_terms += b_term
            b_sizes += tl.abs(b_term)
            b_lost += tl.abs(b_inner) * (b_parts + tl.abs(b_shift))

        for place in tl.static_range(STEP * STEP):
            m_pixel = m_m & (row * STEP + place // 2 < height) & (column * STEP + place % 2 < width)
            o_pixel = (corner + place // 2 * width + place % 2)[:, None] * n_channels + o_c[None, :]
            m_out = m_pixel[:, None] & m_c
            # Outside `m_in` there is no gradient, so any place may take its zero.
            if p_inner is not None:
                b_out = tl.where(b_place == place, b_inner, 0.0) if POOL else b_inner
                tl.store(p_inner + o_pixel, b_out.to(p_inner.dtype.element_ty), mask=m_out)
            if p_skipped is not None:
                b_out = tl.where(b_place == place, b_grad, 0.0)
                tl.store(p_skipped + o_pixel, b_out.to(p_skipped.dtype.element_ty), mask=m_out)

    KINDS: tl.constexpr = 4 if BY_OUTPUT else 1
    p_own = p_partial + pid.to(tl.int64) * KINDS * n_channels + o_c
    tl.store(p_own, tl.sum(b_sum, 0), mask=o_c < n_channels)
    if BY_OUTPUT:
        tl.store(p_own + n_channels, tl.sum(b_terms, 0), mask=o_c < n_channels)
        tl.store(p_own + 2 * n_channels, tl.sum(b_sizes, 0), mask=o_c < n_channels)
        tl.store(p_own + 3 * n_channels, tl.sum(b_lost, 0), mask=o_c < n_channels)


@dataclass(frozen=True)
class UnwindConfig:
    """How the pass over the images is cut up; it is bound by memory.

    Attributes:
        block_m: windows a block: with 64 channels 16 values a thread; half as many where each has four sums.
        block_c: channels a block: 128 bytes of a half type in a row, a whole line.
        programs: at most, over all channels: eight on each of an H100's 132 multiprocessors, so that loads of
            one hide behind another's; a constant, because the order of the sums depends on it.
        num_warps: more would leave a thread less than one load of 16 bytes.
    """

    block_m: int
    block_c: int
    programs: int = 1056
    num_warps: int = 4


ACTIVATIONS: tuple[Activation, ...] = ("none", "before_residual", "after_residual")


def unwind_config(n_channels: int, by_output: bool) -> UnwindConfig:
    """The configuration for images of so many channels; `by_output`: with the sums of a filter's scale."""
    block_c = min(64, max(16, triton.next_power_of_2(n_channels)))
    return UnwindConfig(block_m=(1024 if by_output else 2048) // block_c, block_c=block_c)


class Unwound(NamedTuple):
    """Gradients behind an epilogue.

    Attributes:
        inner: G [N, O, H', W']; `grad` itself where nothing came between.
        residual: dL/dr of the same shape, G or `grad` itself where they are equal.
        shift: dL/dΦ_S2 [O].
        scale: dL/dΦ_S1 [O] from the saved output, None unless asked for.
        lost: uint8 [O], 1 where `scale` cannot be trusted.
        sums: what `shift` is still to be added from, where that was left for later.
    """

    inner: Tensor
    residual: Tensor
    shift: Tensor
    scale: Tensor | None
    lost: Tensor | None
    sums: Sums | None


class SavedOutput(NamedTuple):
    """What the scale of a filter takes its gradient from.

    Attributes:
        scale: Φ_S1 [O, 1, 1, 1].
        output: y [N, O, H'', W''].
        residual: r [N, O, H', W'], or None.
        shift: t [O], float32.
    """

    scale: Tensor
    output: Tensor
    residual: Tensor | None
    shift: Tensor


def unwind(
    grad: Tensor,
    codes: Tensor | None,
    *,
    epilogue: Epilogue,
    size: tuple[int, int],
    norm: ChannelNorm | None,
    dtype: torch.dtype,
    saved: SavedOutput | None = None,
    later: bool = False,
) -> Unwound:
    """Gradients of z, of the residual and of Φ from that of y, in two launches, or one.

    Args:
        grad: dL/dy [N, O, H'', W''], dense channels-last.
        codes: uint8, of the same shape; unread where there is neither activation nor pooling.
        epilogue: what came after the convolution.
        size: H', W', before the pooling.
        norm: the stored norm that is folded into weight and shift, or None.
        dtype: of Φ and its gradients.
        saved: for the scale of a filter.
        later: leave the partial sums to be added with the scale of a kernel, which `saved` is not for.

    Returns:
        `Unwound`, images in grad's dtype, channels-last.
    """
    n_channels = grad.shape[1]
    plain = epilogue.activation == "none" and not epilogue.pool
    codes = None if plain else codes
    shape = (grad.shape[0], n_channels, *size)
    inner = grad if plain else new_images(grad, shape)
    own_residual = epilogue.pool and epilogue.activation == "before_residual"
    residual = new_images(grad, shape) if own_residual else None
    shift = grad.new_empty(n_channels, dtype=dtype)
    scale = None if saved is None else torch.empty_like(shift)
    lost = None if saved is None else grad.new_empty(n_channels, dtype=torch.uint8)
    config = unwind_config(n_channels, saved is not None)
    rows, _ = _cut(grad, _windows(grad, size, epilogue), config)
    partial = torch.empty(rows, 1 if saved is None else 4, n_channels, device=grad.device)
    if rows:
        _unwind_launch(grad, codes, epilogue, size, saved, None if plain else inner, residual, partial).run()
    if not later:
        sums_launch(
            partial,
            images=grad.dtype,
            norm=norm,
            shift_grad=shift,
            scale=None if saved is None else saved.scale,
            scale_grad=scale,
            lost=lost,
        ).run()
    if residual is None:
        residual = grad if epilogue.activation == "before_residual" else inner
    return Unwound(inner, residual, shift, scale, lost, Sums(partial, shift) if later else None)


def new_images(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised channels-last images of the dtype and on the device of others."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _windows(grad: Tensor, size: tuple[int, int], epilogue: Epilogue) -> int:
    step = 2 if epilogue.pool else 1
    return grad.shape[0] * -(-size[0] // step) * -(-size[1] // step)


def _cut(grad: Tensor, n_windows: int, config: UnwindConfig) -> tuple[int, int]:
    """(programs over the windows, blocks of each)."""
    n_blocks = -(-n_windows // config.block_m)
    programs = max(1, config.programs // -(-grad.shape[1] // config.block_c))
    each = max(1, -(-n_blocks // programs))
    return -(-n_blocks // each), each


def _unwind_launch(
    grad: Tensor,
    codes: Tensor | None,
    epilogue: Epilogue,
    size: tuple[int, int],
    saved: SavedOutput | None,
    inner: Tensor | None,
    residual: Tensor | None,
    partial: Tensor,
) -> Launch:
    n_channels, n_windows = grad.shape[1], _windows(grad, size, epilogue)
    config = unwind_config(n_channels, saved is not None)
    programs, each = _cut(grad, n_windows, config)
    output = saved_residual = shift = None
    if saved is not None:
        output, saved_residual, shift = saved.output, saved.residual, saved.shift
    # sm_120's assembler spills two registers a thread for a seventh program where it is left to guess.
    is_tight = saved is not None and grad.element_size() == 2 and not epilogue.pool
    held = 5 if is_tight and chip_of(grad.device) == 120 else None
    read = [grad, codes, output, saved_residual]
    written = [inner, residual, partial]
    return Launch(
        kernel=unwind_kernel,
        grid=(programs, -(-n_channels // config.block_c)),
        arguments={
            "p_grad": grad,
            "p_codes": codes,
            "p_output": output,
            "p_residual": saved_residual,
            "p_shift": shift,
            "p_inner": inner,
            "p_skipped": residual,
            "p_partial": partial,
            "n_windows": n_windows,
            "height": size[0],
            "width": size[1],
            "n_channels": n_channels,
            "n_blocks": each,
        },
        constants={
            "ACTIVATION": ACTIVATIONS.index(epilogue.activation),
            "SLOPE": float(epilogue.slope),
            "POOL": epilogue.pool,
            "BY_OUTPUT": saved is not None,
            "BLOCK_M": config.block_m,
            "BLOCK_C": config.block_c,
        },
        num_warps=config.num_warps,
        num_stages=1,
        work=Work(
            flop=grad.numel() * (1 if saved is None else 8),
            read=sum(t.nbytes for t in read if t is not None),
            written=sum(t.nbytes for t in written if t is not None),
        ),
        programs=held,
        # Of a single block Triton 3.9 contracts the last product with the sum over threads.
        is_contracted=False,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every layer of the shipped encoders in both forms, both granularities."""
    for layer in encoder_layers():
        if layer.n_taps == 1:
            continue  # a shortcut's gradient is the block's end's
        for form in ("after_residual", "before_residual"):
            epilogue = Epilogue(form, 0.1, pool=layer.last)
            for name, dtype in DTYPES.items():
                for granularity, launch in _shipped(layer, epilogue, dtype):
                    end = f"{form} pooled" if layer.last else form
                    yield f"{launch.name}/{layer.name} {end} {granularity} {name}", launch


def _shipped(layer: Layer, epilogue: Epilogue, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    output = layer.images(layer.n_out, dtype, size=layer.size // 2 if layer.last else None)
    codes = output.to(torch.uint8)
    shift = torch.empty(layer.n_out, device="meta")
    scale = shift.view(-1, 1, 1, 1)
    residual = layer.images(layer.n_out, dtype) if layer.last else None
    by_output = SavedOutput(scale, output, residual, shift)
    for granularity, saved in (("kernel", None), ("filter", by_output)):
        with observed() as launches:
            unwind(
                output,
                codes,
                epilogue=epilogue,
                size=(layer.size, layer.size),
                norm=ChannelNorm(shift, shift, shift, shift),
                dtype=torch.float32,
                saved=saved,
            )
        yield from ((granularity, launch) for launch in launches)
