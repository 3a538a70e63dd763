"""A convolution whose weight is each task's own, its norm and its epilogue, in plain PyTorch; the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import BlockOutput, ChannelNorm, ConvOperands, Epilogue
from .ss_conv import apply_epilogue, conv2d


def _side_by_side(x: Tensor, n_tasks: int) -> Tensor:
    """[T·n, C, H, W] → [n, T·C, H, W]: tasks become groups of channels."""
    return x.unflatten(0, (n_tasks, -1)).transpose(0, 1).flatten(1, 2)


def _one_after_the_other(x: Tensor, n_tasks: int) -> Tensor:
    """The inverse of `_side_by_side`."""
    return x.unflatten(1, (n_tasks, -1)).transpose(0, 1).flatten(0, 1)


def _normalised(z: Tensor, norm: ChannelNorm, n_tasks: int, stored: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[n, T·C, H, W] with γ and β [T, C] → the same shape; mean and biased variance [T·C] that were used.

    At least in float32: under autocast z is of half precision, and γ and β are not.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    weight, bias = (None if v is None else v.flatten().to(z.dtype) for v in (norm.weight, norm.bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # batch_norm's second derivative forgets β where there is no γ
    if stored:
        assert norm.mean is not None
        assert norm.var is not None
        mean, var = (v.to(z.dtype).repeat(n_tasks) for v in (norm.mean, norm.var))
        return F.batch_norm(z, mean, var, weight, bias, eps=norm.eps), mean, var
    mean, var = z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1])
    # With momentum 1 the kernel hands back its own mean and unbiased variance: no second pass over z.
    y = F.batch_norm(z, mean, var, weight, bias, training=True, momentum=1.0, eps=norm.eps)
    size = z.numel() // z.shape[1]
    return y, mean, var * ((size - 1) / size)


def task_conv(
    x: Tensor, conv: ConvOperands, *, n_groups: int, epilogue: Epilogue, residual: Tensor | None
) -> BlockOutput:
    """[T·n, I, H, W] → [T·n, O, H', W']; see `mtl_fast.ops.task_conv`."""
    f = conv.filters
    n_tasks = f.weight.shape[0]
    bias = None if f.bias is None else f.bias.flatten()
    weight = f.weight.flatten(0, 1)
    z = conv2d(_side_by_side(x, n_tasks), weight, bias, f, f.groups * n_tasks)
    dtype = z.dtype
    statistics: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()
    if conv.norm is not None:
        size = len(z) * z.shape[2] * z.shape[3]
        z, mean, var = _normalised(z, conv.norm, n_tasks, n_groups == 0)
        if n_groups:
            count = mean.new_full((n_tasks,), size)
            statistics = ((mean.view(n_tasks, -1), var.view(n_tasks, -1), count),)
    if residual is not None:
        residual = _side_by_side(residual, n_tasks)
    output = apply_epilogue(z, epilogue, residual).to(dtype)
    return BlockOutput(_one_after_the_other(output, n_tasks), statistics)
