"""The base-learner in C++ for CPU float32, `kernels/native/base_learner.cpp`: what it cannot run, and its shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import base_learner as reference
from . import _base_learner_operators as operators
from ._library import LIBRARY, native_runs

_ROW_ALIGNMENT = 16  # of n in `kernel` and `trajectory`
# kernel [T, n, n'] and trajectory [T, n_steps, C, n'], where n' is n rounded up to `_ROW_ALIGNMENT`.
operators.define("base_learner")
_HALF = (torch.float16, torch.bfloat16)


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
    """Whether the native implementation takes a call, and why (`backend.Predicate`).

    Args:
        support, weight: as in the call; without them: whether it could take any.
        others: the call's other floating tensors.
        n_steps, form: as in the call.
        by_step: the logits after every step are asked for.
    """
    if support is None or weight is None:
        return native_runs()
    if support.device.type != "cpu":
        return False, f"support is on {support.device}"
    # As in the reference, half types are computed in float32.
    tensors = [t for t in (support, weight, *others) if t.dtype not in _HALF]
    with reference.full_precision(support.device):
        can, reason = native_runs(*tensors)
    if not can:
        return can, reason
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
    (logits,) = _fit(support, support_labels, query, weight, bias, support_mask, inner_lr, n_steps, order)
    return logits.to(torch.promote_types(query.dtype, weight.dtype))


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
    w, b = _fit(support, support_labels, None, weight, bias, support_mask, inner_lr, n_steps, order)
    return w.to(weight.dtype), b.to(weight.dtype)


def _fit(
    support: Tensor,
    labels: Tensor,
    query: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    inner_lr: float,
    n_steps: int,
    order: str,
) -> tuple[Tensor, ...]:
    support, weight, bias = support.float(), weight.float(), bias.float()
    query = None if query is None else query.float()
    return operators.fitted(
        "base_learner", support, labels, query, weight, bias, mask, inner_lr, n_steps, order
    )


@torch.library.register_fake("mtl_fast::base_learner", lib=LIBRARY)
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
    n_tasks, n, n_features = support.shape
    n_way = weight.shape[-2]
    n_kept = n_tasks if second_order else 0
    width = (n + _ROW_ALIGNMENT - 1) // _ROW_ALIGNMENT * _ROW_ALIGNMENT
    return (
        support.new_empty(n_tasks, 0 if query is None else query.shape[1], n_way),
        support.new_empty(n_tasks, n_way, n_features),
        support.new_empty(n_tasks, n_way),
        support.new_empty(n_kept, n, width),
        support.new_empty(n_kept, n_steps, n_way, width),
    )
