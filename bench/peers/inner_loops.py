"""A step of MAML on Conv-4 as it is written down in plain PyTorch: a task at a time through `torch.autograd.grad`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .meta_step import Data, InnerLoop, Tasks

N_LAYERS = 4
Weights = dict[str, Tensor]


def conv4(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[n, 3, H, W] → logits [n, C]; batch statistics of the images given, which take a convolution's bias out."""
    for i in range(N_LAYERS):
        z = F.conv2d(x, weights[f"weight {i}"], padding=1)
        z = F.batch_norm(z, None, None, weights[f"gamma {i}"], weights[f"beta {i}"], training=True)
        x = F.max_pool2d(F.relu(z), 2)
    return F.linear(x.flatten(1), weights["head weight"], weights["head bias"])


class PlainMaml:
    """Loss, gradients and a step of Adam; the gradients stay in the weights until the next step.

    Args:
        weights: as `conv4` names them; copied and trained.
        data: where rows point to.
        inner: step size and number of steps.
        second_order: whether the derivative passes through the inner steps.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], data: Data, inner: InnerLoop, *, second_order: bool
    ) -> None:
        self.weights = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
        self.data, self.inner, self.second_order = data, inner, second_order
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=1e-3)

    def __call__(self, tasks: Tasks) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        losses = []
        for t in range(len(tasks.support)):
            adapted = dict(self.weights)
            support = self._load(tasks.support[t])
            for _ in range(self.inner.n_steps):
                loss = F.cross_entropy(conv4(adapted, support), tasks.support_labels[t])
                grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=self.second_order)
                pairs = zip(adapted.items(), grads, strict=True)
                adapted = {name: w - self.inner.lr * g for (name, w), g in pairs}
            logits = conv4(adapted, self._load(tasks.query[t]))
            loss = F.cross_entropy(logits, tasks.query_labels[t]) / len(tasks.support)
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        grads_of = {name: w.grad for name, w in self.weights.items() if w.grad is not None}
        return {"loss": torch.stack(losses).sum()} | grads_of

    def _load(self, rows: Tensor) -> Tensor:
        return self.data.load(rows, self.weights["head weight"].dtype, torch.contiguous_format)
