"""Fit and predict: 16 tasks, 5-way, 15 queries, 640 features; first order, and second order with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_fast.ops import base_learner, why

from .accuracy import EPS, Expected
from .harness import Against, Case, Contender, Measurable, Row, Target
from .ops.bench_base_learner import INNER_LR, N_FEATURES, problem
from .peers.base_learner import batched_primal, one_task_at_a_time, vmapped

ONE_BY_ONE, VMAPPED, BATCHED = "one task at a time", "vmap over tasks", "batched primal"
Fit = Callable[..., Tensor]


def rows(quick: bool) -> Sequence[Measurable]:
    first, second = (5, 3) if quick else (100, 20)
    found = []
    for n_shot in (1, 5):
        found += [
            Row(
                f"fit and predict, first order, {n_shot}-shot, {first} steps",
                lambda n_shot=n_shot: _case(
                    _logits, n_shot, first, "first", Target(200, 600), Target(10, 30)
                ),
            ),
            Row(
                f"fit and predict, second order with gradients, {n_shot}-shot, {second} steps",
                lambda n_shot=n_shot: _case(_gradients, n_shot, second, "second", None, Target(10, 30)),
            ),
        ]
    return found


def _case(
    way: Callable[..., Mapping[str, Tensor]],
    n_shot: int,
    n_steps: int,
    order: str,
    against_one_by_one: Target | None,
    against_batched: Target,
) -> Case:
    tensors = problem(n_shot)
    options: dict[str, Any] = {"inner_lr": INNER_LR, "n_steps": n_steps, "order": order}
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    # A rounding of a D-long product a step.
    bound = 4 * EPS * (N_FEATURES * n_steps) ** 0.5
    exact = way(one_task_at_a_time, wide, options)
    return Case(
        ours=Contender("ours", lambda: way(_ours, tensors, options)),
        peers=(
            Contender(ONE_BY_ONE, lambda: way(one_task_at_a_time, tensors, options)),
            Contender(VMAPPED, lambda: way(vmapped, tensors, options)),
            Contender(BATCHED, lambda: way(batched_primal, tensors, options)),
        ),
        against=(
            Against((ONE_BY_ONE,), against_one_by_one),
            Against((VMAPPED,)),
            Against((BATCHED,), against_batched),
        ),
        expected={name: Expected(value.detach(), bound) for name, value in exact.items()},
        why_not_native=_why_not_native(tensors, options),
    )


def _ours(
    support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, **options: Any
) -> Tensor:
    return base_learner(support, labels, query, weight, bias, **options)


def _logits(fit: Fit, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Mapping[str, Tensor]:
    return {"logits": fit(**tensors, **options)}


def _gradients(fit: Fit, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Of the embeddings and the head."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
    logits = fit(**(dict(tensors) | leaves), **options)
    gradients = torch.autograd.grad(logits.square().mean(), list(leaves.values()))
    return {"logits": logits.detach()} | dict(zip(leaves, gradients, strict=True))


def _why_not_native(tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> str:
    facts = {"support": tensors["support"], "weight": tensors["weight"], "form": "auto"}
    chosen = why("base_learner", **facts, order=options["order"], n_steps=options["n_steps"])
    return "" if chosen.startswith("native") else chosen
