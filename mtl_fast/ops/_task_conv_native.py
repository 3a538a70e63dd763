"""The native backend of `task_conv`: the kernels of `ss_conv` and `episode_norm`, a task at a time, differentiable twice.

A task's maps stay apart from those of the others: what a kernel writes, the next one finds in the cache. With
s = 1/√(var + eps), x̂ = (z − mean)·s, N values a channel and P v = v − mean(v) − x̂·mean(x̂·v), the norm and what
follows have

    y = S(γ·x̂ + β)                        S: activation and pooling, linear once the codes are known; Sᵀ its adjoint
    dz = γ·s·P u      dγ = Σ u·x̂      dβ = Σ u                  for dy, with u = Sᵀ dy
    and for (a, c, d) in the place of gradients of (dz, dγ, dβ), with A = Σ a·x̂, p = s·P a, t = s·P u, κ = Σ u·p:
    dy ← S(γ·p + c·x̂ + d)      γ ← κ      z ← (c − γ·s·A/N)·t − (γ·s/N)·(dγ·p + κ·x̂)

P is symmetric, and one native call gives p and A (or t and dγ). A convolution's derivatives are convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.contracts import BlockOutput, ConvOperands, Epilogue
from . import _ss_conv_native
from ._epilogue_codes import ACTIVATIONS, POSITIVE
from ._library import native_runs


def runs(
    x: Tensor | None, conv: ConvOperands | None, n_groups: int, epilogue: Epilogue, residual: Tensor | None
) -> tuple[bool, str]:
    """Whether the native kernels run this layer, and why (not); `x` and `conv` may be left open."""
    tensors: list[Tensor | None] = [x]
    if conv is not None:
        tensors += [conv.filters.weight, conv.filters.bias]
        if conv.norm is not None:
            tensors += [conv.norm.weight, conv.norm.bias]
    can, reason = native_runs(*(t for t in tensors if t is not None))
    if not can:
        return False, reason
    if n_groups == 0 or (conv is not None and conv.norm is None):
        return False, "the native layer has batch statistics only"
    if residual is not None:
        return False, "the native layer has no residual"
    if epilogue.activation != "none" and epilogue.slope < 0:
        return False, f"slope {epilogue.slope}; the native kernel's activation must not fall"
    if conv is not None and (refusal := _ss_conv_native.geometry(conv.filters)):
        return False, refusal
    return True, reason


def task_conv(
    x: Tensor, conv: ConvOperands, *, n_groups: int, epilogue: Epilogue, residual: Tensor | None
) -> BlockOutput:
    """[T·n, I, H, W] → [T·n, O, H', W']; see `mtl_fast.ops.task_conv`."""
    assert residual is None
    norm, f = conv.norm, conv.filters
    assert norm is not None
    x = x.contiguous(memory_format=torch.channels_last)
    z = _Convolution.apply(x, f.weight, f.bias, _ss_conv_native.side_padding(f))
    y, mean, var = _Normalisation.apply(norm.weight, norm.bias, norm.eps, epilogue, *z)
    if f.bias is not None:  # the kernels leave out what the statistics take out again
        mean = mean + f.bias.detach()
    size = z[0].numel() // z[0].shape[1]
    return BlockOutput(y, ((mean, var, mean.new_full((n_groups,), size)),))


class _Packed(NamedTuple):
    """One task's weight as the kernels read it, and a shift [O] of zeros."""

    taps: Tensor
    rotated: Tensor
    zeros: Tensor

    @classmethod
    def each(cls, weight: Tensor) -> list[_Packed]:
        """Of every task."""
        zeros = weight.new_zeros(weight.shape[1])
        pairs = (torch.ops.mtl_fast.pack_filters(own) for own in weight)
        return [cls(taps, rotated, zeros) for taps, rotated in pairs]


def _convolved(x: Tensor, weight: _Packed, padding: int, residual: Tensor | None = None) -> Tensor:
    """conv(x, W) + residual of one task, [n, O, H', W']."""
    return torch.ops.mtl_fast.ss_conv(
        x, weight.taps, weight.rotated, None, None, weight.zeros, residual, padding, 0, 0.0, False, False
    )[0]


def _transposed(
    grad: Tensor, x: Tensor, weight: _Packed, padding: int, *, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """For one task, what dL/dz = `grad` gives for x by W, and for W by x; None where not needed."""
    x_grad, taps_grad, *_ = torch.ops.mtl_fast.ss_conv_backward(
        grad,
        x,
        grad.new_empty(0, dtype=torch.uint8),
        weight.taps,
        weight.rotated,
        None,
        None,
        weight.zeros,
        None,
        None,
        padding,
        0,
        0.0,
        False,
        needs_x,
        _ss_conv_native.WEIGHT if needs_weight else _ss_conv_native.NOTHING,
        False,
    )
    weight_grad = torch.ops.mtl_fast.unpack_filters(taps_grad, len(weight.zeros)) if needs_weight else None
    return (x_grad if needs_x else None), weight_grad


def _dense(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


class _Convolution(torch.autograd.Function):
    """x [T·n, I, H, W], W [T, O, I, k, k] → T times [n, O, H', W']; the bias only gets its gradient, 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, bias)
        ctx.packed, ctx.padding = _Packed.each(weight), padding
        parts = zip(x.chunk(len(weight)), ctx.packed, strict=True)
        return tuple(_convolved(part, own, padding) for part, own in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        x_grad, weight_grad = _ConvolutionBackward.apply(
            x, weight, ctx.packed, ctx.padding, needs_x, needs_weight, *grads
        )
        return x_grad, weight_grad, torch.zeros_like(bias) if needs_bias else None, None


class _ConvolutionBackward(torch.autograd.Function):
    """dL/dz of every task → dL/dx, dL/dW."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        packed: list[_Packed],
        padding: int,
        needs_x: bool,
        needs_weight: bool,
        *grads: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        grads = tuple(map(_dense, grads))
        ctx.save_for_backward(x, *grads)
        ctx.packed, ctx.padding = packed, padding
        ctx.set_materialize_grads(False)
        found = [
            _transposed(grad, part, own, padding, needs_x=needs_x, needs_weight=needs_weight)
            for grad, part, own in zip(grads, x.chunk(len(packed)), packed, strict=True)
        ]
        return _joined([f[0] for f in found], torch.cat), _joined([f[1] for f in found], torch.stack)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_x: Tensor | None, to_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *grads = ctx.saved_tensors
        n_tasks = len(grads)
        needs_x, needs_weight, needs_grads = (ctx.needs_input_grad[i] for i in (0, 1, 6))
        x_of, weight_of, grad_of = [], [], []
        to_xs = [None] * n_tasks if to_x is None else _dense(to_x).chunk(n_tasks)
        to_weights = [None] * n_tasks if to_weight is None else _Packed.each(to_weight)
        tasks = zip(grads, x.chunk(n_tasks), ctx.packed, to_xs, to_weights, strict=True)
        for grad, part, own, to_part, to_own in tasks:
            # dx = convᵀ(dz, W) and dW = corr(x, dz): each is linear in both of its arguments.
            z = None if to_own is None else _convolved(part, to_own, ctx.padding)
            if to_part is not None:
                z = _convolved(to_part, own, ctx.padding, z)
            grad_of.append(z if needs_grads else None)
            by_x, by_weight = _transposed(
                grad,
                part if to_part is None else to_part,
                own if to_own is None else to_own,
                ctx.padding,
                needs_x=needs_x and to_own is not None,
                needs_weight=needs_weight and to_part is not None,
            )
            x_of.append(by_x)
            weight_of.append(by_weight)
        return (
            _joined(x_of, torch.cat),
            _joined(weight_of, torch.stack),
            *[None] * 4,
            *grad_of,
        )


def _joined(parts: Sequence[Tensor | None], join: Any) -> Tensor | None:
    """All tasks' tensors as one, None where there are none."""
    return None if parts[0] is None else join(parts)


class _Kept(NamedTuple):
    """What one task's normalisation keeps: [n, C, H, W] images, codes of the epilogue, statistics [1, C], [1]."""

    z: Tensor
    codes: Tensor
    mean: Tensor
    var: Tensor
    n_values: Tensor


def _projected(
    grad: Tensor, kept: _Kept, weight: Tensor | None, eps: float, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    """(γ·s·P u, Σ u·x̂, Σ u) with u = Sᵀ grad; γ = 1 where `weight` is None."""
    return torch.ops.mtl_fast.episode_norm_backward(
        grad,
        kept.z,
        kept.codes,
        kept.mean,
        kept.var,
        kept.n_values,
        weight,
        eps,
        None,
        ACTIVATIONS.index(epilogue.activation),
        epilogue.slope,
        epilogue.pool,
        True,
        False,
    )[:3]


class _Normalisation(torch.autograd.Function):
    """z of every task → y [T·n, C, H', W'], mean and biased variance [T, C]."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor | None, bias: Tensor | None, eps: float, epilogue: Epilogue, *z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs, kept = [], []
        for t, part in enumerate(z):
            y, mean, var, n_values, codes = torch.ops.mtl_fast.episode_norm(
                part,
                None if weight is None else weight[t],
                None if bias is None else bias[t],
                eps,
                1,
                None,
                None,
                ACTIVATIONS.index(epilogue.activation),
                epilogue.slope,
                epilogue.pool,
                epilogue.activation != "none" or epilogue.pool,
            )
            outputs.append(y)
            kept.append(_Kept(part, codes, mean, var, n_values))
        ctx.save_for_backward(weight, bias, *(tensor for task in kept for tensor in task))
        ctx.eps, ctx.epilogue = eps, epilogue
        mean, var = (torch.cat([getattr(task, name) for task in kept]) for name in ("mean", "var"))
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return torch.cat(outputs), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        weight, bias, *kept = ctx.saved_tensors
        # The images first: they take gradients, what was derived from them does not.
        z = kept[::5]
        rest = [tuple(kept[i : i + 4]) for i in range(1, len(kept), 5)]
        weight_grad, bias_grad, *z_grads = _NormalisationBackward.apply(
            grad, weight, rest, ctx.eps, ctx.epilogue, *z
        )
        return (
            None if weight is None else weight_grad,
            None if bias is None else bias_grad,
            None,
            None,
            *z_grads,
        )


class _NormalisationBackward(torch.autograd.Function):
    """dL/dy → dL/dγ, dL/dβ [T, C] and dL/dz of every task."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        weight: Tensor | None,
        rest: list[tuple[Tensor, ...]],
        eps: float,
        epilogue: Epilogue,
        *z: Tensor,
    ) -> tuple[Tensor, ...]:
        grad = _dense(grad)
        ctx.save_for_backward(grad, weight, *z)
        ctx.rest, ctx.eps, ctx.epilogue = rest, eps, epilogue
        found = [
            _projected(part, _Kept(own, *others), None if weight is None else weight[t], eps, epilogue)
            for t, (part, own, others) in enumerate(zip(grad.chunk(len(z)), z, rest, strict=True))
        ]
        z_grads, weight_grads, bias_grads = zip(*found, strict=True)
        return torch.stack(weight_grads), torch.stack(bias_grads), *z_grads

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_weight: Tensor, to_bias: Tensor, *to_z: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight, *z = ctx.saved_tensors
        found = []
        for t, part in enumerate(grad.chunk(len(z))):
            gamma = torch.ones_like(to_weight[t]) if weight is None else weight[t]
            kept = _Kept(z[t], *ctx.rest[t])
            found.append(
                _second_order(
                    part, gamma, kept, ctx.eps, ctx.epilogue, to_weight[t], to_bias[t], _dense(to_z[t])
                )
            )
        grads, weights, images = zip(*found, strict=True)
        weight_grad = None if weight is None else torch.stack(weights)
        return torch.cat(grads), weight_grad, None, None, None, *images


def _second_order(
    grad: Tensor,
    gamma: Tensor,
    kept: _Kept,
    eps: float,
    epilogue: Epilogue,
    c: Tensor,
    d: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What reaches dy, γ and z of one task from (c, d, a); the equations are this module's."""
    mean, s, size = kept.mean[0], torch.rsqrt(kept.var[0] + eps), kept.z.numel() // kept.z.shape[1]
    p, sum_a, _ = _projected(a, kept, None, eps, Epilogue())
    t, weight_grad, _ = _projected(grad, kept, None, eps, epilogue)
    at_p, at_z, slope = _selected(kept, p, epilogue)
    channels = (1, -1, 1, 1)
    u = grad * slope
    kappa = (u * at_p).sum(dim=(0, 2, 3))
    to_grad = (at_p * gamma.view(channels)).addcmul_(at_z - mean.view(channels), (c * s).view(channels))
    to_grad = to_grad.add_(d.view(channels)).mul_(slope)
    share = gamma * s / size
    by_t, by_p, by_z = c - share * sum_a, -share * weight_grad, -share * kappa * s
    to_z = torch.addcmul((-mean * by_z).view(channels), kept.z, by_z.view(channels))
    to_z = to_z.addcmul_(t, by_t.view(channels)).addcmul_(p, by_p.view(channels))
    return to_grad, kappa, to_z


def _selected(kept: _Kept, p: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor, Tensor | float]:
    """p and z where the epilogue took its output from, and the activation's slope there."""
    slope: Tensor | float = 1.0
    if epilogue.activation != "none":
        slope = torch.where((kept.codes & POSITIVE) != 0, 1.0, epilogue.slope).to(p)
    if not epilogue.pool:
        return p, kept.z, slope
    n, channels, height, width = kept.z.shape
    # By code, from a window's beginning: two places of the first row, two of the second, whatever the sign.
    below = width * channels
    steps = torch.tensor([0, channels, below, below + channels] * 2)
    index = steps.take(kept.codes.permute(0, 2, 3, 1).long()).add_(_window_offsets(channels, height, width))
    index += torch.arange(n).mul_(height * below).view(n, 1, 1, 1)
    at_p, at_z = (v.permute(0, 2, 3, 1).take(index).permute(0, 3, 1, 2) for v in (p, kept.z))
    return at_p, at_z, slope


@lru_cache(maxsize=32)
def _window_offsets(channels: int, height: int, width: int) -> Tensor:
    """int64 [H//2, W//2, C]: where the 2×2 windows of an image [H, W, C] begin in its memory."""
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    corners = rows.mul(2 * width)[:, None] + columns.mul(2)
    return corners.mul(channels)[:, :, None] + torch.arange(channels)
