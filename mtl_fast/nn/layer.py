"""One convolution with its norm and epilogue, outside of a residual block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..kernels.contracts import BlockOutput, ConvOperands, Epilogue
from ..ops import _check
from ..ops.episode_norm import episode_norm
from ..ops.ss_conv import ss_conv
from ..ops.task_conv import task_conv


def normalised_conv(
    x: Tensor,
    conv: ConvOperands,
    *,
    epilogue: Epilogue,
    n_groups: int = 0,
    mask: Tensor | None = None,
    fold: bool = True,
    gather: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> BlockOutput:
    """A convolution followed by its norm and the epilogue: what `ss_block` is to three of them.

    Args:
        x: [N, I, H, W] floating.
        conv: the layer's tensors, with a norm.
        epilogue: what follows the norm.
        n_groups, mask, fold, gather, backend: as in `ss_block`.

    Returns:
        (output [N, O, H', W'], statistics): one (mean, var, count) triple, none with stored statistics.
    """
    if conv.filters.by_task:
        _check.by_task_alone(mask, gather)
        return task_conv(x, conv, n_groups=n_groups, epilogue=epilogue, backend=backend)
    if n_groups == 0:
        return BlockOutput(ss_conv(x, conv, epilogue=epilogue, fold=fold, backend=backend), ())
    z = ss_conv(x, conv.without_norm(), backend=backend)
    assert conv.norm is not None
    out = episode_norm(
        z, conv.norm, n_groups=n_groups, mask=mask, epilogue=epilogue, gather=gather, backend=backend
    )
    return BlockOutput(out.output, ((out.mean, out.var, out.n_values),))
