"""Batch statistics per group of images (one task's one split), in plain PyTorch; differentiable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import ChannelNorm, Epilogue, Normalised
from .ss_conv import apply_epilogue


def statistics(z: Tensor, n_groups: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each group's mean [G, C], biased variance [G, C] and number of values a channel [G].

    The variance is the mean of squared deviations, never E[z²] − E[z]². A masked image counts for nothing.
    """
    keep = z.new_ones(z.shape[0], dtype=torch.bool) if mask is None else mask
    m_image = keep.view(n_groups, -1, 1, 1, 1)
    grouped = z.unflatten(0, (n_groups, -1))
    count = m_image.sum(dim=(1, 2, 3, 4)).to(z.dtype) * (z.shape[2] * z.shape[3])
    mean = grouped.where(m_image, 0).sum(dim=(1, 3, 4)) / count[:, None]
    deviation = (grouped - mean[:, None, :, None, None]).where(m_image, 0)
    return mean, deviation.square().sum(dim=(1, 3, 4)) / count[:, None], count


def _plainly(z: Tensor, norm: ChannelNorm, n_groups: int, mask: Tensor | None) -> Normalised:
    """The equation as it stands."""
    mean, var, count = statistics(z, n_groups, mask)
    ratio = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        ratio = ratio * norm.weight
    n, channels = z.shape[:2]
    center, ratio = (t.repeat_interleave(n // n_groups, dim=0).view(n, channels, 1, 1) for t in (mean, ratio))
    # The deviation first: a gradient of γ as Σ G·z − mean·Σ G would be a difference of large sums.
    y = (z - center) * ratio
    if norm.bias is not None:
        y = y + norm.bias.view(-1, 1, 1)
    return Normalised(y, mean.detach(), var.detach(), count)


def _over_processes(z: Tensor, norm: ChannelNorm, gather: Callable[[Tensor], Tensor]) -> Normalised:
    """One group whose images several processes hold: its statistics joined from those of each one's part.

    mean = Σ share·mean_p, var = Σ share·(var_p + (mean_p − mean)²), with share = count_p/count
    """
    channels = z.shape[1]
    mean, var, count = statistics(z, 1, None)
    parts = gather(torch.cat([mean[0], var[0], count]))
    mean, var, count = parts.split([channels, channels, 1], dim=1)
    total = count.sum(dim=0)
    share = count / total
    center = (share * mean).sum(dim=0, keepdim=True)
    spread = (share * (var + (mean - center).square())).sum(dim=0, keepdim=True)
    ratio = torch.rsqrt(spread + norm.eps)
    if norm.weight is not None:
        ratio = ratio * norm.weight
    y = (z - center.view(-1, 1, 1)) * ratio.view(-1, 1, 1)
    if norm.bias is not None:
        y = y + norm.bias.view(-1, 1, 1)
    return Normalised(y, center.detach(), spread.detach(), total.detach())


def _by_batch_norm(z: Tensor, norm: ChannelNorm, n_groups: int) -> Normalised:
    """The same by PyTorch's fused kernel, with G·C channels: group g's channel c is channel g·C + c."""
    n, channels, height, width = z.shape
    size = n // n_groups * height * width
    weight, bias = norm.weight, norm.bias
    if weight is None and bias is not None:
        # Its second derivative forgets β where there is no γ.
        weight = torch.ones_like(bias)
    weight, bias = (None if v is None else v.repeat(n_groups) for v in (weight, bias))
    if n_groups > 1:
        # [N, C, H, W] → [N/G, G·C, H, W], both channels-last
        z = z.permute(0, 2, 3, 1).unflatten(0, (n_groups, -1)).permute(1, 2, 3, 0, 4)
        z = z.flatten(3).permute(0, 3, 1, 2)
    mean, var = z.new_zeros(n_groups * channels), z.new_zeros(n_groups * channels)
    # With momentum 1 the kernel hands back its own mean and unbiased variance: no second pass over z.
    y = F.batch_norm(z, mean, var, weight, bias, training=True, momentum=1.0, eps=norm.eps)
    if n_groups > 1:
        y = y.permute(0, 2, 3, 1).unflatten(3, (n_groups, channels)).permute(3, 0, 1, 2, 4)
        y = y.flatten(0, 1).permute(0, 3, 1, 2)
    biased = var * ((size - 1) / size)
    return Normalised(y, mean.view(n_groups, -1), biased.view(n_groups, -1), mean.new_full((n_groups,), size))


def episode_norm(
    z: Tensor,
    norm: ChannelNorm,
    *,
    n_groups: int,
    mask: Tensor | None,
    epilogue: Epilogue,
    residual: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Normalised:
    """[N, C, H, W] → the same shape, normalised group by group; see `mtl_fast.ops.episode_norm`."""
    wide = torch.promote_types(z.dtype, torch.float32)
    weight, bias = (None if v is None else v.to(wide) for v in (norm.weight, norm.bias))
    norm = replace(norm, weight=weight, bias=bias)
    images = z.to(wide)
    m_image = None if mask is None else mask.view(-1, 1, 1, 1)
    if m_image is not None:
        # where, not a product: 0·NaN is NaN, in values and in gradients.
        images = images.where(m_image, 0)
    if gather is not None:
        normalised = _over_processes(images, norm, gather)
    elif mask is None and z.numel() > n_groups * z.shape[1]:
        normalised = _by_batch_norm(images, norm, n_groups)
    else:
        # PyTorch's kernel takes no mask and refuses a single value a channel.
        normalised = _plainly(images, norm, n_groups, mask)
    output = apply_epilogue(normalised.output, epilogue, residual)
    if m_image is not None:
        output = output.where(m_image, 0)
    return normalised._replace(output=output.to(z.dtype))
