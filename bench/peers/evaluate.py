"""Evaluation as it is written down: every task's images are embedded for it, whatever other tasks had of them.

Both give query logits [T, m, C] of the tasks. `evaluate_plainly` takes one task at a time, `evaluate_batched` embeds
the images of all tasks in large batches and fits all heads together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base_learner import batched_primal, one_task_at_a_time
from .meta_step import Data, FrozenLayer, InnerLoop, Tasks
from .resnet12 import resnet12

Embed = Callable[[Tensor], Tensor]


def evaluate_plainly(
    layers: Sequence[FrozenLayer], weight: Tensor, bias: Tensor, data: Data, tasks: Tasks, inner: InnerLoop
) -> Tensor:
    """Head `weight` [C, D] and `bias` [C] are where every task starts."""
    logits = []
    for t in range(len(tasks.support)):
        with torch.no_grad():
            support, query = (
                resnet12(data.load(rows[t], weight.dtype, torch.contiguous_format), layers)[None]
                for rows in (tasks.support, tasks.query)
            )
        labels = tasks.support_labels[t : t + 1]
        found = one_task_at_a_time(
            support, labels, query, weight, bias, inner_lr=inner.lr, n_steps=inner.n_steps, order="first"
        )
        logits.append(found.detach())
    return torch.cat(logits)


@torch.no_grad()
def evaluate_batched(
    embed: Embed,
    memory_format: torch.memory_format,
    weight: Tensor,
    bias: Tensor,
    data: Data,
    tasks: Tasks,
    inner: InnerLoop,
    *,
    images_per_chunk: int,
) -> Tensor:
    """`embed` takes images [N, 3, H, W] of that memory format to features [N, D]."""
    rows = torch.cat([tasks.support, tasks.query], dim=1)
    chunks = rows.flatten().split(images_per_chunk)
    features = torch.cat([embed(data.load(chunk, weight.dtype, memory_format)) for chunk in chunks])
    sizes = [tasks.support.shape[1], tasks.query.shape[1]]
    support, query = features.unflatten(0, rows.shape).split(sizes, dim=1)
    return batched_primal(
        support,
        tasks.support_labels,
        query,
        weight,
        bias,
        inner_lr=inner.lr,
        n_steps=inner.n_steps,
        order="first",
    )
