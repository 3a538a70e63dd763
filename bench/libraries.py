"""Beside other libraries, where installed: head-only adaptation and evaluation from features, 640 features.

A library that is not installed leaves a line that says so; `pip install learn2learn easyfsl parallel-metalearn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.ops import base_learner, why

from .accuracy import EPS, Expected
from .harness import Against, Case, Contender, Line, Measurable, Row, Settings
from .ops.bench_base_learner import INNER_LR, N_FEATURES, N_QUERY, N_WAY, problem
from .peers.base_learner import one_task_at_a_time
from .peers.libraries import (
    Job,
    Tensors,
    easyfsls_evaluation,
    learn2learns_adaptation,
    parallel_metalearns_adaptation,
)

Adapter = Callable[[Tensors], Job]


@dataclass(frozen=True)
class LibraryRow:
    """Ours beside one library.

    Attributes:
        name: of the row.
        library: its name on the package index.
        adapter: its way of doing the job.
        case: the job with that way as the peer.
    """

    name: str
    library: str
    adapter: Adapter
    case: Callable[[str, Adapter], Case]

    def measure(self, settings: Settings) -> Iterable[Line]:
        try:
            return Row(self.name, lambda: self.case(self.library, self.adapter)).measure(settings)
        except ImportError as error:
            return [Line(self.name, against=self.library, skipped=f"{self.library} is not there: {error}")]


def rows(quick: bool) -> Sequence[Measurable]:
    n_tasks, n_steps = (16, 3) if quick else (16, 20)
    found = []
    for order in ("first", "second"):
        options = {"inner_lr": INNER_LR, "n_steps": n_steps, "order": order}
        for library, adaptation in (
            ("learn2learn", learn2learns_adaptation),
            ("parallel-metalearn", parallel_metalearns_adaptation),
        ):
            found.append(
                LibraryRow(
                    f"adaptation of the head with its gradients, {order} order, {n_tasks} tasks of 5-way 1-shot, "
                    f"{n_steps} steps, beside {library}",
                    library,
                    partial(adaptation, **options),
                    partial(_adaptation, options=options),
                )
            )
    n_tested = 20 if quick else 600
    name = f"evaluation from features, prototypes, {n_tested} tasks of 5-way 1-shot, beside easyfsl"
    return [
        *found,
        LibraryRow(name, "easyfsl", easyfsls_evaluation, partial(_evaluation, n_tasks=n_tested)),
    ]


def _adaptation(library: str, adapter: Adapter, *, options: dict[str, Any]) -> Case:
    tensors = _labelled(problem(1))
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    exact = _loss_and_gradients(one_task_at_a_time, wide, options)
    # A rounding of a D-long product a step.
    bound = 4 * EPS * (N_FEATURES * options["n_steps"]) ** 0.5
    return Case(
        ours=Contender("ours", lambda: _loss_and_gradients(base_learner, tensors, options)),
        peers=(Contender(library, adapter(tensors)),),
        against=(Against((library,)),),
        expected={name: Expected(value, bound) for name, value in exact.items()},
        why_not_native=_why_not_native(tensors),
    )


def _labelled(tensors: Tensors) -> dict[str, Tensor]:
    n_tasks = len(tensors["support"])
    labels = torch.arange(N_WAY).repeat_interleave(N_QUERY).expand(n_tasks, -1).contiguous()
    return {**tensors, "query_labels": labels}


def _loss_and_gradients(fit: Callable[..., Tensor], tensors: Tensors, options: dict[str, Any]) -> Tensors:
    """The mean query loss of all tasks, and its gradients for the start of the head."""
    weight, bias = (tensors[name].detach().requires_grad_() for name in ("weight", "bias"))
    logits = fit(tensors["support"], tensors["labels"], tensors["query"], weight, bias, **options)
    loss = F.cross_entropy(logits.flatten(0, 1), tensors["query_labels"].flatten())
    d_weight, d_bias = torch.autograd.grad(loss, (weight, bias))
    return {"loss": loss.detach(), "weight": d_weight, "bias": d_bias}


def _evaluation(library: str, adapter: Adapter, *, n_tasks: int) -> Case:
    tensors = problem(1)
    repeats = -(-n_tasks // len(tensors["support"]))
    tensors = {
        name: tensors[name].repeat(repeats, *[1] * (tensors[name].dim() - 1))[:n_tasks].contiguous()
        for name in ("support", "labels", "query")
    }
    # Tasks of their own, not copies that the caches know.
    g = torch.Generator().manual_seed(0)
    for name in ("support", "query"):
        tensors[name] += torch.randn(tensors[name].shape, generator=g) / N_FEATURES**0.5
    # Half of the largest square is lost to cancellation at worst; the square root does not add to it.
    bound = 4 * EPS * N_FEATURES**0.5
    return Case(
        ours=Contender("ours", lambda: {"scores": _distances(tensors)}),
        peers=(Contender(library, adapter(tensors | {"query_labels": tensors["labels"]})),),
        against=(Against((library,)),),
        expected={
            "scores": Expected(
                -torch.cdist(tensors["query"].double(), _prototypes(tensors, torch.float64)), bound
            )
        },
        why_not_native=_why_not_native({**tensors, "weight": tensors["support"]}),
    )


def _prototypes(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """[T, C, D]: the mean of each class's support features, which come class by class."""
    return tensors["support"].to(dtype).unflatten(1, (N_WAY, -1)).mean(dim=2)


def _distances(tensors: Tensors) -> Tensor:
    """−|q − p| [T, m, C] from 2·p·q − |p|², a head of its own for each task with no step taken, and |q|²."""
    prototypes = _prototypes(tensors, torch.float32)
    logits = base_learner(
        tensors["support"],
        tensors["labels"],
        tensors["query"],
        2 * prototypes,
        -prototypes.square().sum(dim=2),
        inner_lr=0.0,
        n_steps=0,
    )
    squares = torch.linalg.vector_norm(tensors["query"], dim=2, keepdim=True).square()
    return -(squares - logits).clamp_(min=0).sqrt_()


def _why_not_native(tensors: Tensors) -> str:
    chosen = why("base_learner", support=tensors["support"], weight=tensors["weight"], form="auto")
    return "" if chosen.startswith("native") else chosen
