"""Inner loops of the whole network: every weight of encoder and head adapted per task, all tasks at once (MAML).

θ_0 is the shared weights; θ_{t+1} = θ_t − β·∇L_support(θ_t) for each task, and the query loss of θ_T is what moves
θ_0. Tasks are batched by giving every parameter a leading dimension T (`task_conv`), or go one by one through
fused layers where those serve (`_Network.task_by_task`). Source: arXiv 1703.03400.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..data.store import ImageStore
from ..episodes import Episodes
from ..nn.encoder import Encoder, Statistics
from ..nn.linear_head import LinearHead
from ..nn.network_encoder import NetworkEncoder
from ..nn.scale_shift import interleave
from ..ops.backend import choose
from ..ops.base_learner import check_inner_loop
from .base import (
    Engine,
    NormMode,
    StepOutput,
    require_at_least_one,
    require_evaluation_mode,
    require_norm,
)
from .base import Weights as SharedWeights
from .inputs import Preprocess
from .ranks import ALONE, Ranks
from .scores import Evaluation, gathered, joined, scored, tasks_per_chunk, with_mirrored

Weights = tuple[Tensor, ...]
SupportLoss = Callable[[Weights], tuple[Tensor, Statistics]]


class _Network(nn.Module):
    """Encoder and head, called with parameters that have a leading dimension T."""

    def __init__(self, encoder: Encoder, head: LinearHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor, n_groups: int) -> tuple[Tensor, Statistics]:
        """[T·n, 3, H, W] → logits [T, n, n_way] and the batch statistics."""
        weight, bias = self.head.weight, self.head.bias
        features, statistics = self.encoder.embed(images, n_groups=n_groups)
        features = features.unflatten(0, (len(weight), -1))
        # [T, 1, C] + [T, n, D] @ [T, D, C] -> [T, n, C]
        return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2)), statistics

    def task_by_task(self, names: Sequence[str], weights: Weights, images: Tensor) -> Tensor:
        """The same logits with stored statistics, each task alone through the layers of an ordinary network.

        Those are fused, and only their first derivative is; batched, a layer with stored statistics is a grouped
        convolution of plain PyTorch.
        """
        logits = []
        for part, *own in zip(images.chunk(len(weights[0])), *(w.unbind() for w in weights), strict=True):
            called = {
                name: value.unsqueeze(0) if name.startswith("head.") else value
                for name, value in zip(names, own, strict=True)
            }
            logits.append(functional_call(self, called, (part, 0))[0])
        return torch.cat(logits)


class _Step(torch.autograd.Function):
    """θ_t → θ_t − β·g(θ_t), g = ∇L_support; for v in the place of dL/dθ_{t+1}, dL/dθ_t = v − β·∇g·v.

    ∇g·v needs the graph of g: it is kept, or with `checkpoint` made again, one step's at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: SupportLoss,
        passes: list[Statistics],
        options: tuple[float, str, bool],
        *weights: Tensor,
    ) -> Weights:
        ctx.inner_lr, order, checkpoint = options
        ctx.loss, ctx.second_order = loss, order == "second"
        keeps = ctx.second_order and not checkpoint
        found = _gradient(loss, weights, graph=keeps)
        ctx.kept = found if keeps else None
        if ctx.second_order and checkpoint:
            ctx.save_for_backward(*weights)
        _, gradients, statistics = found
        passes.append(statistics)
        return tuple(w - ctx.inner_lr * g.detach() for w, g in zip(weights, gradients, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.second_order:
            return None, None, None, *grads
        if ctx.kept is None and not ctx.saved_tensors:
            raise RuntimeError(
                "the graph of an inner loop is freed by its way back; for a second one give checkpoint=True"
            )
        leaves, gradients, _ = ctx.kept or _gradient(ctx.loss, ctx.saved_tensors, graph=True)
        # A gradient that depends on no weight, that of a bias before batch statistics, has no graph.
        pairs = [(g, v) for g, v in zip(gradients, grads, strict=True) if g.requires_grad]
        outputs, vectors = zip(*pairs, strict=True)
        products = torch.autograd.grad(outputs, leaves, vectors, materialize_grads=True)
        ctx.kept = None
        return None, None, None, *(v - ctx.inner_lr * p for v, p in zip(grads, products, strict=True))


def _gradient(
    loss: SupportLoss, weights: Sequence[Tensor], *, graph: bool
) -> tuple[Weights, Weights, Statistics]:
    """Leaves of the values of `weights`, the loss's gradient at them (with its graph), and the batch statistics."""
    leaves = tuple(w.detach().requires_grad_() for w in weights)
    with torch.enable_grad():
        value, statistics = loss(leaves)
        gradients = torch.autograd.grad(value, leaves, create_graph=graph, materialize_grads=True)
    return leaves, gradients, statistics


@dataclass
class WholeNetworkEngine(Engine):
    """The inner loop of MAML: all weights of encoder and head are adapted per task.

    The meta-gradient reaches the parameters that require one; all are adapted, whether they do or not. Batch
    statistics (`episode`, `running`) are those of each task's split at each step; `frozen` uses the stored ones.
    `running` averages move as in a plain loop: task after task, its support split at every step, then its query.

    Attributes:
        checkpoint: keep the weights of every inner step instead of its graph, and compute that again on the way
            back: memory then hardly grows with `inner_steps`. Only `second` order keeps anything. The other
            attributes are `Engine`'s; convolutions run on the encoder's own `backend`.

    Raises:
        ValueError: the encoder has scale and shift, whose frozen weights do not adapt, or is a network of another
            kind, whose layers take no weights of each task's own.
    """

    checkpoint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.encoder, NetworkEncoder):
            raise ValueError(
                "encoder: is a NetworkEncoder, whose layers take no weights of each task's own; an inner loop of all "
                "weights takes an encoder of this package"
            )
        if any(conv.scale is not None for conv in self.encoder.convs()):
            raise ValueError(
                "encoder: has scale and shift; an inner loop of all weights takes a plain encoder"
            )

    @property
    def _n_passes(self) -> int:
        return self.inner_steps + 1

    def query_logits(self, episodes: Episodes, weights: SharedWeights | None = None) -> Tensor:
        logits, statistics = self._logits(episodes)
        if statistics:
            self.encoder.update_running(statistics)
        return logits

    def _take(self, part: Episodes, weights: SharedWeights, n_tasks: int) -> tuple[StepOutput, Statistics]:
        with self.spans("inner loop"):
            logits, statistics = self._logits(part)
            return self._scored(logits, part, n_tasks), statistics

    def _logits(self, episodes: Episodes) -> tuple[Tensor, Statistics]:
        """`query_logits`, and the statistics that move the running averages: none but with that norm."""
        ((logits, passes),) = self._after([self.inner_steps], episodes, mirror_support=False)
        return logits, interleave(*passes) if self.norm == "running" else []

    def query_logits_after(
        self, n_steps: Sequence[int], episodes: Episodes, *, mirror_support: bool = False
    ) -> Iterator[Tensor]:
        """Logits [T, n_query, n_way] of the query images after each of these ascending numbers of inner steps.

        `running` averages stay; with mirrored support a task's support images come once more, left to right.

        Raises:
            ValueError: the numbers do not ascend, or are negative.
        """
        n_steps = _ascending(n_steps, self.inner_lr)
        return (logits for logits, _ in self._after(n_steps, episodes, mirror_support=mirror_support))

    def _after(
        self, n_steps: Sequence[int], episodes: Episodes, *, mirror_support: bool
    ) -> Iterator[tuple[Tensor, list[Statistics]]]:
        """`query_logits_after`, each with the statistics of the passes up to it: support by support, then query."""
        network = _Network(self.encoder, self.head)
        names, shared = zip(*network.named_parameters(), strict=True)
        n_tasks = episodes.n_tasks
        n_groups = 0 if self.norm == "frozen" else n_tasks
        rows, labels, mirrored = episodes.support, episodes.support_labels, None
        if mirror_support:
            rows, mirrored = with_mirrored(rows)
            labels = labels.repeat(1, 2)
        dtype = self.head.weight.dtype
        support = self.preprocess(self.store, rows.flatten(), dtype, mirrored)
        query = self.preprocess(self.store, episodes.query.flatten(), dtype)

        task_by_task = (
            self.norm == "frozen"
            and self.order == "first"
            and self.encoder.fold  # without it the native layers refuse stored statistics
            and choose("ss_conv", self.encoder.backend, x=support).backend == "native"
        )

        def run(weights: Weights, images: Tensor) -> tuple[Tensor, Statistics]:
            if task_by_task:
                return network.task_by_task(names, weights, images), []
            return functional_call(network, dict(zip(names, weights, strict=True)), (images, n_groups))

        def support_loss(weights: Weights) -> tuple[Tensor, Statistics]:
            logits, statistics = run(weights, support)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            # The sum over tasks: each one's weights see its own mean loss.
            return loss / labels.shape[1], statistics

        adapted: Weights = tuple(p.expand(n_tasks, *p.shape) for p in shared)
        passes: list[Statistics] = []
        options = (self.inner_lr, self.order, self.checkpoint)
        taken = 0
        for wanted in n_steps:
            for _ in range(wanted - taken):
                adapted = _Step.apply(support_loss, passes, options, *adapted)
            taken = wanted
            logits, statistics = run(adapted, query)
            yield logits, [*passes, statistics]

    def _refresh(self) -> SharedWeights:
        return ()  # weights of each task's own are no operands of `effective_weights`


def _ascending(n_steps: Sequence[int], inner_lr: float) -> list[int]:
    """Numbers of steps that one inner loop passes in this order, as ints."""
    steps = [check_inner_loop(inner_lr, n, name="n_steps") for n in n_steps]
    if sorted(steps) != steps:
        raise ValueError(f"n_steps: expected ascending numbers, got {steps}")
    return steps


@torch.inference_mode(False)  # the inner loop takes gradients, whatever the caller does with the result
@torch.no_grad()
def evaluate_all_weights(
    encoder: Encoder,
    head: LinearHead,
    store: ImageStore,
    episodes: Episodes,
    preprocess: Preprocess,
    *,
    inner_lr: float,
    n_steps: Sequence[int],
    norm: NormMode = "frozen",
    mirror_support: bool = False,
    images_per_chunk: int = 256,
    ranks: Ranks = ALONE,
) -> list[Evaluation]:
    """Fits the whole network on each task's support set and scores its query set after some numbers of steps.

    Each task's images pass through weights of its own, so none is embedded once for all. Arguments and errors as
    `engine.evaluate`; with `running` norm the statistics are the stored ones, in the inner loop too.

    Args:
        n_steps: ascending; one inner loop gives them all.

    Returns:
        An evaluation for each number of steps.

    Raises:
        ValueError: encoder or head were made inside `torch.inference_mode`, whose tensors take no gradient.
    """
    require_norm(norm)
    require_at_least_one(images_per_chunk=images_per_chunk)
    n_steps = _ascending(n_steps, inner_lr)
    if any(t.is_inference() for m in (encoder, head) for t in (*m.parameters(), *m.buffers())):
        raise ValueError(
            "encoder, head: were made inside torch.inference_mode and take no gradient; make or load them outside it"
        )
    require_evaluation_mode(encoder)
    if episodes.support_labels.is_inference():
        episodes = replace(episodes, support_labels=episodes.support_labels.clone())
    engine = WholeNetworkEngine(
        encoder,
        head,
        store,
        preprocess,
        norm="episode" if norm == "episode" else "frozen",
        order="first",  # no gradient passes the inner loop
        inner_lr=inner_lr,
    )
    by = tasks_per_chunk(episodes, images_per_chunk, mirror_support)
    own = episodes[ranks.share(episodes.n_tasks, by)]
    nothing = scored(own[:0], head.weight.new_empty(0, own.query.shape[1], own.n_way))
    found = [[nothing] for _ in n_steps]
    for part in own.chunks(by):
        after = engine.query_logits_after(n_steps, part, mirror_support=mirror_support)
        for evaluations, logits in zip(found, after, strict=True):
            evaluations.append(scored(part, logits))
    return [gathered(joined(evaluations), episodes.n_tasks, ranks, by) for evaluations in found]
