"""The base-learner in Triton, `kernels/triton/base_learner.py`: what it cannot run, its shapes and implementations.

Half types are read and written by the kernels themselves; inside everything is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import base_learner as reference
from . import _base_learner_operators as operators
from ._library import LIBRARY, triton_runs

operators.define("triton_base_learner")


def can_run(
    *,
    support: Tensor | None = None,
    weight: Tensor | None = None,
    others: tuple[Tensor, ...] = (),
    n_steps: int = 0,
    form: str = "auto",
    by_step: bool = False,
    **_: Any,
) -> tuple[bool, str]:
    """Whether the Triton implementation takes a call, and why (`backend.Predicate`); arguments as native's."""
    if support is None or weight is None:
        return triton_runs()
    with reference.full_precision(support.device):
        can, reason = triton_runs(support, weight, *others)
    if not can:
        return can, reason
    # One launch, whatever the steps: the dual form is the cheaper one here also where it multiplies more.
    form = "dual" if form == "auto" else form
    sized, refusal = operators.runs_dual(support, weight, n_steps=n_steps, form=form, by_step=by_step)
    return (True, reason) if sized else (False, refusal)


def base_learner(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: str,
    support_mask: Tensor | None,
    form: str = "dual",
) -> Tensor:
    """Query logits [T, m, C]; contract of `mtl_fast.ops.base_learner.base_learner`."""
    options = (support_mask, inner_lr, n_steps, order)
    (logits,) = operators.fitted(
        "triton_base_learner", support, support_labels, query, weight, bias, *options
    )
    return logits


def fit_heads(
    support: Tensor,
    support_labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: str,
    support_mask: Tensor | None,
    form: str = "dual",
) -> tuple[Tensor, Tensor]:
    """Weight [T, C, D] and bias [T, C]; contract of `mtl_fast.ops.base_learner.fit_heads`."""
    options = (support_mask, inner_lr, n_steps, order)
    w, b = operators.fitted("triton_base_learner", support, support_labels, None, weight, bias, *options)
    return w.to(weight.dtype), b.to(weight.dtype)


def _fit(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.triton import base_learner as kernels

    return kernels.fit(*arguments)


def _fit_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels.triton import base_learner_backward as kernels

    return kernels.fit_backward(*arguments)


# "CPU" serves Triton's interpreter.
for _device in ("CUDA", "CPU"):
    LIBRARY.impl("triton_base_learner", _fit, _device)
    LIBRARY.impl("triton_base_learner_backward", _fit_backward, _device)


@torch.library.register_fake("mtl_fast::triton_base_learner", lib=LIBRARY)
def _fit_shapes(
    support: Tensor,
    labels: Tensor,
    query: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    inner_lr: float,
    n_steps: int,
    second_order: bool,
) -> tuple[Tensor, ...]:
    from ..kernels.triton import base_learner as kernels

    return kernels.outputs(support, query, weight, n_steps, second_order)
