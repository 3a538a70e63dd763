"""The Triton backend of `episode_norm`, `kernels/triton/episode_norm.py`, and what it cannot run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.contracts import ChannelNorm, Epilogue, Normalised
from . import _episode_norm_operators as operators
from ._library import LIBRARY, triton_runs

operators.define("triton_episode_norm")


def runs(
    z: Tensor | None, norm: ChannelNorm, epilogue: Epilogue, residual: Tensor | None
) -> tuple[bool, str]:
    """Whether the Triton kernels normalise these images, and why (not); `z` may be left open."""
    tensors = (z, norm.weight, norm.bias, residual)
    can, reason = triton_runs(*(t for t in tensors if t is not None))
    if can and z is not None and residual is not None and residual.dtype != z.dtype:
        return False, f"the residual is {residual.dtype}, the images are {z.dtype}"
    return can, reason


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
    return operators.normalised(
        "triton_episode_norm", z, norm, n_groups=n_groups, mask=mask, epilogue=epilogue, residual=residual
    )


def _normalise(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.triton import episode_norm as kernels

    return kernels.episode_norm(*arguments)


def _normalise_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.triton import episode_norm_backward as kernels

    return kernels.episode_norm_backward(*arguments)


# "CPU" serves Triton's interpreter.
for _device in ("CUDA", "CPU"):
    LIBRARY.impl("triton_episode_norm", _normalise, _device)
    LIBRARY.impl("triton_episode_norm_backward", _normalise_backward, _device)
