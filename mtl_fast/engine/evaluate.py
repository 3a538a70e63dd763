"""Evaluation: each distinct image embedded once, heads (or whole networks) of many tasks fitted together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..data.store import ImageStore
from ..episodes import Episodes
from ..kernels.contracts import EffectiveWeights
from ..nn.encoder import Encoder
from ..nn.linear_head import LinearHead
from ..ops.base_learner import base_learner, check_inner_loop, query_logits_by_step
from .base import NormMode, a_parameter, require_at_least_one, require_evaluation_mode, require_norm
from .inner_loops import evaluate_all_weights
from .inputs import Preprocess
from .ranks import ALONE, Ranks
from .scores import Evaluation, gathered, joined, scored, tasks_per_chunk, with_mirrored

Adapt = Literal["head", "all"]

_LOGITS_IN_FLIGHT = 2**24  # numbers that `accuracy_by_step` holds at a time


@torch.no_grad()
def embed_rows(
    encoder: Encoder,
    store: ImageStore,
    rows: Tensor,
    preprocess: Preprocess,
    *,
    mirrored: Tensor | None = None,
    images_per_chunk: int = 256,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Features [B, D] of rows [B] of the store, with the stored statistics.

    Ranks share out whole chunks, so that each image is embedded in the company that it has on one rank.

    Args:
        encoder: in evaluation mode.
        store: where `rows` point to.
        rows: int64 [B].
        preprocess: as in training.
        mirrored: bool [B], images to mirror left to right; None: no image.
        images_per_chunk: images embedded together.
        ranks: who shares the work; all get all features.

    Raises:
        ValueError: the encoder, or a network inside it, is in training mode, where it embeds otherwise.
    """
    require_at_least_one(images_per_chunk=images_per_chunk)
    require_evaluation_mode(encoder)
    weights = encoder.refresh()
    parameter = a_parameter(encoder, rows.device)
    own = ranks.share(len(rows), images_per_chunk)
    features = [parameter.new_empty(0, encoder.feature_dim)]
    for start in range(own.start, own.stop, images_per_chunk):
        chunk = slice(start, min(start + images_per_chunk, own.stop))
        flip = None if mirrored is None else mirrored[chunk]
        images = preprocess(store, rows[chunk], parameter.dtype, flip)
        features.append(encoder.embed(images, weights=weights).features)
    every = ranks.spread(torch.cat(features), len(rows), images_per_chunk)
    ranks.sum_([every])
    return every


class DistinctImages(NamedTuple):
    """The images that some episodes need, each once, and where each episode finds its own among them.

    The rows of the store [R], whether each is mirrored [R] (None: none is), and the places in this list of each
    task's support images [T, n] and query images [T, m]. With mirrored support n is twice n_way·n_shot: the images,
    then their mirror images in the same order.
    """

    rows: Tensor
    mirrored: Tensor | None
    support: Tensor
    query: Tensor


def distinct_images(episodes: Episodes, n_images: int, *, mirror_support: bool = False) -> DistinctImages:
    """The images of the episodes, which index a store of `n_images`; plain ones first, each part in the store's order."""
    rows, place = _numbered(torch.cat([episodes.support, episodes.query], dim=1), n_images)
    support, query = place.split([episodes.support.shape[1], episodes.query.shape[1]], dim=1)
    if not mirror_support:
        return DistinctImages(rows, None, support, query)
    mirrored_rows, mirrored_place = _numbered(episodes.support, n_images)
    mirrored = torch.arange(len(rows) + len(mirrored_rows), device=rows.device) >= len(rows)
    support = torch.cat([support, len(rows) + mirrored_place], dim=1)
    return DistinctImages(torch.cat([rows, mirrored_rows]), mirrored, support, query)


def _numbered(rows: Tensor, n_images: int) -> tuple[Tensor, Tensor]:
    """The distinct values [R] of `rows`, ascending, and the place of each of `rows` among them."""
    needed = torch.zeros(n_images, dtype=torch.bool, device=rows.device)
    needed[rows] = True
    return needed.nonzero()[:, 0], (needed.cumsum(0) - 1)[rows]


@dataclass(frozen=True, eq=False)
class EmbeddedEpisodes:
    """Features of the images of some episodes, and where each episode finds its own.

    Args:
        episodes: T tasks.
        features: [R, D].
        support: int64 [T, n], rows of `features`; n is n_way·n_shot, or twice that with mirrored support.
        query: int64 [T, n_way·n_query], rows of `features`.
    """

    episodes: Episodes
    features: Tensor
    support: Tensor
    query: Tensor

    @classmethod
    def of_store(
        cls, episodes: Episodes, features: Tensor, mirrored: Tensor | None = None
    ) -> EmbeddedEpisodes:
        """Episodes that index `features` [N, D] itself; `mirrored` [N, D], of the mirror images, doubles the support."""
        if mirrored is None:
            return cls(episodes, features, episodes.support, episodes.query)
        support = torch.cat([episodes.support, episodes.support + len(features)], dim=1)
        return cls(episodes, torch.cat([features, mirrored]), support, episodes.query)

    def __getitem__(self, tasks: slice) -> EmbeddedEpisodes:
        """The tasks of a slice."""
        return EmbeddedEpisodes(self.episodes[tasks], self.features, self.support[tasks], self.query[tasks])

    @property
    def support_labels(self) -> Tensor:
        """int64 [T, n], 0..n_way-1."""
        labels = self.episodes.support_labels
        return labels.repeat(1, self.support.shape[1] // labels.shape[1])

    def batches(self, n: int) -> Iterator[EmbeddedEpisodes]:
        """The tasks in order, `n` at a time, fewer in the last; an empty batch where there is no task."""
        return (self[start : start + n] for start in range(0, max(1, self.episodes.n_tasks), n))


def embed_episodes(
    encoder: Encoder,
    store: ImageStore,
    episodes: Episodes,
    preprocess: Preprocess,
    *,
    mirror_support: bool = False,
    images_per_chunk: int = 256,
    ranks: Ranks = ALONE,
) -> EmbeddedEpisodes:
    """Embeds each distinct image of the episodes once, on one of the ranks, with the stored statistics."""
    rows, mirrored, support, query = distinct_images(episodes, store.n_images, mirror_support=mirror_support)
    features = embed_rows(
        encoder,
        store,
        rows,
        preprocess,
        mirrored=mirrored,
        images_per_chunk=images_per_chunk,
        ranks=ranks,
    )
    return EmbeddedEpisodes(episodes, features, support, query)


def embedded_parts(
    encoder: Encoder,
    store: ImageStore,
    episodes: Episodes,
    preprocess: Preprocess,
    *,
    norm: NormMode = "frozen",
    mirror_support: bool = False,
    images_per_chunk: int = 256,
) -> Iterator[EmbeddedEpisodes]:
    """The episodes with their features; arguments and errors as `evaluate`.

    All at once with stored statistics. With `episode` norm, where no two tasks share a feature, a chunk of whole
    tasks at a time.
    """
    require_norm(norm)
    require_at_least_one(images_per_chunk=images_per_chunk)
    if norm != "episode" or not episodes.n_tasks:  # without a task there is nothing to embed
        yield embed_episodes(
            encoder,
            store,
            episodes,
            preprocess,
            mirror_support=mirror_support,
            images_per_chunk=images_per_chunk,
        )
        return
    require_evaluation_mode(encoder)
    with torch.no_grad():
        weights = encoder.refresh(fold=False)
    for part in episodes.chunks(tasks_per_chunk(episodes, images_per_chunk, mirror_support)):
        yield _embed_apart(encoder, weights, store, part, preprocess, mirror_support)


@torch.no_grad()
def _embed_apart(
    encoder: Encoder,
    weights: Sequence[EffectiveWeights | None],
    store: ImageStore,
    episodes: Episodes,
    preprocess: Preprocess,
    mirror_support: bool,
) -> EmbeddedEpisodes:
    """Embeds each task's two splits for it alone, with their own batch statistics."""
    support, mirrored, query = episodes.support, None, episodes.query
    if mirror_support:
        support, mirrored = with_mirrored(support)
    dtype = a_parameter(encoder, support.device).dtype
    features = [
        encoder.embed(
            preprocess(store, rows.flatten(), dtype, flip), n_groups=episodes.n_tasks, weights=weights
        ).features
        for rows, flip in ((support, mirrored), (query, None))
    ]
    places = torch.arange(support.numel() + query.numel(), device=support.device)
    own_support, own_query = places.split([support.numel(), query.numel()])
    return EmbeddedEpisodes(
        episodes, torch.cat(features), own_support.view_as(support), own_query.view_as(query)
    )


@torch.no_grad()
def fit_and_predict(
    embedded: EmbeddedEpisodes,
    head: LinearHead,
    *,
    inner_lr: float,
    inner_steps: int,
    tasks_per_batch: int = 100,
    backend: str = "auto",
) -> Tensor:
    """Query logits [T, m, n_way] of θ fitted on each episode's support features, many tasks at a time."""
    require_at_least_one(tasks_per_batch=tasks_per_batch)
    return torch.cat(
        [
            base_learner(
                *_operands(batch, head),
                inner_lr=inner_lr,
                n_steps=inner_steps,
                order="first",
                backend=backend,
            )
            for batch in embedded.batches(tasks_per_batch)
        ]
    )


def fit_and_score(
    embedded: EmbeddedEpisodes,
    head: LinearHead,
    *,
    inner_lr: float,
    inner_steps: int,
    tasks_per_batch: int = 100,
    backend: str = "auto",
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Fits θ on each episode's support features, many tasks at a time, and scores its query features.

    Ranks share out whole batches of tasks.
    """
    require_at_least_one(tasks_per_batch=tasks_per_batch)
    n_tasks = embedded.episodes.n_tasks
    own = embedded[ranks.share(n_tasks, tasks_per_batch)]
    logits = fit_and_predict(
        own,
        head,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        tasks_per_batch=tasks_per_batch,
        backend=backend,
    )
    return gathered(scored(own.episodes, logits), n_tasks, ranks, tasks_per_batch)


@torch.no_grad()
def accuracy_by_step(
    embedded: EmbeddedEpisodes,
    head: LinearHead,
    *,
    inner_lr: float,
    inner_steps: int,
    tasks_per_batch: int = 100,
    backend: str = "auto",
) -> Tensor:
    """Query accuracy [T, inner_steps + 1] of each task after 0, 1, …, inner_steps steps, all from one fit.

    Memory stays bounded whatever the number of tasks and steps: fewer tasks are fitted together where logits of all
    steps would exceed 64 MiB.
    """
    require_at_least_one(tasks_per_batch=tasks_per_batch)
    inner_steps = check_inner_loop(inner_lr, inner_steps, name="inner_steps")
    episodes = embedded.episodes
    per_task = (inner_steps + 1) * episodes.query.shape[1] * episodes.n_way
    found = []
    for batch in embedded.batches(min(tasks_per_batch, max(1, _LOGITS_IN_FLIGHT // per_task))):
        logits = query_logits_by_step(
            *_operands(batch, head), inner_lr=inner_lr, n_steps=inner_steps, backend=backend
        )
        # [S + 1, T, m] -> [T, S + 1]
        # The first of equal ones, as argmax says, ten times as fast over strided classes.
        correct = logits.max(dim=-1).indices == batch.episodes.query_labels
        found.append(correct.to(torch.float32).mean(dim=-1).T)
    return torch.cat(found)


def _operands(batch: EmbeddedEpisodes, head: LinearHead) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of the base-learner: support, its labels, query, weight and bias."""
    support, query = batch.features[batch.support], batch.features[batch.query]
    return support, batch.support_labels, query, head.weight, head.bias


def evaluate(
    encoder: Encoder,
    head: LinearHead,
    store: ImageStore,
    episodes: Episodes,
    preprocess: Preprocess,
    *,
    inner_lr: float,
    inner_steps: int,
    norm: NormMode = "frozen",
    adapt: Adapt = "head",
    mirror_support: bool = False,
    tasks_per_batch: int = 100,
    images_per_chunk: int = 256,
    backend: str = "auto",
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Fits θ, or the whole network, on each task's support set and scores its query set.

    With `frozen` or `running` norm every distinct image of the episodes is embedded once, whatever their
    number; `episode` norm depends on the task, so there each task's two splits are embedded for it alone.
    Tasks a to b alone are those of ``episodes[a:b]``, which may be none.

    Args:
        encoder, head: Θ with Φ, and θ; the encoder must be in evaluation mode.
        store: where `episodes` index.
        episodes: T tasks.
        preprocess: as in training.
        inner_lr, inner_steps: of the base-learner at test time.
        norm: as in training.
        adapt: what the inner loop fits: ``head``, or ``all`` weights (then see `evaluate_all_weights`).
        mirror_support: the support set holds each of its images mirrored as well. `inner_lr` is against the mean
            loss of them all.
        tasks_per_batch: heads fitted together.
        images_per_chunk: images embedded together (`episode` and `all`: as many whole tasks as fit, at least one).
        backend: of the base-learner.
        ranks: the processes that share out the work, in whole chunks and batches: the result on each is, to the
            bit, that of one.

    Raises:
        ValueError: the encoder, or a network inside it, is in training mode, where it embeds otherwise; a setting that
            is none of the above, or out of range.
        TypeError: `inner_steps` is no integer, or `inner_lr` a learned one.
    """
    require_norm(norm)
    if adapt not in get_args(Adapt):
        raise ValueError(f"adapt: {adapt!r} is neither head nor all")
    require_at_least_one(tasks_per_batch=tasks_per_batch, images_per_chunk=images_per_chunk)
    inner_steps = check_inner_loop(inner_lr, inner_steps, name="inner_steps")
    embed: dict[str, Any] = {"mirror_support": mirror_support, "images_per_chunk": images_per_chunk}
    if adapt == "all":
        parts: tuple[Any, ...] = (encoder, head, store, episodes, preprocess)
        options: dict[str, Any] = {"inner_lr": inner_lr, "n_steps": [inner_steps], "norm": norm, **embed}
        return evaluate_all_weights(*parts, **options, ranks=ranks)[0]
    fit: dict[str, Any] = {
        "inner_lr": inner_lr,
        "inner_steps": inner_steps,
        "tasks_per_batch": tasks_per_batch,
        "backend": backend,
    }
    if norm != "episode":
        embedded = embed_episodes(encoder, store, episodes, preprocess, ranks=ranks, **embed)
        return fit_and_score(embedded, head, ranks=ranks, **fit)
    by = tasks_per_chunk(episodes, images_per_chunk, mirror_support)
    own = episodes[ranks.share(episodes.n_tasks, by)]
    found = [
        fit_and_score(part, head, **fit)
        for part in embedded_parts(encoder, store, own, preprocess, norm=norm, **embed)
    ]
    return gathered(joined(found), episodes.n_tasks, ranks, by)
