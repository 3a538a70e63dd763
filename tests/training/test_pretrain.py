"""Pre-training: the bits of a seed, the best epoch, the schedule, what Ctrl-C and non-finite numbers leave."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.config import Config, PretrainConfig
from mtl_fast.errors import InputError
from mtl_fast.nn import LinearHead
from mtl_fast.training import checkpoint, phase, pretrain
from mtl_fast.training.models import build_encoder, load_model, weights_of
from mtl_fast.training.pretrain import learning_rate, validation_episodes
from mtl_fast.training.run import Interrupted
from tests.training import tiny
from tests.training.tiny import CONFIG, at_update, ctrl_c

EPOCH = 7 * 24 // CONFIG.pretrain.batch_size  # updates


def test_one_seed_gives_the_same_bits_and_another_gives_others(pretrained: Path, tmp_path: Path) -> None:
    tiny.pretraining(tmp_path / "again").run()
    tiny.assert_same_run(tmp_path / "again", pretrained)
    tiny.pretraining(tmp_path / "other", replace(CONFIG, seed=1)).run()
    assert not tiny.same_tensors(tiny.model_of(tmp_path / "other"), tiny.model_of(pretrained))


@pytest.mark.parametrize("update", [EPOCH + 3, 2 * EPOCH - 1])
def test_ctrl_c_saves_and_going_on_gives_the_same_bits(update: int, pretrained: Path, tmp_path: Path) -> None:
    run = tiny.pretraining(tmp_path)
    at_update(run, update, ctrl_c)
    with pytest.raises(Interrupted, match=rf"update {update + 1} of {3 * EPOCH}.*--resume"):
        run.run()
    again = tiny.pretraining(tmp_path, resume=True)
    assert again.update == update + 1
    again.run()
    tiny.assert_same_run(tmp_path, pretrained)


def test_ctrl_c_in_the_last_update_stops_what_would_follow(pretrained: Path, tmp_path: Path) -> None:
    run = tiny.pretraining(tmp_path)
    at_update(run, 3 * EPOCH - 1, ctrl_c)
    with pytest.raises(Interrupted, match="after its last update"):
        run.run()
    tiny.assert_same_run(tmp_path, pretrained)


def test_a_finished_run_is_left_as_it_is(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in pretrained.iterdir()}
    run = tiny.pretraining(pretrained, resume=True)
    monkeypatch.setattr(run, "_update", lambda: pytest.fail("trained on"))
    assert run.run() == pretrained / "model.safetensors"
    assert {path: path.read_bytes() for path in pretrained.iterdir()} == before


@pytest.mark.parametrize(
    ("scores", "best"), [((0.3, 0.9, 0.5), 2), ((0.4, 0.4, 0.2), 1), ((0.1, 0.2, 0.6), 3)]
)
def test_the_best_epoch_by_validation_is_kept(scores: tuple[float, ...], best: int, tmp_path: Path) -> None:
    config = tiny.with_pretrain(batch_size=84)
    run = tiny.pretraining(tmp_path, config)
    seen: list[dict[str, Tensor]] = []

    def validate() -> float:
        seen.append(weights_of(run.encoder))
        return scores[len(seen) - 1]

    run._validate = validate  # type: ignore[method-assign]
    run.run()
    assert not tiny.same_tensors(seen[0], seen[1])
    assert tiny.same_tensors(tiny.model_of(tmp_path), seen[best - 1])
    meta = checkpoint.load(tmp_path / "model.safetensors")[1]
    assert (meta["epoch"], meta["validation_accuracy"]) == (best, scores[best - 1])
    assert meta["curve"] == [[i + 1, score] for i, score in enumerate(scores)]
    assert meta["kind"] == "pretrained"
    assert meta["image_size"] == 16


def test_validation_fits_a_fresh_head_on_the_same_episodes(pretrained: Path, tmp_path: Path) -> None:
    """The logged accuracies, computed anew from the kept model: one head a task, by autograd and plain descent."""
    model, store = load_model(pretrained), tiny.split("val")
    tasks = validation_episodes(CONFIG, store, CONFIG.pretrain.validation_tasks)
    accuracies = []
    for t in range(tasks.n_tasks):
        x, q = (
            model.encoder((store.images[rows[t]].permute(0, 3, 1, 2).float() - 127.5) / 64).detach()
            for rows in (tasks.support, tasks.query)
        )
        head = LinearHead(4, 3, init="zeros")
        for _ in range(CONFIG.inner.test_steps):
            loss = torch.nn.functional.cross_entropy(head(x), tasks.support_labels[t])
            gradients = torch.autograd.grad(loss, list(head.parameters()))
            with torch.no_grad():
                for p, g in zip(head.parameters(), gradients, strict=True):
                    p -= CONFIG.inner.lr * g
        accuracies.append((head(q).argmax(dim=1) == tasks.query_labels[t]).float().mean())
    assert float(torch.stack(accuracies).mean()) == pytest.approx(model.meta["validation_accuracy"], abs=1e-6)


def test_validation_comes_as_often_as_asked_and_at_the_end(tmp_path: Path) -> None:
    config = tiny.with_pretrain(batch_size=84, validate_every=2)
    tiny.pretraining(tmp_path, config).run()
    rows = tiny.rows_of(tmp_path)
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert [bool(row["validation_accuracy"]) for row in rows] == [False, True, True]


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Tensor] = []
    original = pretrain.augmented

    def spy(store: Any, rows: Tensor, *rest: Any) -> Tensor:
        batches.append(rows)
        return original(store, rows, *rest)

    monkeypatch.setattr(pretrain, "augmented", spy)
    tiny.pretraining(tmp_path / "a", tiny.with_pretrain(batch_size=42, epochs=2)).run()
    assert [len(rows) for rows in batches] == [42] * 8
    first, second = torch.cat(batches[:4]), torch.cat(batches[4:])
    assert torch.equal(first.sort().values, torch.arange(168))
    assert torch.equal(second.sort().values, torch.arange(168))
    assert not torch.equal(first, second)
    batches.clear()
    tiny.pretraining(tmp_path / "b", tiny.with_pretrain(batch_size=1000, epochs=2)).run()
    assert [len(rows) for rows in batches] == [168, 168]


def test_a_loss_that_is_not_finite_leaves_what_was_saved(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.pretraining(tmp_path)
    original = pretrain.augmented
    saved: dict[str, bytes] = {}

    def spoil(*arguments: Any) -> Tensor:
        x = original(*arguments)
        if run.update == EPOCH + 4:
            saved.update({path.name: path.read_bytes() for path in tmp_path.iterdir()})
            ctrl_c()  # not even that saves
            return x * math.nan
        return x

    monkeypatch.setattr(pretrain, "augmented", spoil)
    with pytest.raises(InputError) as caught:
        run.run()
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in ("loss became nan", "epoch 2", "--pretrain.lr (now 0.01)")), text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == saved
    assert saved.keys() == {"checkpoint.safetensors", "config.json", "log.csv"}
    monkeypatch.setattr(pretrain, "augmented", original)
    tiny.pretraining(tmp_path, resume=True).run()
    tiny.assert_same_run(tmp_path, pretrained)


@pytest.mark.parametrize("interrupt", [True, False])
def test_weights_that_the_last_update_spoilt_are_not_saved(interrupt: bool, tmp_path: Path) -> None:
    """Their loss, computed before the update, was still finite."""
    run = tiny.pretraining(tmp_path)
    original = run._update

    def spoil() -> None:
        original()
        if run.update == (EPOCH + 5 if interrupt else 2 * EPOCH):
            next(run.encoder.parameters()).data[0] = math.inf
            if interrupt:
                ctrl_c()

    run._update = spoil  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"weight became non-finite at update \d+"):
        run.run()
    meta = checkpoint.load(tmp_path / "checkpoint.safetensors")[1]
    assert meta["update"] == EPOCH
    assert [row["step"] for row in tiny.rows_of(tmp_path)] == [str(EPOCH)]


def test_a_rate_that_is_too_high_says_so(tmp_path: Path) -> None:
    config = tiny.with_pretrain(optimizer="sgd", lr=1e30)
    with pytest.raises(InputError, match=r"non-finite|loss became (nan|inf)"):
        tiny.pretraining(tmp_path, config).run()
    assert not (tmp_path / "checkpoint.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_the_rate_rises_and_falls_along_a_cosine() -> None:
    settings = PretrainConfig(lr=0.8, warmup_epochs=0.5, epochs=4)
    rates = [learning_rate(settings, update, 8) for update in range(32)]
    for update, rate in enumerate(rates):
        expected = 0.8 * (update + 1) / 5 if update < 4 else 0.4 * (1 + math.cos(math.pi * (update - 4) / 28))
        assert rate == pytest.approx(expected, rel=1e-12)
    plain = [learning_rate(replace(settings, warmup_epochs=0.0), update, 8) for update in (0, 16, 31)]
    assert plain == pytest.approx([0.8, 0.4, 0.4 * (1 + math.cos(math.pi * 31 / 32))], rel=1e-12)
    assert all(0 < rate <= 0.8 for rate in rates)
    # A warm-up longer than the run never falls, and never exceeds its goal.
    assert learning_rate(replace(settings, warmup_epochs=9), 31, 8) == pytest.approx(0.8 * 32 / 73)


def test_optimisers_are_those_of_the_recipes() -> None:
    encoder, head = build_encoder(CONFIG.encoder, image_size=16), LinearHead(4, 7)
    parameters = [*encoder.parameters(), *head.parameters()]
    sgd = pretrain._optimizer(PretrainConfig("sgd", lr=0.1, weight_decay=5e-4), encoder, head)
    assert type(sgd) is torch.optim.SGD
    (group,) = sgd.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    assert len(group["params"]) == len(parameters)
    adam = pretrain._optimizer(PretrainConfig("adam", lr=1e-3, weight_decay=0.0), encoder, head)
    assert type(adam) is torch.optim.Adam
    assert (adam.defaults["betas"], adam.defaults["weight_decay"]) == ((0.9, 0.999), 0.0)
    adamw = pretrain._optimizer(PretrainConfig("adamw", weight_decay=0.05), encoder, head)
    assert type(adamw) is torch.optim.AdamW
    decayed, free = adamw.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(parameters)


def test_dropout_and_augmentation_draw_from_their_own_streams(tmp_path: Path) -> None:
    """Switching one off does not change what the other draws, nor the order of the images."""
    states = []
    for name, config in {
        "both": CONFIG,
        "no-dropout": replace(CONFIG, encoder=replace(CONFIG.encoder, dropout=0.0)),
        "no-flip": tiny.with_pretrain(flip=False, crop="none", jitter=0.0),
    }.items():
        run = tiny.pretraining(tmp_path / name, config)
        for _ in range(2):
            run._update()
        states.append(run.streams.state_dict())
    both, no_dropout, no_flip = states
    assert torch.equal(both["pretrain_order"], no_dropout["pretrain_order"])
    assert torch.equal(both["augmentation"], no_dropout["augmentation"])
    assert not torch.equal(both["dropout"], no_dropout["dropout"])
    assert torch.equal(both["dropout"], no_flip["dropout"])
    assert "augmentation" not in no_flip or not torch.equal(both["augmentation"], no_flip["augmentation"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"train": tiny.a_store("train", 0, n_images=25)}, "train.images is 168 there and 175 here"),
        ({"train": tiny.a_store("train", 0, n_classes=8)}, "train.classes is 7 there and 8 here"),
        ({"val": tiny.a_store("val", 1, n_images=23)}, "val.images is 168 there and 161 here"),
    ],
)
def test_other_data_are_no_resumption(
    changed: dict[str, Any], says: str, pretrained: Path, tmp_path: Path
) -> None:
    run = tiny.pretraining(tmp_path, tiny.with_pretrain(epochs=1))
    run.run()
    with pytest.raises(InputError, match=re.escape(says)):
        tiny.pretraining(tmp_path, tiny.with_pretrain(epochs=1), resume=True, **changed)


@pytest.mark.parametrize(
    ("stores", "says"),
    [
        (
            {"train": tiny.a_store("t", 0, size=8), "val": tiny.a_store("v", 0, size=8)},
            "8×8 pixels are too small",
        ),
        (
            {"val": tiny.a_store("validation", 1, size=20)},
            "validation: images are 20×20 pixels, those of train 16×16",
        ),
        ({"val": tiny.a_store("few", 1, n_classes=2)}, "few: 2 classes, fewer than n_way = 3"),
        (
            {"val": tiny.a_store("few", 1, n_images=4)},
            "has 4 images .*fewer than n_shot . n_query = 1 . 4 = 5",
        ),
    ],
)
def test_data_that_cannot_be_learned_from_are_named(
    stores: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        tiny.pretraining(tmp_path / "run", **stores)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_the_other_phase_is_named(meta_trained: Path) -> None:
    before = (meta_trained / "checkpoint.safetensors").read_bytes()
    meta = checkpoint.load(meta_trained / "checkpoint.safetensors")[1]
    config = Config.from_dict(meta["config"])
    with pytest.raises(InputError):
        tiny.pretraining(meta_trained, config, resume=True)
    assert (meta_trained / "checkpoint.safetensors").read_bytes() == before


def test_validation_of_the_command_is_one_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(source: str, split: str, size: int | None) -> Any:
        asked.append((source, split, size))
        return tiny.split(split)

    monkeypatch.setattr(phase, "load_split", load)
    five = replace(CONFIG, episodes=replace(CONFIG.episodes, n_shot=5))
    path = pretrain.pretrain(tiny.with_pretrain(five, epochs=1), tmp_path)
    assert load_model(path).config.episodes.n_shot == 1
    assert asked == [("tiny", "train", None), ("tiny", "val", None)]
