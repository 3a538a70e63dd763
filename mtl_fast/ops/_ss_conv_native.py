"""The native backend of `ss_conv`: operators, their fakes and gradients, and what it cannot run.

`mtl_fast::ss_conv` computes, with packed taps W, Φ_S1 and ρ = γ/σ in the filters and the folded shift t,

    z = conv(x, W ⊙ Φ_S1 ⊙ ρ) + t        y = pool(act(z + residual))

`mtl_fast::pack_filters` brings a weight into the order that the kernels read. A trainable weight goes through it
on every call and takes its gradient from there; a frozen one is packed once, into its `FrozenFilters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.contracts import ConvOperands, Epilogue, FrozenFilters
from ..kernels.reference.effective_weights import effective_shift, effective_weights, stored_scale
from ._double_backward import alone, gradients
from ._epilogue_codes import ACTIVATIONS, unwound
from ._library import LIBRARY, native_runs

# What the backward operator computes for the weights, in the order of the C++ enumeration.
NOTHING, KERNEL_SCALE, FILTER_SCALE, WEIGHT = range(4)
# Packed taps are [⌈N/32⌉, K, k², 32], K the summed and N the produced channels: panels of any vector width in a row.
PACKED_COLUMNS = 32

LIBRARY.define("pack_filters(Tensor weight) -> (Tensor, Tensor)")
LIBRARY.define("unpack_filters(Tensor taps, int n_out) -> Tensor")
LIBRARY.define(
    "ss_conv(Tensor x, Tensor taps, Tensor rotated, Tensor? scale, Tensor? ratio, Tensor shift, "
    "Tensor? residual, int padding, int activation, float slope, bool pool, bool save) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "ss_conv_backward(Tensor grad, Tensor x, Tensor codes, Tensor taps, Tensor rotated, Tensor? scale, "
    "Tensor? ratio, Tensor shift, Tensor? output, Tensor? residual, int padding, int activation, float slope, "
    "bool pool, bool needs_x, int wanted, bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor)"
)


def runs(
    convs: Sequence[ConvOperands], x: Tensor | None, epilogue: Epilogue, residual: Tensor | None, fold: bool
) -> tuple[bool, str]:
    """Whether the native kernels run these convolutions, and why (not); `x` may be left open."""
    tensors: list[Tensor | None] = [x, residual]
    for conv in convs:
        tensors += [conv.filters.weight, conv.filters.bias, conv.scale, conv.shift]
        if conv.norm is not None:
            tensors += [conv.norm.mean, conv.norm.var, conv.norm.weight, conv.norm.bias]
    can, reason = native_runs(*(t for t in tensors if t is not None))
    if not can:
        return False, reason
    for conv in convs:
        if refusal := geometry(conv.filters):
            return False, refusal
        if conv.norm is not None and not fold:
            return False, "fold=False asks for the bits of a convolution followed by its norm"
    if epilogue.activation != "none" and epilogue.slope < 0:
        return False, f"slope {epilogue.slope}; the native kernel's activation must not fall"
    return True, reason


def geometry(filters: FrozenFilters, backend: str = "native") -> str | None:
    """What about the geometry the kernel of a backend does not have."""
    side = tuple(filters.weight.shape[-2:])
    if side not in ((1, 1), (3, 3)):
        return f"taps of {side[0]}×{side[1]}; the {backend} kernel has 3×3 and 1×1"
    for name, value in (("stride", filters.stride), ("dilation", filters.dilation)):
        if value not in (1, (1, 1)):
            return f"{name} {value}; the {backend} kernel has {name} 1"
    if filters.groups != 1:
        return f"groups {filters.groups}; the {backend} kernel has one group"
    if not 0 <= side_padding(filters) < side[0]:
        return f"padding {filters.padding}; the {backend} kernel has 0..{side[0] - 1}, the same on all sides"
    return None


def ss_conv(
    x: Tensor, conv: ConvOperands, *, epilogue: Epilogue, residual: Tensor | None, fold: bool = True
) -> Tensor:
    """[N, I, H, W] → [N, O, H', W'], the norm (if any) folded; see `mtl_fast.ops.ss_conv`."""
    assert fold or conv.norm is None
    weight, norm = conv.filters.weight, conv.norm
    scale, ratio = conv.scale, None
    trained = [weight] + ([norm.weight] if norm is not None and norm.weight is not None else [])
    if torch.is_grad_enabled() and any(t.requires_grad for t in trained):
        # The weight's own gradient is needed: PyTorch differentiates its product with Φ_S1 and γ/σ.
        effective = effective_weights(conv, fold=True)
        taps, rotated = torch.ops.mtl_fast.pack_filters(effective.weight)
        scale, shift = None, effective.shift
    else:
        taps, rotated = packed(conv.filters)
        if norm is not None:
            ratio = stored_scale(norm)
        shift = effective_shift(conv, ratio)
    inputs = [x, taps, scale, shift, residual]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    coded = epilogue.activation != "none" or epilogue.pool
    output, _ = torch.ops.mtl_fast.ss_conv(
        x,
        taps,
        rotated,
        scale,
        ratio,
        shift,
        residual,
        side_padding(conv.filters),
        ACTIVATIONS.index(epilogue.activation),
        epilogue.slope,
        epilogue.pool,
        save and coded,
    )
    return output


def packed(filters: FrozenFilters) -> tuple[Tensor, Tensor]:
    """Taps and rotated taps, packed; of a frozen weight made once a `FrozenFilters`.

    What is compiled packs them in its graph: nothing would tell it that the weight was written to.
    """
    kept = filters.derived
    compiled = torch.compiler.is_compiling()
    if "taps" in kept and not filters.weight.requires_grad and not compiled:
        return kept["taps"], kept["rotated"]
    # What is kept serves gradients later, also when it was first asked for in inference mode.
    with torch.inference_mode(False):
        taps, rotated = torch.ops.mtl_fast.pack_filters(filters.weight.detach())
    if not filters.weight.requires_grad and not compiled:
        # In this order: another thread that sees the taps finds the rotated ones too.
        kept["rotated"], kept["taps"] = rotated, taps
    return taps, rotated


def side_padding(filters: FrozenFilters) -> int:
    """The padding, −1 where it differs between the sides."""
    if isinstance(filters.padding, int):
        return filters.padding
    top, left = filters.padding
    return top if top == left else -1


@torch.library.register_fake("mtl_fast::pack_filters")
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    n_out, n_in, *side = weight.shape
    packs_out, packs_in = (-(-n // PACKED_COLUMNS) for n in (n_out, n_in))
    rest = side[0] * side[1], PACKED_COLUMNS
    return weight.new_empty(packs_out, n_in, *rest), weight.new_empty(packs_in, n_out, *rest)


@torch.library.register_fake("mtl_fast::unpack_filters")
def _(taps: Tensor, n_out: int) -> Tensor:
    side = _side(taps)
    return taps.new_empty(n_out, taps.shape[1], side, side)


def _pack_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.n_out = inputs[0].shape[0]
    ctx.mark_non_differentiable(output[1])


def _pack_backward(ctx: Any, taps: Tensor, rotated: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return _unpacked(taps, ctx.n_out)
    return torch.ops.mtl_fast.unpack_filters(taps, ctx.n_out)


def _unpacked(taps: Tensor, n_out: int) -> Tensor:
    """Packed taps -> weight [O, I, k, k], differentiably."""
    side = _side(taps)
    return taps.permute(0, 3, 1, 2).flatten(0, 1)[:n_out].unflatten(2, (side, side))


def _side(taps: Tensor) -> int:
    """k of packed taps."""
    return 1 if taps.shape[2] == 1 else 3


torch.library.register_autograd("mtl_fast::pack_filters", _pack_backward, setup_context=_pack_context)


@torch.library.register_fake("mtl_fast::ss_conv")
def _(
    x: Tensor,
    taps: Tensor,
    rotated: Tensor,
    scale: Tensor | None,
    ratio: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    padding: int,
    activation: int,
    slope: float,
    pool: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    side = _side(taps)
    halved = 2 if pool else 1
    size = [(length + 2 * padding - side + 1) // halved for length in x.shape[2:]]
    output = _images(x, x.shape[0], shift.shape[0], *size)
    return output, _images(x, x.shape[0] if save else 0, shift.shape[0], *size).to(torch.uint8)


@torch.library.register_fake("mtl_fast::ss_conv_backward")
def _(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    taps: Tensor,
    rotated: Tensor,
    scale: Tensor | None,
    ratio: Tensor | None,
    shift: Tensor,
    output: Tensor | None,
    residual: Tensor | None,
    padding: int,
    activation: int,
    slope: float,
    pool: bool,
    needs_x: bool,
    wanted: int,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_out = shift.shape[0]
    side = _side(taps)
    size = [length + 2 * padding - side + 1 for length in x.shape[2:]]
    weights = {
        NOTHING: x.new_empty(0),
        KERNEL_SCALE: x.new_empty(x.shape[1], taps.shape[0] * PACKED_COLUMNS),
        FILTER_SCALE: x.new_empty(n_out),
        WEIGHT: torch.empty_like(taps),
    }
    return (
        _images(x, *x.shape) if needs_x else x.new_empty(0),
        weights[wanted],
        x.new_empty(n_out),
        _images(x, x.shape[0], n_out, *size) if needs_residual else x.new_empty(0),
    )


def _images(like: Tensor, *shape: Any) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, taps, rotated, scale, ratio, shift, residual, padding, activation, slope, pool, _ = inputs
    needs = ctx.needs_input_grad
    ctx.wanted = NOTHING
    if needs[1]:
        ctx.wanted = WEIGHT
    elif needs[3]:
        ctx.wanted = KERNEL_SCALE if scale.shape[1] == x.shape[1] else FILTER_SCALE
    # Only the scale of a filter takes its gradient from the output.
    kept = (output[0], residual) if ctx.wanted == FILTER_SCALE else (None, None)
    ctx.save_for_backward(x, taps, rotated, scale, ratio, shift, output[1], *kept)
    ctx.padding, ctx.activation, ctx.slope, ctx.pool = padding, activation, slope, pool
    ctx.mark_non_differentiable(output[1])
    # No zeros in the place of the codes' gradient, which nobody reads.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    x, taps, rotated, scale, ratio, shift, codes, output, residual = ctx.saved_tensors
    needs_x, needs_shift, needs_residual = (ctx.needs_input_grad[i] for i in (0, 5, 6))
    activation = ACTIVATIONS[ctx.activation]
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad)
    # Where nothing came between, the residual's gradient is the output's own.
    passes_on = needs_residual and not ctx.pool and activation != "after_residual"
    x_grad, weights, sums, residual_grad = torch.ops.mtl_fast.ss_conv_backward(
        grad,
        x,
        codes,
        taps,
        rotated,
        scale,
        ratio,
        shift,
        output,
        residual,
        ctx.padding,
        ctx.activation,
        ctx.slope,
        ctx.pool,
        needs_x,
        ctx.wanted,
        needs_residual and not passes_on,
    )
    if ctx.wanted == KERNEL_SCALE:
        weights = weights[:, : shift.shape[0]].t()
    return (
        x_grad if needs_x else None,
        weights if ctx.wanted == WEIGHT else None,
        None,
        weights.view(scale.shape)
        if ctx.wanted == FILTER_SCALE
        else weights[:, :, None, None]
        if ctx.wanted == KERNEL_SCALE
        else None,
        None,
        sums if needs_shift else None,
        grad if passes_on else residual_grad if needs_residual else None,
        *[None] * 5,
    )


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as PyTorch expressions, for derivatives of derivatives.

    The epilogue is piecewise linear, so its part is a fixed mask, read off the codes.
    """
    x, taps, _, scale, ratio, shift, codes, *_ = alone(*ctx.saved_tensors)
    n_out = shift.shape[0]
    side = _side(taps)
    height, width = (length + 2 * ctx.padding - side + 1 for length in x.shape[2:])
    pooled_from = (height, width) if ctx.pool else None
    inner, skipped = unwound(grad, codes, ACTIVATIONS[ctx.activation], ctx.slope, pooled_from)
    weight = _unpacked(taps, n_out)
    for factor in (scale, None if ratio is None else ratio.view(-1, 1, 1, 1)):
        weight = weight if factor is None else weight * factor
    z = torch.nn.functional.conv2d(x, weight, shift, padding=ctx.padding)
    wanted = {0: x, 1: taps, 3: scale, 5: shift}
    grads = gradients([z], [inner], wanted, ctx.needs_input_grad)
    return (*grads[:6], skipped if ctx.needs_input_grad[6] else None, *grads[7:])


torch.library.register_autograd("mtl_fast::ss_conv", _backward, setup_context=_context)
