"""`adapt_and_predict` against each task on its own through autograd, and against the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import EpisodicEngine, adapt_and_predict
from mtl_fast.episodes import Episodes
from mtl_fast.nn import Embeddings, LinearHead, NetworkEncoder, convert
from tests.conv_cases import assert_near
from tests.engine.cases import ORDERS, fitted, images, make_encoder, make_engine, tasks
from tests.nn.user_network import user_network

# Twelve layers of about 60 terms, batch statistics of as few as 24 values, and a loss over all of it.
TOLERANCE = 1000 * 12 * 60**0.5 * torch.finfo(torch.float64).eps
INNER: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 4}
by_order = pytest.mark.parametrize("order", ORDERS)
by_norm = pytest.mark.parametrize("norm", ["frozen", "episode"])


def drawn(store: ImageStore, episodes: Episodes) -> tuple[Tensor, Tensor, Tensor]:
    """Support images, their labels, query images."""
    support, query = (
        images(store, rows.flatten(), torch.float64).unflatten(0, rows.shape)
        for rows in (episodes.support, episodes.query)
    )
    return support, episodes.support_labels, query


def gradients(logits: Tensor, engine: EpisodicEngine) -> list[Tensor]:
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    return list(torch.autograd.grad(logits, parameters(engine), cotangent))


def parameters(engine: EpisodicEngine) -> list[Tensor]:
    return [*engine.encoder.scale_shift_parameters(), *engine.head.parameters()]


def one_by_one(
    engine: EpisodicEngine, support: Tensor, labels: Tensor, query: Tensor, order: str, norm: str
) -> Tensor:
    found, n_groups = [], int(norm == "episode")
    for t in range(len(support)):
        x, q = (engine.encoder.embed(part[t], n_groups=n_groups).features for part in (support, query))
        w, b = fitted(x, labels[t], engine.head.weight, engine.head.bias, 0.1, 4, order)
        found.append(q @ w.T + b)
    return torch.stack(found)


def assert_same_gradients(ours: list[Tensor], expected: list[Tensor]) -> None:
    # A shift before batch statistics has no gradient but rounding: compare with the largest of all.
    largest = max(float(g.abs().max()) for g in expected)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= TOLERANCE * largest


@by_norm
@by_order
@pytest.mark.parametrize("kind", ["common", "conv4"])
def test_logits_and_gradients_are_those_of_each_task_alone(
    small_store: ImageStore, order: Any, norm: Any, kind: str
) -> None:
    engine = make_engine(small_store, make_encoder(kind))
    support, labels, query = drawn(small_store, tasks(small_store, 4))
    ours = adapt_and_predict(
        engine.encoder, engine.head, support, labels, query, order=order, norm=norm, **INNER
    )
    expected = one_by_one(engine, support, labels, query, order, norm)
    assert ours.shape == (4, 9, 3)
    assert_near(ours, expected, TOLERANCE)
    assert_same_gradients(gradients(ours, engine), gradients(expected, engine))


@by_order
def test_it_is_what_the_engine_does(small_store: ImageStore, order: Any) -> None:
    engine, episodes = make_engine(small_store, order=order), tasks(small_store, 3)
    ours = adapt_and_predict(engine.encoder, engine.head, *drawn(small_store, episodes), order=order, **INNER)
    assert_near(ours, engine.query_logits(episodes).detach(), TOLERANCE)


@by_norm
@by_order
def test_tasks_of_fewer_shots_are_padded_under_a_mask(small_store: ImageStore, order: Any, norm: Any) -> None:
    engine = make_engine(small_store)
    support, labels, query = drawn(small_store, tasks(small_store, 2))
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
    padded = support.masked_fill(~mask[..., None, None, None], torch.nan)
    ours = adapt_and_predict(
        engine.encoder, engine.head, padded, labels, query, order=order, norm=norm, support_mask=mask, **INNER
    )
    expected = torch.cat(
        [
            one_by_one(
                engine, support[t : t + 1, mask[t]], labels[t : t + 1, mask[t]], query[t : t + 1], order, norm
            )
            for t in range(2)
        ]
    )
    assert_near(ours, expected, TOLERANCE)
    assert_same_gradients(gradients(ours, engine), gradients(expected, engine))


def test_first_order_builds_no_graph_of_the_support(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(small_store)
    embed, graphs = engine.encoder.embed, {}

    def watched(images: Tensor, **options: Any) -> Embeddings:
        out = embed(images, **options)
        graphs[len(images)] = out.features.requires_grad
        return out

    monkeypatch.setattr(engine.encoder, "embed", watched)
    given = drawn(small_store, tasks(small_store, 2))
    for order in ORDERS:
        adapt_and_predict(engine.encoder, engine.head, *given, order=order, **INNER)
        assert graphs == {12: order == "second", 18: True}


def test_a_user_s_network_through_the_second_derivative_too(small_store: ImageStore) -> None:
    encoder = NetworkEncoder(convert(user_network(), backend="torch"), 10)
    head = LinearHead(10, 3, generator=torch.Generator().manual_seed(1)).double()
    support, labels, query = drawn(small_store, tasks(small_store, 2))
    logits = adapt_and_predict(encoder, head, support, labels, query, backend="torch", **INNER)
    (first,) = torch.autograd.grad(logits.square().sum(), head.bias, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), encoder.network.last.scale)
    assert second.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"support_images": torch.zeros(6, 3, 16, 16)},
            r"support_images: expected \[6, n, 3, H, W\], a task a row",
        ),
        ({"query_images": torch.zeros(3, 9, 3, 16, 16)}, r"query_images: expected \[2, n, .* got \[3, 9"),
        ({"support_labels": torch.zeros(2, 5, dtype=torch.int64)}, r"support_labels: expected \[2, 6\]"),
        ({"support_mask": torch.ones(2, 5, dtype=torch.bool)}, r"support_mask: expected bool \[2, 6\]"),
        ({"support_mask": torch.ones(2, 6)}, r"support_mask: .* got torch\.float32 \[2, 6\]"),
        ({"norm": "running"}, "norm: 'running' is neither frozen nor episode"),
        ({"order": "third"}, "order: 'third' is neither first nor second"),
    ],
    ids=["four-dimensions", "tasks", "labels", "mask", "mask-dtype", "norm", "order"],
)
def test_what_does_not_fit_is_named(small_store: ImageStore, change: dict[str, Any], message: str) -> None:
    engine = make_engine(small_store)
    support, labels, query = drawn(small_store, tasks(small_store, 2))
    given = {"support_images": support, "support_labels": labels, "query_images": query, **INNER, **change}
    with pytest.raises(ValueError, match=message):
        adapt_and_predict(engine.encoder, engine.head, **given)


def test_dropout_is_an_error(small_store: ImageStore) -> None:
    engine = make_engine(small_store)
    engine.encoder.train()
    with pytest.raises(ValueError, match="training mode, with dropout"):
        adapt_and_predict(engine.encoder, engine.head, *drawn(small_store, tasks(small_store, 1)), **INNER)
