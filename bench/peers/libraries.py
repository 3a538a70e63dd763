"""Other libraries on the jobs that they share with us, where they are installed.

Two jobs. Head-only adaptation in meta-training: heads fitted on the support features of T tasks, the mean query loss,
and its gradients for the head's start (learn2learn's `MAML` on a linear layer, parallel-metalearn's `MAML` in its ANIL
mode). Evaluation from features with a prototype a class (easyfsl's `PrototypicalNetworks`). Each adapter calls what
the library offers for the job, as its documentation does it, and fails with an `ImportError` that says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Job = Callable[[], Tensors]


def learn2learns_adaptation(tensors: Tensors, *, inner_lr: float, n_steps: int, order: str) -> Job:
    """A task at a time: clone, adapt step by step, query loss, backward."""
    from learn2learn.algorithms import MAML

    head = _linear(tensors["weight"], tensors["bias"])
    maml = MAML(head, lr=inner_lr, first_order=order == "first")

    def run() -> Tensors:
        maml.zero_grad()
        n_tasks = len(tensors["support"])
        total = tensors["weight"].new_zeros(())
        for x, y, q, z in zip(*(tensors[name] for name in TASK), strict=True):
            learner = maml.clone()
            for _ in range(n_steps):
                learner.adapt(F.cross_entropy(learner(x), y))
            loss = F.cross_entropy(learner(q), z) / n_tasks
            loss.backward()
            total += loss.detach()
        return {"loss": total} | _gradients(head)

    return run


def parallel_metalearns_adaptation(tensors: Tensors, *, inner_lr: float, n_steps: int, order: str) -> Job:
    """All tasks under `torch.func.vmap`."""
    from metalearn.algorithms import MAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss import CategoricalAccuracy, CrossEntropy
    from metalearn.model_wrappers import MAML_Model

    head = _linear(tensors["weight"], tensors["bias"])
    model = MAML_Model(_Takes(nn.Identity()), _Takes(head), fast_weights_names="ANIL")
    steps = InnerSGD(
        model.get_fast_weights(), first_order=order == "first", inner_lr=inner_lr, learn_lr=False
    )
    learner = MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=steps,
        support_loss_fn=CrossEntropy(metric_fn=CategoricalAccuracy()),
        inner_steps=n_steps,
        device=tensors["weight"].device,
    )
    support, support_labels, query, query_labels = (tensors[name] for name in TASK)
    batch = support, {"labels": support_labels}, query, {"labels": query_labels}

    def run() -> Tensors:
        loss, _ = learner.step(iter([batch]), training=True)
        return {"loss": torch.tensor(loss)} | _gradients(head)

    return run


def easyfsls_evaluation(tensors: Tensors) -> Job:
    """A task at a time, on features: scores [T, m, C], minus the distance to each prototype."""
    from easyfsl.methods import PrototypicalNetworks

    model = PrototypicalNetworks(nn.Identity())

    @torch.no_grad()
    def run() -> Tensors:
        scores = []
        for x, y, q in zip(*(tensors[name] for name in TASK[:3]), strict=True):
            model.process_support_set(x, y)
            scores.append(model(q))
        return {"scores": torch.stack(scores)}

    return run


# Of [T, n, D], [T, n], [T, m, D] and [T, m].
TASK = ("support", "labels", "query", "query_labels")


class _Takes(nn.Module):
    """A module that is called with options which it has no use for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        out: Tensor = self.module(x)
        return out


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _gradients(head: nn.Linear) -> dict[str, Tensor]:
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    return {"weight": head.weight.grad, "bias": head.bias.grad}
