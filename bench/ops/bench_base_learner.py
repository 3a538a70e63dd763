"""Fitting the heads of 16 tasks, 640 features, 15 queries a class: `pytest bench/ops/bench_base_learner.py`.

Peers are plain PyTorch: one task at a time through autograd, and the batched gradient steps on the weights.
Every row is checked against the first peer in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.peers.base_learner import batched_primal, one_task_at_a_time
from mtl_fast.ops import base_learner, why

N_TASKS, N_WAY, N_QUERY, N_FEATURES, INNER_LR = 16, 5, 15, 640, 0.05
Fit = Callable[..., Tensor]


def problem(n_shot: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Embeddings of norm about 3, as a trained encoder gives them."""
    g = torch.Generator().manual_seed(n_shot)
    labels = torch.arange(N_WAY).repeat_interleave(n_shot).expand(N_TASKS, -1).contiguous()

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, N_FEATURES, generator=g) * 3 / N_FEATURES**0.5).to(dtype)

    return {
        "support": normal(N_TASKS, N_WAY * n_shot),
        "labels": labels,
        "query": normal(N_TASKS, N_WAY * N_QUERY),
        "weight": normal(N_WAY) * 0.1,
        "bias": torch.zeros(N_WAY, dtype=dtype),
    }


def ours(form: str, backend: str) -> Fit:
    def run(
        support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, **options: Any
    ) -> Tensor:
        how: dict[str, Any] = {"inner_lr": INNER_LR, "form": form, "backend": backend, **options}
        return base_learner(support, labels, query, weight, bias, **how)

    return run


FITS: dict[str, Fit] = {
    "peer_one_task_at_a_time": partial(one_task_at_a_time, inner_lr=INNER_LR),
    "peer_batched_primal": partial(batched_primal, inner_lr=INNER_LR),
    "torch_primal": ours("primal", "torch"),
    "torch_dual": ours("dual", "torch"),
    "native": ours("dual", "native"),
}
needs_native = pytest.mark.skipif(why("base_learner").startswith("torch"), reason=why("base_learner"))
by_fit = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_native if name == "native" else ()) for name in FITS]
)
by_shot = pytest.mark.parametrize("n_shot", [1, 5])


def rounds(name: str) -> int:
    return 3 if name == "peer_one_task_at_a_time" else 15


def gradients(fit: Fit, p: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in p.items() if t.is_floating_point()}
    logits = fit(**(p | leaves), **options)
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), list(leaves.values()))]


def check(actual: list[Tensor], exact: list[Tensor], n_steps: int) -> None:
    """float32 against float64: a rounding of a D-long product a step."""
    bound = 4 * torch.finfo(torch.float32).eps * (N_FEATURES * n_steps) ** 0.5
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).abs().max() <= bound * e.abs().max()


@by_shot
@by_fit
def test_fit_and_predict(benchmark: Any, name: str, n_shot: int) -> None:
    benchmark.group = f"fit and predict, 100 steps, {n_shot}-shot, float32, {torch.get_num_threads()} threads"
    options: dict[str, Any] = {"n_steps": 100, "order": "first"}
    p = problem(n_shot)
    exact = FITS["peer_one_task_at_a_time"](
        **{k: t.double() if t.is_floating_point() else t for k, t in p.items()}, **options
    )
    check([FITS[name](**p, **options)], [exact.detach()], 100)
    benchmark.pedantic(FITS[name], kwargs=p | options, rounds=rounds(name), warmup_rounds=1)


@by_shot
@by_fit
def test_second_order_with_gradients(benchmark: Any, name: str, n_shot: int) -> None:
    benchmark.group = f"second order, 20 steps and backward, {n_shot}-shot, {torch.get_num_threads()} threads"
    options: dict[str, Any] = {"n_steps": 20, "order": "second"}
    p = problem(n_shot)
    wide = {k: t.double() if t.is_floating_point() else t for k, t in p.items()}
    check(
        gradients(FITS[name], p, **options), gradients(FITS["peer_one_task_at_a_time"], wide, **options), 20
    )
    benchmark.pedantic(gradients, args=(FITS[name], p), kwargs=options, rounds=rounds(name), warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
