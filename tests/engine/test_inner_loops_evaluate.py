"""Evaluation with an inner loop of all weights, against each task on its own in torch.nn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import evaluate, evaluate_all_weights
from mtl_fast.nn import LinearHead
from tests.conv_cases import assert_near
from tests.engine.cases import PREPROCESS, tasks, whole_engine
from tests.engine.test_inner_loops import TOLERANCE, by_norm, one_by_one


@by_norm
def test_evaluation_is_each_task_on_its_own(small_store: ImageStore, norm: str) -> None:
    """With `running` norm the statistics of the test are the stored ones."""
    engine = whole_engine(small_store, norm="episode" if norm == "episode" else "frozen", order="first")
    episodes = tasks(small_store, 5)
    before = copy.deepcopy(engine.encoder.state_dict())
    expected = {}
    for n_steps in (0, 2, 5):
        engine.inner_steps = n_steps
        expected[n_steps] = one_by_one(engine, episodes)[2]
        margin = expected[n_steps].topk(2, dim=2).values
        assert float((margin[..., 0] - margin[..., 1]).min()) > 1e-9  # nothing here hangs by a rounding
    parts: Any = (engine.encoder.requires_grad_(False), engine.head, small_store, episodes, PREPROCESS)
    for images_per_chunk in (1, 31, 256):
        found = evaluate_all_weights(
            *parts, inner_lr=0.05, n_steps=[0, 2, 5], norm=norm, images_per_chunk=images_per_chunk
        )
        for evaluation, logits in zip(found, expected.values(), strict=True):
            assert torch.equal(evaluation.predictions, logits.argmax(dim=2))
            right = (evaluation.predictions == episodes.query_labels).float()
            assert_near(evaluation.accuracy, right.mean(dim=1), 1e-6)
            assert not evaluation.accuracy.requires_grad
    one = evaluate(*parts, inner_lr=0.05, inner_steps=2, norm=norm, adapt="all")
    assert all(torch.equal(a, b) for a, b in zip(one, found[1], strict=True))
    assert all(torch.equal(value, before[name]) for name, value in engine.encoder.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("norm", ["frozen", "episode"])
def test_mirrored_support_is_more_images(small_store: ImageStore, norm: str) -> None:
    engine, episodes = whole_engine(small_store, norm=norm, order="first"), tasks(small_store, 3)
    plain, expected = (one_by_one(engine, episodes, mirrored=mirrored)[2] for mirrored in (False, True))
    engine.encoder.requires_grad_(False)
    (logits,) = engine.query_logits_after([3], episodes, mirror_support=True)
    assert_near(logits.detach(), expected, TOLERANCE)
    assert (plain - expected).abs().max() > 1e-3
    found = evaluate(
        engine.encoder,
        engine.head,
        small_store,
        episodes,
        PREPROCESS,
        inner_lr=0.05,
        inner_steps=3,
        norm=engine.norm,
        adapt="all",
        mirror_support=True,
        images_per_chunk=42,
    )
    assert torch.equal(found.predictions, expected.argmax(dim=2))


def test_evaluation_inside_inference_mode_equal_to_the_bit(small_store: ImageStore) -> None:
    for norm in ("frozen", "episode"):
        engine = whole_engine(small_store, dtype=torch.float32)
        options: Any = {"inner_lr": 0.05, "n_steps": [0, 2], "norm": norm}
        parts: Any = (engine.encoder, engine.head)
        expected = evaluate_all_weights(*parts, small_store, tasks(small_store, 3), PREPROCESS, **options)
        with torch.inference_mode():
            store = small_store.to("cpu")
            found = evaluate_all_weights(*parts, store, tasks(store, 3), PREPROCESS, **options)
            assert torch.is_inference_mode_enabled()
            made_inside = LinearHead(engine.encoder.feature_dim, 3)
            with pytest.raises(ValueError, match=r"encoder, head: were made inside torch\.inference_mode"):
                evaluate_all_weights(
                    engine.encoder, made_inside, store, tasks(store, 3), PREPROCESS, **options
                )
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_steps": [5, 2]}, r"n_steps: expected ascending numbers, got \[5, 2\]"),
        ({"n_steps": [-3]}, "n_steps: expected at least 0, got -3"),
        ({"inner_lr": -1.0}, "inner_lr: expected a finite number, at least 0, got -1.0"),
        ({"images_per_chunk": 0}, "images_per_chunk: expected at least 1, got 0"),
        ({"norm": "batch"}, "norm: 'batch' is not one of frozen, episode, running"),
    ],
)
def test_settings_of_the_evaluation_are_checked_at_the_door(
    small_store: ImageStore, options: Any, says: str
) -> None:
    engine, episodes = whole_engine(small_store), tasks(small_store, 2)
    given = {"inner_lr": 0.05, "n_steps": [2], **options}
    for some in (episodes, episodes[:0]):
        with pytest.raises(ValueError, match=says):
            evaluate_all_weights(engine.encoder, engine.head, small_store, some, PREPROCESS, **given)
    if "inner_lr" not in options and "n_steps" in options:
        with pytest.raises(ValueError, match=says):
            engine.query_logits_after(options["n_steps"], episodes)


def test_no_tasks_have_no_scores(small_store: ImageStore) -> None:
    engine = whole_engine(small_store)
    parts: Any = (engine.encoder, engine.head, small_store, tasks(small_store, 2)[:0], PREPROCESS)
    found = evaluate_all_weights(*parts, inner_lr=0.05, n_steps=[0, 1])
    assert [[tuple(value.shape) for value in one] for one in found] == [[(0,), (0, 3), (0, 9)]] * 2
