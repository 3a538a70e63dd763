"""A meta-training step of scale, shift and head, first order, with Adam, in plain PyTorch.

`PlainStep` is how it is written down: a task at a time, Φ multiplied onto the weights in Python, the inner loop
through autograd. `BatchedStep` is the best that PyTorch gives: all tasks at once, the norm folded, the inner loop
batched and, if asked for, all of the encoder compiled. Neither builds a graph for the support images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base_learner import batched_primal, one_task_at_a_time
from .resnet12 import Folded, folded_resnet12, resnet12


@dataclass(frozen=True)
class FrozenLayer:
    """A frozen convolution and its norm, with Φ_S1 [O, I, 1, 1] and Φ_S2 [O] unless they are None."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
    scale: Tensor | None
    shift: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.scale is not None and self.shift is not None:
            weight, bias = weight * self.scale, bias + self.shift
        z = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        return F.batch_norm(z, self.mean, self.var, self.gamma, self.beta, eps=self.eps)


class FoldedLayer(NamedTuple):
    """The same with the norm multiplied in, once for all: (γ/σ)·W, (b − mean)·γ/σ + β, and γ/σ for the shift."""

    weight: Tensor
    bias: Tensor
    ratio: Tensor
    scale: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, layer: FrozenLayer, memory_format: torch.memory_format) -> FoldedLayer:
        ratio = layer.gamma / (layer.var + layer.eps).sqrt()
        weight = (layer.weight * ratio.view(-1, 1, 1, 1)).contiguous(memory_format=memory_format)
        return cls(weight, (layer.bias - layer.mean) * ratio + layer.beta, ratio, layer.scale, layer.shift)


def effective(layers: Sequence[FoldedLayer]) -> list[Folded]:
    """What each layer convolves with."""
    pairs = []
    for weight, bias, ratio, scale, shift in layers:
        if scale is not None and shift is not None:
            weight, bias = weight * scale, torch.addcmul(bias, shift, ratio)
        pairs.append((weight, bias))
    return pairs


@dataclass(frozen=True)
class Tasks:
    """Where the images of T tasks are: rows [T, n] of the data and labels in each split."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


@dataclass(frozen=True)
class Data:
    """uint8 images [N, H, W, 3] and their mean and deviation by channel."""

    images: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(self, rows: Tensor, like: Tensor, memory_format: torch.memory_format) -> Tensor:
        """Rows [B] → normalised [B, 3, H, W] of the dtype of `like`."""
        mean, std = (torch.tensor(values).to(like) for values in (self.mean, self.std))
        x = (self.images[rows].to(like) - mean) / std
        return x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class InnerLoop:
    lr: float
    n_steps: int


class PlainStep:
    """See the module. The gradients stay in the parameters until the next step.

    Args:
        layers: of the encoder; their Φ are copied and trained.
        weight, bias: of the head, [C, D] and [C]; copied and trained.
        data: where rows point to.
        inner: of the base-learner.
    """

    def __init__(
        self, layers: Sequence[FrozenLayer], weight: Tensor, bias: Tensor, data: Data, inner: InnerLoop
    ) -> None:
        self.layers = [
            replace(layer, scale=_trained(layer.scale), shift=_trained(layer.shift)) for layer in layers
        ]
        self.weight = weight.detach().clone().requires_grad_()
        self.bias = bias.detach().clone().requires_grad_()
        self.data, self.inner = data, inner
        self.parameters = {"head weight": self.weight, "head bias": self.bias}
        for i, layer in enumerate(self.layers):
            if layer.scale is not None and layer.shift is not None:
                self.parameters |= {f"scale {i}": layer.scale, f"shift {i}": layer.shift}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=1e-3)

    def __call__(self, tasks: Tasks) -> dict[str, Tensor]:
        """The mean query loss, whose gradients are then in the parameters, moved by one step of Adam."""
        self.optimizer.zero_grad()
        loss = self._backward(tasks)
        self.optimizer.step()
        return {"loss": loss} | {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def _backward(self, tasks: Tasks) -> Tensor:
        losses = []
        for t in range(len(tasks.support)):
            with torch.no_grad():
                support = resnet12(self._load(tasks.support[t]), self.layers)
            query = resnet12(self._load(tasks.query[t]), self.layers)
            logits = one_task_at_a_time(
                support[None],
                tasks.support_labels[t : t + 1],
                query[None],
                self.weight,
                self.bias,
                **self._options,
            )
            loss = F.cross_entropy(logits[0], tasks.query_labels[t]) / len(tasks.support)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _load(self, rows: Tensor) -> Tensor:
        return self.data.load(rows, self.weight, torch.contiguous_format)

    @property
    def _options(self) -> dict[str, object]:
        return {"inner_lr": self.inner.lr, "n_steps": self.inner.n_steps, "order": "first"}


class BatchedStep(PlainStep):
    """See the module; arguments as `PlainStep`, and

    Args:
        memory_format: of images and weights.
        compiled: whether the weights' products and the encoder go through `torch.compile`.
    """

    def __init__(
        self,
        layers: Sequence[FrozenLayer],
        weight: Tensor,
        bias: Tensor,
        data: Data,
        inner: InnerLoop,
        *,
        memory_format: torch.memory_format,
        compiled: bool = False,
    ) -> None:
        super().__init__(layers, weight, bias, data, inner)
        self.folded = [FoldedLayer.of(layer, memory_format) for layer in self.layers]
        self.memory_format = memory_format
        self.effective, self.embed = effective, folded_resnet12
        if compiled:
            self.effective = torch.compile(effective, dynamic=False)
            self.embed = torch.compile(folded_resnet12, dynamic=False)

    def _backward(self, tasks: Tasks) -> Tensor:
        operands = self.effective(self.folded)
        query = self.embed(self._load(tasks.query.flatten()), operands)
        with torch.no_grad():
            support = self.embed(
                self._load(tasks.support.flatten()), [(w.detach(), b.detach()) for w, b in operands]
            )
        logits = batched_primal(
            support.unflatten(0, tasks.support.shape),
            tasks.support_labels,
            query.unflatten(0, tasks.query.shape),
            self.weight,
            self.bias,
            **self._options,
        )
        loss = F.cross_entropy(logits.flatten(0, 1), tasks.query_labels.flatten())
        loss.backward()
        return loss.detach()

    def _load(self, rows: Tensor) -> Tensor:
        return self.data.load(rows, self.weight, self.memory_format)


def _trained(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone().requires_grad_()
