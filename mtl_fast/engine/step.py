"""One meta-training step: a batch of episodes → query losses, class accuracies, gradients of Φ and θ."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.residency import Gathered
from ..data.store import ImageStore
from ..episodes import Episodes
from ..errors import InputError
from ..kernels.contracts import EffectiveWeights
from ..nn.encoder import Embeddings, Encoder, Statistics
from ..nn.linear_head import LinearHead
from ..nn.scale_shift import interleave
from ..ops.base_learner import base_learner
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


Weights = tuple[EffectiveWeights | None, ...]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class EpisodicEngine:
    """Runs episodes through encoder and base-learner and accumulates the meta-gradients.

    The gradient is that of the mean query loss over the step's tasks and reaches whatever parameters of
    encoder and head require one: Φ (scaling and shifting), or the weights themselves (fine-tuning), and θ.
    The result does not depend on `images_per_chunk` but for rounding.

    Attributes:
        encoder, head: Θ with Φ, in evaluation mode, and θ.
        store, preprocess: where the images come from.
        norm: ``frozen``, ``episode`` or ``running``; the last moves the running averages, query first.
        order: ``first`` treats θ' as θ minus constants; ``second`` differentiates through all inner steps.
        inner_lr, inner_steps: β and T of the inner loop.
        images_per_chunk: bounds the images in flight; None takes all tasks together. A chunk is as many whole
            tasks as fit. A task that does not fit alone is embedded twice: without a graph, then piece by piece
            against the gradient of its embeddings. A piece is that many images, or with batch statistics a
            whole split, which is then the least that can be given.
        backend: of the base-learner.
        encoder_dtype: of images and activations; None is the head's. Φ, the effective weights as they are
            computed, batch statistics, Gram matrix, logits and gradients keep the parameters' dtype.
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
    backend: str = "auto"
    encoder_dtype: torch.dtype | None = None
    loss_scale: Tensor | None = None
    spans: Spans = field(default_factory=Spans)
    say: Callable[[str], None] = _to_stderr
    ranks: Ranks = ALONE
    _halved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.norm not in ("frozen", "episode", "running"):
            raise ValueError(f"norm: {self.norm!r} is not one of frozen, episode, running")
        if self.order not in ("first", "second"):
            raise ValueError(f"order: {self.order!r} is neither first nor second")
        if self.norm != "frozen" and self.ranks.first:
            _warn_of_what_cancels(self.encoder, self.norm)

    def step(self, episodes: Episodes) -> StepOutput:
        """Adds the gradients of the mean query loss to the parameters' `.grad`; nothing is read back.

        With several ranks `episodes` are all tasks of the step, the same on each; so is the result. Each takes its
        share of them, perhaps none, and only what became of it is exchanged, once.

        Out of memory on a GPU halves the images in flight of this rank, says so and begins the step anew, once.

        Raises:
            InputError: `images_per_chunk` is less than a split that batch statistics need whole, or memory ran
                out again.
        """
        require_evaluation_mode(self.encoder)
        self.require_whole_splits(*_images_of_splits(episodes))
        ranks, n_tasks = self.ranks, episodes.n_tasks
        learned = [p for m in (self.encoder, self.head) for p in m.parameters() if p.requires_grad]
        with self._own_gradients() as drop_gradients, ranks.summing(learned) as along:
            outputs, statistics = self._as_memory_allows(
                episodes[ranks.share(n_tasks)], n_tasks, drop_gradients
            )
            losses, accuracies = (torch.cat(parts) for parts in zip(*outputs, strict=True))
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

    def query_logits(self, episodes: Episodes, weights: Weights | None = None) -> Tensor:
        """Logits [T, n_query, n_way] of the query images after the inner loop, with the graph of `order`.

        Args:
            episodes: T tasks, embedded together.
            weights: this meta-step's effective weights; None computes them.
        """
        weights = self._refresh() if weights is None else weights
        embedded = [
            self._embed(rows, episodes.n_tasks, weights, graph) for rows, graph in self._rows(episodes)
        ]
        if self.norm == "running":
            self.encoder.update_running(interleave(*(e.statistics for e in embedded)))
        return self._logits(episodes, [e.features for e in embedded])

    def _accumulate(self, own: Episodes, n_tasks: int) -> tuple[list[StepOutput], list[Statistics]]:
        """Forward and backward of this rank's tasks, `n_tasks` being those of all ranks, chunk by chunk.

        Returns:
            Outputs of each chunk, after one of no tasks: a share may be empty; with `running` norm also the
            statistics of each chunk in task order, each task's query split before its support split.
        """
        per_task = sum(_images_of_splits(own))
        chunk = n_tasks if self.images_per_chunk is None else max(1, self.images_per_chunk // per_task)
        weights = self._refresh()
        nothing = self.head.weight.new_empty(0)
        outputs = [StepOutput(nothing, nothing.new_empty(0, own.n_way, dtype=torch.float32))]
        statistics: list[Statistics] = []
        for part in own.chunks(chunk):
            output, by_split = self._take(part, weights, n_tasks)
            outputs.append(output)
            if self.norm == "running":
                statistics.append(interleave(*by_split))
        return outputs, statistics

    def _take(self, part: Episodes, weights: Weights, n_tasks: int) -> tuple[StepOutput, list[Statistics]]:
        """Forward and backward of one chunk."""
        in_pieces = self.images_per_chunk is not None and sum(_images_of_splits(part)) > self.images_per_chunk
        embed = self._embed_in_pieces if in_pieces else self._embed
        rows = self._rows(part)
        embedded = [embed(r, part.n_tasks, weights, graph) for r, graph in rows]
        trains = any(p.requires_grad for p in self.encoder.parameters())
        # The graph is cut here: the inner loop's backward gives the gradient of the features.
        leaves = [
            e.features.detach().requires_grad_(graph and trains)
            for e, (_, graph) in zip(embedded, rows, strict=True)
        ]
        output = self._inner_loop(part, leaves, n_tasks)
        for (r, _), whole, leaf in zip(rows, embedded, leaves, strict=True):
            if leaf.grad is None:
                continue
            if not in_pieces:
                self._back(whole.features, leaf.grad)
                continue
            pieces = self._pieces(r)
            gradients = leaf.grad.split([len(piece) for piece in pieces])
            for piece, gradient in zip(pieces, gradients, strict=True):
                self._back(self._embed(piece, part.n_tasks, weights, graph=True).features, gradient)
        return output, [e.statistics for e in embedded]

    def _back(self, features: Tensor, gradient: Tensor) -> None:
        """From the gradient of the features to that of the encoder's parameters."""
        if features.requires_grad:
            with self.spans("encoder"):
                features.backward(gradient)

    def _inner_loop(self, part: Episodes, features: list[Tensor], n_tasks: int) -> StepOutput:
        """Fits and scores the tasks, and goes back to the features and the head."""
        with self.spans("inner loop"):
            logits = self._logits(part, features)
            loss = F.cross_entropy(logits.flatten(0, 1), part.query_labels.flatten(), reduction="none")
            task_loss = loss.view(part.n_tasks, -1).mean(dim=1)
            total = task_loss.sum() / n_tasks
            (total if self.loss_scale is None else total * self.loss_scale).backward()
            accuracy = class_accuracy(logits.detach(), part.query_labels, part.n_way)
            return StepOutput(task_loss.detach(), accuracy)

    def _logits(self, part: Episodes, features: list[Tensor]) -> Tensor:
        """[T·n, D] features in the order of `_rows` → query logits [T, n_query, n_way]."""
        if len(features) == 1:
            support, query = features[0].split([part.support.numel(), part.query.numel()])
        else:
            query, support = features
        return base_learner(
            support.unflatten(0, (part.n_tasks, -1)),
            part.support_labels,
            query.unflatten(0, (part.n_tasks, -1)),
            self.head.weight,
            self.head.bias,
            inner_lr=self.inner_lr,
            n_steps=self.inner_steps,
            order=self.order,
            backend=self.backend,
        )

    def _refresh(self) -> Weights:
        with self.spans("encoder"):
            return self.encoder.refresh(fold=self.norm == "frozen")

    def _rows(self, part: Episodes) -> list[tuple[Tensor, bool]]:
        """Rows that are embedded together, and whether with a graph: query and support, or both in one."""
        query, support = part.query.flatten(), part.support.flatten()
        if self.norm == "frozen" and self.order == "second":
            return [(torch.cat([support, query]), True)]
        # First order needs no derivative of the support features, hence no graph for them.
        return [(query, True), (support, self.order == "second")]

    def _embed(self, rows: Tensor, n_tasks: int, weights: Weights, graph: bool) -> Embeddings:
        """Rows [B] of the store, of `n_tasks` tasks, → features [B, D] in the head's dtype, and statistics."""
        dtype = self.head.weight.dtype
        with self.spans("data"):
            images = self.preprocess(self.store, rows, self.encoder_dtype or dtype)
        with self.spans("encoder"), torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            n_groups = 0 if self.norm == "frozen" else n_tasks
            features, statistics = self.encoder.embed(images, n_groups=n_groups, weights=weights)
            return Embeddings(features.to(dtype), statistics)

    def _embed_in_pieces(self, rows: Tensor, n_tasks: int, weights: Weights, graph: bool) -> Embeddings:
        """`_embed` of rows that may not be in flight together, without a graph whatever `graph` says."""
        parts = [self._embed(piece, n_tasks, weights, graph=False) for piece in self._pieces(rows)]
        return Embeddings(torch.cat([p.features for p in parts]), parts[0].statistics)

    def _pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows that may be in flight together; batch statistics are those of a whole split."""
        assert self.images_per_chunk is not None
        return rows.split(self.images_per_chunk) if self.norm == "frozen" else (rows,)

    def _in_task_order(self, parts: list[Statistics], n_tasks: int) -> Statistics:
        """Statistics of this rank's tasks, chunk after chunk → at their place among those of all tasks."""
        whole = []
        for i, norm in enumerate(self.encoder.norms()):
            nothing = norm.running_mean.new_empty(0, len(norm.running_mean))
            layer = [(nothing, nothing, nothing[:, 0]), *(part[i] for part in parts)]
            # Two groups a task, [2·k, …] → [k, 2, …] → [2·T, …]
            mean, var, count = (
                self.ranks.spread(torch.cat(column).unflatten(0, (-1, 2)), n_tasks).flatten(0, 1)
                for column in zip(*layer, strict=True)
            )
            whole.append((mean, var, count))
        return whole

    def smallest_chunk(self, n_support: int, n_query: int) -> int:
        """The least `images_per_chunk` for tasks of so many images."""
        return 1 if self.norm == "frozen" else max(n_support, n_query)

    def require_whole_splits(self, n_support: int, n_query: int) -> None:
        """Raises InputError where `images_per_chunk` is less than `smallest_chunk`."""
        least = self.smallest_chunk(n_support, n_query)
        if self.images_per_chunk is not None and self.images_per_chunk < least:
            raise InputError(
                f"images_per_chunk is {self.images_per_chunk}, but norm {self.norm!r} takes the statistics of a split "
                f"of {least} images; give at least {least}, or norm 'frozen'"
            )

    @contextmanager
    def _own_gradients(self) -> Iterator[Callable[[], None]]:
        """Sets the caller's gradients apart, so that an attempt's can be dropped, and adds them at the end."""
        parameters = [p for module in (self.encoder, self.head) for p in module.parameters()]
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
        in_flight = episodes.n_tasks * sum(_images_of_splits(episodes))
        if self.images_per_chunk is not None:
            in_flight = min(in_flight, self.images_per_chunk)
        half = in_flight // 2
        if self._halved or half < self.smallest_chunk(*_images_of_splits(episodes)):
            raise InputError(
                f"out of memory with {in_flight} images in flight ({reason}); give a smaller --meta.images-per-chunk, "
                "smaller tasks or smaller images"
            )
        self._halved, self.images_per_chunk = True, half
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self.say(f"out of memory with {in_flight} images in flight: going on with images_per_chunk {half}")


def _images_of_splits(episodes: Episodes) -> tuple[int, int]:
    """Support and query images of a task."""
    return episodes.support.shape[1], episodes.query.shape[1]
