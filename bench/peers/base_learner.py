"""The inner loop in plain PyTorch: one task at a time through autograd, `torch.func.vmap` over tasks, and batched
gradient steps written out.

All take support [T, n, D], labels [T, n], query [T, m, D], weight [C, D] and bias [C], and give query logits
[T, m, C] whose gradients are those of `order`, "first" or "second".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot


def one_task_at_a_time(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: str,
) -> Tensor:
    logits = []
    for x, y, q in zip(support, labels, query, strict=True):
        w, b = (t if t.requires_grad else t.detach().requires_grad_() for t in (weight, bias))
        x = x.detach() if order == "first" else x
        for _ in range(n_steps):
            loss = cross_entropy(x @ w.T + b, y)
            gw, gb = torch.autograd.grad(loss, (w, b), create_graph=order == "second")
            w, b = w - inner_lr * gw, b - inner_lr * gb
        logits.append(q @ w.T + b)
    return torch.stack(logits)


def vmapped(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: str,
) -> Tensor:
    def one_task(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        def loss(w: Tensor, b: Tensor) -> Tensor:
            return cross_entropy(x @ w.T + b, y)

        w, b = weight, bias
        for _ in range(n_steps):
            # First order: steps are constants, so what is differentiated at is as well.
            at = (w.detach(), b.detach()) if order == "first" else (w, b)
            gw, gb = torch.func.grad(loss, argnums=(0, 1))(*at)
            w, b = w - inner_lr * gw, b - inner_lr * gb
        return q @ w.T + b

    x = support.detach() if order == "first" else support
    return torch.func.vmap(one_task)(x, labels, query)


def batched_primal(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    inner_lr: float,
    n_steps: int,
    order: str,
) -> Tensor:
    x = support.detach() if order == "first" else support
    w, b = weight.expand(len(x), -1, -1), bias.expand(len(x), 1, -1)
    if order == "first":
        w, b = w.detach(), b.detach()
        w0, b0 = weight - weight.detach(), bias - bias.detach()  # zeros that carry the gradient
    else:
        w0, b0 = torch.zeros_like(weight), torch.zeros_like(bias)
    targets = one_hot(labels, len(weight)).to(x.dtype)
    for _ in range(n_steps):
        residual = (torch.baddbmm(b, x, w.mT).softmax(2) - targets) * (inner_lr / x.shape[1])
        w, b = w - residual.mT @ x, b - residual.sum(1, keepdim=True)
    return torch.baddbmm(b + b0, query, (w + w0).mT)
