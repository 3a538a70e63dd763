"""Supervised pre-training as anyone writes it; the examples that start from a pre-trained network import it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mtl_fast import ImageStore, Preprocess


def pretrain(
    network: nn.Module,
    feature_dim: int,
    store: ImageStore,
    preprocess: Preprocess,
    *,
    n_epochs: int,
    lr: float = 3e-3,
) -> float:
    """Trains a network under a throw-away classifier of all classes; the last epoch's accuracy.

    Args:
        network: [N, 3, H, W] → [N, feature_dim]; left in evaluation mode.
        feature_dim: D.
        store: the training classes.
        preprocess: its normalisation.
        n_epochs: passes over the store.
        lr: AdamW's largest rate; it rises and falls once.
    """
    classifier = nn.Linear(feature_dim, store.n_classes)
    batches_per_epoch = -(-store.n_images // 64)
    optimizer = torch.optim.AdamW([*network.parameters(), *classifier.parameters()], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, n_epochs * batches_per_epoch)
    network.train()
    right = torch.zeros(())
    for _ in range(n_epochs):
        right = torch.zeros(())
        for rows in torch.randperm(store.n_images).split(64):
            logits, labels = classifier(network(preprocess(store, rows))), store.labels[rows]
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            schedule.step()
            right += (logits.argmax(dim=1) == labels).sum()
    network.eval()
    return float(right) / store.n_images
