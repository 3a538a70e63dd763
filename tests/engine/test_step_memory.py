"""Memory of a step: chunks of whole tasks, tasks in pieces, and what happens where memory runs out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import EpisodicEngine
from mtl_fast.errors import InputError
from mtl_fast.nn.encoder import Embeddings
from tests.conv_cases import assert_near
from tests.engine.cases import (
    NORMS,
    ORDERS,
    TOLERANCE,
    Watched,
    assert_same_gradients,
    assert_same_state,
    gradients,
    make_encoder,
    make_engine,
    tasks,
)

by_norm = pytest.mark.parametrize("norm", NORMS)
by_order = pytest.mark.parametrize("order", ORDERS)


def watched_twins(
    store: ImageStore, images_per_chunk: int, learn: str = "kernel", **options: Any
) -> tuple[EpisodicEngine, EpisodicEngine]:
    """An engine that takes all images together, and its copy that takes so many at a time."""
    whole = make_engine(store, Watched(make_encoder(learn=learn)), **options)
    twin = copy.copy(whole)
    twin.encoder, twin.head = copy.deepcopy(whole.encoder), copy.deepcopy(whole.head)
    twin.images_per_chunk = images_per_chunk
    return whole, twin


@by_norm
@by_order
@pytest.mark.parametrize("images_per_chunk", [15, 31])
def test_chunked_equals_unchunked(
    small_store: ImageStore, norm: str, order: str, images_per_chunk: int
) -> None:
    """Tasks are of 15 images: one a chunk, or two (the last chunk is not full)."""
    whole, chunked = watched_twins(small_store, images_per_chunk, norm=norm, order=order)
    before = copy.deepcopy(whole.encoder)
    for start in (0, 5):
        episodes = tasks(small_store, 10)[start : start + 5]
        expected, out = whole.step(episodes), chunked.step(episodes)
        assert_near(out.loss, expected.loss, TOLERANCE)
        assert torch.equal(out.class_accuracy, expected.class_accuracy)
        assert_same_gradients(gradients(chunked), gradients(whole))
    n_images = [15 * n for n in {15: [1] * 5, 31: [2, 2, 1]}[images_per_chunk]]
    joint = (norm, order) == ("frozen", "second")
    assert [n for n, _ in chunked.encoder.seen] == 2 * (
        n_images if joint else [n * part // 15 for n in n_images for part in (9, 6)]
    )
    assert_same_state(chunked.encoder, whole.encoder)
    moved = not torch.equal(before.norms()[0].running_var, whole.encoder.norms()[0].running_var)
    assert moved == (norm == "running")


@by_norm
@by_order
@pytest.mark.parametrize("learn", ["kernel", "weights", "head"])
@pytest.mark.parametrize("images_per_chunk", [1, 4, 9, 14])
def test_a_task_that_does_not_fit_alone_is_taken_in_pieces(
    small_store: ImageStore, norm: str, order: str, learn: str, images_per_chunk: int
) -> None:
    """Never more images in flight than allowed, and the gradients, losses and running averages of the whole."""
    whole, pieces = watched_twins(small_store, images_per_chunk, learn, norm=norm, order=order)
    if norm != "frozen" and images_per_chunk < 9:
        with pytest.raises(InputError, match=rf"images_per_chunk is {images_per_chunk}, but .* at least 9"):
            pieces.step(tasks(small_store, 2))
        return
    for start in (0, 2):
        episodes = tasks(small_store, 4)[start : start + 2]
        expected, out = whole.step(episodes), pieces.step(episodes)
        assert_near(out.loss, expected.loss, TOLERANCE)
        assert torch.equal(out.class_accuracy, expected.class_accuracy)
        assert_same_gradients(gradients(pieces), gradients(whole))
    assert_same_state(pieces.encoder, whole.encoder)
    assert max(n for n, _ in pieces.encoder.seen) <= images_per_chunk
    # Two steps of two tasks: all images without a graph; then those whose gradient is asked for, with one.
    again = 0 if learn == "head" else 15 if order == "second" else 9
    assert sum(n for n, graph in pieces.encoder.seen if not graph) == 4 * 15
    assert sum(n for n, graph in pieces.encoder.seen if graph) == 4 * again


class Full:
    """An encoder's `embed` that has no memory for more than `limit` images, from the `n`th call on."""

    def __init__(self, engine: EpisodicEngine, limit: int, n: int = 0) -> None:
        self.embed, self.limit, self.n = engine.encoder.embed, limit, n
        engine.encoder.embed = self  # type: ignore[method-assign,assignment]

    def __call__(self, images: Tensor, **options: Any) -> Embeddings:
        self.n -= 1
        if self.n < 0 and len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.\nMore lines.")
        return self.embed(images, **options)


@by_norm
@by_order
def test_out_of_memory_halves_the_images_in_flight_once_and_says_so(
    small_store: ImageStore, norm: str, order: str
) -> None:
    """Also in the middle of a step: what the attempt had added and moved is gone, what the caller had is not."""
    whole = make_engine(small_store, norm=norm, order=order)
    halved = copy.copy(whole)
    halved.encoder, halved.head = copy.deepcopy(whole.encoder), copy.deepcopy(whole.head)
    said: list[str] = []
    halved.say, halved.images_per_chunk = said.append, 30
    # Two tasks of 15 images a chunk; the second chunk fails.
    Full(halved, limit=15, n=1 if (norm, order) == ("frozen", "second") else 2)
    episodes = tasks(small_store, 4)
    for engine in (whole, halved):
        engine.head.bias.grad = torch.ones_like(engine.head.bias)
        out = engine.step(episodes)
    assert said == ["out of memory with 30 images in flight: going on with images_per_chunk 15"]
    assert halved.images_per_chunk == 15
    assert_same_gradients(gradients(halved), gradients(whole))
    assert_same_state(halved.encoder, whole.encoder)
    assert out.loss.shape == (4,)
    halved.step(episodes)
    assert len(said) == 1


def test_the_second_time_is_an_error_of_one_line(small_store: ImageStore) -> None:
    engine = make_engine(small_store)
    engine.head.bias.grad = torch.ones_like(engine.head.bias)
    said: list[str] = []
    engine.say = said.append
    Full(engine, limit=7)
    with pytest.raises(InputError) as caught:
        engine.step(tasks(small_store, 2))
    assert said == ["out of memory with 30 images in flight: going on with images_per_chunk 15"]
    assert "15 images in flight (CUDA out of memory. Tried to allocate much.)" in str(caught.value)
    assert "--meta.images-per-chunk" in str(caught.value)
    assert "\n" not in str(caught.value)
    # What the caller had is as it was.
    assert torch.equal(engine.head.bias.grad, torch.ones_like(engine.head.bias))
    assert all(p.grad is None for p in engine.encoder.parameters())


def test_a_split_that_must_stay_whole_is_not_halved(small_store: ImageStore) -> None:
    engine = make_engine(small_store, norm="episode", images_per_chunk=15)
    Full(engine, limit=0)
    with pytest.raises(InputError, match="out of memory with 15 images in flight"):
        engine.step(tasks(small_store, 2))


def test_another_error_leaves_the_gradients_as_they_were(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(small_store, images_per_chunk=15)
    take: Callable[..., Any] = engine._take
    monkeypatch.setattr(engine, "_take", lambda *a: (take(*a), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        engine.step(tasks(small_store, 2))
    assert all(p.grad is None for p in (*engine.encoder.parameters(), *engine.head.parameters()))
