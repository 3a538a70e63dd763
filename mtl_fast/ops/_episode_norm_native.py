"""The native backend of `episode_norm`, `kernels/native/episode_norm.cpp`, and what it cannot run.

It reads the images twice, for the statistics of a group and to normalise them with the epilogue in the same pass.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.contracts import ChannelNorm, Epilogue, Normalised
from . import _episode_norm_operators as operators
from ._library import native_runs

operators.define("episode_norm")


def runs(
    z: Tensor | None, norm: ChannelNorm, epilogue: Epilogue, residual: Tensor | None
) -> tuple[bool, str]:
    """Whether the native kernel normalises these images, and why (not); `z` may be left open."""
    tensors = (z, norm.weight, norm.bias, residual)
    can, reason = native_runs(*(t for t in tensors if t is not None))
    if can and epilogue.activation != "none" and epilogue.slope < 0:
        return False, f"slope {epilogue.slope}; the native kernel's activation must not fall"
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
        "episode_norm", z, norm, n_groups=n_groups, mask=mask, epilogue=epilogue, residual=residual
    )
