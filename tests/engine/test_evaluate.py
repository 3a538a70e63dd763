"""Evaluation against each task on its own; each distinct image embedded once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import EpisodicEngine, embed_episodes, embed_rows, evaluate, fit_and_score
from mtl_fast.episodes import Episodes
from mtl_fast.nn import Encoder
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


def logits_one_by_one(engine: EpisodicEngine, episodes: Episodes, norm: str) -> Tensor:
    n_groups, found = int(norm == "episode"), []
    for t in range(episodes.n_tasks):
        support, query = (
            engine.encoder.embed(
                images(engine.store, rows, torch.float64), n_groups=n_groups
            ).features.detach()
            for rows in (episodes.support[t], episodes.query[t])
        )
        w, b = fitted(
            support, episodes.support_labels[t], engine.head.weight, engine.head.bias, 0.2, 30, "first"
        )
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
