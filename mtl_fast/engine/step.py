"""One meta-training step: a batch of episodes → query losses, class accuracies, gradients of Φ and θ."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.store import ImageStore
from ..episodes import Episodes
from ..kernels.contracts import EffectiveWeights
from ..nn.encoder import Encoder, Statistics
from ..nn.linear_head import LinearHead
from ..nn.scale_shift import interleave
from ..ops.base_learner import base_learner
from ..ops.images import images
from .ranks import ALONE, Ranks

NormMode = Literal["frozen", "episode", "running"]
Order = Literal["first", "second"]


@dataclass(frozen=True)
class Preprocess:
    """How rows of a store become network input: (image − mean)/std, channels-last.

    Attributes:
        mean, std: per channel, of 255.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(
        self,
        store: ImageStore,
        rows: Tensor,
        dtype: torch.dtype = torch.float32,
        mirrored: Tensor | None = None,
    ) -> Tensor:
        """Rows [B] of the store → [B, 3, H, W], those of `mirrored` (bool [B]) left to right."""
        device = store.images.device
        mean, std = (torch.tensor(values, device=device) for values in (self.mean, self.std))
        return images(store.images, rows, mean=mean, std=std, flip=mirrored, dtype=dtype)


class StepOutput(NamedTuple):
    """Mean query loss [T] and query accuracy of each class [T, n_way], after the inner loop."""

    loss: Tensor
    class_accuracy: Tensor


def class_accuracy(logits: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """Query accuracy of each class, [T, n_way]; queries are class-major, as `Episodes` holds them."""
    correct = (logits.argmax(dim=-1) == labels).to(torch.float32)
    return correct.view(len(labels), n_way, labels.shape[1] // n_way).mean(dim=-1)


def require_evaluation_mode(encoder: Encoder) -> None:
    """Dropout belongs to pre-training: an encoder that still has it on would embed an image anew each time."""
    if encoder.training and encoder.dropout:
        raise ValueError(
            f"encoder: is in training mode, with dropout {encoder.dropout}; call encoder.eval() first"
        )


def _warn_of_what_cancels(encoder: Encoder, norm: NormMode) -> None:
    """Says which part of Φ batch statistics take out again."""
    normed = [conv for conv in encoder.convs() if conv.norm is not None and conv.shift is not None]
    if not normed:
        return
    filters = any(c.scale is not None and c.scale.shape[1] == 1 < c.weight.shape[1] for c in normed)
    warnings.warn(
        f"norm {norm!r}: batch statistics follow {len(normed)} of the convolutions with scale and shift; "
        "there the shift has no effect on the training loss"
        + (", nor has the size of a filter's scale (only its sign)" if filters else "")
        + "; norm 'frozen' keeps them effective",
        UserWarning,
        stacklevel=4,
    )


@dataclass
class Engine(ABC):
    """Runs episodes through encoder and inner loop and accumulates the meta-gradients; a subclass is an inner loop.

    The gradient is that of the mean query loss over the step's tasks and reaches whatever parameters of
    encoder and head require one: Φ (scaling and shifting), or the weights themselves (fine-tuning), and θ.
    The result does not depend on `images_per_chunk` but for rounding.

    Attributes:
        encoder, head: Θ with Φ, in evaluation mode, and θ.
        store, preprocess: where the images come from.
        norm: ``frozen``, ``episode`` or ``running``; the last moves the running averages.
        order: ``first`` treats θ' as θ minus constants; ``second`` differentiates through all inner steps.
        inner_lr, inner_steps: β and T of the inner loop.
        images_per_chunk: bounds the images in flight; a chunk is as many whole tasks as fit, at least one.
        ranks: the processes among which the tasks of a step are shared out; all have the same parameters.
    """

    encoder: Encoder
    head: LinearHead
    store: ImageStore
    preprocess: Preprocess
    norm: NormMode = "frozen"
    order: Order = "second"
    inner_lr: float = 0.05
    inner_steps: int = 20
    images_per_chunk: int | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        if self.norm not in ("frozen", "episode", "running"):
            raise ValueError(f"norm: {self.norm!r} is not one of frozen, episode, running")
        if self.order not in ("first", "second"):
            raise ValueError(f"order: {self.order!r} is neither first nor second")

    def step(self, episodes: Episodes) -> StepOutput:
        """Adds the gradients of the mean query loss to the parameters' `.grad`; nothing is read back.

        With several ranks `episodes` are all tasks of the step, the same on each; so is the result.
        """
        require_evaluation_mode(self.encoder)
        ranks, n_tasks = self.ranks, episodes.n_tasks
        per_task = episodes.support.shape[1] + episodes.query.shape[1]
        chunk = n_tasks if self.images_per_chunk is None else max(1, self.images_per_chunk // per_task)
        weights = self._refresh()
        learned = [p for m in (self.encoder, self.head) for p in m.parameters() if p.requires_grad]
        losses, statistics = [self.head.weight.new_empty(0)], list[Statistics]()
        accuracies = [losses[0].new_empty(0, episodes.n_way, dtype=torch.float32)]
        with ranks.summing(learned) as along:
            for part in episodes[ranks.share(n_tasks)].chunks(chunk):
                logits, moments = self._logits(part, weights)
                loss = F.cross_entropy(logits.flatten(0, 1), part.query_labels.flatten(), reduction="none")
                task_loss = loss.view(part.n_tasks, -1).mean(dim=1)
                (task_loss.sum() / n_tasks).backward()
                losses.append(task_loss.detach())
                accuracies.append(class_accuracy(logits.detach(), part.query_labels, part.n_way))
                statistics.append(moments)
            output = StepOutput(*(ranks.spread(torch.cat(parts), n_tasks) for parts in (losses, accuracies)))
            running = self._in_task_order(statistics, n_tasks) if self.norm == "running" else Statistics()
            along += [*output, *(tensor for moments in running for tensor in moments)]
        if running:
            self.encoder.update_running(running)
        return output

    def query_logits(
        self, episodes: Episodes, weights: tuple[EffectiveWeights | None, ...] | None = None
    ) -> Tensor:
        """Logits [T, n_query, n_way] of the query images after the inner loop, with the graph of `order`.

        Args:
            episodes: T tasks, embedded together.
            weights: this meta-step's effective weights; None computes them.
        """
        logits, statistics = self._logits(episodes, self._refresh() if weights is None else weights)
        if statistics:
            self.encoder.update_running(statistics)
        return logits

    @property
    @abstractmethod
    def _n_passes(self) -> int:
        """How many groups of images of each task move the running averages."""

    @abstractmethod
    def _logits(
        self, episodes: Episodes, weights: tuple[EffectiveWeights | None, ...]
    ) -> tuple[Tensor, Statistics]:
        """`query_logits`, and the statistics that move the running averages: none but with that norm."""

    def _refresh(self) -> tuple[EffectiveWeights | None, ...]:
        return self.encoder.refresh(fold=self.norm == "frozen")

    def _in_task_order(self, parts: list[Statistics], n_tasks: int) -> Statistics:
        """Statistics of this rank's tasks, chunk after chunk → at their place among those of all tasks."""
        whole = []
        for i, norm in enumerate(self.encoder.norms()):
            nothing = norm.running_mean.new_empty(0, len(norm.running_mean))
            layer = [(nothing, nothing, nothing[:, 0]), *(part[i] for part in parts)]
            # Some groups a task, [k·P, …] → [k, P, …] → [T·P, …]
            mean, var, count = (
                self.ranks.spread(torch.cat(column).unflatten(0, (-1, self._n_passes)), n_tasks).flatten(0, 1)
                for column in zip(*layer, strict=True)
            )
            whole.append((mean, var, count))
        return whole


@dataclass
class EpisodicEngine(Engine):
    """The inner loop of MTL: the head alone is fitted, on features that the encoder gives once.

    Attributes:
        backend: of the base-learner; the others are `Engine`'s. `running` averages take the query split first.
    """

    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "frozen" and self.ranks.first:
            _warn_of_what_cancels(self.encoder, self.norm)

    @property
    def _n_passes(self) -> int:
        return 2

    def _logits(
        self, episodes: Episodes, weights: tuple[EffectiveWeights | None, ...]
    ) -> tuple[Tensor, Statistics]:
        support, query, statistics = self._embed(episodes, weights)
        logits = base_learner(
            support.unflatten(0, (episodes.n_tasks, -1)),
            episodes.support_labels,
            query.unflatten(0, (episodes.n_tasks, -1)),
            self.head.weight,
            self.head.bias,
            inner_lr=self.inner_lr,
            n_steps=self.inner_steps,
            order=self.order,
            backend=self.backend,
        )
        return logits, statistics

    def _embed(
        self, episodes: Episodes, weights: tuple[EffectiveWeights | None, ...]
    ) -> tuple[Tensor, Tensor, Statistics]:
        """Features of all support and all query images, [T·n, D] each, and what moves the running averages."""
        encoder, n_groups = self.encoder, 0 if self.norm == "frozen" else episodes.n_tasks
        rows = [episodes.support.flatten(), episodes.query.flatten()]
        dtype = self.head.weight.dtype
        # First order needs no derivative of the support features, hence no graph for them.
        without_graph = torch.no_grad() if self.order == "first" else contextlib.nullcontext()
        if n_groups == 0 and self.order == "second":
            both = self.preprocess(self.store, torch.cat(rows), dtype)
            support, query = encoder.embed(both, weights=weights).features.split([len(r) for r in rows])
            return support, query, []
        query, query_statistics = encoder.embed(
            self.preprocess(self.store, rows[1], dtype), n_groups=n_groups, weights=weights
        )
        with without_graph:
            support, support_statistics = encoder.embed(
                self.preprocess(self.store, rows[0], dtype), n_groups=n_groups, weights=weights
            )
        if self.norm != "running":
            return support, query, []
        # In task order, each task's query split before its support split.
        return support, query, interleave(query_statistics, support_statistics)
