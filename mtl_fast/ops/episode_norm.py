"""`episode_norm`: normalisation by the statistics of one task's one split, and the epilogue after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..kernels.contracts import ChannelNorm, Epilogue, Normalised
from ..kernels.reference import episode_norm as reference
from . import _check, _episode_norm_native, _episode_norm_triton
from .backend import Predicate, choose, register

_IMPLEMENTATIONS = {
    "torch": reference.episode_norm,
    "native": _episode_norm_native.episode_norm,
    "triton": _episode_norm_triton.episode_norm,
}


def _predicate(runs: Callable[..., tuple[bool, str]]) -> Predicate:
    """Of a backend with operators: what its `runs` says, given a call's facts."""

    def can_run(
        z: Tensor | None = None,
        norm: ChannelNorm | None = None,
        epilogue: Epilogue | None = None,
        residual: Tensor | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        **_: Any,
    ) -> tuple[bool, str]:
        if gather is not None:
            return False, "its statistics span several processes"
        return runs(z, norm or ChannelNorm(None, None), epilogue or Epilogue(), residual)

    return can_run


register("episode_norm", "native", _predicate(_episode_norm_native.runs))
register("episode_norm", "triton", _predicate(_episode_norm_triton.runs))


def episode_norm(
    z: Tensor,
    norm: ChannelNorm,
    *,
    n_groups: int,
    mask: Tensor | None = None,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Normalised:
    """Batch statistics per group of images, then the epilogue.

        y = (z − mean_g)/√(var_g + eps)·γ + β        mean and variance over the images and pixels of group g
        output = pool(act(y + residual))             the order and place of the activation: `Epilogue`

    A group is one task's one split; images of a group are neighbours, groups are of one size. The variance is
    the biased one, computed from deviations. The stored statistics of `norm` are neither read nor changed.

    Args:
        z: [N, C, H, W] floating, N = n_groups · images a group. Half types are computed in float32.
        norm: γ, β and eps.
        n_groups: 1 is ordinary batch normalisation.
        mask: bool [N]; a False image (padding of an unequal shot) counts for nothing, whatever it holds (NaN
            too): its output is 0 and no gradient passes it. A group has at least one True.
        epilogue: what follows; by default nothing.
        residual: [N, C, H, W].
        gather: for one group whose images several processes share, at least one each: [K] → [processes, K],
            every process's vector, differentiable. The statistics are then those of all, and every process
            calls this alike. Runs on ``torch``.
        backend: ``auto`` or a backend's name.

    Returns:
        (output, mean [G, C], biased variance [G, C], count of values a channel [G]); only `output`, in z's
        dtype, has a gradient.

    Raises:
        ValueError: shapes that do not fit, both named; an unknown activation; `gather` with groups or a mask.
        TypeError: a mask that is not bool.
    """
    epilogue = epilogue or Epilogue()
    _check.images_4d("z", z)
    _check.groups(z.shape[0], n_groups, mask)
    _check.gather(gather, n_groups, mask)
    for key in ("weight", "bias"):
        vector = getattr(norm, key)
        if vector is not None and tuple(vector.shape) != (z.shape[1],):
            raise ValueError(f"norm.{key}: shape {tuple(vector.shape)} does not fit images {tuple(z.shape)}")
    _check.epilogue(epilogue, tuple(z.shape), residual)
    choice = choose(
        "episode_norm", backend, z=z, norm=norm, epilogue=epilogue, residual=residual, gather=gather
    )
    if gather is not None:
        return reference.episode_norm(
            z, norm, n_groups=n_groups, mask=mask, epilogue=epilogue, residual=residual, gather=gather
        )
    return _IMPLEMENTATIONS[choice.backend](
        z, norm, n_groups=n_groups, mask=mask, epilogue=epilogue, residual=residual
    )
