"""`task_conv`: a convolution with a weight of each task's own, its norm and its epilogue, differentiable twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.contracts import BlockOutput, ConvOperands, Epilogue
from ..kernels.reference import task_conv as reference
from . import _check, _task_conv_native
from .backend import choose, register

_IMPLEMENTATIONS = {"torch": reference.task_conv, "native": _task_conv_native.task_conv}


def _native_runs(
    x: Tensor | None = None,
    conv: ConvOperands | None = None,
    n_groups: int = 1,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    **_: Any,
) -> tuple[bool, str]:
    return _task_conv_native.runs(x, conv, n_groups, epilogue or Epilogue(), residual)


register("task_conv", "native", _native_runs)


def task_conv(
    x: Tensor,
    conv: ConvOperands,
    *,
    n_groups: int,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> BlockOutput:
    """One layer of T networks at once, as whole-network inner loops (MAML, arXiv 1703.03400) need it:

        z_t = conv(x_t, W_t) + b_t
        y_t = pool(act((z_t − mean_t)/√(var_t + eps)·γ_t + β_t + residual_t))    in the order of `Epilogue`

    mean_t and var_t are the statistics of task t's images, or the stored ones. Gradients of first and second order
    reach x, W, b, γ, β and the residual; batch statistics take b out again, so its gradient there is 0.

    Args:
        x: [T·n, I, H, W] floating, channels-last preferred; a task's images are neighbours.
        conv: the layer's tensors, with ``filters.weight`` [T, O, I/g, k, k], ``filters.bias`` [T, O] or None, the
            norm's ``weight`` and ``bias`` [T, O] or None, its stored ``mean`` and ``var`` [O]; no Φ.
        n_groups: 0 for stored statistics, T for batch statistics.
        epilogue: what follows; by default nothing.
        residual: [T·n, O, H', W'], added as the epilogue says.
        backend: ``auto`` or a backend's name. ``native`` has batch statistics and no residual.

    Returns:
        (output [T·n, O, H', W'], statistics): with batch statistics one triple (mean [T, O], biased variance
        [T, O], values a channel [T]), without gradient; else none.

    Raises:
        ValueError: shapes that do not fit, both named; a Φ; an unknown activation.
    """
    epilogue = epilogue or Epilogue()
    _check.images_4d("x", x)
    _check.task_operands("conv", conv, x.shape, n_groups)
    _check.epilogue(epilogue, _check.output_shape(x.shape, conv.filters), residual)
    facts = {"x": x, "conv": conv, "n_groups": n_groups, "epilogue": epilogue, "residual": residual}
    choice = choose("task_conv", backend, **facts)
    return _IMPLEMENTATIONS[choice.backend](x, conv, n_groups=n_groups, epilogue=epilogue, residual=residual)
