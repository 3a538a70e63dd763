"""Operands of scale-and-shift convolutions for tests, and comparison within derived bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import ChannelNorm, ConvOperands, Epilogue, FrozenFilters


class Random:
    """A stream of test tensors."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        """0.5 to 1.5."""
        return (0.5 + torch.rand(shape, generator=self.generator, dtype=torch.float64)).to(self.dtype)

    def images(self, *shape: int) -> Tensor:
        """Channels-last in memory."""
        return self.normal(*shape).contiguous(memory_format=torch.channels_last)

    def norm(self, n: int, affine: str = "both", eps: float = 1e-5) -> ChannelNorm:
        weight = self.normal(n) if affine == "both" else None
        bias = self.normal(n) if affine != "none" else None
        return ChannelNorm(self.normal(n), self.positive(n), weight, bias, eps)

    def conv(
        self,
        n_in: int,
        n_out: int,
        k: int = 3,
        *,
        granularity: str | None = "kernel",
        bias: bool = True,
        norm: str | None = "both",
        eps: float = 1e-5,
        **geometry: Any,
    ) -> ConvOperands:
        """Random filters, Φ_S1 about 1, Φ_S2 and norm; padding k // 2 unless given."""
        per_group = n_in // geometry.get("groups", 1)
        weight = self.normal(n_out, per_group, k, k) / (per_group * k * k) ** 0.5
        geometry.setdefault("padding", k // 2)
        filters = FrozenFilters(weight, self.normal(n_out) if bias else None, **geometry)
        scale = shift = None
        if granularity is not None:
            scale = self.positive(n_out, per_group if granularity == "kernel" else 1, 1, 1)
            # Negative scales too: no formula may take their sign for granted.
            scale = scale * torch.where(self.normal(*scale.shape) < -1, -1, 1).to(scale)
            shift = self.normal(n_out)
        return ConvOperands(filters, scale, shift, None if norm is None else self.norm(n_out, norm, eps))


@contextmanager
def convolutions_take(fp32_precision: Literal["tf32", "ieee"]) -> Iterator[None]:
    """Within it, convolutions of float32 on a GPU are of this precision."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = fp32_precision
    try:
        yield
    finally:
        conv.fp32_precision = before


def tensors(conv: ConvOperands) -> dict[str, Tensor]:
    """The tensors that may take a gradient, by name."""
    found = {
        "weight": conv.filters.weight,
        "bias": conv.filters.bias,
        "scale": conv.scale,
        "shift": conv.shift,
    }
    if conv.norm is not None:
        found |= {"gamma": conv.norm.weight, "beta": conv.norm.bias}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def rebuilt(conv: ConvOperands, values: dict[str, Tensor]) -> ConvOperands:
    """`conv` with the tensors of `values` in the places that `tensors` names."""
    norm = conv.norm
    if norm is not None:
        norm = replace(norm, weight=values.get("gamma"), bias=values.get("beta"))
    filters = replace(conv.filters, weight=values["weight"], bias=values.get("bias"))
    return replace(conv, filters=filters, scale=values.get("scale"), shift=values.get("shift"), norm=norm)


def mapped(conv: ConvOperands, change: Callable[[Tensor], Tensor]) -> ConvOperands:
    """`conv` with every tensor changed; nothing that was derived from them is kept."""
    norm = conv.norm
    if norm is not None:
        norm = replace(norm, mean=change(norm.mean), var=change(norm.var))
    filters = replace(conv.filters, derived={})
    values = {name: change(t.detach()) for name, t in tensors(conv).items()}
    return rebuilt(replace(conv, filters=filters, norm=norm), values)


def with_gradients(conv: ConvOperands) -> ConvOperands:
    """A copy whose tensors all require a gradient."""
    return rebuilt(conv, {name: t.detach().clone().requires_grad_() for name, t in tensors(conv).items()})


def plain_epilogue(z: Tensor, epilogue: Epilogue, residual: Tensor | None) -> Tensor:
    def act(x: Tensor) -> Tensor:
        return torch.nn.LeakyReLU(epilogue.slope)(x) if epilogue.slope else torch.nn.ReLU()(x)

    if epilogue.activation == "before_residual":
        z = act(z)
    if residual is not None:
        z = z + residual
    if epilogue.activation == "after_residual":
        z = act(z)
    return torch.nn.MaxPool2d(2)(z) if epilogue.pool else z


def plain_conv(x: Tensor, conv: ConvOperands) -> Tensor:
    """conv2d with Φ multiplied and added, norm left out."""
    f = conv.filters
    weight, bias = f.weight, f.bias
    if conv.scale is not None:
        weight = weight * conv.scale
    if conv.shift is not None:
        bias = conv.shift if bias is None else bias + conv.shift
    return F.conv2d(x, weight, bias, f.stride, f.padding, f.dilation, f.groups)


def plain_norm(z: Tensor, norm: ChannelNorm | None, *, batch: bool = False) -> Tensor:
    """PyTorch's batch normalisation, of stored or of batch statistics."""
    if norm is None:
        return z
    mean, var = (None, None) if batch else (norm.mean, norm.var)
    return F.batch_norm(z, mean, var, norm.weight, norm.bias, training=batch, eps=norm.eps)


def rounding_bound(x: Tensor, conv: ConvOperands) -> Tensor:
    """Largest error of a normalised convolution in any order of evaluation: K·eps·Σ|terms|, elementwise."""
    f = conv.filters
    absolute = replace(f, weight=f.weight.abs(), bias=None)
    scale = None if conv.scale is None else conv.scale.abs()
    shift = sum(t.abs() for t in (f.bias, conv.shift, conv.norm and conv.norm.mean) if t is not None)
    terms = plain_conv(x.abs(), ConvOperands(absolute, scale))
    terms = terms + (shift.view(-1, 1, 1) if isinstance(shift, Tensor) else 0)
    if conv.norm is not None and conv.norm.var is not None:
        ratio = torch.rsqrt(conv.norm.var + conv.norm.eps)
        ratio = ratio if conv.norm.weight is None else ratio * conv.norm.weight.abs()
        terms = terms * ratio.view(-1, 1, 1)
        if conv.norm.bias is not None:
            terms = terms + conv.norm.bias.abs().view(-1, 1, 1)
    n_terms = f.weight[0].numel() + 8
    return n_terms * torch.finfo(x.dtype).eps * terms


def assert_near(actual: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """Largest and RMS error, both against the largest and RMS expected value."""
    assert actual.shape == expected.shape, what
    assert torch.isfinite(actual).all(), what
    error = actual.double() - expected.double()
    largest, rms = expected.double().abs().max(), expected.double().square().mean().sqrt()
    assert error.abs().max() <= relative * largest, f"{what}: {error.abs().max() / largest:.2e}"
    assert error.square().mean().sqrt() <= relative * rms, what


def assert_all_near(
    actual: Sequence[Tensor], expected: Sequence[Tensor], relative: float, names: Sequence[str]
) -> None:
    for a, e, name in zip(actual, expected, names, strict=True):
        assert_near(a, e, relative, name)
