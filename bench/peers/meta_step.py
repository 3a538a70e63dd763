"""A meta-training step of scale, shift and head, first order, with Adam, in plain PyTorch.

`PlainStep` is how it is written down: a task at a time, Φ multiplied onto the weights in Python, the inner loop
through autograd. `VmappedStep` is the same for one task, under `torch.func.vmap`. `BatchedStep` is the best that
PyTorch gives: all tasks at once, the norm folded, the inner loop batched and, if asked for, all of the encoder
compiled. None builds a graph for the support images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base_learner import batched_primal, one_task_at_a_time, vmapped
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


@dataclass(frozen=True)
class FoldedLayer:
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
    for layer in layers:
        weight, bias = layer.weight, layer.bias
        if layer.scale is not None and layer.shift is not None:
            weight, bias = weight * layer.scale, torch.addcmul(bias, layer.shift, layer.ratio)
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

    def load(self, rows: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """Rows [B] → normalised [B, 3, H, W]."""
        mean, std = (
            torch.tensor(values, dtype=dtype, device=self.images.device) for values in (self.mean, self.std)
        )
        x = (self.images[rows].to(dtype) - mean) / std
        return x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class InnerLoop:
    """Step size and number of steps of the base-learner."""

    lr: float
    n_steps: int


AnyLayer = TypeVar("AnyLayer", FrozenLayer, FoldedLayer)


class MetaStep(ABC, Generic[AnyLayer]):
    """Forward, backward and Adam; the gradients stay in the parameters until the next step.

    Args:
        layers: of the encoder; their Φ are copied and trained.
        weight, bias: of the head, [C, D] and [C]; copied and trained.
        data: where rows point to.
        inner: of the base-learner.
    """

    memory_format = torch.contiguous_format

    def __init__(
        self, layers: Sequence[AnyLayer], weight: Tensor, bias: Tensor, data: Data, inner: InnerLoop
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
        """The mean query loss, and its gradients, along which the parameters are then moved."""
        self.optimizer.zero_grad()
        loss = self.backward(tasks)
        self.optimizer.step()
        return {"loss": loss} | {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    @abstractmethod
    def backward(self, tasks: Tasks) -> Tensor:
        """The mean query loss; adds its gradients to the parameters'."""

    def load(self, rows: Tensor) -> Tensor:
        return self.data.load(rows, self.weight.dtype, self.memory_format)


class PlainStep(MetaStep[FrozenLayer]):
    """See the module."""

    def backward(self, tasks: Tasks) -> Tensor:
        losses = []
        for t in range(len(tasks.support)):
            with torch.no_grad():
                support = resnet12(self.load(tasks.support[t]), self.layers)
            query = resnet12(self.load(tasks.query[t]), self.layers)
            logits = one_task_at_a_time(
                support[None],
                tasks.support_labels[t : t + 1],
                query[None],
                self.weight,
                self.bias,
                inner_lr=self.inner.lr,
                n_steps=self.inner.n_steps,
                order="first",
            )
            loss = F.cross_entropy(logits[0], tasks.query_labels[t]) / len(tasks.support)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()


class VmappedStep(MetaStep[FrozenLayer]):
    """See the module."""

    def backward(self, tasks: Tasks) -> Tensor:
        embed = torch.func.vmap(partial(resnet12, layers=self.layers))
        support, query = (
            self.load(rows.flatten()).unflatten(0, rows.shape) for rows in (tasks.support, tasks.query)
        )
        with torch.no_grad():
            support = embed(support)
        logits = vmapped(
            support,
            tasks.support_labels,
            embed(query),
            self.weight,
            self.bias,
            inner_lr=self.inner.lr,
            n_steps=self.inner.n_steps,
            order="first",
        )
        loss = F.cross_entropy(logits.flatten(0, 1), tasks.query_labels.flatten())
        loss.backward()
        return loss.detach()


class BatchedStep(MetaStep[FoldedLayer]):
    """See the module; `compiled` sends the weights' products and the encoder through `torch.compile`."""

    def __init__(
        self,
        layers: Sequence[FoldedLayer],
        weight: Tensor,
        bias: Tensor,
        data: Data,
        inner: InnerLoop,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__(layers, weight, bias, data, inner)
        if not layers[-1].weight.is_contiguous():
            self.memory_format = torch.channels_last
        self.effective, self.embed = effective, folded_resnet12
        if compiled:
            self.effective = torch.compile(effective, dynamic=False)
            self.embed = torch.compile(folded_resnet12, dynamic=False)

    def backward(self, tasks: Tasks) -> Tensor:
        operands = self.effective(self.layers)
        query = self.embed(self.load(tasks.query.flatten()), operands)
        with torch.no_grad():
            frozen = [(weight.detach(), bias.detach()) for weight, bias in operands]
            support = self.embed(self.load(tasks.support.flatten()), frozen)
        logits = batched_primal(
            support.unflatten(0, tasks.support.shape),
            tasks.support_labels,
            query.unflatten(0, tasks.query.shape),
            self.weight,
            self.bias,
            inner_lr=self.inner.lr,
            n_steps=self.inner.n_steps,
            order="first",
        )
        loss = F.cross_entropy(logits.flatten(0, 1), tasks.query_labels.flatten())
        loss.backward()
        return loss.detach()


def _trained(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone().requires_grad_()
