"""The test of a model file: the same tasks for every model, the files it writes, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

from mtl_fast.config import EvaluationChanges, EvaluationConfig
from mtl_fast.data.store import ImageStore
from mtl_fast.engine import Preprocess
from mtl_fast.episodes import Episodes
from mtl_fast.errors import InputError
from mtl_fast.training import checkpoint, evaluate, models, scoring
from mtl_fast.training.embeddings import embed_split
from mtl_fast.training.evaluate import Score, drawn_episodes, evaluate_model, score
from mtl_fast.training.models import load_model
from mtl_fast.training.statistics import mean_interval
from tests.training import tiny
from tests.training.tiny import CONFIG

TASKS = EvaluationConfig(n_tasks=12)


@pytest.fixture(autouse=True)
def _tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, split: str, size: int | None) -> ImageStore:
        if source == "bigger":
            return tiny.a_store("bigger", 5, size=20 if size is None else size)
        return tiny.split(split)

    monkeypatch.setattr(models, "load_split", load)


def tasks_of(monkeypatch: pytest.MonkeyPatch) -> list[Episodes]:
    """The episodes of each test that follows."""
    seen: list[Episodes] = []

    def spy(*arguments: Any) -> Episodes:
        seen.append(drawn_episodes(*arguments))
        return seen[-1]

    monkeypatch.setattr(evaluate, "drawn_episodes", spy)
    return seen


def test_every_model_gets_the_same_tasks_under_one_seed(
    pretrained: Path, meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tasks_of(monkeypatch)
    scores = [evaluate_model(path, evaluation=TASKS) for path in (pretrained, meta_trained, meta_trained)]
    evaluate_model(meta_trained, evaluation=TASKS, seed=1)
    for name in ("support", "query", "classes"):
        assert torch.equal(getattr(seen[0], name), getattr(seen[1], name))
    assert not torch.equal(seen[0].support, seen[3].support)
    assert torch.equal(scores[1].task_accuracy, scores[2].task_accuracy)
    assert scores[0].task_accuracy.shape == (12,)
    # Fewer tasks are the first ones of many.
    assert torch.equal(
        evaluate_model(meta_trained, evaluation=EvaluationConfig(n_tasks=5)).task_accuracy,
        scores[1].task_accuracy[:5],
    )


def test_a_score_is_the_mean_of_its_tasks_and_a_task_that_of_its_classes(meta_trained: Path) -> None:
    model, store = load_model(meta_trained), tiny.split("test")
    episodes = drawn_episodes(CONFIG, store)
    result, evaluation = score(model, CONFIG, store, episodes)
    correct = (evaluation.predictions == episodes.query_labels).float()
    torch.testing.assert_close(evaluation.class_accuracy, correct.unflatten(1, (3, 4)).mean(dim=2))
    torch.testing.assert_close(result.task_accuracy, correct.mean(dim=1))
    assert result.interval == mean_interval(result.task_accuracy)
    text = str(result)
    assert text.startswith("3-way 1-shot, 12 test tasks of tiny: ")
    assert text.endswith(f"{result.interval.percent()} %")


def test_a_pretrained_model_gets_a_fresh_head_of_any_shape(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tasks_of(monkeypatch)
    result = evaluate_model(pretrained, n_way=5, n_shot=2, n_query=6, evaluation=TASKS)
    assert (seen[0].n_way, seen[0].n_shot, seen[0].n_query) == (5, 2, 6)
    assert (result.config.episodes.n_way, result.config.episodes.n_shot) == (5, 2)
    # No step from a head of zeros: the first class is as likely as the others, and always said.
    idle = evaluate_model(pretrained, inner_steps=0, evaluation=TASKS)
    assert idle.task_accuracy.tolist() == pytest.approx([1 / 3] * 12)


def test_what_is_not_said_is_as_trained(meta_trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    original = scoring.fit_and_score

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.update(options)
        return original(*arguments, **options)

    monkeypatch.setattr(scoring, "fit_and_score", spy)
    evaluate_model(meta_trained, evaluation=TASKS)
    assert (asked["inner_lr"], asked["inner_steps"]) == (0.05, 5)
    evaluate_model(meta_trained, inner_lr=0.2, inner_steps=0, n_shot=2, evaluation=TASKS)
    assert (asked["inner_lr"], asked["inner_steps"]) == (0.2, 0)


def test_the_split_is_the_one_asked_for(meta_trained: Path) -> None:
    result = evaluate_model(meta_trained, evaluation=EvaluationConfig(n_tasks=12, split="val"))
    assert "12 val tasks" in str(result)
    model, store = load_model(meta_trained), tiny.split("val")
    expected, _ = score(model, CONFIG, store, drawn_episodes(CONFIG, store))
    assert torch.equal(result.task_accuracy, expected.task_accuracy)


def test_files_hold_the_score_and_each_task(meta_trained: Path, tmp_path: Path) -> None:
    result = evaluate_model(meta_trained, evaluation=TASKS, seed=3, output=tmp_path / "new" / "test")
    folder = tmp_path / "new" / "test"
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "evaluation.safetensors"]
    tensors, meta = checkpoint.load(folder / "evaluation.safetensors")
    assert torch.equal(tensors["task_accuracy"], result.task_accuracy)
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary == meta
    assert summary["mean"] == pytest.approx(float(result.task_accuracy.double().mean()))
    assert summary["interval95"] == result.interval.half
    assert (summary["n_tasks"], summary["seed"], summary["model"]) == (12, 3, str(meta_trained))
    assert summary["config"]["evaluation"] == {"n_tasks": 12, "split": "test", "mirror_support": False}
    # Once more into the same folder replaces both.
    evaluate_model(meta_trained, evaluation=EvaluationConfig(n_tasks=4), output=folder)
    assert json.loads((folder / "evaluation.json").read_text())["n_tasks"] == 4


def test_other_data_are_brought_to_the_size_of_the_model(meta_trained: Path) -> None:
    result = evaluate_model(meta_trained, data="bigger", evaluation=TASKS)
    assert result.task_accuracy.shape == (12,)


def test_data_that_changed_their_size_are_named(meta_trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_split", lambda *_: tiny.a_store("grown", 0, size=20))
    with pytest.raises(
        InputError, match=r"grown: images are 20×20 pixels, .* was trained on 16×16; .*--data"
    ):
        evaluate_model(meta_trained, evaluation=TASKS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_way": 5}, "meta-trained for 3 classes a task, --n-way asks for 5; .*--episodes.n-way 5"),
        ({"n_shot": 0}, "episodes.n_shot is 0; it must be at least 1"),
        ({"n_query": -1}, "episodes.n_query is -1"),
        ({"inner_lr": 0.0}, "inner.test_lr is 0.0; it must be positive"),
        ({"inner_steps": -1}, "inner.test_steps is -1; it must be at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"evaluation": EvaluationConfig(n_tasks=1)}, "evaluation.n_tasks is 1; it must be at least 2"),
        ({"n_query": 24}, r"has 24 images .*fewer than n_shot \+ n_query = 1 \+ 24 = 25"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
    ],
)
def test_what_cannot_be_tested_is_named(options: dict[str, Any], says: str, meta_trained: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        evaluate_model(meta_trained, **({"evaluation": TASKS} | options))
    assert "\n" not in str(caught.value)


def test_an_output_that_is_a_file_is_named_before_the_work(
    meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.setattr(scoring, "fit_and_score", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(InputError, match="cannot make this folder"):
        evaluate_model(meta_trained, evaluation=TASKS, output=file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("mirror", [False, True], ids=["plain", "mirrored"])
def test_saved_features_give_the_score_of_the_model(
    mirror: bool, meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = replace(TASKS, mirror_support=mirror)
    expected = evaluate_model(meta_trained, evaluation=evaluation, n_shot=2, inner_lr=0.2, device="cpu")
    file = tmp_path / "f.safetensors"
    embed_split(meta_trained, file, mirror=mirror, device="cpu")
    monkeypatch.setattr(models, "load_split", lambda *_: pytest.fail("images"))
    found = evaluate_model(embeddings=file, evaluation=evaluation, n_shot=2, inner_lr=0.2, device="cpu")
    assert torch.equal(found.task_accuracy, expected.task_accuracy)
    assert str(found) == str(expected).replace(" tasks of tiny:", f" tasks of {file}:")
    assert found.config.inner == expected.config.inner


def test_features_keep_their_split_and_take_the_settings_of_their_model(
    pretrained: Path, tmp_path: Path
) -> None:
    embed_split(pretrained, tmp_path / "f.safetensors", split="val", device="cpu")
    found = evaluate_model(embeddings=tmp_path / "f.safetensors", evaluation=TASKS, device="cpu")
    assert found.config.evaluation.split == "val"
    assert (found.config.inner, found.config.episodes) == (CONFIG.inner, CONFIG.episodes)
    expected = evaluate_model(pretrained, evaluation=replace(TASKS, split="val"), device="cpu")
    assert torch.equal(found.task_accuracy, expected.task_accuracy)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "from elsewhere"])
def test_features_are_tested_on_no_other_split(ours: bool, pretrained: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    if ours:
        embed_split(pretrained, file, split="val", device="cpu")
        found = evaluate_model(embeddings=file, evaluation=EvaluationChanges(4, "val"), device="cpu")
        assert ", 4 val tasks of " in str(found)
    else:
        safetensors.torch.save_file({"features": torch.eye(8), "labels": torch.arange(8) % 2}, file)
    held = "of the val split" if ours else "of a split that it does not name"
    with pytest.raises(
        InputError, match=f"features {held}, --evaluation.split asks for test; .*embed --split"
    ):
        evaluate_model(embeddings=file, evaluation=EvaluationChanges(split="test"), device="cpu")


def test_features_from_elsewhere_are_tested_too(tmp_path: Path) -> None:
    labels = torch.arange(6).repeat_interleave(10)
    features = torch.eye(6)[labels] + 0.01 * torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"features": features, "labels": labels}, tmp_path / "f.safetensors")
    found = evaluate_model(
        embeddings=tmp_path / "f.safetensors", n_query=9, inner_lr=1.0, evaluation=TASKS, device="cpu"
    )
    assert found.interval.mean == 1.0
    assert found.task_accuracy.shape == (12,)
    assert str(found).startswith(f"5-way 1-shot, 12 tasks of {tmp_path / 'f.safetensors'}: ")


def test_mirrored_support_is_a_setting(meta_trained: Path) -> None:
    mirrored = replace(TASKS, mirror_support=True)
    options: dict[str, Any] = {"n_shot": 3, "inner_steps": 50, "inner_lr": 0.5, "device": "cpu"}
    found = evaluate_model(meta_trained, evaluation=mirrored, **options)
    model, store = load_model(meta_trained), tiny.split("test")
    expected, _ = score(model, found.config, store, drawn_episodes(found.config, store))
    assert torch.equal(found.task_accuracy, expected.task_accuracy)
    plain = evaluate_model(meta_trained, evaluation=TASKS, **options)
    assert not torch.equal(found.task_accuracy, plain.task_accuracy)


def test_a_fresh_head_is_of_any_n_way(meta_trained: Path) -> None:
    found = evaluate_model(meta_trained, n_way=6, head="zeros", evaluation=TASKS, device="cpu")
    assert found.config.episodes.n_way == 6
    # No step from zeros: always the first class.
    idle = evaluate_model(meta_trained, head="zeros", inner_steps=0, evaluation=TASKS, device="cpu")
    assert idle.task_accuracy.tolist() == pytest.approx([1 / 3] * 12)
    learned = evaluate_model(meta_trained, inner_steps=0, evaluation=TASKS, device="cpu")
    assert not torch.equal(learned.task_accuracy, idle.task_accuracy)


def test_other_data_are_named_and_normalised_as_in_training(
    meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = scoring.embed_rows

    def spy(encoder: Any, store: Any, rows: Any, preprocess: Any, **options: Any) -> Any:
        seen.append((store.name, preprocess))
        return original(encoder, store, rows, preprocess, **options)

    monkeypatch.setattr(scoring, "embed_rows", spy)
    found = evaluate_model(meta_trained, data="bigger", evaluation=TASKS, output=tmp_path, device="cpu")
    assert str(found).startswith("3-way 1-shot, 12 test tasks of bigger (trained on tiny): ")
    assert seen == [("bigger", Preprocess(CONFIG.data.mean, CONFIG.data.std))]
    assert json.loads((tmp_path / "evaluation.json").read_text())["data"] == "bigger (trained on tiny)"
    same = evaluate_model(meta_trained, data="tiny", evaluation=TASKS, device="cpu")
    assert str(same).startswith("3-way 1-shot, 12 test tasks of tiny: ")


def test_every_step_comes_with_its_interval(meta_trained: Path, tmp_path: Path) -> None:
    found = evaluate_model(
        meta_trained, by_step=True, inner_steps=6, evaluation=TASKS, output=tmp_path, device="cpu"
    )
    assert found.accuracy_by_step is not None
    assert found.accuracy_by_step.shape == (12, 7)
    for n_steps in (0, 3, 6):
        alone = evaluate_model(meta_trained, inner_steps=n_steps, evaluation=TASKS, device="cpu")
        torch.testing.assert_close(found.accuracy_by_step[:, n_steps], alone.task_accuracy)
        assert found.steps[n_steps].mean == pytest.approx(alone.interval.mean)
        assert found.steps[n_steps].half == pytest.approx(alone.interval.half)
    shown = ", ".join(f"{i}: {found.steps[i]}" for i in (0, 1, 2, 5, 6))
    assert found.steps_text() == f"by inner steps: {shown} %"
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary["by_step"]["mean"] == [step.mean for step in found.steps]
    assert summary["by_step"]["interval95"] == [step.half for step in found.steps]
    tensors, _ = checkpoint.load(tmp_path / "evaluation.safetensors")
    assert torch.equal(tensors["accuracy_by_step"], found.accuracy_by_step)
    lines = (tmp_path / "accuracy_by_step.csv").read_text().splitlines()
    assert lines[0] == "step,mean,interval95"
    assert [tuple(map(float, line.split(","))) for line in lines[1:]] == [
        (i, step.mean, step.half) for i, step in enumerate(found.steps)
    ]
    with Image.open(tmp_path / "accuracy_by_step.png") as picture:
        assert picture.width == 1600
    # Another test into the same folder does not leave them behind.
    evaluate_model(meta_trained, evaluation=TASKS, output=tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.safetensors"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give either --checkpoint, a model file, or --embeddings"),
        ({"checkpoint": "a", "embeddings": "b"}, "give either --checkpoint"),
        ({"embeddings": "b", "data": "c"}, "--data goes with --checkpoint"),
        ({"embeddings": "nowhere"}, "nowhere: no such file of embeddings"),
    ],
)
def test_one_thing_is_tested(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        evaluate_model(**options)


def test_features_that_do_not_fit_the_test_are_named(meta_trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    embed_split(meta_trained, file, device="cpu")
    for options, says in (
        ({"evaluation": replace(TASKS, mirror_support=True)}, "no features of mirror images.*embed --mirror"),
        ({"n_way": 5}, "meta-trained for 3 classes a task, --n-way asks for 5; .*--head zeros"),
        ({"adapt": "all"}, "holds features, of which the head alone can adapt; --adapt all takes a model"),
        ({"n_way": 8, "head": "zeros"}, "test: 7 classes, fewer than n_way = 8"),
        ({"n_query": 24}, r"has 24 images .*fewer than n_shot \+ n_query"),
    ):
        with pytest.raises(InputError, match=says):
            evaluate_model(embeddings=file, device="cpu", **({"evaluation": TASKS} | options))


def test_episode_norm_is_that_of_training(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta-trained model is tested with its norm; a pre-trained one has stored statistics."""
    model, store = load_model(pretrained), tiny.split("test")
    config = replace(CONFIG, meta=replace(CONFIG.meta, norm="episode"))
    episodes = drawn_episodes(config, store)
    frozen, _ = score(model, CONFIG, store, episodes)
    same, _ = score(model, config, store, episodes)
    assert torch.equal(same.task_accuracy, frozen.task_accuracy)
    assert isinstance(same, Score)
