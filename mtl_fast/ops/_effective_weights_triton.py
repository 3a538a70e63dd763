"""The Triton backend of `effective_weights`: one operator refreshes any number of layers.

`mtl_fast::triton_effective_weights` takes the layers in flat buffers, as `kernels.triton.effective_weights` lays them
out, with their shapes as whole numbers. It holds values only and has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.contracts import ConvOperands, EffectiveWeights, PackedWeights
from ._library import LIBRARY, triton_runs

LIBRARY.define(
    "triton_effective_weights(Tensor frozen, Tensor values, int[] shapes, float[] eps, ScalarType dtype) -> "
    "(Tensor forward, Tensor rotated, Tensor shift)"
)


def runs(convs: Sequence[ConvOperands], dtype: torch.dtype | None) -> tuple[bool, str]:
    """Whether the Triton kernel refreshes these layers, and why (not)."""
    tensors: list[Tensor | None] = []
    for conv in convs:
        tensors += [conv.filters.weight, conv.filters.bias, conv.scale, conv.shift]
        if conv.norm is not None:
            tensors += [conv.norm.mean, conv.norm.var, conv.norm.weight, conv.norm.bias]
    can, reason = triton_runs(*(t for t in tensors if t is not None))
    if not can:
        return False, reason
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        return False, f"dtype {dtype}; Triton kernels are float32, float16 and bfloat16"
    for conv in convs:
        height, width = conv.filters.weight.shape[2:]
        if height != width:
            return False, f"taps of {height}×{width}; the Triton kernel has squares"
        if conv.filters.groups != 1:
            return False, f"groups {conv.filters.groups}; the Triton kernel has one group"
    return True, reason


def effective_weights(
    convs: Sequence[ConvOperands], *, fold: bool, dtype: torch.dtype | None
) -> tuple[EffectiveWeights, ...]:
    """See `mtl_fast.ops.effective_weights`; `weight` is a view of the packed one."""
    if not convs:
        return ()
    made = refresh(convs, dtype or convs[0].filters.weight.dtype, fold)
    return tuple(
        EffectiveWeights(
            weight=forward.permute(0, 3, 1, 2)[:, : conv.filters.weight.shape[1]],
            shift=shift,
            folded=fold and conv.norm is not None,
            packed=PackedWeights(forward, rotated),
        )
        for conv, (forward, rotated, shift) in zip(convs, made, strict=True)
    )


def refresh(
    convs: Sequence[ConvOperands], dtype: torch.dtype, fold: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(forward [O, k, k, I'], rotated [I, k, k, O], shift fp32 [O]) of each layer; see `PackedWeights`."""
    from ..kernels.triton import effective_weights as kernels

    return kernels.refresh(convs, dtype, fold, run=_run)


def _run(
    frozen: Tensor,
    values: Tensor,
    shapes: Sequence[Sequence[int]],
    eps: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = [number for shape in shapes for number in shape]
    return torch.ops.mtl_fast.triton_effective_weights(frozen, values, numbers, list(eps), dtype)


def _launch(
    frozen: Tensor, values: Tensor, shapes: Sequence[int], eps: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.triton import effective_weights as kernels

    return kernels.refresh_all(frozen, values, kernels.Shape.each(shapes), eps, dtype)


for _device in ("CUDA", "CPU"):
    LIBRARY.impl("triton_effective_weights", _launch, _device)


@torch.library.register_fake("mtl_fast::triton_effective_weights")
def _(
    frozen: Tensor, values: Tensor, shapes: Sequence[int], eps: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.triton import effective_weights as kernels

    return kernels.empty_buffers(kernels.Shape.each(shapes), dtype, frozen.device)
