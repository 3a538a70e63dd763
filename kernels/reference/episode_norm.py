"""Batch statistics per group of images (one task's one split), in plain PyTorch; differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import ChannelNorm, Epilogue, Normalised
from .ss_conv import apply_epilogue


def statistics(z: Tensor, n_groups: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each group's mean [G, C], biased variance [G, C] and number of values a channel [G].

    The variance is the mean of squared deviations, never E[z²] − E[z]². A masked image counts for nothing.
    """
    n, channels, height, width = z.shape
    grouped = z.view(n_groups, n // n_groups, channels, height, width)
    if mask is None:
        var, mean = torch.var_mean(grouped, dim=(1, 3, 4), correction=0)
        count = mean.new_full((n_groups,), n // n_groups * height * width)
        return mean, var, count
    m_image = mask.view(n_groups, -1, 1, 1, 1)
    count = m_image.to(z.dtype).sum(dim=(1, 2, 3, 4)) * (height * width)
    mean = grouped.where(m_image, 0).sum(dim=(1, 3, 4)) / count[:, None]
    deviation = (grouped - mean[:, None, :, None, None]).where(m_image, 0)
    return mean, deviation.square().sum(dim=(1, 3, 4)) / count[:, None], count


def _one_group(z: Tensor, norm: ChannelNorm, epilogue: Epilogue, residual: Tensor | None) -> Normalised:
    """One group is ordinary batch normalisation, for which PyTorch has a fused kernel."""
    n, channels, height, width = z.shape
    size = n * height * width
    mean, var = z.new_zeros(channels), z.new_zeros(channels)
    # With momentum 1 the kernel hands back its own mean and unbiased variance: no second pass over z.
    y = F.batch_norm(z, mean, var, norm.weight, norm.bias, training=True, momentum=1.0, eps=norm.eps)
    biased = var * ((size - 1) / size)
    return Normalised(
        apply_epilogue(y, epilogue, residual), mean[None], biased[None], mean.new_full((1,), size)
    )


def episode_norm(
    z: Tensor,
    norm: ChannelNorm,
    *,
    n_groups: int,
    mask: Tensor | None,
    epilogue: Epilogue,
    residual: Tensor | None,
) -> Normalised:
    """[N, C, H, W] → the same shape, normalised group by group; see `mtl_fast.ops.episode_norm`."""
    if n_groups == 1 and mask is None:
        return _one_group(z, norm, epilogue, residual)
    mean, var, count = statistics(z, n_groups, mask)
    ratio = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        ratio = ratio * norm.weight
    offset = -mean * ratio
    if norm.bias is not None:
        offset = offset + norm.bias
    n, channels = z.shape[:2]
    group_size = n // n_groups
    ratio, offset = (t.repeat_interleave(group_size, dim=0).view(n, channels, 1, 1) for t in (ratio, offset))
    y = torch.addcmul(offset, z, ratio)
    return Normalised(apply_epilogue(y, epilogue, residual), mean.detach(), var.detach(), count)
