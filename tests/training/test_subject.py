"""What a test is about: its settings over the model's, where heads start, what its result depends on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl_fast.config import EvaluationChanges, EvaluationConfig
from mtl_fast.data.features import FeatureStore
from mtl_fast.errors import InputError
from mtl_fast.nn import LinearHead
from mtl_fast.training import models
from mtl_fast.training.embeddings import save_embeddings
from mtl_fast.training.subject import Changes, Subject, features_subject, head_for, model_subject
from tests.training import tiny
from tests.training.tiny import CONFIG

CPU = torch.device("cpu")


def test_what_is_not_changed_is_the_model_s() -> None:
    mirrored = replace(CONFIG, evaluation=EvaluationConfig(n_tasks=77, split="val", mirror_support=True))
    assert Changes(device="cpu").over(mirrored) == mirrored
    one = Changes(evaluation=EvaluationChanges(n_tasks=9), device="cpu").over(mirrored).evaluation
    assert one == EvaluationConfig(n_tasks=9, split="val", mirror_support=True)
    plain = Changes(evaluation=EvaluationChanges(mirror_support=False)).over(mirrored).evaluation
    assert plain == EvaluationConfig(n_tasks=77, split="val", mirror_support=False)
    changes = Changes(4, 2, 6, 7, 0.5, "head", EvaluationConfig(n_tasks=9), 3, "cpu")
    config = changes.over(CONFIG)
    assert (config.episodes.n_way, config.episodes.n_shot, config.episodes.n_query) == (4, 2, 6)
    assert (config.inner.test_steps, config.inner.lr_at_test, config.inner.lr) == (7, 0.5, CONFIG.inner.lr)
    assert (config.evaluation.n_tasks, config.seed) == (9, 3)
    assert (config.inner.train_steps, config.data, config.meta) == (3, CONFIG.data, CONFIG.meta)
    with pytest.raises(InputError, match=r"inner\.test_lr is 0\.0"):
        Changes(inner_lr=0.0).over(CONFIG)
    half = replace(CONFIG, precision="bf16", meta=replace(CONFIG.meta, learn="weights"))
    tested = Changes(adapt="all", device="cpu").over(half)
    assert (tested.precision, tested.inner.adapt) == ("fp32", "all")


def test_heads_start_as_learned_or_from_zeros() -> None:
    learned = LinearHead(4, 3, generator=torch.Generator().manual_seed(0))
    assert head_for(learned, 3, 4, "learned", "m") is learned
    for head in (head_for(learned, 5, 4, "zeros", "m"), head_for(None, 5, 4, "learned", "m")):
        assert head.weight.shape == (5, 4)
        assert not head.weight.any()
        assert not head.bias.any()
    with pytest.raises(
        InputError, match="m: its head was meta-trained for 3 classes a task, --n-way asks for 2"
    ):
        head_for(learned, 2, 4, "learned", "m")


def of_features(tmp_path: Path, **changes: torch.Tensor) -> Subject:
    tensors = {"features": torch.ones(4, 3), "labels": torch.tensor([0, 1, 0, 1])} | changes
    store = FeatureStore(**tensors, class_names=("a", "b"))  # type: ignore[arg-type]
    save_embeddings(tmp_path / "f.safetensors", store, LinearHead(3, 2, init="zeros"))
    return features_subject(tmp_path / "f.safetensors", Changes(n_way=2), CPU)


def test_facts_tell_data_weights_and_settings_apart(tmp_path: Path) -> None:
    subject = of_features(tmp_path)
    facts = subject.facts(by_step=True)
    assert json.loads(json.dumps(facts)) == json.loads(json.dumps(of_features(tmp_path).facts(by_step=True)))
    assert facts["by_step"] is True
    assert "device" not in facts["config"]
    for changed in (
        of_features(tmp_path, features=torch.zeros(4, 3)),
        of_features(tmp_path, labels=torch.tensor([0, 1, 1, 0])),
        of_features(tmp_path, mirrored=torch.ones(4, 3)),
    ):
        assert changed.facts()["data"] != facts["data"]
        assert changed.facts()["weights"] == facts["weights"]
    other = replace(subject, head=LinearHead(3, 2, generator=torch.Generator().manual_seed(0)))
    assert other.facts()["weights"] != facts["weights"]


def test_an_encoder_s_weights_are_among_the_facts(
    pretrained: Path, meta_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_split", lambda source, split, size: tiny.split(split))
    changes = Changes(device="cpu")
    first, second = (
        model_subject(path, changes, CPU, head="zeros").facts() for path in (pretrained, meta_trained)
    )
    assert first["data"] == second["data"]
    assert first["weights"] != second["weights"]
    assert (
        model_subject(pretrained, replace(changes, evaluation=EvaluationConfig(split="val")), CPU).facts()[
            "data"
        ]
        != first["data"]
    )
