"""The Triton backend of `ss_conv`: operators, their fakes and gradients.

`mtl_fast::triton_ss_conv` computes, with the weight and the shift of `mtl_fast::triton_effective_weights`,

    y = pool(act(conv(x, W_eff) + t + residual))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.contracts import ConvOperands, Epilogue
from ..kernels.reference.ss_conv import apply_epilogue
from ._double_backward import alone, gradients
from ._library import LIBRARY
from ._ss_layers_triton import (
    LAYER,
    N_LAYER,
    Layer,
    channels_last,
    differentiable,
    empty_images,
    flat,
    layers,
    output_size,
    runs,
    shaped,
    unflat,
    unwound,
)
from ._ss_products_triton import forward, input_gradient

__all__ = ["runs", "ss_conv"]

LIBRARY.define(
    f"triton_ss_conv(Tensor x, {LAYER.format('')}, Tensor? residual, int activation, float slope, bool pool, "
    "bool save) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"triton_ss_conv_backward(Tensor grad, Tensor x, Tensor output, Tensor codes, {LAYER.format('')}, "
    "Tensor? residual, int activation, float slope, bool pool, bool needs_x, bool needs_scale, "
    "bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor)"
)


def ss_conv(
    x: Tensor, conv: ConvOperands, *, epilogue: Epilogue, residual: Tensor | None, fold: bool = True
) -> Tensor:
    """[N, I, H, W] → [N, O, H', W'], the norm (if any) folded; see `mtl_fast.ops.ss_conv`."""
    assert fold or conv.norm is None
    (layer,) = layers([conv], x)
    given = (x, layer.scale, layer.shift, residual)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    output, _ = torch.ops.mtl_fast.triton_ss_conv(x, *layer, residual, *flat(epilogue), save)
    return output


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    layer = Layer(*arguments[:N_LAYER])
    residual, activation, slope, pool, save = arguments[N_LAYER:]
    output, codes = forward(
        channels_last(x),
        layer,
        residual=None if residual is None else channels_last(residual),
        epilogue=unflat(activation, slope, pool),
        save=save,
    )
    return output, x.new_empty(0, dtype=torch.uint8) if codes is None else codes


def _gradients(
    grad: Tensor, x: Tensor, output: Tensor, codes: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = Layer(*arguments[:N_LAYER])
    residual, activation, slope, pool, needs_x, needs_scale, needs_residual = arguments[N_LAYER:]
    x = channels_last(x)
    inner, skipped, scale_grad, shift_grad = unwound(
        channels_last(grad),
        codes,
        x,
        layer,
        epilogue=unflat(activation, slope, pool),
        needs_scale=needs_scale,
        output=output,
        residual=None if residual is None else channels_last(residual),
    )
    nothing, scale_grad = x.new_empty(0), shaped(scale_grad, layer)
    return (
        input_gradient(inner, layer) if needs_x else nothing,
        nothing if scale_grad is None else scale_grad,
        shift_grad,
        skipped if needs_residual else nothing,
    )


for _device in ("CUDA", "CPU"):
    LIBRARY.impl("triton_ss_conv", _forward, _device)
    LIBRARY.impl("triton_ss_conv_backward", _gradients, _device)


@torch.library.register_fake("mtl_fast::triton_ss_conv")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    layer = Layer(*arguments[:N_LAYER])
    _, activation, _, pool, save = arguments[N_LAYER:]
    size = [length // (2 if pool else 1) for length in output_size(x, layer)]
    output = empty_images(x, x.shape[0], layer.folded.shape[0], *size)
    coded = save and (activation or pool)
    return output, output.to(torch.uint8) if coded else x.new_empty(0, dtype=torch.uint8)


@torch.library.register_fake("mtl_fast::triton_ss_conv_backward")
def _(
    grad: Tensor, x: Tensor, output: Tensor, codes: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer = Layer(*arguments[:N_LAYER])
    *_, needs_x, needs_scale, needs_residual = arguments[N_LAYER:]
    nothing, n_out = x.new_empty(0), layer.folded.shape[0]
    return (
        empty_images(x, *x.shape) if needs_x else nothing,
        x.new_empty(layer.scale.shape, dtype=layer.dtype)
        if needs_scale and layer.scale is not None
        else nothing,
        x.new_empty(n_out, dtype=layer.dtype),
        empty_images(x, x.shape[0], n_out, *output_size(x, layer)) if needs_residual else nothing,
    )


# Of the arguments of `triton_ss_conv`: x, Φ_S1, Φ_S2, residual.
_X, _SCALE, _SHIFT, _RESIDUAL = (
    0,
    1 + Layer._fields.index("scale"),
    1 + Layer._fields.index("shift"),
    1 + N_LAYER,
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *rest = inputs
    layer, (residual, *epilogue, _) = Layer(*rest[:N_LAYER]), rest[N_LAYER:]
    ctx.save_for_backward(x, *output, residual, *layer.tensors)
    ctx.numbers, ctx.epilogue = layer.numbers, epilogue
    ctx.mark_non_differentiable(output[1])
    # No zeros in the place of the codes' gradient, which nobody reads.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = alone(*ctx.saved_tensors) if torch.is_grad_enabled() else ctx.saved_tensors
    x, output, codes, residual, *tensors = saved
    layer = Layer.with_tensors(tensors, *ctx.numbers)
    needs = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(needs)
    epilogue = unflat(*ctx.epilogue)
    if torch.is_grad_enabled():
        wanted = {_X: x, _SCALE: layer.scale, _SHIFT: layer.shift, _RESIDUAL: residual}
        y = apply_epilogue(differentiable(x, layer), epilogue, residual)
        return gradients([y], [grad], wanted, needs)
    # Where nothing came between, the residual's gradient is the output's own.
    passes_on = needs[_RESIDUAL] and not epilogue.pool and epilogue.activation != "after_residual"
    x_grad, scale_grad, shift_grad, residual_grad = torch.ops.mtl_fast.triton_ss_conv_backward(
        grad,
        x,
        output,
        codes,
        *layer,
        residual,
        *ctx.epilogue,
        needs[_X],
        needs[_SCALE],
        needs[_RESIDUAL] and not passes_on,
    )
    found = {
        _X: x_grad,
        _SCALE: scale_grad,
        _SHIFT: shift_grad,
        _RESIDUAL: grad if passes_on else residual_grad,
    }
    for i, value in found.items():
        grads[i] = value if needs[i] else None
    return tuple(grads)


torch.library.register_autograd("mtl_fast::triton_ss_conv", _backward, setup_context=_context)
