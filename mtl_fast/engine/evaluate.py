"""Evaluation: each distinct image embedded once, heads (or whole networks) of many tasks fitted together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..data.store import ImageStore
from ..episodes import Episodes
from ..nn.encoder import Encoder
from ..nn.linear_head import LinearHead
from ..ops.base_learner import base_learner
from .inner_loops import WholeNetworkEngine
from .step import NormMode, Preprocess, class_accuracy, require_evaluation_mode

Adapt = Literal["head", "all"]


class Evaluation(NamedTuple):
    """Query accuracy of each task [T] and of its classes [T, n_way]; predicted label of each query [T, m]."""

    accuracy: Tensor
    class_accuracy: Tensor
    predictions: Tensor


@torch.no_grad()
def embed_rows(
    encoder: Encoder, store: ImageStore, rows: Tensor, preprocess: Preprocess, *, images_per_chunk: int = 256
) -> Tensor:
    """Features [B, D] of rows [B] of the store, with the stored statistics."""
    require_evaluation_mode(encoder)
    weights = encoder.refresh()
    dtype = next(encoder.parameters()).dtype
    return torch.cat(
        [
            encoder.embed(preprocess(store, part, dtype), weights=weights).features
            for part in rows.split(images_per_chunk)
        ]
    )


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
) -> EmbeddedEpisodes:
    """Embeds each distinct image of the episodes once, with the stored statistics."""
    sizes = [episodes.support.shape[1], episodes.query.shape[1]]
    rows, place = torch.cat([episodes.support, episodes.query], dim=1).unique(return_inverse=True)
    features = embed_rows(encoder, store, rows, preprocess, images_per_chunk=images_per_chunk)
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
) -> Evaluation:
    """Fits θ on each episode's support features, many tasks at a time, and scores its query features."""
    parts = []
    for start, part in enumerate(embedded.episodes.chunks(tasks_per_batch)):
        tasks = slice(start * tasks_per_batch, (start + 1) * tasks_per_batch)
        support, query = (embedded.features[place[tasks]] for place in (embedded.support, embedded.query))
        parts.append(_score(part, support, query, head, inner_lr, inner_steps, backend))
    return _joined(parts)


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
    adapt: Adapt = "head",
    tasks_per_batch: int = 100,
    images_per_chunk: int = 256,
    backend: str = "auto",
) -> Evaluation:
    """Fits θ, or the whole network, on each task's support set and scores its query set.

    With `frozen` or `running` norm every distinct image of the episodes is embedded once, whatever their
    number; `episode` norm depends on the task, so there each task's two splits are embedded for it alone.

    Args:
        encoder, head: Θ with Φ, and θ; the encoder must be in evaluation mode.
        store: where `episodes` index.
        episodes: T tasks.
        preprocess: as in training.
        inner_lr, inner_steps: of the base-learner at test time.
        norm: as in training.
        adapt: what the inner loop fits: ``head``, or ``all`` weights (then see `evaluate_all_weights`).
        tasks_per_batch: heads fitted together.
        images_per_chunk: images embedded together (`episode` and `all`: as many whole tasks as fit, at least one).
        backend: of the base-learner.

    Raises:
        ValueError: the encoder is in training mode and has dropout.
    """
    if adapt == "all":
        (result,) = evaluate_all_weights(
            encoder,
            head,
            store,
            episodes,
            preprocess,
            inner_lr=inner_lr,
            n_steps=[inner_steps],
            norm=norm,
            images_per_chunk=images_per_chunk,
        )
        return result
    if norm != "episode":
        embedded = embed_episodes(encoder, store, episodes, preprocess, images_per_chunk=images_per_chunk)
        return fit_and_score(
            embedded,
            head,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            tasks_per_batch=tasks_per_batch,
            backend=backend,
        )
    require_evaluation_mode(encoder)
    weights = encoder.refresh(fold=False)
    n_images = episodes.support.shape[1] + episodes.query.shape[1]
    parts = []
    for part in episodes.chunks(max(1, images_per_chunk // n_images)):
        support, query = (
            encoder.embed(
                preprocess(store, rows.flatten(), head.weight.dtype), n_groups=part.n_tasks, weights=weights
            ).features.unflatten(0, rows.shape)
            for rows in (part.support, part.query)
        )
        parts.append(_score(part, support, query, head, inner_lr, inner_steps, backend))
    return _joined(parts)


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
    images_per_chunk: int = 256,
) -> list[Evaluation]:
    """Fits the whole network on each task's support set and scores its query set after some numbers of steps.

    Each task's images pass through weights of its own, so none is embedded once for all. Arguments as `evaluate`;
    with `running` norm the statistics are the stored ones, in the inner loop too.

    Args:
        n_steps: ascending; one inner loop gives them all.

    Returns:
        An evaluation for each number of steps.
    """
    require_evaluation_mode(encoder)
    engine = WholeNetworkEngine(
        encoder,
        head,
        store,
        preprocess,
        norm="episode" if norm == "episode" else "frozen",
        order="first",  # no gradient passes the inner loop
        inner_lr=inner_lr,
    )
    n_images = episodes.support.shape[1] + episodes.query.shape[1]
    found: list[list[Evaluation]] = [[] for _ in n_steps]
    for part in episodes.chunks(max(1, images_per_chunk // n_images)):
        for evaluations, logits in zip(found, engine.query_logits_after(n_steps, part), strict=True):
            evaluations.append(_scored(part, logits))
    return [_joined(evaluations) for evaluations in found]


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
    return _scored(part, logits)


def _scored(part: Episodes, logits: Tensor) -> Evaluation:
    by_class = class_accuracy(logits, part.query_labels, part.n_way)
    return Evaluation(by_class.mean(dim=1), by_class, logits.argmax(dim=-1))


def _joined(parts: list[Evaluation]) -> Evaluation:
    return Evaluation(*(torch.cat(column) for column in zip(*parts, strict=True)))
