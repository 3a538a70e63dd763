"""One seed's comparison: what each row learns, where it lies, and that choices see the validation split only."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.data.store import ImageStore
from mtl_fast.engine.evaluate import embed_episodes, evaluate, fit_and_score
from mtl_fast.nn import LinearHead
from mtl_fast.training import checkpoint, inner_search
from mtl_fast.training import experiment as module
from mtl_fast.training.experiment import Experiment
from mtl_fast.training.models import preprocess_of
from mtl_fast.training.pretrain import validation_episodes
from mtl_fast.training.rows import (
    FT_ALL,
    FT_HEAD,
    FT_LAST,
    MAML,
    MAML_DEEP,
    MAML_DEEP_HT,
    MAML_HT,
    SS,
    SS_HT,
    SS_LAST,
    UPDATE_ALL,
    UPDATE_HEAD,
    Row,
)
from tests.training import tiny
from tests.training.tiny import MAML as MAML_CONFIG

CONFIG = tiny.with_meta(tiny.with_pretrain(epochs=1), n_tasks=6, validate_every=6)
# Where the search over all weights takes its number of tasks from.
DEEP = tiny.with_meta(CONFIG, validation_tasks=12)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were loaded."""
    seen: list[str] = []

    def load(source: str, split: str, size: int | None) -> ImageStore:
        seen.append(split)
        return tiny.split(split)

    module.splits_of.cache_clear()
    monkeypatch.setattr(module, "load_split", load)
    return seen


def test_rows_differ_in_what_they_say(loaded: list[str], tmp_path: Path) -> None:
    experiment = Experiment(CONFIG, tmp_path)
    rows = {row.key: experiment.meta_train(row, 1).config.meta for row in (FT_HEAD, FT_ALL, SS, SS_HT)}
    assert {key: (meta.learn, meta.hard) for key, meta in rows.items()} == {
        "ft-head": ("head", "none"),
        "ft-all": ("weights", "none"),
        "ss": ("scale_shift", "none"),
        "ss-ht": ("scale_shift", "resample"),
    }
    assert not any(meta.last_block_only for meta in rows.values())
    assert experiment.settings(SS_LAST, 1).meta == replace(rows["ss"], last_block_only=True)
    assert {replace(meta, learn="head", hard="none") for meta in rows.values()} == {
        replace(CONFIG.meta, learn="head", hard="none")
    }
    # Each split once, however many runs.
    assert sorted(loaded) == ["test", "train", "val"]
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["ft-all-1shot", "ft-head-1shot", "pretrain", "ss-1shot", "ss-ht-1shot"]


def test_a_rate_is_that_of_what_the_row_learns(loaded: list[str], tmp_path: Path) -> None:
    experiment = Experiment(CONFIG, tmp_path)
    head, scales = experiment.meta_train(FT_HEAD, 2, lr=0.25), experiment.meta_train(SS, 2, lr=0.25)
    assert (head.config.meta.lr, head.config.meta.head_lr) == (CONFIG.meta.lr, 0.25)
    assert (scales.config.meta.lr, scales.config.meta.head_lr) == (0.25, CONFIG.meta.head_lr)
    assert {head.config.episodes.n_shot, scales.config.episodes.n_shot} == {2}
    assert (tmp_path / "ss-2shot-lr0.25" / "model.safetensors").exists()


def test_pretraining_is_one_shot_and_made_once(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment(replace(CONFIG, episodes=replace(CONFIG.episodes, n_shot=5)), tmp_path)
    first = experiment.pretrain()
    assert first.config.episodes.n_shot == 1
    monkeypatch.setattr(module.Pretraining, "_update", lambda self: pytest.fail("trained again"))
    assert tiny.same_tensors(first.encoder.state_dict(), experiment.pretrain().encoder.state_dict())


def test_the_inner_loop_is_the_best_of_the_grid_on_the_validation_split(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner_search, "INNER_GRID", ((0.01, 1), (0.3, 7), (1.0, 40)))
    experiment = Experiment(CONFIG, tmp_path)
    model = experiment.pretrain()
    test_split, tested = tiny.split("test"), []
    original = inner_search.embed_episodes

    def spy(encoder: object, store: ImageStore, *rest: object, **options: object) -> object:
        tested.append(store)
        return original(encoder, store, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(inner_search, "embed_episodes", spy)
    inner = experiment.choose_inner(model, 1)
    assert tested == [tiny.split("val")]
    assert test_split not in tested
    config = experiment.with_shot(1)
    episodes = validation_episodes(config, tiny.split("val"), config.meta.validation_tasks)
    embedded = embed_episodes(model.encoder, tiny.split("val"), episodes, preprocess_of(config))
    accuracies = {
        (lr, steps): float(
            fit_and_score(
                embedded, LinearHead(4, 3, init="zeros"), inner_lr=lr, inner_steps=steps
            ).accuracy.mean()
        )
        for lr, steps in inner_search.INNER_GRID
    }
    assert accuracies[inner.lr, inner.test_steps] == max(accuracies.values())
    assert (inner.train_steps, inner.order) == (CONFIG.inner.train_steps, CONFIG.inner.order)


@pytest.mark.parametrize("row", [UPDATE_HEAD, UPDATE_ALL], ids=lambda row: row.key)
def test_the_inner_loop_is_chosen_on_support_sets_like_those_of_the_test(
    row: Row, loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner_search, "INNER_GRID", ((0.01, 1),))
    monkeypatch.setattr(inner_search, "ALL_RATES", (0.01,))
    monkeypatch.setattr(inner_search, "ALL_STEPS", (1,))
    seen: list[bool] = []
    name = "evaluate_all_weights" if row.is_whole_network else "embed_episodes"
    original = getattr(inner_search, name)

    def spy(*arguments: object, mirror_support: bool, **options: object) -> object:
        seen.append(mirror_support)
        return original(*arguments, mirror_support=mirror_support, **options)

    monkeypatch.setattr(inner_search, name, spy)
    searched = []
    for mirrored in (False, True):
        config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, mirror_support=mirrored))
        experiment = Experiment(config, tmp_path / str(mirrored))
        experiment.choose_inner(experiment.pretrain(), 1, row, n_tasks=2)
        searched.append(experiment._searched(row))
    assert seen == [False, True]
    assert searched[0] != searched[1]  # so a test after another search is made again


def test_a_row_that_learns_the_head_alone_leaves_the_norms_alone(tmp_path: Path) -> None:
    config = replace(CONFIG, meta=replace(CONFIG.meta, train_affine=True))
    experiment = Experiment(config, tmp_path)
    trained = {row.key: experiment.settings(row, 1).meta.train_affine for row in (FT_HEAD, FT_ALL, SS)}
    assert trained == {"ft-head": False, "ft-all": True, "ss": True}


def test_all_rows_are_tested_on_the_same_tasks(loaded: list[str], tmp_path: Path) -> None:
    experiment = Experiment(CONFIG, tmp_path)
    pretrained, meta = experiment.pretrain(), experiment.meta_train(SS, 1)
    inner = replace(CONFIG.inner, lr=0.3, test_steps=7)
    (a, _, tasks_a), (b, evaluation, tasks_b) = (
        experiment.test(pretrained, 1, inner),
        experiment.test(meta, 1),
    )
    assert torch.equal(tasks_a.support, tasks_b.support)
    assert torch.equal(tasks_a.query, tasks_b.query)
    assert a.config.inner == inner
    assert b.config.inner == CONFIG.inner
    assert torch.equal(b.task_accuracy, evaluation.accuracy)
    assert {a.config.evaluation.split, b.config.evaluation.split} == {"test"}
    assert UPDATE_HEAD.label != SS.label


def test_rows_of_maml_take_its_recipe_and_deep_ones_the_pretrained_network(
    loaded: list[str], tmp_path: Path
) -> None:
    of_deep_rows = replace(MAML_CONFIG, meta=replace(MAML_CONFIG.meta, lr=MAML_CONFIG.meta.lr / 2))
    experiment = Experiment(CONFIG, tmp_path, maml=MAML_CONFIG, maml_deep=of_deep_rows)
    for row in (MAML, MAML_HT, MAML_DEEP, MAML_DEEP_HT):
        model = experiment.meta_train(row, 1)
        config, recipe = model.config, of_deep_rows if "deep" in row.key else MAML_CONFIG
        assert config.inner == recipe.inner
        assert config.meta == replace(recipe.meta, hard=row.hard)
        assert config.encoder == (CONFIG.encoder if "deep" in row.key else MAML_CONFIG.encoder)
        assert model.meta["tasks"] >= 0
    assert (MAML.hard, MAML_HT.hard, MAML_DEEP.hard, MAML_DEEP_HT.hard) == ("none", "resample") * 2
    # The random start needs no pre-training, and makes none.
    alone = Experiment(CONFIG, tmp_path / "alone", maml=MAML_CONFIG)
    alone.meta_train(MAML, 1, lr=0.25)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["maml-1shot-lr0.25"]
    rates = alone.settings(MAML, 1, lr=0.25).meta
    assert (rates.lr, rates.head_lr) == (0.25, 0.25)
    result, _, _ = experiment.test(experiment.meta_train(MAML, 1), 1)
    assert result.config.inner == MAML_CONFIG.inner
    assert result.config.meta.norm == "episode"


def test_a_stopped_test_of_all_weights_goes_on_piece_by_piece(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner_search, "ALL_RATES", (0.01, 0.3))
    monkeypatch.setattr(inner_search, "ALL_STEPS", (1, 4))
    monkeypatch.setattr(module, "TASKS_PER_PART", 3)
    whole = Experiment(CONFIG, tmp_path / "whole", maml_deep=DEEP).outcome(UPDATE_ALL, 1, n_tasks=8)
    calls: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr("mtl_fast.training.parts.time.monotonic", lambda: float(next(clock)))

    def stops_at(last: int) -> None:
        calls.clear()
        for owner, name in ((inner_search, "evaluate_all_weights"), (module, "score")):
            original = originals[name]

            def spy(*args: object, name: str = name, original: Any = original, **options: object) -> object:
                calls.append(name)
                if len(calls) == last:
                    raise KeyboardInterrupt
                return original(*args, **options)

            monkeypatch.setattr(owner, name, spy)

    originals = {
        "evaluate_all_weights": inner_search.evaluate_all_weights,
        "score": module.score,
    }
    experiment = Experiment(CONFIG, tmp_path / "stopped", maml_deep=DEEP)
    for last, seen in ((2, ["evaluate_all_weights"] * 2), (3, ["evaluate_all_weights", "score", "score"])):
        stops_at(last)
        with pytest.raises(KeyboardInterrupt):
            experiment.outcome(UPDATE_ALL, 1, n_tasks=8)
        assert calls == seen
    stops_at(100)
    found = experiment.outcome(UPDATE_ALL, 1, n_tasks=8)
    assert calls == ["score"] * 2  # of three pieces the first was there
    assert found.task_accuracy == whole.task_accuracy
    assert found.inner == whole.inner
    assert (found.seconds, found.test_seconds) == (2, 3)  # a tick a piece, whichever run computed it
    assert not list((tmp_path / "stopped").rglob("parts"))


def test_pieces_of_other_settings_are_computed_anew(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner_search, "ALL_RATES", (0.01,))
    monkeypatch.setattr(inner_search, "ALL_STEPS", (1,))
    original, search, searched = module.score, inner_search.evaluate_all_weights, []

    def stop(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    def spy(*args: Any, **options: Any) -> object:
        searched.append(options["n_steps"])
        return search(*args, **options)

    monkeypatch.setattr(module, "score", stop)
    monkeypatch.setattr(inner_search, "evaluate_all_weights", spy)
    with pytest.raises(KeyboardInterrupt):
        Experiment(CONFIG, tmp_path, maml_deep=DEEP).outcome(UPDATE_ALL, 1, n_tasks=8)
    monkeypatch.setattr(module, "score", original)
    monkeypatch.setattr(inner_search, "ALL_STEPS", (2,))
    assert Experiment(CONFIG, tmp_path, maml_deep=DEEP).outcome(UPDATE_ALL, 1, n_tasks=8).inner == (0.01, 2)
    assert searched == [(1,), (2,)]


def test_updating_all_weights_is_chosen_on_the_validation_split_and_learns_nothing(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner_search, "ALL_RATES", (0.01, 0.3))
    monkeypatch.setattr(inner_search, "ALL_STEPS", (1, 4))
    experiment = Experiment(CONFIG, tmp_path, maml_deep=DEEP)
    model = experiment.pretrain()
    inner = experiment.choose_inner(model, 1, UPDATE_ALL)
    assert inner.adapt == "all"
    config = experiment.with_shot(1)
    store = tiny.split("val")
    episodes = validation_episodes(config, store, experiment.n_searched(UPDATE_ALL))
    assert (experiment.n_searched(UPDATE_HEAD), episodes.n_tasks) == (CONFIG.meta.validation_tasks, 12)
    assert CONFIG.meta.validation_tasks != 12
    accuracies = {
        (lr, steps): float(
            evaluate(
                model.encoder,
                LinearHead(4, 3, init="zeros"),
                store,
                episodes,
                preprocess_of(config),
                inner_lr=lr,
                inner_steps=steps,
                adapt="all",
            ).accuracy.mean()
        )
        for lr, steps in itertools.product((0.01, 0.3), (1, 4))
    }
    assert accuracies[inner.lr, inner.test_steps] == max(accuracies.values())
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    result, _, tasks = experiment.test(model, 1, inner)
    assert result.config.inner == inner
    assert tiny.same_tensors(model.encoder.state_dict(), before)
    head_only, _, same_tasks = experiment.test(model, 1, replace(inner, adapt="head"))
    assert torch.equal(tasks.support, same_tasks.support)
    assert not torch.equal(result.task_accuracy, head_only.task_accuracy)


def test_an_outcome_is_read_only_where_weights_settings_and_tasks_are_the_same(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner_search, "INNER_GRID", ((0.01, 1), (0.3, 7)))
    experiment = Experiment(CONFIG, tmp_path, n_drawn=9)
    assert experiment.finished(SS, 1) is experiment.finished(UPDATE_HEAD, 1) is None
    scales, update = experiment.outcome(SS, 1), experiment.outcome(UPDATE_HEAD, 1)
    assert experiment.finished(SS, 1) == scales
    assert experiment.finished(UPDATE_HEAD, 1) == update
    assert len(scales.task_accuracy) == 9
    assert (update.curve, update.n_learned, update.n_adapted) == ([], 0, 3 * 5)
    assert scales.seconds > 0
    # The first tasks of those that are drawn: fewer tests are no other tasks.
    assert experiment.finished(SS, 1, n_tasks=4) is None
    assert experiment.outcome(SS, 1, n_tasks=4).task_accuracy == scales.task_accuracy[:4]
    assert experiment.finished(SS, 1) is None
    # Another grid may choose another inner loop.
    monkeypatch.setattr(inner_search, "INNER_GRID", ((0.01, 1),))
    assert experiment.finished(UPDATE_HEAD, 1) is None
    assert experiment.outcome(UPDATE_HEAD, 1).inner == (0.01, 1)


def test_a_model_of_other_settings_is_not_what_was_asked_for(loaded: list[str], tmp_path: Path) -> None:
    Experiment(CONFIG, tmp_path).outcome(SS, 1)
    assert Experiment(replace(CONFIG, device="auto"), tmp_path).finished(SS, 1) is not None
    assert Experiment(tiny.with_meta(CONFIG, n_tasks=8), tmp_path).finished(SS, 1) is None


def test_a_test_from_before_a_setting_was_there_is_still_read(loaded: list[str], tmp_path: Path) -> None:
    experiment = Experiment(CONFIG, tmp_path)
    outcome = experiment.outcome(SS, 1)
    file = tmp_path / "test" / "ss-1shot" / "evaluation.safetensors"
    tensors, meta = checkpoint.load(file)
    assert meta["facts"]["config"]["evaluation"].pop("mirror_support") is False
    checkpoint.save(file, tensors, meta)
    assert experiment.finished(SS, 1) == outcome
    meta["facts"]["config"]["evaluation"]["mirror_support"] = True
    checkpoint.save(file, tensors, meta)
    assert experiment.finished(SS, 1) is None


def test_what_is_counted_as_learned(loaded: list[str], tmp_path: Path) -> None:
    experiment = Experiment(CONFIG, tmp_path)
    plain = experiment.pretrain().encoder
    n_total, n_head = sum(p.numel() for p in plain.parameters()), 3 * (plain.feature_dim + 1)
    found = {row.key: experiment.outcome(row, 1) for row in (FT_HEAD, FT_LAST, FT_ALL, SS_LAST, SS)}
    convs = {
        row: plain.convs(plain.blocks()[-1] if row.last_block_only else None) for row in (FT_LAST, FT_ALL)
    }
    weights = {
        row.key: sum(c.weight.numel() + (0 if c.bias is None else c.bias.numel()) for c in of)
        for row, of in convs.items()
    }
    # Three scaled convolutions a block: a scale a kernel and a shift a filter.
    scales = {"ss-last": 3 * (4 * 4 + 4), "ss": (3 * 4 + 4) + 11 * (4 * 4 + 4)}
    learned = {key: outcome.n_learned - n_head for key, outcome in found.items()}
    assert learned == {"ft-head": 0} | weights | scales
    assert {(outcome.n_adapted, outcome.n_total) for outcome in found.values()} == {
        (n_head, n_total + n_head)
    }
