"""Evaluation: each distinct image embedded once, heads of many tasks fitted together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..data.store import ImageStore
from ..episodes import Episodes
from ..nn.encoder import Encoder
from ..nn.linear_head import LinearHead
from ..ops.base_learner import base_learner
from .ranks import ALONE, Ranks
from .step import NormMode, Preprocess, class_accuracy, require_evaluation_mode


class Evaluation(NamedTuple):
    """Query accuracy of each task [T] and of its classes [T, n_way]; predicted label of each query [T, m]."""

    accuracy: Tensor
    class_accuracy: Tensor
    predictions: Tensor


@torch.no_grad()
def embed_rows(
    encoder: Encoder,
    store: ImageStore,
    rows: Tensor,
    preprocess: Preprocess,
    *,
    images_per_chunk: int = 256,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Features [B, D] of rows [B] of the store, with the stored statistics.

    Ranks share out whole chunks, so that each image is embedded in the company that it has on one rank.
    """
    require_evaluation_mode(encoder)
    weights = encoder.refresh()
    parameter = next(encoder.parameters())
    own = [parameter.new_empty(0, encoder.feature_dim)]
    mine = rows[ranks.share(len(rows), images_per_chunk)]
    for start in range(0, len(mine), images_per_chunk):
        images = preprocess(store, mine[start : start + images_per_chunk], parameter.dtype)
        own.append(encoder.embed(images, weights=weights).features)
    features = ranks.spread(torch.cat(own), len(rows), images_per_chunk)
    ranks.sum_([features])
    return features


class EmbeddedEpisodes(NamedTuple):
    """Features of the distinct images of some episodes, and where each episode finds its own."""

    episodes: Episodes
    features: Tensor  # [distinct images, D]
    support: Tensor  # [T, n_way·n_shot], rows of `features`
    query: Tensor  # [T, n_way·n_query]


def embed_episodes(
    encoder: Encoder,
    store: ImageStore,
    episodes: Episodes,
    preprocess: Preprocess,
    *,
    images_per_chunk: int = 256,
    ranks: Ranks = ALONE,
) -> EmbeddedEpisodes:
    """Embeds each distinct image of the episodes once, on one of the ranks, with the stored statistics."""
    sizes = [episodes.support.shape[1], episodes.query.shape[1]]
    rows, place = torch.cat([episodes.support, episodes.query], dim=1).unique(return_inverse=True)
    features = embed_rows(encoder, store, rows, preprocess, images_per_chunk=images_per_chunk, ranks=ranks)
    return EmbeddedEpisodes(episodes, features, *place.split(sizes, dim=1))


@torch.no_grad()
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
    n_tasks = embedded.episodes.n_tasks
    own = ranks.share(n_tasks, tasks_per_batch)
    parts = []
    for start in range(own.start, own.stop, tasks_per_batch):
        tasks = slice(start, min(start + tasks_per_batch, own.stop))
        support, query = (embedded.features[place[tasks]] for place in (embedded.support, embedded.query))
        parts.append(_score(embedded.episodes[tasks], support, query, head, inner_lr, inner_steps, backend))
    return _joined(parts, embedded.episodes, ranks, tasks_per_batch)


@torch.no_grad()
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
    tasks_per_batch: int = 100,
    images_per_chunk: int = 256,
    backend: str = "auto",
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Fits θ on each task's support set and scores its query set.

    With `frozen` or `running` norm every distinct image of the episodes is embedded once, whatever their
    number; `episode` norm depends on the task, so there each task's two splits are embedded for it alone.

    Args:
        encoder, head: Θ with Φ, and θ; the encoder must be in evaluation mode.
        store: where `episodes` index.
        episodes: T tasks.
        preprocess: as in training.
        inner_lr, inner_steps: of the base-learner at test time.
        norm: as in training.
        tasks_per_batch: heads fitted together.
        images_per_chunk: images embedded together (`episode`: as many whole tasks as fit, at least one).
        backend: of the base-learner.
        ranks: the processes that share out the work, in whole chunks and batches: the result on each is, to the
            bit, that of one.

    Raises:
        ValueError: the encoder is in training mode and has dropout.
    """
    if norm != "episode":
        embedded = embed_episodes(
            encoder, store, episodes, preprocess, images_per_chunk=images_per_chunk, ranks=ranks
        )
        return fit_and_score(
            embedded,
            head,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            tasks_per_batch=tasks_per_batch,
            backend=backend,
            ranks=ranks,
        )
    require_evaluation_mode(encoder)
    weights = encoder.refresh(fold=False)
    n_images = episodes.support.shape[1] + episodes.query.shape[1]
    chunk = max(1, images_per_chunk // n_images)
    parts = []
    for part in episodes[ranks.share(episodes.n_tasks, chunk)].chunks(chunk):
        support, query = (
            encoder.embed(
                preprocess(store, rows.flatten(), head.weight.dtype), n_groups=part.n_tasks, weights=weights
            ).features.unflatten(0, rows.shape)
            for rows in (part.support, part.query)
        )
        parts.append(_score(part, support, query, head, inner_lr, inner_steps, backend))
    return _joined(parts, episodes, ranks, chunk)


def _score(
    part: Episodes,
    support: Tensor,
    query: Tensor,
    head: LinearHead,
    inner_lr: float,
    inner_steps: int,
    backend: str,
) -> Evaluation:
    """[T, n, D] support and [T, m, D] query features → the tasks' accuracies and predictions."""
    logits = base_learner(
        support,
        part.support_labels,
        query,
        head.weight,
        head.bias,
        inner_lr=inner_lr,
        n_steps=inner_steps,
        order="first",
        backend=backend,
    )
    by_class = class_accuracy(logits, part.query_labels, part.n_way)
    return Evaluation(by_class.mean(dim=1), by_class, logits.argmax(dim=-1))


def _joined(parts: list[Evaluation], episodes: Episodes, ranks: Ranks, by: int) -> Evaluation:
    """The parts of `ranks.share(T, by)`, of all ranks, in the order of the tasks."""
    by_class = torch.empty(0, episodes.n_way, dtype=torch.float32, device=episodes.classes.device)
    nothing = Evaluation(by_class[:, 0], by_class, episodes.query_labels[:0])
    whole = Evaluation(
        *(
            ranks.spread(torch.cat(column), episodes.n_tasks, by)
            for column in zip(nothing, *parts, strict=True)
        )
    )
    ranks.sum_(whole)
    return whole
