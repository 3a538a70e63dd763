"""Many linear heads fitted at once by full-batch gradient descent.

Layout inside: logits, probabilities and residuals are [T, C, n], rows last, so that the softmax over the
few classes runs over long contiguous rows (four times faster on a CPU than classes last).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def multiply_adds(n: int, n_features: int, n_way: int, n_steps: int) -> tuple[int, int]:
    """Of a task, in the dual and in the primal form.

    dual   = n²·D + 2·n·C·D + n_steps·n²·C      Gram matrix, first logits, final head; then the steps
    primal = n_steps·2·n·C·D
    """
    by_features = 2 * n * n_way * n_features
    return n * n * n_features + by_features + n_steps * n * n * n_way, n_steps * by_features


def cheaper_form(n: int, n_features: int, n_way: int, n_steps: int) -> str:
    """``"dual"`` or ``"primal"``: the one with fewer multiply-adds for a task (ties go to dual).

    Dual wins where n is small relative to D and there are a few steps to pay for the Gram matrix.
    """
    dual, primal = multiply_adds(n, n_features, n_way, n_steps)
    return "dual" if dual <= primal else "primal"


def fit_heads(
    support: Tensor,
    support_labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: str = "second",
    form: str = "auto",
    support_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Heads after the inner loop: (weight [T, C, D], bias [T, C]) in the dtype of `weight`.

    The contract and the equations are those of `mtl_fast.ops.base_learner.fit_heads`; nothing is validated
    here. Differentiable to any order in `support`, `weight` and `bias` (``order="second"``).
    """
    dtype = _compute_dtype(support, weight, bias)
    with full_precision(support.device):
        adapted = _fit(
            support.to(dtype),
            support_labels,
            weight.to(dtype),
            bias.to(dtype),
            support_mask,
            inner_lr=inner_lr,
            n_steps=n_steps,
            order=order,
            form=form,
        )
    return adapted[0].to(weight.dtype), adapted[1].to(weight.dtype)


def base_learner(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: str = "second",
    form: str = "auto",
    support_mask: Tensor | None = None,
) -> Tensor:
    """Query logits [T, m, C] of the fitted heads; contract of `mtl_fast.ops.base_learner.base_learner`."""
    dtype = _compute_dtype(support, query, weight, bias)
    with full_precision(support.device):
        adapted_weight, adapted_bias = _fit(
            support.to(dtype),
            support_labels,
            weight.to(dtype),
            bias.to(dtype),
            support_mask,
            inner_lr=inner_lr,
            n_steps=n_steps,
            order=order,
            form=form,
        )
        # [T, 1, C] + [T, m, D] @ [T, D, C] -> [T, m, C]
        logits = torch.baddbmm(adapted_bias.unsqueeze(1), query.to(dtype), adapted_weight.mT)
    return logits.to(torch.promote_types(query.dtype, weight.dtype))


@torch.no_grad()
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
) -> Tensor:
    """Query logits [n_steps + 1, T, m, C] along the inner loop, from one dual fit, without a graph."""
    dtype = _compute_dtype(support, query, weight, bias)
    with full_precision(support.device):
        x, targets, rates = _prepare(
            support.to(dtype), support_labels, support_mask, weight.shape[-2], inner_lr
        )
        q, w, b = query.to(dtype), *_per_task(weight.to(dtype), bias.to(dtype), support.shape[0])
        first = torch.baddbmm(b.unsqueeze(2), w, q.mT)  # [T, C, m]
        steps = first.unsqueeze(1)
        if n_steps:
            logits, kernel = _dual_start(x, w, b, rates)
            sums = torch.stack(_residual_sums(logits, kernel, targets, n_steps, in_place=False), 1)
            # All steps in one product: [T, n_steps·C, n] @ [T, n, m] -> [T, n_steps·C, m]
            moved = torch.bmm((sums * rates.unsqueeze(1)).flatten(1, 2), torch.bmm(x, q.mT).add_(1))
            steps = torch.cat([steps, steps + moved.unflatten(1, sums.shape[1:3])], 1)
    return steps.permute(1, 0, 3, 2).to(torch.promote_types(query.dtype, weight.dtype))


def _fit(
    support: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    *,
    inner_lr: float,
    n_steps: int,
    order: str,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The adapted head ([T, C, D], [T, C]) in the inputs' dtype, with the graph that `order` asks for."""
    first_order = order == "first"
    # Without a graph through the steps nothing is saved for backward, so buffers may be updated in place.
    in_place = first_order or not torch.is_grad_enabled()
    x, w, b = (t.detach() if first_order else t for t in (support, weight, bias))
    w, b = _per_task(w, b, support.shape[0])
    if n_steps:
        if form == "auto":
            form = cheaper_form(support.shape[1], support.shape[2], w.shape[1], n_steps)
        x, targets, rates = _prepare(x, labels, mask, w.shape[1], inner_lr)
        solve = _dual if form == "dual" else _primal
        w, b = solve(x, targets, w, b, rates, n_steps, in_place)
    if first_order:
        # θ' = θ − constants: adds an exact zero that carries the identity gradient to θ.
        w, b = w + (weight - weight.detach()), b + (bias - bias.detach())
    return w, b


def _dual(
    x: Tensor, targets: Tensor, w: Tensor, b: Tensor, rates: Tensor, n_steps: int, in_place: bool
) -> tuple[Tensor, Tensor]:
    logits, kernel = _dual_start(x, w, b, rates)
    coefficients = _residual_sums(logits, kernel, targets, n_steps, in_place)[-1] * rates
    # [T, C, D] + [T, C, n] @ [T, n, D] -> [T, C, D]
    return torch.baddbmm(w, coefficients, x), b + coefficients.sum(2)


def _dual_start(x: Tensor, w: Tensor, b: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """First logits Z₀ᵀ [T, C, n] and the kernel diag(rates)·(XXᵀ + 1) [T, n, n], the 1 being the bias."""
    return torch.baddbmm(b.unsqueeze(2), w, x.mT), (torch.bmm(x, x.mT) + 1) * rates.mT


def _residual_sums(
    logits: Tensor, kernel: Tensor, targets: Tensor, n_steps: int, in_place: bool
) -> list[Tensor]:
    """R_t = Σ_{s<t} (Y − P_s) as [T, C, n] for t = 1..n_steps; only the last if `in_place`. n_steps ≥ 1."""
    sums = [targets - logits.softmax(1)]
    for _ in range(n_steps - 1):
        # [T, C, n] + [T, C, n] @ [T, n, n] -> [T, C, n]
        probabilities = torch.baddbmm(logits, sums[-1], kernel).softmax(1)
        if in_place:
            sums[-1].sub_(probabilities.sub_(targets))
        else:
            sums.append(sums[-1] - (probabilities - targets))
    return sums


def _primal(
    x: Tensor, targets: Tensor, w: Tensor, b: Tensor, rates: Tensor, n_steps: int, in_place: bool
) -> tuple[Tensor, Tensor]:
    b = b.unsqueeze(2)
    for step in range(n_steps):
        # [T, C, 1] + [T, C, D] @ [T, D, n] -> [T, C, n]
        residual = (targets - torch.baddbmm(b, w, x.mT).softmax(1)) * rates
        if in_place and step > 0:  # the first step allocates: w and b are the caller's until then
            w.baddbmm_(residual, x)
            b.add_(residual.sum(2, keepdim=True))
        else:
            w = torch.baddbmm(w, residual, x)
            b = b + residual.sum(2, keepdim=True)
    return w, b.squeeze(2)


def _prepare(
    x: Tensor, labels: Tensor, mask: Tensor | None, n_way: int, inner_lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean rows [T, n, D], one-hot targets [T, C, n] and step sizes of the rows ([T, 1, n] or [1, 1, 1])."""
    if mask is None:
        rates = x.new_full((1, 1, 1), inner_lr / max(x.shape[1], 1))
    else:
        # where, not a product: 0·NaN is NaN, in values and in gradients.
        x = torch.where(mask.unsqueeze(2), x, 0)
        labels = torch.where(mask, labels, 0)
        count = mask.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
        rates = (mask * (inner_lr / count)).unsqueeze(1)
    return x, _one_hot(labels, n_way, x.dtype), rates


def _one_hot(labels: Tensor, n_way: int, dtype: torch.dtype) -> Tensor:
    """[T, n] in 0..n_way-1 -> [T, n_way, n]."""
    zeros = torch.zeros(labels.shape[0], n_way, labels.shape[1], dtype=dtype, device=labels.device)
    try:
        return zeros.scatter(1, labels.unsqueeze(1), 1)
    except RuntimeError as error:  # the CPU's own bounds check; a GPU asserts on the device
        if "out of bounds" not in str(error):
            raise
        raise ValueError(
            f"support_labels: must lie in 0..{n_way - 1} (weight has {n_way} rows): {error}"
        ) from error


def _per_task(weight: Tensor, bias: Tensor, n_tasks: int) -> tuple[Tensor, Tensor]:
    """Shared [C, D], [C] or per-task [T, C, D], [T, C] -> views [T, C, D], [T, C]."""
    return weight.expand(n_tasks, *weight.shape[-2:]), bias.expand(n_tasks, bias.shape[-1])


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if any input is: half types are accumulated in float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: a hundred steps in bfloat16 are not the same trajectory."""
    # Some devices, such as meta, have no autocast.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
