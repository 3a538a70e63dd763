"""One residual block: three scale-and-shift convolutions, a shortcut, pooling; in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ..contracts import BlockOutput, ConvOperands, Epilogue, Normalised
from .episode_norm import episode_norm
from .ss_conv import ss_conv
from .task_conv import task_conv


def ss_block(
    x: Tensor,
    convs: Sequence[ConvOperands],
    shortcut: ConvOperands | None,
    *,
    epilogue: Epilogue,
    n_groups: int,
    mask: Tensor | None,
    fold: bool,
    convolve: Callable[..., Tensor] = ss_conv,
    normalise: Callable[..., Normalised] = episode_norm,
    layer_by_task: Callable[..., BlockOutput] = task_conv,
) -> BlockOutput:
    """[N, I, H, W] → [N, O, H', W']; see `mtl_fast.ops.ss_block`.

    `convolve` computes its convolutions, `normalise` their batch statistics and what follows; `layer_by_task` both,
    where each task has weights of its own.
    """
    statistics: list[tuple[Tensor, Tensor, Tensor]] = []
    if mask is not None:
        # A masked image may hold NaN, and a weight's gradient would be 0·NaN.
        x = x.where(mask.view(-1, 1, 1, 1), 0)

    def layer(z: Tensor, conv: ConvOperands, after: Epilogue, residual: Tensor | None = None) -> Tensor:
        if conv.filters.by_task:
            own = layer_by_task(z, conv, n_groups=n_groups, epilogue=after, residual=residual)
            statistics.extend(own.statistics)
            return own.output
        if conv.norm is None or n_groups == 0:
            return convolve(z, conv, epilogue=after, residual=residual, fold=fold)
        z = convolve(z, conv.without_norm(), epilogue=Epilogue(), residual=None, fold=False)
        out = normalise(z, conv.norm, n_groups=n_groups, mask=mask, epilogue=after, residual=residual)
        statistics.append((out.mean, out.var, out.n_values))
        return out.output

    inner = replace(epilogue, pool=False)
    residual = x if shortcut is None else layer(x, shortcut, Epilogue())
    for conv in convs[:-1]:
        x = layer(x, conv, inner)
    x = layer(x, convs[-1], epilogue, residual)
    return BlockOutput(x, tuple(statistics))
