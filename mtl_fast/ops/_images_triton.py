"""`images` in Triton, `kernels/triton/images.py`: what it cannot run, its operator and its implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import LIBRARY, triton_runs

LIBRARY.define(
    "triton_images(Tensor store, Tensor index, Tensor mean, Tensor std, Tensor? crop, Tensor? flip, int[2] size, "
    "int padding, ScalarType dtype) -> Tensor"
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_run(*, store: Tensor | None = None, dtype: torch.dtype = torch.float32, **_: Any) -> tuple[bool, str]:
    """Whether the Triton implementation takes a call, and why (`backend.Predicate`); `store` may be left open."""
    # The store holds bytes: an empty tensor of the output's dtype stands for it.
    can, reason = triton_runs(*([] if store is None else [store.new_empty(0, dtype=dtype)]))
    return can, reason


def images(
    store: Tensor,
    index: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    crop: Tensor | None,
    size: tuple[int, int] | None,
    padding: int,
    flip: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B, 3, h, w]; contract of `mtl_fast.ops.images.images`."""
    mean, std = (t.to(store.device, torch.float32) for t in (mean, std))
    height, width = size or store.shape[1:3]
    return torch.ops.mtl_fast.triton_images(
        store, index, mean, std, crop, flip, (height, width), padding, dtype
    )


def _images(
    store: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    crop: Tensor | None,
    flip: Tensor | None,
    size: list[int],
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    from ..kernels.triton import images as kernels

    return kernels.images(store, index, mean, std, crop, flip, (size[0], size[1]), padding, dtype)


# "CPU" serves Triton's interpreter.
for _device in ("CUDA", "CPU"):
    LIBRARY.impl("triton_images", _images, _device)


@torch.library.register_fake("mtl_fast::triton_images", lib=LIBRARY)
def _(
    store: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    crop: Tensor | None,
    flip: Tensor | None,
    size: list[int],
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = index.shape[0], 3, *size
    return torch.empty(shape, dtype=dtype, device=store.device, memory_format=torch.channels_last)
