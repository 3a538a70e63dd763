"""Operators that fit heads and differentiate them: schema and autograd, the same for every backend that has some.

One operator fits all tasks in the dual form and applies the heads; one more gives the gradients of either order in
closed form. Differentiating those again goes through the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import base_learner as reference
from ._double_backward import alone, gradients
from ._library import LIBRARY

MAX_ROWS, MAX_CLASSES = 128, 64
# One call in the dual form beats many of PyTorch's in the primal one with up to so many times its multiply-adds: with
# 3.5 times as many (one step, 25 rows of 640 features, 5 classes) it took 0.22 ms against 0.33.
MOST_TIMES_PRIMAL = 4


def define(name: str) -> None:
    """Declares `mtl_fast::<name>` and `mtl_fast::<name>_backward`.

    `query` may be left out: no logits then ([T, 0, C]). The heads are those after the inner loop. With
    `second_order`, what its backward needs is kept in `kernel` and `trajectory`, in a layout of the backend's own;
    they carry no gradient. Without, the derivative is that of the first order.
    Gradients that are not `wanted` (of support, query, head) come back empty.
    """
    LIBRARY.define(
        f"{name}(Tensor support, Tensor labels, Tensor? query, Tensor weight, Tensor bias, Tensor? mask, "
        "float inner_lr, int n_steps, bool second_order) -> "
        "(Tensor logits, Tensor head_weight, Tensor head_bias, Tensor kernel, Tensor trajectory)"
    )
    LIBRARY.define(
        f"{name}_backward(Tensor? d_logits, Tensor? d_head_weight, Tensor? d_head_bias, Tensor support, "
        "Tensor labels, Tensor? query, Tensor weight, Tensor bias, Tensor? mask, Tensor head_weight, Tensor kernel, "
        "Tensor trajectory, float inner_lr, int n_steps, bool second_order, bool[3] wanted) -> "
        "(Tensor d_support, Tensor d_query, Tensor d_weight, Tensor d_bias)"
    )
    torch.library.register_fake(f"mtl_fast::{name}_backward", _gradient_shapes, lib=LIBRARY)


def runs_dual(support: Tensor, weight: Tensor, *, n_steps: int, form: str, by_step: bool) -> tuple[bool, str]:
    """Whether tasks are of the size and form that these operators have, and why not."""
    if by_step:
        return False, "the logits after every step are computed by the reference"
    n, n_features, n_way = support.shape[1], support.shape[2], weight.shape[-2]
    if n > MAX_ROWS or n_way > MAX_CLASSES:
        limits = f"at most {MAX_ROWS} support rows and {MAX_CLASSES} classes a task"
        return False, f"{limits}, here {n} and {n_way}"
    if form == "primal":
        return False, "the primal form is asked for"
    dual, primal = reference.multiply_adds(n, n_features, n_way, n_steps)
    if form == "auto" and n_steps and dual > MOST_TIMES_PRIMAL * primal:
        sizes = f"{n_steps} steps on {n} rows of {n_features} features"
        return False, f"{sizes} take {dual / primal:.1f} times the multiply-adds of the primal form"
    return True, ""


def fitted(
    name: str,
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
    """(logits,) of the query or (weight, bias), with a graph only where a gradient can be asked for.

    Args:
        name: of the operator that fits.
    """
    # Without steps θ' does not depend on the support set.
    first_order = order == "first" or n_steps == 0
    if first_order:
        support = support.detach()
    of_head = support.requires_grad or weight.requires_grad or bias.requires_grad
    with_graph = torch.is_grad_enabled() and (of_head or (query is not None and query.requires_grad))
    second_order = with_graph and of_head and not first_order
    run = _Fit.apply if with_graph else _results
    return run(name, support, labels, query, weight, bias, mask, inner_lr, n_steps, second_order)


def _operator(name: str) -> Any:
    return getattr(torch.ops.mtl_fast, name).default


def _results(name: str, *inputs: Any) -> tuple[Tensor, ...]:
    return _chosen(inputs[2], _operator(name)(*inputs))


def _chosen(query: Tensor | None, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs[1:3] if query is None else outputs[:1]


class _Fit(torch.autograd.Function):
    """An operator with its gradients; takes its name and its arguments."""

    @staticmethod
    def forward(ctx: Any, name: str, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _operator(name)(*inputs)
        ctx.name = name
        support, labels, query, weight, bias, mask, ctx.inner_lr, ctx.n_steps, ctx.second_order = inputs
        _, head_weight, _, kernel, trajectory = outputs
        ctx.save_for_backward(support, labels, query, weight, bias, mask, head_weight, kernel, trajectory)
        ctx.set_materialize_grads(False)
        return _chosen(query, outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, cotangents)
        _, need_support, _, need_query, need_weight, need_bias, *_ = ctx.needs_input_grad
        wanted = [need_support, need_query, need_weight or need_bias]
        # Of logits, head weight, head bias.
        reached = (*cotangents, None, None) if len(cotangents) == 1 else (None, *cotangents)
        options = (ctx.inner_lr, ctx.n_steps, ctx.second_order, wanted)
        backward = _operator(f"{ctx.name}_backward")
        d_support, d_query, d_weight, d_bias = backward(*reached, *ctx.saved_tensors, *options)
        return (
            None,
            d_support if need_support else None,
            None,
            d_query if need_query else None,
            d_weight if need_weight else None,
            d_bias if need_bias else None,
            *[None] * 4,
        )


def _differentiable_gradients(ctx: Any, cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of the ten inputs with a graph of their own, for double backward (``create_graph=True``)."""
    support, labels, query, weight, bias, mask, *_ = alone(*ctx.saved_tensors)
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
    outputs = [y for y, dy in zip(results, cotangents, strict=True) if dy is not None]
    arrived = [dy for dy in cotangents if dy is not None]
    wanted = {1: support, 3: query, 4: weight, 5: bias}
    return gradients(outputs, arrived, wanted, ctx.needs_input_grad)


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
