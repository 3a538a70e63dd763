"""Images of tasks in, query logits out: the heads of T tasks fitted together, for loops of one's own."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor

from ..nn.encoder import Encoder
from ..nn.linear_head import LinearHead
from ..ops.base_learner import Order, base_learner
from .base import require_evaluation_mode


def adapt_and_predict(
    encoder: Encoder,
    head: LinearHead,
    support_images: Tensor,
    support_labels: Tensor,
    query_images: Tensor,
    *,
    inner_lr: float,
    inner_steps: int,
    order: Order = "second",
    norm: Literal["frozen", "episode"] = "frozen",
    support_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Fits a head θ' to each task's support set and predicts its query set.

    θ' = θ after `inner_steps` gradient steps of size `inner_lr` on the mean support loss (see `base_learner`).
    The result has the graph of `order`; its loss's gradients reach whatever parameters of encoder and head
    require one, and the images of the query (of the support too in second order). All images are embedded
    together: give as many tasks at a time as fit in memory. Nothing is changed, running averages included.

    Args:
        encoder, head: Θ with Φ, in evaluation mode, and θ, for C classes.
        support_images: [T, n, 3, H, W], as the encoder takes them: normalised, of its dtype.
        support_labels: int64 [T, n] in 0..C-1, any number a class (free where masked out).
        query_images: [T, m, 3, H, W].
        inner_lr, inner_steps: of the inner loop.
        order: ``second`` is the exact derivative; ``first`` treats θ' as θ minus constants.
        norm: ``frozen`` (stored statistics) or ``episode`` (batch statistics of each task's splits, apart).
        support_mask: bool [T, n], False for an image that is only padding, as where shots differ.
        backend: of the base-learner.

    Returns:
        Query logits [T, m, C].

    Raises:
        ValueError, TypeError: shapes, dtypes or values that break the above, named; an encoder in training
            mode, or a network inside it, where that embeds otherwise.
    """
    require_evaluation_mode(encoder)
    if norm not in ("frozen", "episode"):
        raise ValueError(f"norm: {norm!r} is neither frozen nor episode")
    if order not in ("first", "second"):
        raise ValueError(f"order: {order!r} is neither first nor second")
    for name, images in (("support_images", support_images), ("query_images", query_images)):
        if images.ndim != 5 or len(images) != len(support_images):
            raise ValueError(
                f"{name}: expected [{len(support_images)}, n, 3, H, W], a task a row, got {list(images.shape)}"
            )
    n_tasks, n_support = support_images.shape[:2]
    if support_mask is not None and (support_mask.shape, support_mask.dtype) != (
        support_images.shape[:2],
        torch.bool,
    ):
        raise ValueError(
            f"support_mask: expected bool {[n_tasks, n_support]} for support_images "
            f"{list(support_images.shape)}, got {support_mask.dtype} {list(support_mask.shape)}"
        )
    n_groups = n_tasks if norm == "episode" else 0
    mask = None
    if support_mask is not None:
        # Padding may hold anything, NaN too, and stored statistics take no mask.
        support_images = support_images.where(support_mask[..., None, None, None], 0)
        mask = support_mask.flatten() if norm == "episode" else None
    weights = encoder.refresh(fold=norm == "frozen")
    query = encoder.embed(query_images.flatten(0, 1), n_groups=n_groups, weights=weights).features
    # First order needs no derivative of the support features, hence no graph for them.
    with torch.no_grad() if order == "first" else contextlib.nullcontext():
        support = encoder.embed(
            support_images.flatten(0, 1), n_groups=n_groups, mask=mask, weights=weights
        ).features
    return base_learner(
        support.unflatten(0, (n_tasks, -1)),
        support_labels,
        query.unflatten(0, (n_tasks, -1)),
        head.weight,
        head.bias,
        inner_lr=inner_lr,
        n_steps=inner_steps,
        order=order,
        support_mask=support_mask,
        backend=backend,
    )
