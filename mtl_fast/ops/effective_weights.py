"""`effective_weights`, the refresh: what every convolution really multiplies by, once a meta-step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..kernels.contracts import ConvOperands, EffectiveWeights
from ..kernels.reference import effective_weights as reference
from . import _check, _effective_weights_triton
from .backend import choose, register


def _triton_runs(
    convs: Sequence[ConvOperands] = (), dtype: torch.dtype | None = None, **_: Any
) -> tuple[bool, str]:
    return _effective_weights_triton.runs(convs, dtype)


register("effective_weights", "triton", _triton_runs)


@torch.no_grad()
def effective_weights(
    convs: Sequence[ConvOperands],
    *,
    fold: bool = True,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[EffectiveWeights, ...]:
    """The effective weight and shift of all layers, to be passed to every forward of a meta-step.

    With σ = √(var + eps) of the stored norm and its affine γ, β:

        weight = (γ/σ)·Φ_S1·W        shift = (b + Φ_S2 − mean)·γ/σ + β          (folded)
        weight = Φ_S1·W              shift = b + Φ_S2                            (not folded, or no norm)

    The result holds values only: a convolution returns the gradients of Φ itself, through its own operands.

    Args:
        convs: the layers' operands, in any number.
        fold: take the stored norm in, for layers that have one.
        dtype: of the images to come, where a backend rounds the weights here and not in every convolution; None is
            the weights' own.
        backend: ``auto`` or a backend's name.

    Returns:
        One `EffectiveWeights` a layer, on the weight's device; of the weight's dtype, or with ``triton`` weights of
        `dtype` and shifts in float32.

    Raises:
        ValueError: a tensor's shape does not fit its layer's weight, or `fold` without stored statistics.
    """
    for i, conv in enumerate(convs):
        _check.operands(f"convs[{i}]", conv)
        if fold:
            _check.stored_norm(f"convs[{i}]", conv)
    choice = choose("effective_weights", backend, convs=convs, dtype=dtype)
    if choice.backend == "triton":
        return _effective_weights_triton.effective_weights(convs, fold=fold, dtype=dtype)
    results = (reference.effective_weights(conv, fold=fold) for conv in convs)
    # Without scale or norm a result is the frozen weight itself, which may be a parameter.
    return tuple(replace(e, weight=e.weight.detach(), shift=e.shift.detach()) for e in results)
