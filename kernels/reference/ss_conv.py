"""A scale-and-shift convolution with its stored norm and epilogue, in plain PyTorch; the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import ConvOperands, Epilogue, FrozenFilters
from .effective_weights import effective_weights, unfolded


def convolve(x: Tensor, filters: FrozenFilters, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d with the geometry of `filters`; weights computed in another dtype are rounded to x's once, here."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return conv2d(x, weight, bias, filters, filters.groups)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, filters: FrozenFilters, groups: int) -> Tensor:
    """PyTorch's, with the geometry of `filters` but so many groups."""
    stride = (filters.stride,) * 2 if isinstance(filters.stride, int) else filters.stride
    # oneDNN in torch 2.13 writes past the end in the weight gradient of 1×1 kernels with a stride on fewer than eight
    # channels, channels-last on AVX2: crashes. They meet every stride-th pixel only, so these are taken first.
    has_gradient = weight.requires_grad and torch.is_grad_enabled()
    broken = has_gradient and x.device.type == "cpu" and weight.shape[1] < 8
    if broken and weight.shape[2:] == (1, 1) and filters.padding in (0, (0, 0)) and max(stride) > 1:
        last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x, stride = x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=layout), (1, 1)
    return F.conv2d(x, weight, bias, stride, filters.padding, filters.dilation, groups)


def activate(x: Tensor, slope: float) -> Tensor:
    """Leaky ReLU; slope 0 is the ReLU."""
    return F.leaky_relu(x, slope) if slope else F.relu(x)


def apply_epilogue(z: Tensor, epilogue: Epilogue, residual: Tensor | None) -> Tensor:
    """[act] → + residual → [act] → 2×2 max-pool."""
    if epilogue.activation == "before_residual":
        z = activate(z, epilogue.slope)
    if residual is not None:
        z = z + residual
    if epilogue.activation == "after_residual":
        z = activate(z, epilogue.slope)
    return F.max_pool2d(z, 2) if epilogue.pool else z


def needs_graph(conv: ConvOperands) -> bool:
    """Whether a gradient must flow through the effective weights."""
    tensors = [conv.filters.weight, conv.filters.bias, conv.scale, conv.shift]
    if conv.norm is not None:
        tensors += [conv.norm.weight, conv.norm.bias]
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def ss_conv(
    x: Tensor, conv: ConvOperands, *, epilogue: Epilogue, residual: Tensor | None, fold: bool
) -> Tensor:
    """[N, I, H, W] → [N, O, H', W']; see `mtl_fast.ops.ss_conv`."""
    norm = conv.norm
    if norm is None or fold:
        folded = norm is not None
        effective = conv.effective
        # This meta-step's values serve where no gradient passes through them; else it is computed anew.
        if effective is None or effective.folded != folded or needs_graph(conv):
            effective = effective_weights(conv, fold=folded)
        z = convolve(x, conv.filters, effective.weight, effective.shift)
    else:
        weight, bias = unfolded(conv)
        z = convolve(x, conv.filters, weight, bias)
        z = F.batch_norm(z, norm.mean, norm.var, norm.weight, norm.bias, training=False, eps=norm.eps)
    return apply_epilogue(z, epilogue, residual)
