"""W_eff = (γ/σ)·Φ_S1·W and the folded shift, in plain PyTorch; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import ChannelNorm, ConvOperands, EffectiveWeights


def unfolded(conv: ConvOperands) -> tuple[Tensor, Tensor | None]:
    """(Φ_S1·W [O, I/g, k, k], b + Φ_S2 [O] or None)."""
    filters = conv.filters
    weight = filters.weight if conv.scale is None else filters.weight * conv.scale
    bias = filters.bias
    if conv.shift is not None:
        bias = conv.shift if bias is None else bias + conv.shift
    return weight, bias


def stored_scale(norm: ChannelNorm) -> Tensor:
    """γ/σ [C] of the stored statistics."""
    assert norm.var is not None
    inverse = torch.rsqrt(norm.var + norm.eps)
    return inverse if norm.weight is None else inverse * norm.weight


def effective_weights(conv: ConvOperands, *, fold: bool) -> EffectiveWeights:
    """One layer's effective weight and shift; `fold` takes its stored norm in, when it has one."""
    weight, bias = unfolded(conv)
    norm = conv.norm
    if not fold or norm is None:
        shift = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return EffectiveWeights(weight, shift, folded=False)
    ratio = stored_scale(norm)
    assert norm.mean is not None
    shift = (-norm.mean if bias is None else bias - norm.mean) * ratio
    if norm.bias is not None:
        shift = shift + norm.bias
    return EffectiveWeights(weight * ratio.view(-1, 1, 1, 1), shift, folded=True)
