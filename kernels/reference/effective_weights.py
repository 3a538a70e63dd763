"""W_eff = (γ/σ)·Φ_S1·W and the folded shift, in plain PyTorch; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import ChannelNorm, ConvOperands, EffectiveWeights


def unfolded(conv: ConvOperands) -> tuple[Tensor, Tensor | None]:
    """(Φ_S1·W [O, I/g, k, k], b + Φ_S2 [O] or None)."""
    return _scaled_weight(conv), _unfolded_shift(conv.filters.bias, conv.shift)


def _scaled_weight(conv: ConvOperands) -> Tensor:
    return conv.filters.weight if conv.scale is None else conv.filters.weight * conv.scale


def _unfolded_shift(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """b + Φ_S2, None where there is neither."""
    if shift is None or bias is None:
        return bias if shift is None else shift
    return bias + shift


def effective_shift(conv: ConvOperands, ratio: Tensor | None) -> Tensor:
    """[O] = (b + Φ_S2 − mean)·γ/σ + β with `ratio` γ/σ of the stored norm, b + Φ_S2 without."""
    bias, norm = _unfolded_shift(conv.filters.bias, conv.shift), conv.norm
    if ratio is None or norm is None:
        weight = conv.filters.weight
        return weight.new_zeros(weight.shape[0]) if bias is None else bias
    assert norm.mean is not None
    shift = (-norm.mean if bias is None else bias - norm.mean) * ratio
    return shift if norm.bias is None else shift + norm.bias


def stored_scale(norm: ChannelNorm) -> Tensor:
    """γ/σ [C] of the stored statistics."""
    assert norm.var is not None
    inverse = torch.rsqrt(norm.var + norm.eps)
    return inverse if norm.weight is None else inverse * norm.weight


def effective_weights(conv: ConvOperands, *, fold: bool) -> EffectiveWeights:
    """One layer's effective weight and shift; `fold` takes its stored norm in, when it has one."""
    weight = _scaled_weight(conv)
    if not fold or conv.norm is None:
        return EffectiveWeights(weight, effective_shift(conv, None), folded=False)
    ratio = stored_scale(conv.norm)
    return EffectiveWeights(weight * ratio.view(-1, 1, 1, 1), effective_shift(conv, ratio), folded=True)
