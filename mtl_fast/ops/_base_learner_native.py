"""The base-learner in C++ for CPU float32: schema, shapes and autograd; `kernels/native/base_learner.cpp` runs it.

One operator call fits all tasks in the dual form and applies the heads; one more gives the gradients of either
order in closed form. Differentiating those again goes through the reference.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import base_learner as reference
from ._library import LIBRARY, native_runs

MAX_ROWS, MAX_CLASSES = 128, 64
_ROW_ALIGNMENT = 16  # of n in `kernel` and `trajectory`

# `query` may be left out: no logits then ([T, 0, C]). The heads are those after the inner loop. With
# `second_order`, what its backward needs is kept: kernel [T, n, n'] and trajectory [T, n_steps, C, n'], where n'
# is n rounded up to `_ROW_ALIGNMENT`; they carry no gradient. Without, the derivative is that of the first order.
LIBRARY.define(
    "base_learner(Tensor support, Tensor labels, Tensor? query, Tensor weight, Tensor bias, Tensor? mask, "
    "float inner_lr, int n_steps, bool second_order) -> "
    "(Tensor logits, Tensor head_weight, Tensor head_bias, Tensor kernel, Tensor trajectory)"
)
# Gradients that are not `wanted` (of support, query, head) come back empty.
LIBRARY.define(
    "base_learner_backward(Tensor? d_logits, Tensor? d_head_weight, Tensor? d_head_bias, Tensor support, "
    "Tensor labels, Tensor? query, Tensor weight, Tensor bias, Tensor? mask, Tensor head_weight, Tensor kernel, "
    "Tensor trajectory, float inner_lr, int n_steps, bool second_order, bool[3] wanted) -> "
    "(Tensor d_support, Tensor d_query, Tensor d_weight, Tensor d_bias)"
)
_FIT = torch.ops.mtl_fast.base_learner.default
_FIT_BACKWARD = torch.ops.mtl_fast.base_learner_backward.default
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
    # As in the reference, half types are computed in float32, and autocast changes nothing.
    tensors = [t for t in (support, weight, *others) if t.dtype not in _HALF]
    with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
        can, reason = native_runs(*tensors)
    if not can:
        return can, reason
    if by_step:
        return False, "the logits after every step are computed by the reference"
    n, n_features, n_way = support.shape[1], support.shape[2], weight.shape[-2]
    if n > MAX_ROWS or n_way > MAX_CLASSES:
        limits = f"at most {MAX_ROWS} support rows and {MAX_CLASSES} classes a task"
        return False, f"{limits}, here {n} and {n_way}"
    if form == "primal":
        return False, "the primal form is asked for"
    if form == "auto" and n_steps and reference.cheaper_form(n, n_features, n_way, n_steps) == "primal":
        return False, f"{n_steps} steps on {n} rows of {n_features} features are cheaper in the primal form"
    return True, reason


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
    """(logits,) of the query or (weight, bias), with a graph only where a gradient can be asked for."""
    # Without steps θ' does not depend on the support set.
    first_order = order == "first" or n_steps == 0
    support = (support.detach() if first_order else support).float()
    weight, bias = weight.float(), bias.float()
    query = None if query is None else query.float()
    of_head = support.requires_grad or weight.requires_grad or bias.requires_grad
    with_graph = torch.is_grad_enabled() and (of_head or (query is not None and query.requires_grad))
    second_order = with_graph and of_head and not first_order
    run = _Fit.apply if with_graph else _results
    return run(support, labels, query, weight, bias, mask, inner_lr, n_steps, second_order)


def _results(*inputs: Any) -> tuple[Tensor, ...]:
    return _chosen(inputs[2], _FIT(*inputs))


def _chosen(query: Tensor | None, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs[1:3] if query is None else outputs[:1]


class _Fit(torch.autograd.Function):
    """The operator with its gradients; takes the operator's arguments."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _FIT(*inputs)
        support, labels, query, weight, bias, mask, ctx.inner_lr, ctx.n_steps, ctx.second_order = inputs
        _, head_weight, _, kernel, trajectory = outputs
        ctx.save_for_backward(support, labels, query, weight, bias, mask, head_weight, kernel, trajectory)
        ctx.set_materialize_grads(False)
        return _chosen(query, outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, cotangents)
        need_support, _, need_query, need_weight, need_bias, *_ = ctx.needs_input_grad
        wanted = [need_support, need_query, need_weight or need_bias]
        # Of logits, head weight, head bias.
        reached = (*cotangents, None, None) if len(cotangents) == 1 else (None, *cotangents)
        options = (ctx.inner_lr, ctx.n_steps, ctx.second_order, wanted)
        d_support, d_query, d_weight, d_bias = _FIT_BACKWARD(*reached, *ctx.saved_tensors, *options)
        return (
            d_support if need_support else None,
            None,
            d_query if need_query else None,
            d_weight if need_weight else None,
            d_bias if need_bias else None,
            *[None] * 4,
        )


def _differentiable_gradients(ctx: Any, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of the nine inputs with a graph of their own, for double backward (``create_graph=True``)."""
    support, labels, query, weight, bias, mask, *_ = ctx.saved_tensors
    options = {
        "inner_lr": ctx.inner_lr,
        "n_steps": ctx.n_steps,
        "order": "second" if ctx.second_order else "first",
        "form": "dual",
        "support_mask": mask,
    }
    results: tuple[Tensor, ...]
    if query is None:
        results = reference.fit_heads(support, labels, weight, bias, **options)
    else:
        results = (reference.base_learner(support, labels, query, weight, bias, **options),)
    reached = [(y, dy) for y, dy in zip(results, cotangents, strict=True) if dy is not None]
    if not reached:
        return (None,) * len(ctx.needs_input_grad)
    outputs, arrived = zip(*reached, strict=True)
    needed = [x for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(outputs, needed, arrived, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad)


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


@torch.library.register_fake("mtl_fast::base_learner_backward", lib=LIBRARY)
def _gradient_shapes(
    d_logits: Tensor | None,
    d_head_weight: Tensor | None,
    d_head_bias: Tensor | None,
    support: Tensor,
    labels: Tensor,
    query: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    head_weight: Tensor,
    kernel: Tensor,
    trajectory: Tensor,
    inner_lr: float,
    n_steps: int,
    second_order: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    operands = (support, query, weight, bias)
    kept = (wanted[0], wanted[1], wanted[2], wanted[2])
    return tuple(
        torch.empty_like(x) if x is not None and keep else support.new_empty(0)
        for x, keep in zip(operands, kept, strict=True)
    )
