"""What every inner loop's engine does: chunks and ranks of a step, gradients, and what happens when memory runs out."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.residency import Gathered
from ..data.store import ImageStore
from ..episodes import Episodes
from ..errors import InputError
from ..kernels.contracts import EffectiveWeights
from ..nn.encoder import Encoder, Statistics
from ..nn.linear_head import LinearHead
from ..nn.network_encoder import NetworkEncoder
from ..ops.base_learner import check_inner_loop
from .inputs import Preprocess
from .ranks import ALONE, Ranks
from .spans import Spans

NormMode = Literal["frozen", "episode", "running"]
Order = Literal["first", "second"]


class StepOutput(NamedTuple):
    """Mean query loss [T] and query accuracy of each class [T, n_way], after the inner loop."""

    loss: Tensor
    class_accuracy: Tensor


def class_accuracy(logits: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """Query accuracy of each class, [T, n_way]; queries are class-major, as `Episodes` holds them.

    Raises:
        ValueError: queries in another order; looked at on the CPU only, so that nothing is read back from a GPU.
    """
    if labels.device.type == "cpu" and type(labels) is Tensor:
        # NumPy's: what runs on a GPU as well has no part in it.
        found, n_query = labels.numpy(), labels.shape[1] // n_way
        wrong = (found != np.arange(n_way).repeat(n_query)).any(axis=1)
        if wrong.any():
            first = found[int(wrong.argmax())].tolist()
            raise ValueError(
                f"query_labels: those of a task are {first}; give queries in the order of their classes, {n_query} of each"
            )
    correct = (logits.argmax(dim=-1) == labels).to(torch.float32)
    return correct.view(len(labels), n_way, labels.shape[1] // n_way).mean(dim=-1)


def require_evaluation_mode(encoder: Encoder) -> None:
    """Training mode belongs to pre-training: dropout would embed an image anew each time, batch norms would move.

    The modes of its modules are looked at, too: a network inside an encoder can be set apart from it.
    """
    if encoder.training and encoder.dropout:
        raise ValueError(
            f"encoder: is in training mode, with dropout {encoder.dropout}; call encoder.eval() first"
        )
    # Of a network of another kind nobody knows which modules differ.
    whole = encoder.network if isinstance(encoder, NetworkEncoder) else None
    for module in encoder.modules() if whole is None else whole.modules():
        if module.training and (whole is not None or _differs_in_training(module)):
            raise ValueError(
                f"encoder: its {type(module).__name__} is in training mode; call encoder.eval() first"
            )


def _differs_in_training(module: nn.Module) -> bool:
    """Whether it is an encoder with dropout, or a layer of PyTorch's with batch statistics or noise in training mode."""
    if isinstance(module, Encoder):
        return bool(module.dropout)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or (
        isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
    )


def require_norm(norm: str) -> None:
    """A norm that none of these names would be taken for another silently."""
    if norm not in get_args(NormMode):
        raise ValueError(f"norm: {norm!r} is not one of {', '.join(get_args(NormMode))}")


def require_at_least_one(**counts: int) -> None:
    """Numbers of things that are taken together."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def a_parameter(encoder: Encoder, device: torch.device) -> Tensor:
    """One of its parameters, for dtype and device; for an encoder that has none an empty float32 tensor on `device`."""
    return next(encoder.parameters(), torch.empty(0, dtype=torch.float32, device=device))


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """All rows of some tensors; those of the only one that has any are not copied."""
    filled = [part for part in parts if len(part)]
    return filled[0] if len(filled) == 1 else torch.cat(parts)


Weights = tuple[EffectiveWeights | None, ...]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
        images_per_chunk: bounds the images in flight; None takes all tasks together. A chunk is as many whole
            tasks as fit, at least one.
        loss_scale: a scalar that the gradients are multiplied by, against underflow in float16; None is 1.
        spans: measures ``data``, ``encoder`` and ``inner loop``.
        say: where a line goes that the user must read.
        ranks: the processes among which the tasks of a step are shared out; all have the same parameters.
    """

    encoder: Encoder
    head: LinearHead
    store: ImageStore | Gathered
    preprocess: Preprocess
    norm: NormMode = "frozen"
    order: Order = "second"
    inner_lr: float = 0.05
    inner_steps: int = 20
    images_per_chunk: int | None = None
    loss_scale: Tensor | None = None
    spans: Spans = field(default_factory=Spans)
    say: Callable[[str], None] = _to_stderr
    ranks: Ranks = ALONE
    _halved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        require_norm(self.norm)
        if self.order not in ("first", "second"):
            raise ValueError(f"order: {self.order!r} is neither first nor second")
        if self.images_per_chunk is not None and self.images_per_chunk < 1:
            raise ValueError(f"images_per_chunk: expected at least 1, or None, got {self.images_per_chunk}")
        self.inner_steps = check_inner_loop(self.inner_lr, self.inner_steps, name="inner_steps")

    def step(self, episodes: Episodes) -> StepOutput:
        """Adds the gradients of the mean query loss to the parameters' `.grad`; nothing is read back.

        With several ranks `episodes` are all tasks of the step, the same on each; so is the result. Each takes its
        share of them, perhaps none, and only what became of it is exchanged, once.

        Out of memory on a GPU halves the images in flight of this rank, says so and begins the step anew, once.

        Raises:
            InputError: `images_per_chunk` is less than a split that batch statistics need whole, or memory ran
                out again.
            ValueError: nothing learns, or gradients are off; the encoder is in training mode.
        """
        require_evaluation_mode(self.encoder)
        self.require_whole_splits(*images_of_splits(episodes))
        ranks, n_tasks = self.ranks, episodes.n_tasks
        learned = [p for p in self._parameters() if p.requires_grad]
        if not learned:
            raise ValueError(
                "step: nothing learns, no parameter of encoder or head requires a gradient; call "
                "encoder.enable_scale_shift(), or requires_grad_() of what shall learn"
            )
        if not torch.is_grad_enabled():
            raise ValueError(
                "step: gradients are off; call it outside torch.no_grad and torch.inference_mode"
            )
        with self._own_gradients() as drop_gradients, ranks.summing(learned) as along:
            outputs, statistics = self._as_memory_allows(
                episodes[ranks.share(n_tasks)], n_tasks, drop_gradients
            )
            losses, accuracies = (_joined(parts) for parts in zip(*outputs, strict=True))
            output = StepOutput(ranks.spread(losses, n_tasks), ranks.spread(accuracies, n_tasks))
            running = self._in_task_order(statistics, n_tasks) if self.norm == "running" else Statistics()
            along += [*output, *(tensor for moments in running for tensor in moments)]
        # Once nothing can fail any more: an attempt that ran out of memory has moved no average.
        if running:
            self.encoder.update_running(running)
        return output

    def _as_memory_allows(
        self, own: Episodes, n_tasks: int, drop_gradients: Callable[[], None]
    ) -> tuple[list[StepOutput], list[Statistics]]:
        """`_accumulate`, begun anew once where memory runs out. No exchange happens inside."""
        while True:
            try:
                return self._accumulate(own, n_tasks)
            except torch.OutOfMemoryError as error:
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise
                reason = str(error).partition("\n")[0]
            # Outside the handler, whose traceback holds the tensors of the attempt.
            drop_gradients()
            self._halve(own, reason)

    @abstractmethod
    def query_logits(self, episodes: Episodes, weights: Weights | None = None) -> Tensor:
        """Logits [T, n_query, n_way] of the query images after the inner loop, with the graph of `order`.

        Args:
            episodes: T tasks, embedded together.
            weights: this meta-step's effective weights; None computes them.
        """

    @property
    @abstractmethod
    def _n_passes(self) -> int:
        """How many groups of images of each task move the running averages."""

    @abstractmethod
    def _take(self, part: Episodes, weights: Weights, n_tasks: int) -> tuple[StepOutput, Statistics]:
        """Forward and backward of one chunk of a step of `n_tasks`; with `running` norm also the statistics that
        move the running averages, in task order."""

    def _accumulate(self, own: Episodes, n_tasks: int) -> tuple[list[StepOutput], list[Statistics]]:
        """Forward and backward of this rank's tasks, `n_tasks` being those of all ranks, chunk by chunk.

        Returns:
            Outputs of each chunk, after one of no tasks: a share may be empty; with `running` norm also the
            statistics of each chunk in task order.
        """
        per_task = sum(images_of_splits(own))
        chunk = n_tasks if self.images_per_chunk is None else max(1, self.images_per_chunk // per_task)
        weights = self._refresh()
        nothing = self.head.weight.new_empty(0)
        outputs = [StepOutput(nothing, nothing.new_empty(0, own.n_way, dtype=torch.float32))]
        statistics: list[Statistics] = []
        for part in own.chunks(chunk):
            output, moments = self._take(part, weights, n_tasks)
            outputs.append(output)
            statistics.append(moments)
        return outputs, statistics

    def _scored(self, logits: Tensor, part: Episodes, n_tasks: int) -> StepOutput:
        """Losses and accuracies of the query logits, and the way back from their share of the step's mean loss."""
        loss = F.cross_entropy(logits.flatten(0, 1), part.query_labels.flatten(), reduction="none")
        task_loss = loss.view(part.n_tasks, -1).mean(dim=1)
        # The mean over the step's tasks begins on the way back: its value is nobody's.
        share = task_loss.new_full((), 1 / n_tasks) if self.loss_scale is None else self.loss_scale / n_tasks
        task_loss.backward(share.to(task_loss.dtype).expand_as(task_loss))
        return StepOutput(task_loss.detach(), class_accuracy(logits.detach(), part.query_labels, part.n_way))

    @abstractmethod
    def _refresh(self) -> Weights:
        """The effective weights of one meta-step."""

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

    def smallest_chunk(self, n_support: int, n_query: int) -> int:
        """The least `images_per_chunk` for tasks of so many images: by default any serves, a task is taken whole."""
        return 1

    def require_whole_splits(self, n_support: int, n_query: int) -> None:
        """Raises InputError where `images_per_chunk` is less than `smallest_chunk`."""
        least = self.smallest_chunk(n_support, n_query)
        if self.images_per_chunk is not None and self.images_per_chunk < least:
            raise InputError(
                f"images_per_chunk is {self.images_per_chunk}, but norm {self.norm!r} takes the statistics of a split "
                f"of {least} images; give at least {least}, or norm 'frozen'"
            )

    def _parameters(self) -> list[nn.Parameter]:
        """Those of encoder and head, one that both have once."""
        return list(nn.ModuleList([self.encoder, self.head]).parameters())

    @contextmanager
    def _own_gradients(self) -> Iterator[Callable[[], None]]:
        """Sets the caller's gradients apart, so that an attempt's can be dropped, and adds them at the end."""
        parameters = self._parameters()
        before = [p.grad for p in parameters]

        def drop() -> None:
            for p in parameters:
                p.grad = None

        drop()
        try:
            yield drop
        except BaseException:
            drop()
            raise
        finally:
            for p, gradient in zip(parameters, before, strict=True):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else gradient.add_(p.grad)

    def _halve(self, episodes: Episodes, reason: str) -> None:
        """Half the images in flight from now on; the second time an error."""
        in_flight = episodes.n_tasks * sum(images_of_splits(episodes))
        if self.images_per_chunk is not None:
            in_flight = min(in_flight, self.images_per_chunk)
        half = in_flight // 2
        if self._halved or half < self.smallest_chunk(*images_of_splits(episodes)):
            raise InputError(
                f"out of memory with {in_flight} images in flight ({reason}); give a smaller --meta.images-per-chunk, "
                "smaller tasks or smaller images"
            )
        self._halved, self.images_per_chunk = True, half
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self.say(f"out of memory with {in_flight} images in flight: going on with images_per_chunk {half}")


def images_of_splits(episodes: Episodes) -> tuple[int, int]:
    """Support and query images of a task."""
    return episodes.support.shape[1], episodes.query.shape[1]
