"""Evaluation against each task on its own; each distinct image embedded once."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import (
    EmbeddedEpisodes,
    EpisodicEngine,
    accuracy_by_step,
    distinct_images,
    embed_episodes,
    embed_rows,
    embedded_parts,
    evaluate,
    fit_and_predict,
    fit_and_score,
)
from mtl_fast.episodes import Episodes
from mtl_fast.nn import Encoder, LinearHead
from mtl_fast.nn.encoder import Embeddings
from tests.conv_cases import assert_near
from tests.engine.cases import NORMS, PREPROCESS, fitted, images, make_encoder, make_engine, tasks

TOLERANCE = 1000 * 12 * 60**0.5 * torch.finfo(torch.float64).eps
by_norm = pytest.mark.parametrize("norm", NORMS)


def run(engine: EpisodicEngine, episodes: Episodes, **options: Any) -> Any:
    return evaluate(
        engine.encoder,
        engine.head,
        engine.store,
        episodes,
        PREPROCESS,
        inner_lr=0.2,
        inner_steps=30,
        **options,
    )


def logits_one_by_one(
    engine: EpisodicEngine, episodes: Episodes, norm: str, *, mirror_support: bool = False, n_steps: int = 30
) -> Tensor:
    n_groups, found = int(norm == "episode"), []
    for t in range(episodes.n_tasks):
        support, query = (
            images(engine.store, rows, torch.float64) for rows in (episodes.support[t], episodes.query[t])
        )
        labels = episodes.support_labels[t]
        if mirror_support:
            support, labels = torch.cat([support, support.flip(3)]), torch.cat([labels, labels])
        support, query = (
            engine.encoder.embed(x, n_groups=n_groups).features.detach() for x in (support, query)
        )
        w, b = fitted(support, labels, engine.head.weight, engine.head.bias, 0.2, n_steps, "first")
        found.append((query @ w.T + b).detach())
    return torch.stack(found)


@by_norm
@pytest.mark.parametrize("kind", ["common", "tensorflow", "conv4"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (11, 3, 2, 3)], ids=["one", "many"])
def test_it_is_each_task_on_its_own(
    small_store: ImageStore, norm: str, kind: str, shape: tuple[int, ...]
) -> None:
    engine, episodes = (
        make_engine(small_store, make_encoder(kind), n_way=shape[1]),
        tasks(small_store, *shape),
    )
    out = run(engine, episodes, norm=norm)
    logits = logits_one_by_one(engine, episodes, norm)
    best = logits.topk(2, dim=2).values
    # Nothing here hangs by a rounding.
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-9
    assert torch.equal(out.predictions, logits.argmax(dim=2))
    right = (out.predictions == episodes.query_labels).float()
    assert_near(out.accuracy, right.mean(dim=1), 1e-6)
    for c in range(shape[1]):
        per_class = [
            row[labels == c].mean() for row, labels in zip(right, episodes.query_labels, strict=True)
        ]
        assert torch.equal(out.class_accuracy[:, c], torch.stack(per_class))


class Counted(Encoder):
    """Notes the first values of each image that is embedded."""

    def __init__(self, inner: Encoder) -> None:
        super().__init__()
        self.inner, self.feature_dim, self.seen, self.graphs = inner, inner.feature_dim, [], []
        self.eval()

    def embed(self, images: Tensor, **options: Any) -> Embeddings:
        out = self.inner.embed(images, **options)
        self.seen.append(images)
        self.graphs.append(out.features.requires_grad)
        return out


@pytest.mark.parametrize("norm", ["frozen", "running"])
def test_each_distinct_image_is_embedded_once(small_store: ImageStore, norm: str) -> None:
    encoder = Counted(make_encoder())
    engine, episodes = make_engine(small_store, encoder), tasks(small_store, 50)
    run(engine, episodes, norm=norm, images_per_chunk=7)
    rows = torch.cat([episodes.support.flatten(), episodes.query.flatten()]).unique()
    assert len(rows) < episodes.support.numel()
    assert max(map(len, encoder.seen)) == 7
    seen = torch.cat(encoder.seen)
    assert len(seen) == len(rows)
    assert_near(seen, images(small_store, rows, torch.float64), 1e-14)
    assert not any(encoder.graphs)


def test_episode_norm_embeds_whole_tasks_a_chunk_at_a_time(small_store: ImageStore) -> None:
    encoder = Counted(make_encoder())
    engine, episodes = make_engine(small_store, encoder), tasks(small_store, 5)
    expected = logits_one_by_one(engine, episodes, "episode").argmax(dim=2)
    for images_per_chunk, sizes in ((1, [6, 9] * 5), (31, [12, 18, 12, 18, 6, 9]), (256, [30, 45])):
        encoder.seen.clear()
        out = run(engine, episodes, norm="episode", images_per_chunk=images_per_chunk)
        assert [len(x) for x in encoder.seen] == sizes
        assert torch.equal(out.predictions, expected)


class Pixels(Encoder):
    """All pixels as features; no parameter."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim

    def embed(self, images: Tensor, **options: Any) -> Embeddings:
        return Embeddings(images.flatten(1), [])


@by_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_an_encoder_without_parameters(small_store: ImageStore, norm: str, dtype: torch.dtype) -> None:
    encoder = Pixels(small_store.images[0].numel())
    head = LinearHead(encoder.feature_dim, 3, init="zeros").to(dtype)
    episodes = tasks(small_store, 4)
    found = evaluate(
        encoder, head, small_store, episodes, PREPROCESS, norm=norm, inner_lr=1e-3, inner_steps=20
    )
    logits = []
    for t in range(4):
        support, query = (
            images(small_store, rows[t], torch.float64).flatten(1)
            for rows in (episodes.support, episodes.query)
        )
        start = head.weight.double(), head.bias.double()
        w, b = fitted(support, episodes.support_labels[t], *start, 1e-3, 20, "first")
        logits.append((query @ w.T + b).detach())
    best = torch.stack(logits).topk(2, dim=2).values
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-3  # nothing here hangs by a rounding
    assert torch.equal(found.predictions, torch.stack(logits).argmax(dim=2))


@by_norm
def test_batches_of_tasks_change_nothing(small_store: ImageStore, norm: str) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 7)
    expected = run(engine, episodes, norm=norm)
    for options in ({"tasks_per_batch": 1}, {"tasks_per_batch": 3}, {"images_per_chunk": 4}):
        out = run(engine, episodes, norm=norm, **options)
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b)


@by_norm
def test_it_leaves_everything_as_it_was(small_store: ImageStore, norm: str) -> None:
    engine = make_engine(small_store)
    before = copy.deepcopy(engine.encoder.state_dict())
    out = run(engine, tasks(small_store, 2), norm=norm)
    assert not any(t.requires_grad for t in out)
    assert all(torch.equal(value, before[name]) for name, value in engine.encoder.state_dict().items())
    assert all(p.grad is None for p in (*engine.encoder.parameters(), *engine.head.parameters()))
    assert torch.is_grad_enabled()


def test_features_are_found_by_row_and_serve_many_heads(small_store: ImageStore) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 6)
    embedded = embed_episodes(engine.encoder, small_store, episodes, PREPROCESS, images_per_chunk=5)
    for place, rows in ((embedded.support, episodes.support), (embedded.query, episodes.query)):
        direct = embed_rows(engine.encoder, small_store, rows.flatten(), PREPROCESS)
        assert_near(embedded.features[place].flatten(0, 1), direct, TOLERANCE)
    for inner_lr in (0.2, 0.01):
        out = fit_and_score(embedded, engine.head, inner_lr=inner_lr, inner_steps=30, tasks_per_batch=4)
        expected = evaluate(
            engine.encoder, engine.head, small_store, episodes, PREPROCESS, inner_lr=inner_lr, inner_steps=30
        )
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@by_norm
def test_dropout_is_an_error(small_store: ImageStore, norm: str) -> None:
    engine = make_engine(small_store)
    engine.encoder.train()
    with pytest.raises(ValueError, match=r"training mode, with dropout 0\.1; call encoder\.eval\(\)"):
        run(engine, tasks(small_store, 1), norm=norm)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"norm": "batch"}, "norm: 'batch' is not one of frozen, episode, running"),
        ({"adapt": "whole"}, "adapt: 'whole' is neither head nor all"),
        ({"inner_lr": -1.0}, "inner_lr: expected a finite number, at least 0, got -1.0"),
        ({"inner_lr": math.nan}, "inner_lr: expected a finite number"),
        ({"inner_steps": -3}, "inner_steps: expected at least 0, got -3"),
        ({"tasks_per_batch": 0}, "tasks_per_batch: expected at least 1, got 0"),
        ({"tasks_per_batch": -1}, "tasks_per_batch: expected at least 1, got -1"),
        ({"images_per_chunk": 0}, "images_per_chunk: expected at least 1, got 0"),
        ({"images_per_chunk": -1}, "images_per_chunk: expected at least 1, got -1"),
    ],
    ids=str,
)
def test_settings_are_checked_at_the_door(small_store: ImageStore, options: Any, says: str) -> None:
    engine, episodes = make_engine(small_store, make_encoder(learn="head")), tasks(small_store, 2)
    adapts = ("head",) if "adapt" in options else ("head", "all")
    for adapt in adapts:
        given = {"inner_lr": 0.2, "inner_steps": 3, "adapt": adapt, **options}
        with pytest.raises(ValueError, match=says):
            evaluate(engine.encoder, engine.head, small_store, episodes, PREPROCESS, **given)


def test_settings_of_the_parts_are_checked_at_the_door(small_store: ImageStore) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 2)
    embedded = embed_episodes(engine.encoder, small_store, episodes, PREPROCESS)
    for call in (fit_and_predict, fit_and_score, accuracy_by_step):
        with pytest.raises(ValueError, match="tasks_per_batch: expected at least 1, got 0"):
            call(embedded, engine.head, **FIT, tasks_per_batch=0)
    with pytest.raises(ValueError, match="inner_steps: expected at least 0, got -1"):
        accuracy_by_step(embedded, engine.head, inner_lr=0.1, inner_steps=-1)
    with pytest.raises(ValueError, match="images_per_chunk: expected at least 1, got 0"):
        embed_episodes(engine.encoder, small_store, episodes, PREPROCESS, images_per_chunk=0)
    with pytest.raises(ValueError, match="norm: 'batch' is not one of"):
        all_parts(engine, episodes, "batch")


# The package's `evaluate` is the function.
module = sys.modules["mtl_fast.engine.evaluate"]
FIT: dict[str, Any] = {"inner_lr": 0.2, "inner_steps": 30}


def all_parts(
    engine: EpisodicEngine, episodes: Episodes, norm: Any, **options: Any
) -> list[EmbeddedEpisodes]:
    return list(embedded_parts(engine.encoder, engine.store, episodes, PREPROCESS, norm=norm, **options))


@by_norm
@pytest.mark.parametrize("mirror_support", [False, True], ids=["plain", "mirrored"])
def test_logits_are_those_of_the_plain_way_task_by_task(
    small_store: ImageStore, norm: str, mirror_support: bool
) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 9)
    parts = all_parts(engine, episodes, norm, mirror_support=mirror_support, images_per_chunk=50)
    assert len(parts) == (5 if norm == "episode" and mirror_support else 3 if norm == "episode" else 1)
    logits = torch.cat([fit_and_predict(part, engine.head, **FIT, tasks_per_batch=4) for part in parts])
    expected = logits_one_by_one(engine, episodes, norm, mirror_support=mirror_support)
    for ours, plain in zip(logits, expected, strict=True):
        assert_near(ours, plain, TOLERANCE)
    out = run(engine, episodes, norm=norm, mirror_support=mirror_support)
    assert torch.equal(out.predictions, expected.argmax(dim=2))


@pytest.mark.parametrize("norm", ["frozen", "running"])
def test_each_distinct_support_image_is_embedded_once_more_mirrored(
    small_store: ImageStore, norm: str
) -> None:
    encoder = Counted(make_encoder())
    engine, episodes = make_engine(small_store, encoder), tasks(small_store, 4, n_shot=1, n_query=1)
    run(engine, episodes, norm=norm, mirror_support=True, images_per_chunk=5)
    rows = torch.cat([episodes.support.flatten(), episodes.query.flatten()]).unique()
    support = episodes.support.unique()
    assert len(rows) < episodes.support.numel() + episodes.query.numel()
    expected = [images(small_store, part, torch.float64) for part in (rows, support)]
    seen = torch.cat(encoder.seen)
    assert len(seen) == len(rows) + len(support)
    assert_near(seen, torch.cat([expected[0], expected[1].flip(3)]), 1e-14)


def test_distinct_images_are_in_the_store_s_order(small_store: ImageStore) -> None:
    episodes = tasks(small_store, 3)
    rows, mirrored, support, query = distinct_images(episodes, small_store.n_images)
    assert mirrored is None
    assert torch.equal(rows, torch.cat([episodes.support.flatten(), episodes.query.flatten()]).unique())
    assert torch.equal(rows[support], episodes.support)
    assert torch.equal(rows[query], episodes.query)


def random_features(store: ImageStore, n_tasks: int, *, mirror_support: bool) -> EmbeddedEpisodes:
    """Classes that overlap: some steps make tasks better, but not all right."""
    g = torch.Generator().manual_seed(2)
    features, mirrored = (
        torch.randn(7, 10, generator=g, dtype=torch.float64)[store.labels]
        + 2 * torch.randn(store.n_images, 10, generator=g, dtype=torch.float64)
        for _ in range(2)
    )
    return EmbeddedEpisodes.of_store(tasks(store, n_tasks), features, mirrored if mirror_support else None)


@pytest.mark.parametrize("mirror_support", [False, True], ids=["plain", "mirrored"])
def test_accuracy_by_step_is_that_of_so_many_steps(small_store: ImageStore, mirror_support: bool) -> None:
    embedded = random_features(small_store, 40, mirror_support=mirror_support)
    head = LinearHead(10, 3, generator=torch.Generator().manual_seed(3)).double()
    by_step = accuracy_by_step(embedded, head, inner_lr=0.2, inner_steps=7, tasks_per_batch=9)
    assert by_step.shape == (40, 8)
    assert not by_step.requires_grad
    assert len(by_step.mean(dim=0).unique()) > 5
    for n_steps in range(8):
        accuracy = fit_and_score(embedded, head, inner_lr=0.2, inner_steps=n_steps).accuracy
        assert_near(by_step[:, n_steps], accuracy, 1e-6)
        for t in range(3):
            support, query = (embedded.features[place[t]] for place in (embedded.support, embedded.query))
            w, b = fitted(support, embedded.support_labels[t], head.weight, head.bias, 0.2, n_steps, "first")
            right = (query @ w.T + b).argmax(dim=1) == embedded.episodes.query_labels[t]
            assert float(by_step[t, n_steps]) == pytest.approx(float(right.float().mean()))


def test_accuracy_by_step_bounds_the_logits_in_flight(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded, head = (
        random_features(small_store, 7, mirror_support=False),
        LinearHead(10, 3, init="zeros").double(),
    )
    expected = accuracy_by_step(embedded, head, **FIT)
    sizes: list[int] = []
    original = module.query_logits_by_step

    def spy(*arguments: Any, **options: Any) -> Tensor:
        out = original(*arguments, **options)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(module, "query_logits_by_step", spy)
    for bound, n_batches in ((1, 7), (2 * 31 * 9 * 3, 4), (10**9, 1)):
        sizes.clear()
        monkeypatch.setattr(module, "_LOGITS_IN_FLIGHT", bound)
        assert torch.equal(accuracy_by_step(embedded, head, **FIT), expected)
        assert len(sizes) == n_batches
        assert max(sizes) <= max(bound, 31 * 9 * 3)


@by_norm
def test_a_share_of_the_tasks_is_that_part_of_all(small_store: ImageStore, norm: str) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 7)
    expected = run(engine, episodes, norm=norm)
    for share in (slice(0, 3), slice(3, 7), slice(2, 2)):
        out = run(engine, episodes[share], norm=norm)
        assert all(torch.equal(a, b[share]) for a, b in zip(out, expected, strict=True))
    (embedded,) = all_parts(engine, episodes, "frozen")
    assert torch.equal(
        fit_and_predict(embedded[3:5], engine.head, **FIT), fit_and_predict(embedded, engine.head, **FIT)[3:5]
    )


@pytest.mark.parametrize("mirror_support", [False, True], ids=["plain", "mirrored"])
def test_features_of_a_whole_store_serve_as_well(small_store: ImageStore, mirror_support: bool) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 5)
    rows = torch.arange(small_store.n_images)
    features, mirrored = (
        embed_rows(engine.encoder, small_store, rows, PREPROCESS, mirrored=flip)
        for flip in (None, torch.ones_like(rows, dtype=torch.bool))
    )
    assert not torch.equal(features, mirrored)
    embedded = EmbeddedEpisodes.of_store(episodes, features, mirrored if mirror_support else None)
    expected = logits_one_by_one(engine, episodes, "frozen", mirror_support=mirror_support)
    assert_near(fit_and_predict(embedded, engine.head, **FIT), expected, TOLERANCE)
