"""One meta-training step against the same tasks one by one through autograd; chunks; nothing read back."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import EpisodicEngine, Preprocess, evaluate
from mtl_fast.engine.base import class_accuracy
from mtl_fast.episodes import Episodes
from mtl_fast.nn import Encoder, LinearHead
from mtl_fast.nn.encoder import Embeddings
from tests.conv_cases import assert_near
from tests.engine.cases import (
    NORMS,
    ORDERS,
    PREPROCESS,
    TOLERANCE,
    Watched,
    assert_same_gradients,
    assert_same_state,
    gradients,
    make_encoder,
    make_engine,
    one_by_one,
    parameters,
    tasks,
)
from tests.read_back import NothingReadBack

by_norm = pytest.mark.parametrize("norm", NORMS)
by_order = pytest.mark.parametrize("order", ORDERS)


def check(engine: EpisodicEngine, episodes: Episodes) -> None:
    losses, accuracies, expected, encoder = one_by_one(engine, episodes)
    out = engine.step(episodes)
    assert_near(out.loss, losses, TOLERANCE)
    assert torch.equal(out.class_accuracy, accuracies)
    assert not out.loss.requires_grad
    assert_same_gradients(gradients(engine), expected)
    assert_same_state(engine.encoder, encoder)


@by_norm
@by_order
@pytest.mark.parametrize("learn", ["kernel", "filter", "affine", "weights", "head"])
def test_a_step_is_its_tasks_one_by_one(small_store: ImageStore, norm: str, order: str, learn: str) -> None:
    engine = make_engine(small_store, make_encoder("common", learn), norm=norm, order=order)
    check(engine, tasks(small_store, 3))


@by_norm
@pytest.mark.parametrize("kind", ["tensorflow", "conv4", "resnet25"])
def test_with_every_encoder(small_store: ImageStore, norm: str, kind: str) -> None:
    check(make_engine(small_store, make_encoder(kind), norm=norm), tasks(small_store, 2))


@by_order
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 5, 1, 3), (4, 2, 3, 2)], ids=str)
def test_tasks_of_every_shape(small_store: ImageStore, order: str, shape: tuple[int, ...]) -> None:
    engine = make_engine(small_store, n_way=shape[1], order=order)
    check(engine, tasks(small_store, *shape))


@by_norm
@pytest.mark.filterwarnings("ignore:norm")
def test_effective_weights_are_computed_once_a_step(
    small_store: ImageStore, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folds = make_engine(small_store, norm=norm), []
    engine.images_per_chunk = 15
    refresh = engine.encoder.refresh
    monkeypatch.setattr(
        engine.encoder,
        "refresh",
        lambda *, fold, dtype: (folds.append(fold), refresh(fold=fold, dtype=dtype))[1],
    )
    engine.step(tasks(small_store, 3))
    assert folds == [norm == "frozen"]


def test_gradients_add_up(small_store: ImageStore) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 4)
    engine.step(episodes[:1])
    first = gradients(engine)
    engine.step(episodes[1:])
    rest = gradients(engine)
    engine.step(episodes[:1])
    engine.step(episodes[1:])
    for name, both in gradients(engine).items():
        assert torch.equal(both, first[name] + rest[name])


@by_norm
@by_order
def test_support_images_have_a_graph_in_second_order_only(
    small_store: ImageStore, norm: str, order: str
) -> None:
    encoder = Watched(make_encoder())
    make_engine(small_store, encoder, norm=norm, order=order).step(tasks(small_store, 2))
    # Two tasks of 6 support and 9 query images.
    if (norm, order) == ("frozen", "second"):
        assert encoder.seen == [(30, True)]
    else:
        assert encoder.seen == [(18, True), (12, order == "second")]


@by_norm
@by_order
def test_learning_the_head_alone_builds_no_graph_of_the_encoder(
    small_store: ImageStore, norm: str, order: str
) -> None:
    encoder = Watched(make_encoder(learn="head"))
    engine = make_engine(small_store, encoder, norm=norm, order=order)
    engine.step(tasks(small_store, 2))
    assert not any(graph for _, graph in encoder.seen)
    assert gradients(engine).keys() == {"head.weight", "head.bias"}
    assert all(p.grad is None for p in encoder.parameters())


def test_a_frozen_head_gets_no_gradient(small_store: ImageStore) -> None:
    engine = make_engine(small_store)
    engine.head.requires_grad_(False)
    engine.step(tasks(small_store, 2))
    assert engine.head.weight.grad is None
    assert all(name.startswith("encoder") for name in gradients(engine))


class Colours(Encoder):
    """Features are the colour of the first pixel, in 0..1."""

    feature_dim = 3

    def embed(self, images: Tensor, **options: Any) -> Embeddings:
        return Embeddings(images[:, :, 0, 0], [])


def test_class_accuracies_of_a_case_made_by_hand() -> None:
    """Red, green, blue; one query of class 0 is green, and all of class 2 are red or green."""
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    colours = [red, green, blue, red, green, green, green, red, green]
    labels = torch.tensor([0, 1, 2, 0, 0, 1, 1, 2, 2])
    pictures = torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(-1, 2, 2, -1).contiguous()
    store = ImageStore(pictures, labels, ("r", "g", "b"))
    support, query = torch.tensor([[0, 1, 2]]), torch.arange(3, 9)[None]
    episodes = Episodes(
        torch.tensor([[0, 1, 2]]),
        support,
        query,
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[0, 0, 1, 1, 2, 2]]),
    )
    head = LinearHead(3, 3, init="zeros")
    with torch.no_grad():
        head.weight.copy_(2 * torch.eye(3))
    engine = EpisodicEngine(
        Colours(), head, store, Preprocess((0, 0, 0), (255, 255, 255)), inner_lr=0.5, inner_steps=3
    )
    out = engine.step(episodes)
    assert out.class_accuracy.tolist() == [[0.5, 1.0, 0.0]]
    # The inner loop keeps the symmetry: a own colour's logit is above the other two by the same margin.
    weight = torch.eye(3) * 2
    bias = torch.zeros(3)
    for _ in range(3):
        residual = (weight.T + bias).softmax(dim=1) - torch.eye(3)
        weight, bias = weight - 0.5 / 3 * residual.T, bias - 0.5 / 3 * residual.sum(dim=0)
    logits = (pictures[3:, 0, 0].float() / 255) @ weight.T + bias
    assert_near(out.loss[0], F.cross_entropy(logits, episodes.query_labels[0]), 1e-6)


def test_class_accuracy_counts_each_class_of_each_task() -> None:
    labels = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    guesses = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1]])
    accuracy = class_accuracy(F.one_hot(guesses, 2).float(), labels, 2)
    assert_near(accuracy, torch.tensor([[1 / 3, 1.0], [0.0, 1 / 3]]), 1e-7)


def test_the_order_of_the_support_set_changes_nothing_but_rounding(small_store: ImageStore) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 3)
    expected, wanted = engine.step(episodes), gradients(engine)
    order = torch.rand(episodes.support.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    support, labels = (x.gather(1, order) for x in (episodes.support, episodes.support_labels))
    out = engine.step(replace(episodes, support=support, support_labels=labels))
    assert_near(out.loss, expected.loss, TOLERANCE)
    assert torch.equal(out.class_accuracy, expected.class_accuracy)
    assert_same_gradients(gradients(engine), wanted)


class Tied(Watched):
    """Holds the head as well."""

    def __init__(self, inner: Encoder, head: LinearHead) -> None:
        super().__init__(inner)
        self.head = head


def test_a_parameter_of_both_encoder_and_head_has_its_gradient_once(small_store: ImageStore) -> None:
    engine, episodes = make_engine(small_store, Watched(make_encoder())), tasks(small_store, 3)
    found = []
    for encoder in (engine.encoder, Tied(make_encoder(), engine.head)):
        engine.encoder = encoder
        for _ in range(2):  # the second is added to the first
            engine.step(episodes)
        learned = [*encoder.inner.scale_shift_parameters(), *engine.head.parameters()]
        found.append([p.grad for p in learned])
        engine.head.zero_grad()
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


def test_a_step_in_which_nothing_can_learn_is_an_error(small_store: ImageStore) -> None:
    engine, episodes = make_engine(small_store), tasks(small_store, 1)
    for off in (torch.no_grad, torch.inference_mode):
        with (
            off(),
            pytest.raises(ValueError, match=r"step: gradients are off; call it outside torch\.no_grad"),
        ):
            engine.step(episodes)
    engine.encoder.freeze()
    engine.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"step: nothing learns, .* call encoder\.enable_scale_shift\(\)"):
        engine.step(episodes)


def test_the_watch_sees_what_is_read_back() -> None:
    x = torch.arange(3.0)
    for read in (lambda: x[0].item(), lambda: bool(x[0] > 1), lambda: x[x > 0], lambda: x.nonzero()):
        with NothingReadBack(), pytest.raises(AssertionError, match="back"):
            read()


@by_norm
@by_order
@pytest.mark.parametrize("learn", ["kernel", "filter"])
def test_a_step_reads_nothing_back(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch, norm: str, order: str, learn: str
) -> None:
    # The range of indices is checked on the CPU alone, where nothing waits.
    monkeypatch.setattr(sys.modules["mtl_fast.ops.images"], "_check_window", lambda *_: None)
    engine = make_engine(
        small_store,
        make_encoder(learn=learn, dtype=torch.float32),
        norm=norm,
        order=order,
        images_per_chunk=20,
    )
    episodes = tasks(small_store, 3)
    with NothingReadBack():
        out = engine.step(episodes)
    assert torch.isfinite(out.loss).all()


@by_norm
@by_order
def test_a_step_runs_where_tensors_hold_no_values(small_store: ImageStore, norm: str, order: str) -> None:
    """On the meta device: shapes alone decide what is computed."""
    engine = make_engine(
        small_store, make_encoder("conv4", dtype=torch.float32), norm=norm, order=order, images_per_chunk=20
    )
    engine.encoder.to("meta")
    engine.head.to("meta")
    engine.store = small_store.to("meta")
    out = engine.step(tasks(small_store, 3).to("meta"))
    assert out.loss.is_meta
    assert out.loss.shape == (3,)
    assert all(p.grad.is_meta for _, p in parameters(engine))


def test_unknown_settings_are_errors(small_store: ImageStore) -> None:
    with pytest.raises(ValueError, match="norm: 'batch' is not one of frozen, episode, running"):
        make_engine(small_store, norm="batch")
    with pytest.raises(ValueError, match="order: 'third' is neither first nor second"):
        make_engine(small_store, order="third")
    with pytest.raises(ValueError, match="inner_lr: expected a finite number, at least 0, got -1"):
        make_engine(small_store, inner_lr=-1)
    with pytest.raises(TypeError, match="a learned step size is not differentiated"):
        make_engine(small_store, inner_lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match="inner_steps: expected at least 0, got -3"):
        make_engine(small_store, inner_steps=-3)


@pytest.mark.parametrize(
    "labels", [[0, 0, 0, 1, 1, 2, 1, 2, 2], [0, 0, 1, 1, 1, 1, 2, 2, 2]], ids=["order", "count"]
)
def test_queries_are_in_the_order_of_their_classes(small_store: ImageStore, labels: list[int]) -> None:
    episodes = tasks(small_store, 2)
    n_query = episodes.n_query
    own = torch.tensor(labels)
    shuffled = replace(episodes, query_labels=torch.stack([episodes.query_labels[0], own]))
    says = f"{own.tolist()}; give queries in the order of their classes, {n_query} of each"
    engine = make_engine(small_store)
    with pytest.raises(ValueError, match=re.escape(says)):
        engine.step(shuffled)
    with pytest.raises(ValueError, match=re.escape(says)):
        evaluate(engine.encoder, engine.head, small_store, shuffled, PREPROCESS, inner_lr=0.1, inner_steps=1)
    assert class_accuracy(torch.zeros(1, 3 * n_query, 3, device="meta"), own[None].to("meta"), 3).shape == (
        1,
        3,
    )


def test_dropout_is_an_error(small_store: ImageStore) -> None:
    engine = make_engine(small_store)
    engine.encoder.train()
    with pytest.raises(ValueError, match=r"training mode, with dropout 0\.1; call encoder\.eval\(\)"):
        engine.step(tasks(small_store, 1))
    # An encoder inside another, set to training mode apart from it.
    engine.encoder = Watched(make_encoder())
    engine.encoder.inner.train()
    with pytest.raises(
        ValueError, match=r"encoder: its ResNet12 is in training mode; call encoder\.eval\(\)"
    ):
        engine.step(tasks(small_store, 1))
    engine.encoder.eval()
    engine.step(tasks(small_store, 1))


@pytest.mark.parametrize("learn", ["kernel", "filter"])
def test_batch_statistics_warn_of_what_they_cancel(small_store: ImageStore, learn: str) -> None:
    encoder = make_encoder(learn=learn)
    head = LinearHead(encoder.feature_dim, 3).double()
    for norm in ("episode", "running"):
        with pytest.warns(UserWarning, match=f"norm '{norm}': .* 12 .* shift has no effect") as caught:
            EpisodicEngine(encoder, head, small_store, PREPROCESS, norm=norm)
        assert ("filter's scale" in str(caught[0].message)) == (learn == "filter")
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EpisodicEngine(encoder, head, small_store, PREPROCESS, norm="frozen")
        for other in ("weights", "head"):
            EpisodicEngine(make_encoder(learn=other), head, small_store, PREPROCESS, norm="episode")
