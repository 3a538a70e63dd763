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
from .step import NormMode, Preprocess, class_accuracy


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
    weights = encoder.refresh()
    dtype = next(encoder.parameters()).dtype
    return torch.cat(
        [
            encoder.embed(preprocess(store, part, dtype), weights=weights).features
            for part in rows.split(images_per_chunk)
        ]
    )


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
        images_per_chunk: images embedded together.
        backend: of the base-learner.

    Raises:
        ValueError: the encoder is in training mode and has dropout.
    """
    if encoder.training and encoder.dropout:
        raise ValueError(
            f"encoder: is in training mode, with dropout {encoder.dropout}; call encoder.eval() first"
        )
    per_task = norm == "episode"
    if per_task:
        n_images = episodes.support.shape[1] + episodes.query.shape[1]
        tasks_per_batch = max(1, images_per_chunk // n_images)
    else:
        both = torch.cat([episodes.support, episodes.query], dim=1)
        rows, position = both.unique(return_inverse=True)
        features = embed_rows(encoder, store, rows, preprocess, images_per_chunk=images_per_chunk)
        place = position.split([episodes.support.shape[1], episodes.query.shape[1]], dim=1)
    accuracies, predictions = [], []
    weights = encoder.refresh(fold=False) if per_task else None
    for start, part in zip(
        range(0, episodes.n_tasks, tasks_per_batch), episodes.chunks(tasks_per_batch), strict=True
    ):
        if per_task:
            support, query = (
                encoder.embed(
                    preprocess(store, split.flatten(), head.weight.dtype),
                    n_groups=part.n_tasks,
                    weights=weights,
                ).features.unflatten(0, split.shape)
                for split in (part.support, part.query)
            )
        else:
            support, query = (features[p[start : start + tasks_per_batch]] for p in place)
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
        accuracies.append(class_accuracy(logits, part.query_labels, part.n_way))
        predictions.append(logits.argmax(dim=-1))
    by_class = torch.cat(accuracies)
    return Evaluation(by_class.mean(dim=1), by_class, torch.cat(predictions))
