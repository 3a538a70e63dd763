"""A test taken in chunks of whole tasks: their size, what each gives, and all of them in the order of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..episodes import Episodes
from .base import class_accuracy
from .ranks import Ranks


class Evaluation(NamedTuple):
    """Query accuracy of each task [T] and of its classes [T, n_way]; predicted label of each query [T, m]."""

    accuracy: Tensor
    class_accuracy: Tensor
    predictions: Tensor


def scored(episodes: Episodes, logits: Tensor) -> Evaluation:
    """Query logits [T, m, n_way] against the labels of T tasks, perhaps none."""
    by_class = class_accuracy(logits, episodes.query_labels, episodes.n_way)
    return Evaluation(by_class.mean(dim=1), by_class, logits.argmax(dim=-1))


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Those of some tasks, then of the next, …; at least one part."""
    return Evaluation(*(torch.cat(column) for column in zip(*parts, strict=True)))


def gathered(own: Evaluation, n_tasks: int, ranks: Ranks, by: int) -> Evaluation:
    """The scores of each rank's `share(n_tasks, by)` in the order of the tasks."""
    whole = Evaluation(*(ranks.spread(column, n_tasks, by) for column in own))
    ranks.sum_(whole)
    return whole


def tasks_per_chunk(episodes: Episodes, images_per_chunk: int, mirror_support: bool) -> int:
    """As many whole tasks as have no more images than that, at least one."""
    n_images = episodes.support.shape[1] * (1 + mirror_support) + episodes.query.shape[1]
    return max(1, images_per_chunk // n_images)


def with_mirrored(support: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, n] → [T, 2·n], the same ones again, and which of all T·2·n are those: their mirror images."""
    n_tasks, n = support.shape
    mirrored = (torch.arange(2 * n, device=support.device) >= n).repeat(n_tasks)
    return support.repeat(1, 2), mirrored
