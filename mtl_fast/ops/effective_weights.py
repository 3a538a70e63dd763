"""`effective_weights`, the refresh: what every convolution really multiplies by, once a meta-step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..kernels.contracts import ConvOperands, EffectiveWeights
from ..kernels.reference import effective_weights as reference
from . import _check
from .backend import choose

_IMPLEMENTATIONS = {"torch": reference}


@torch.no_grad()
def effective_weights(
    convs: Sequence[ConvOperands], *, fold: bool = True, backend: str = "auto"
) -> tuple[EffectiveWeights, ...]:
    """The effective weight and shift of all layers, to be passed to every forward of a meta-step.

    With σ = √(var + eps) of the stored norm and its affine γ, β:

        weight = (γ/σ)·Φ_S1·W        shift = (b + Φ_S2 − mean)·γ/σ + β          (folded)
        weight = Φ_S1·W              shift = b + Φ_S2                            (not folded, or no norm)

    The result holds values only: a convolution returns the gradients of Φ itself, through its own operands.

    Args:
        convs: the layers' operands, in any number.
        fold: take the stored norm in, for layers that have one.
        backend: ``auto`` or a backend's name.

    Returns:
        One `EffectiveWeights` a layer, in the weight's dtype and on its device.

    Raises:
        ValueError: a tensor's shape does not fit its layer's weight, or `fold` without stored statistics.
    """
    for i, conv in enumerate(convs):
        _check.operands(f"convs[{i}]", conv)
        if fold:
            _check.stored_norm(f"convs[{i}]", conv)
    choice = choose("effective_weights", backend, convs=convs)
    results = (_IMPLEMENTATIONS[choice.backend].effective_weights(conv, fold=fold) for conv in convs)
    # Without scale or norm a result is the frozen weight itself, which may be a parameter.
    return tuple(replace(e, weight=e.weight.detach(), shift=e.shift.detach()) for e in results)
