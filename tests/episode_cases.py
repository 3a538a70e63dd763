"""What the tests of episodes and of hard tasks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.episodes import Episodes, EpisodeSampler, HardTaskPool
from mtl_fast.random_streams import RandomStreams

N_WAY, N_SHOT, N_QUERY = 3, 2, 3


def make_store(counts=(5, 9, 7, 30, 6, 11, 5)) -> ImageStore:
    """Classes of unequal size, their rows scattered over the store."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.zeros(len(labels), 1, 1, 3, dtype=torch.uint8)
    return ImageStore(images, labels, tuple(f"class{i}" for i in range(len(counts))), name="birds")


def make_sampler(store=None, seed=0, shape=(N_WAY, N_SHOT, N_QUERY), device=None) -> EpisodeSampler:
    return EpisodeSampler(store or make_store(), *shape, RandomStreams(seed).stream("tasks"), device)


def make_pool(mode="resample", seed=0, sampler=None, **options) -> HardTaskPool:
    stream = RandomStreams(seed).stream("hard_tasks")
    return HardTaskPool(sampler or make_sampler(seed=seed), mode, stream, **options)


def fail(pool: HardTaskPool, sampler: EpisodeSampler, classes) -> Episodes:
    """Tasks that fail on `classes`, one each, beside random other ones."""
    columns = [[m, *[c for c in range(sampler.n_classes) if c != m][: N_WAY - 1]] for m in classes]
    episodes = sampler.sample_classes(torch.tensor(columns))
    pool.add(episodes, torch.tensor([[0.0] + [1.0] * (N_WAY - 1)] * len(columns)))
    return episodes


def check(episodes: Episodes, store: ImageStore, n_tasks: int, shape=(N_WAY, N_SHOT, N_QUERY)) -> None:
    """What holds for every task, random or hard."""
    n_way, n_shot, n_query = shape
    assert (episodes.n_tasks, episodes.n_way, episodes.n_shot, episodes.n_query) == (n_tasks, *shape)
    assert episodes.support.shape == episodes.support_labels.shape == (n_tasks, n_way * n_shot)
    assert episodes.query.shape == episodes.query_labels.shape == (n_tasks, n_way * n_query)
    assert {tensor.dtype for tensor in vars(episodes).values()} == {torch.int64}
    for classes in episodes.classes.tolist():
        assert len(set(classes)) == n_way
    for rows in torch.cat([episodes.support, episodes.query], 1).tolist():
        assert len(set(rows)) == n_way * (n_shot + n_query)
    for rows, labels in (
        (episodes.support, episodes.support_labels),
        (episodes.query, episodes.query_labels),
    ):
        assert torch.equal(store.labels[rows], episodes.classes.gather(1, labels))
        assert torch.equal(labels, labels.sort(1).values)


def assert_equal(a: Episodes, b: Episodes) -> None:
    for name in vars(a):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def joined(parts: list[Episodes]) -> Episodes:
    return Episodes(*(torch.cat(tensors) for tensors in zip(*(vars(p).values() for p in parts), strict=True)))


def assert_uniform(counts: Tensor, expected: Tensor | float) -> None:
    """Chi-square of `counts`: mean k - 1, standard deviation sqrt(2 (k - 1)); five of them are allowed."""
    df = counts.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < df + 5 * math.sqrt(2 * df), counts
