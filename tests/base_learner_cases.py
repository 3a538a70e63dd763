"""Problems for the base-learner, the loop over tasks and steps through autograd, and comparison within bounds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_fast.ops.base_learner import base_learner, fit_heads

ORDERS = ("first", "second")
NAMES = ("support", "query", "weight", "bias")


class Problem(NamedTuple):
    support: Tensor
    labels: Tensor
    query: Tensor
    weight: Tensor
    bias: Tensor
    mask: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.support, self.query, self.weight, self.bias

    def to(self, dtype: torch.dtype) -> Problem:
        return self._replace(**{name: getattr(self, name).to(dtype) for name in NAMES})

    def with_graph(self) -> Problem:
        made = {name: getattr(self, name).detach().clone().requires_grad_() for name in NAMES}
        return self._replace(**made)


class Size(NamedTuple):
    n_tasks: int
    n_way: int
    n: int
    m: int
    n_features: int
    n_steps: int
    per_task: bool = False


SIZES = {
    "ones": Size(1, 1, 1, 1, 1, 1),
    "two_way": Size(3, 2, 5, 4, 7, 3),
    "primes": Size(3, 5, 13, 11, 17, 7),
    "rows_over_features": Size(2, 3, 31, 5, 4, 6),
    "per_task_head": Size(3, 5, 10, 7, 13, 5, True),
    "wide": Size(2, 64, 64, 64, 67, 3),
}


def make(size: Size, *, masked: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    t, c, n, m, d = size[:5]
    mask = None
    if masked:
        mask = torch.rand(t, n, generator=g) < 0.6
        mask[:, 0] = True
    head = (t, c) if size.per_task else (c,)
    labels = torch.stack([torch.randperm(n, generator=g) % c for _ in range(t)])
    return Problem(normal(t, n, d), labels, normal(t, m, d), normal(*head, d), normal(*head), mask)


def fit(p: Problem, **options: Any) -> Tensor:
    return base_learner(p.support, p.labels, p.query, p.weight, p.bias, support_mask=p.mask, **options)


def heads(p: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    return fit_heads(p.support, p.labels, p.weight, p.bias, support_mask=p.mask, **options)


def plain(p: Problem, *, inner_lr: float, n_steps: int, order: str) -> Tensor:
    """One task at a time, one step at a time, gradients by autograd."""
    logits = []
    for task in range(len(p.support)):
        rows = p.mask[task] if p.mask is not None else slice(None)
        x, y = p.support[task][rows], p.labels[task][rows]
        w, b = (v if v.ndim == k else v[task] for v, k in ((p.weight, 2), (p.bias, 1)))
        if not w.requires_grad:
            w, b = w.detach().requires_grad_(), b.detach().requires_grad_()
        for _ in range(n_steps):
            loss = torch.nn.functional.cross_entropy(x @ w.T + b, y)
            gw, gb = torch.autograd.grad(loss, (w, b), create_graph=order == "second")
            w, b = w - inner_lr * gw, b - inner_lr * gb
        logits.append(p.query[task] @ w.T + b)
    return torch.stack(logits)


def gradients(logits: Tensor, p: Problem) -> list[Tensor]:
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = torch.autograd.grad(logits, p.leaves, cotangent.to(logits.dtype), allow_unused=True)
    return [torch.zeros_like(x) if v is None else v for v, x in zip(found, p.leaves, strict=True)]


def assert_near(actual: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """Largest and RMS error, both against the largest and RMS expected value."""
    error, expected = (actual.double() - expected.double()), expected.double()
    assert torch.isfinite(actual).all(), what
    assert error.abs().max() <= relative * max(expected.abs().max().item(), 1.0), what
    assert error.norm() <= relative * max(expected.norm().item(), math.sqrt(expected.numel())), what


def tolerance(size: Size, inner_lr: float, dtype: torch.dtype = torch.float64) -> float:
    """Rounding of a D-long product, carried through steps whose curvature is about inner_lr·|x|²/4."""
    growth = 1 + inner_lr * (size.n_features + 1) / 4
    return 2 * torch.finfo(dtype).eps * math.sqrt(size.n_features + size.n) * (size.n_steps + growth**2)
