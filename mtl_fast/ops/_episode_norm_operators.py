"""Operators of batch statistics: schema and autograd, the same for every backend that has some.

The backward keeps the images, the statistics and a byte a value of the output (`_epilogue_codes`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.contracts import ChannelNorm, Epilogue, Normalised
from ..kernels.reference.episode_norm import episode_norm as reference
from ._double_backward import alone, gradients
from ._epilogue_codes import ACTIVATIONS, unwound
from ._library import LIBRARY


def define(name: str) -> None:
    """Declares `mtl_fast::<name>` and `mtl_fast::<name>_backward`, with fakes and gradients."""
    LIBRARY.define(
        f"{name}(Tensor z, Tensor? weight, Tensor? bias, float eps, int n_groups, Tensor? mask, "
        "Tensor? residual, int activation, float slope, bool pool, bool save) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    LIBRARY.define(
        f"{name}_backward(Tensor grad, Tensor z, Tensor codes, Tensor mean, Tensor var, Tensor n_values, "
        "Tensor? weight, float eps, Tensor? mask, int activation, float slope, bool pool, bool needs_z, "
        "bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    torch.library.register_fake(f"mtl_fast::{name}", _shapes, lib=LIBRARY)
    torch.library.register_fake(f"mtl_fast::{name}_backward", _gradient_shapes, lib=LIBRARY)
    backward = partial(_backward, f"{name}_backward")
    torch.library.register_autograd(f"mtl_fast::{name}", backward, setup_context=_context, lib=LIBRARY)


def normalised(
    name: str,
    z: Tensor,
    norm: ChannelNorm,
    *,
    n_groups: int,
    mask: Tensor | None,
    epilogue: Epilogue,
    residual: Tensor | None,
) -> Normalised:
    """`mtl_fast.ops.episode_norm` by the operator of this name."""
    inputs = (z, norm.weight, norm.bias, residual)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    output, mean, var, n_values, _ = getattr(torch.ops.mtl_fast, name)(
        z,
        norm.weight,
        norm.bias,
        norm.eps,
        n_groups,
        None if mask is None else mask.contiguous(),
        residual,
        ACTIVATIONS.index(epilogue.activation),
        epilogue.slope,
        epilogue.pool,
        # Without activation and pooling there is nothing to keep.
        needs_grad and (epilogue.activation != "none" or epilogue.pool),
    )
    return Normalised(output, mean, var, n_values)


def _statistics_dtype(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _shapes(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    n_groups: int,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: int,
    slope: float,
    pool: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, channels, *size = z.shape
    if pool:
        size = [length // 2 for length in size]
    mean = z.new_empty(n_groups, channels, dtype=_statistics_dtype(z))
    codes = _images(z, n if save else 0, channels, *size).to(torch.uint8)
    return _images(z, n, channels, *size), mean, torch.empty_like(mean), mean.new_empty(n_groups), codes


def _gradient_shapes(
    grad: Tensor,
    z: Tensor,
    codes: Tensor,
    mean: Tensor,
    var: Tensor,
    n_values: Tensor,
    weight: Tensor | None,
    eps: float,
    mask: Tensor | None,
    activation: int,
    slope: float,
    pool: bool,
    needs_z: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = z.shape[1]
    z_grad, residual_grad = (
        _images(z, *z.shape) if needs else z.new_empty(0) for needs in (needs_z, needs_residual)
    )
    sums = z.new_empty(channels, dtype=_statistics_dtype(z))
    return z_grad, sums, torch.empty_like(sums), residual_grad


def _images(like: Tensor, *shape: Any) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, weight, bias, ctx.eps, _, mask, _, activation, ctx.slope, ctx.pool, _ = inputs
    _, mean, var, n_values, codes = output
    ctx.activation = activation
    ctx.save_for_backward(z, weight, bias, mask, mean, var, n_values, codes)
    ctx.mark_non_differentiable(mean, var, n_values, codes)
    # No zeros as the "gradients" of statistics and codes.
    ctx.set_materialize_grads(False)


def _backward(name: str, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad)
    z, weight, bias, mask, mean, var, n_values, codes = ctx.saved_tensors
    needs_z, needs_weight, needs_bias, needs_residual = (ctx.needs_input_grad[i] for i in (0, 1, 2, 6))
    # Where nothing came between, the residual's gradient is the output's own.
    passes_on = needs_residual and not ctx.pool and ACTIVATIONS[ctx.activation] != "after_residual"
    operator = getattr(torch.ops.mtl_fast, name)
    z_grad, weight_grad, bias_grad, residual_grad = operator(
        grad,
        z,
        codes,
        mean,
        var,
        n_values,
        weight,
        ctx.eps,
        mask,
        ctx.activation,
        ctx.slope,
        ctx.pool,
        needs_z,
        needs_residual and not passes_on,
    )
    if passes_on:
        residual_grad = _kept(grad, mask)
    return (
        z_grad if needs_z else None,
        weight_grad.to(weight.dtype) if needs_weight else None,
        bias_grad.to(bias.dtype) if needs_bias else None,
        *[None] * 3,
        residual_grad if needs_residual else None,
        *[None] * 4,
    )


def _kept(grad: Tensor, mask: Tensor | None) -> Tensor:
    """No gradient from images that count for nothing."""
    return grad if mask is None else grad.where(mask.view(-1, 1, 1, 1), 0)


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as PyTorch expressions, for derivatives of derivatives."""
    z, weight, bias, mask, mean, *_, codes = alone(*ctx.saved_tensors)
    activation = ACTIVATIONS[ctx.activation]
    size = tuple(z.shape[2:]) if ctx.pool else None
    inner, skipped = unwound(_kept(grad, mask), codes, activation, ctx.slope, size)
    norm = ChannelNorm(None, None, weight, bias, ctx.eps)
    normalised = reference(
        z, norm, n_groups=mean.shape[0], mask=mask, epilogue=Epilogue(), residual=None
    ).output
    grads = gradients([normalised], [inner], {0: z, 1: weight, 2: bias}, ctx.needs_input_grad)
    return (*grads[:6], skipped if ctx.needs_input_grad[6] else None, *grads[7:])
