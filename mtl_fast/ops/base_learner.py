"""The base-learner: one linear head per task, fitted on its support set, all tasks at once.

For a task with support embeddings X [n, D], one-hot labels Y [n, C] and initial head θ (weight W₀ [C, D],
bias b₀ [C]), `n_steps` full-batch gradient steps of size `inner_lr` on the mean cross-entropy:

    P_t = softmax(X·W_tᵀ + b_t)
    W_{t+1} = W_t − (inner_lr/n)·(P_t − Y)ᵀ·X;    b_{t+1} = b_t − (inner_lr/n)·Σ_rows (P_t − Y)

That is the `primal` form. The `dual` form runs the same trajectory on logits, with K = X·Xᵀ + 1 (the 1 is
the bias) and Z₀ = X·W₀ᵀ + b₀:

    P_t = softmax(Z_t);    A_{t+1} = A_t + P_t − Y;    Z_{t+1} = Z_t − (inner_lr/n)·K·(P_t − Y)
    W_T = W₀ − (inner_lr/n)·Aᵀ·X;    b_T = b₀ − (inner_lr/n)·Σ_rows A

so a step costs n²·C multiply-adds instead of 2·n·D·C. Both are exact and differ by rounding only.

`order` says what the gradient of θ' is:

    "first"    θ' = θ − constants. Gradients reach the query, `weight` and `bias`; the support set gets none,
               and no graph of the steps is built.
    "second"   the exact derivative through all steps; it can itself be
               differentiated.

A row whose `support_mask` is False contributes nothing, whatever it holds (NaN too), and n is the task's own
number of valid rows; a task without any keeps the initial head. ``n_steps=0`` gives the initial head.

Half-precision inputs are computed in float32, also under autocast.

Backends: `torch` runs everywhere, in either form. `native` runs the dual form on a CPU in float32, `triton` on a GPU,
a whole batch of tasks in one call, both with at most 128 support rows and 64 classes a task. With ``form="auto"`` that
is always so on a GPU, and on a CPU up to four times the primal form's multiply-adds. Their gradients are closed forms,
and those' own derivatives go through the reference.
"""

from __future__ import annotations

import math
import operator
from typing import Literal

import torch
from torch import Tensor

from ..kernels.reference import base_learner as reference
from . import _base_learner_native as native
from . import _base_learner_triton as triton
from .backend import choose, register

Order = Literal["first", "second"]
Form = Literal["auto", "dual", "primal"]

_IMPLEMENTATIONS = {"torch": reference, "native": native, "triton": triton}
register("base_learner", "native", native.can_run)
register("base_learner", "triton", triton.can_run)


def base_learner(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: Order = "second",
    form: Form = "auto",
    support_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Fits a head to each task's support set and applies it to its query set.

    In the dual form, with A and K as the head of this module defines them,

        query logits = Q·W₀ᵀ + b₀ − (inner_lr/n)·(Q·Xᵀ + 1)·A = Q·W_Tᵀ + b_T

    Args:
        support: embeddings [T, n, D], floating.
        support_labels: int64 [T, n] in 0..C-1 (free where masked out).
        query: embeddings [T, m, D], floating.
        weight: initial weight [C, D], shared, or [T, C, D], one per task; floating.
        bias: initial bias [C] or [T, C], as `weight`.
        inner_lr: step size against the mean support loss, at least 0; a number, it gets no gradient.
        n_steps: number of steps, at least 0.
        order: ``"first"`` or ``"second"``, see above.
        form: ``"dual"``, ``"primal"``, or ``"auto"``: what runs fastest. In `torch` that is dual when
            it has no more multiply-adds a task, n·D + 2·C·D + n_steps·n·C ≤ 2·n_steps·C·D (n small relative to
            D, and at least a few steps).
        support_mask: bool [T, n], False for a row that is only padding; None: all rows count.
        backend: ``"auto"`` or a backend's name.

    Returns:
        Query logits [T, m, C] in the common dtype of `query` and `weight`.

    Raises:
        ValueError, TypeError: an argument that breaks the above, with its shape and the one it must fit.
            Labels are checked on the CPU only (on a GPU `torch` asserts on the device, as in any indexing; with
            `triton` a label out of range makes the results of its task NaN).
    """
    n_steps = check_inner_loop(inner_lr, n_steps)
    _check(support, support_labels, weight, bias, order, form, support_mask)
    _check_query(query, support, weight)
    facts = {"support": support, "weight": weight, "others": (query, bias), "n_steps": n_steps, "form": form}
    choice = choose("base_learner", backend, **facts)
    return _IMPLEMENTATIONS[choice.backend].base_learner(
        support,
        support_labels,
        query,
        weight,
        bias,
        inner_lr=inner_lr,
        n_steps=n_steps,
        order=order,
        form=form,
        support_mask=support_mask,
    )


def fit_heads(
    support: Tensor,
    support_labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: Order = "second",
    form: Form = "auto",
    support_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Fits a head to each task's support set; arguments, gradients and errors as `base_learner`.

    Returns:
        (weight [T, C, D], bias [T, C]) after `n_steps` steps, in the dtype of `weight`. May share memory with
        the initial head when ``n_steps=0``: do not write into it.
    """
    n_steps = check_inner_loop(inner_lr, n_steps)
    _check(support, support_labels, weight, bias, order, form, support_mask)
    facts = {"support": support, "weight": weight, "others": (bias,), "n_steps": n_steps, "form": form}
    choice = choose("base_learner", backend, **facts)
    return _IMPLEMENTATIONS[choice.backend].fit_heads(
        support,
        support_labels,
        weight,
        bias,
        inner_lr=inner_lr,
        n_steps=n_steps,
        order=order,
        form=form,
        support_mask=support_mask,
    )


def query_logits_by_step(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    support_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Query logits along the inner loop, for accuracy against steps; arguments as `base_learner`.

    One fit in the dual form gives them all; entry t equals ``base_learner(..., n_steps=t)``. No gradients.

    Returns:
        Logits [n_steps + 1, T, m, C] in the common dtype of `query` and `weight`. Memory grows with n_steps:
        fit tasks in chunks.
    """
    n_steps = check_inner_loop(inner_lr, n_steps)
    _check(support, support_labels, weight, bias, "first", "dual", support_mask)
    _check_query(query, support, weight)
    choice = choose(
        "base_learner", backend, support=support, weight=weight, others=(query, bias), by_step=True
    )
    return _IMPLEMENTATIONS[choice.backend].query_logits_by_step(
        support,
        support_labels,
        query,
        weight,
        bias,
        inner_lr=inner_lr,
        n_steps=n_steps,
        support_mask=support_mask,
    )


def check_inner_loop(inner_lr: float, n_steps: int, *, name: str = "n_steps") -> int:
    """The number of steps as an int, so of NumPy's too; `name` is what the caller calls it.

    Raises:
        TypeError: a number of steps that is no integer, or a learned step size.
        ValueError: a negative one, or a step size that is not finite.
    """
    if getattr(inner_lr, "requires_grad", False):
        raise TypeError("inner_lr: expected a number; a learned step size is not differentiated")
    if not (math.isfinite(inner_lr) and inner_lr >= 0):
        raise ValueError(f"inner_lr: expected a finite number, at least 0, got {inner_lr}")
    if isinstance(n_steps, bool) or not hasattr(n_steps, "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(n_steps).__name__}")
    if n_steps < 0:
        raise ValueError(f"{name}: expected at least 0, got {n_steps}")
    return operator.index(n_steps)


def _check(
    support: Tensor,
    support_labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: str,
    form: str,
    support_mask: Tensor | None,
) -> None:
    if support.ndim != 3:
        raise ValueError(f"support: expected [T, n, D], got {_shape(support)}")
    n_tasks, _, n_features = support.shape
    if weight.ndim not in (2, 3) or weight.shape[-1] != n_features or weight.shape[-2] < 1:
        raise ValueError(
            f"weight: expected [C, {n_features}] or [{n_tasks}, C, {n_features}] with C ≥ 1 for support "
            f"{_shape(support)}, got {_shape(weight)}"
        )
    if weight.ndim == 3 and weight.shape[0] != n_tasks:
        raise ValueError(f"weight: one per task must fit support {_shape(support)}, got {_shape(weight)}")
    if bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"bias: expected {list(weight.shape[:-1])} for weight {_shape(weight)}, got {_shape(bias)}"
        )
    if support_labels.shape != support.shape[:2]:
        raise ValueError(
            f"support_labels: expected {list(support.shape[:2])} for support {_shape(support)}, "
            f"got {_shape(support_labels)}"
        )
    if support_labels.dtype != torch.int64:
        raise TypeError(f"support_labels: expected int64, got {support_labels.dtype}")
    if support_mask is not None:
        if support_mask.shape != support.shape[:2]:
            raise ValueError(
                f"support_mask: expected {list(support.shape[:2])} for support {_shape(support)}, "
                f"got {_shape(support_mask)}"
            )
        if support_mask.dtype != torch.bool:
            raise TypeError(f"support_mask: expected bool, got {support_mask.dtype}")
        _check_device("support_mask", support_mask, support)
    for name, tensor in (("support", support), ("weight", weight), ("bias", bias)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        _check_device(name, tensor, support)
    _check_device("support_labels", support_labels, support)
    if order not in ("first", "second"):
        raise ValueError(f"order: expected 'first' or 'second', got {order!r}")
    if form not in ("auto", "dual", "primal"):
        raise ValueError(f"form: expected 'auto', 'dual' or 'primal', got {form!r}")


def _check_query(query: Tensor, support: Tensor, weight: Tensor) -> None:
    if query.ndim != 3 or query.shape[0] != support.shape[0] or query.shape[2] != support.shape[2]:
        raise ValueError(
            f"query: expected [{support.shape[0]}, m, {support.shape[2]}] for support {_shape(support)}, "
            f"got {_shape(query)}"
        )
    if not query.is_floating_point():
        raise TypeError(f"query: expected a floating dtype, got {query.dtype}")
    _check_device("query", query, support)


def _check_device(name: str, tensor: Tensor, support: Tensor) -> None:
    if tensor.device != support.device:
        raise ValueError(f"{name}: is on {tensor.device}, support is on {support.device}; move one of them")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
